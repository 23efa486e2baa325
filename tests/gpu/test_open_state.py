"""Before an engine on a GPU serves, a prompt has been read and steps are captured; neither leaves anything behind."""

from __future__ import annotations

from hnet_runtime.engine.building import open_state
from hnet_runtime.engine.config import EngineConfig
from hnet_runtime.engine.gpu_memory import MemoryPlan
from tests.gpu.steps import captured


def test_a_first_prompt_goes_through_all_stages_on_padding_and_leaves_no_trace(golden_case, monkeypatch):
    case = golden_case("b_2stage")
    model = captured(case.config, case.weights)
    honest_run, honest_open = model.run, model.open
    done = []

    def run(state, rows, pieces, num_logits):
        result = honest_run(state, rows, pieces, num_logits)
        done.append((rows, [work.stage for work in result.work if work.positions]))
        return result

    def capture(state):
        done.append([stage.positions[0] for stage in state.stages])
        return honest_open(state)

    monkeypatch.setattr(model, "run", run)
    monkeypatch.setattr(model, "open", capture)
    state, graphs = open_state(model, MemoryPlan(2, 256, 0), EngineConfig(max_model_len=32))
    assert done == [([0], [0, 1, 2]), [0, 0, 0]]
    assert graphs is not None
    rows = [tensor[1:] for stage in state.stages for tensor in stage.tensors() if len(tensor) == state.num_rows]
    assert rows
    assert not any(tensor.any() for tensor in rows)
