"""The proofs hold for a sound step, and catch every planted defect: each by the first proof that could."""

from __future__ import annotations

import pytest

from tests.gpu import toy
from tests.gpu.allow_list import NotCapturable
from tests.gpu.proofs import NotProved, prove_capturable, prove_padding, prove_replay, prove_state
from tests.gpu.toy import ToyStep

STATE = ["chunks", "memory", "positions"]

CAPTURE, STATES, REPLAY, PADDING = "on fake tensors", "of the state written", "replayed", "with padding"
PLANTED = {
    toy.HiddenSync: CAPTURE,
    toy.HiddenBool: CAPTURE,
    toy.HiddenAlgebra: CAPTURE,
    toy.CopyToHost: CAPTURE,
    toy.BooleanIndexing: CAPTURE,
    toy.BooleanAssignment: CAPTURE,
    toy.Nonzero: CAPTURE,
    toy.HostTensor: CAPTURE,
    toy.HostIndex: CAPTURE,
    toy.HostScalar: CAPTURE,
    toy.NewConstant: CAPTURE,
    toy.RandomNumbers: CAPTURE,
    toy.UndeclaredWrite: CAPTURE,
    toy.StrayState: STATES,
    toy.ForgottenState: STATES,
    toy.ReboundState: STATES,
    toy.BakedPosition: REPLAY,
    toy.BakedBranch: REPLAY,
    toy.EscapingOutput: REPLAY,
    toy.LeakThroughMean: PADDING,
    toy.LeakIntoLastRow: PADDING,
    toy.PaddingIsFirstRow: PADDING,
}


@pytest.fixture
def prove(fake_mode):
    """Each proof by its name, in order."""

    def proofs(make):
        return {
            CAPTURE: lambda: prove_capturable(make, fake_mode, 4),
            STATES: lambda: prove_state(make, 4, 4, STATE),
            REPLAY: lambda: prove_replay(make, 4, 8),
            PADDING: lambda: prove_padding(make, 4, 8, 8),
        }

    return proofs


def test_a_sound_step_passes_every_proof(prove):
    for proof in prove(ToyStep).values():
        proof()


@pytest.mark.parametrize("defect", PLANTED, ids=lambda defect: defect.__name__)
def test_every_planted_defect_is_caught(prove, defect):
    for name, proof in prove(defect).items():
        if name == PLANTED[defect]:
            with pytest.raises((NotCapturable, NotProved)):
                proof()
            return
        proof()


def test_every_defect_of_the_toy_is_planted():
    assert set(PLANTED) == set(ToyStep.__subclasses__())


@pytest.mark.parametrize("defect", [toy.ReboundState, toy.BakedPosition, toy.BakedBranch, toy.EscapingOutput])
def test_only_a_replay_shows_what_python_did_once(defect):
    with pytest.raises(NotProved, match="replayed"):
        prove_replay(defect, 4, 8)
