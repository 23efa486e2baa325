"""The oracle against the authors' recorded outputs, and its parts against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from hnet_runtime.config import AttentionConfig, Mamba2Config, ModelConfig
from hnet_runtime.model import reference
from hnet_runtime.model.reference import Reference


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


# ── against the golden cases ──────────────────────────────────────────────────────────────────


def test_prefill_gives_the_recorded_logits_and_verdicts(fp32_golden):
    model = Reference(fp32_golden.config, fp32_golden.weights)
    for prompt in fp32_golden.prompts():
        output = model.forward(prompt.ids)
        assert largest_difference(output.logits, prompt.prefill_logits) <= fp32_golden.logits_atol
        assert len(output.probabilities) == fp32_golden.config.num_routed_stages
        for s, (p, b) in enumerate(zip(output.probabilities, output.boundaries, strict=True)):
            assert largest_difference(p, prompt.probabilities[s]) <= fp32_golden.probability_atol
            assert torch.equal(b, prompt.boundaries[s])


def test_every_greedy_step_has_the_recorded_logits_and_verdicts(fp32_golden):
    model = Reference(fp32_golden.config, fp32_golden.weights)
    for prompt in fp32_golden.prompts():
        output = model.forward(prompt.fed_ids)
        assert largest_difference(output.logits, prompt.fed_logits) <= fp32_golden.logits_atol
        assert torch.equal(output.logits[len(prompt.ids) - 1 :].argmax(dim=1), prompt.decode_tokens)
        for s, (p, b) in enumerate(zip(output.probabilities, output.boundaries, strict=True)):
            assert largest_difference(p, prompt.fed_probabilities[s]) <= fp32_golden.probability_atol
            assert torch.equal(b, prompt.fed_boundaries[s])


def test_greedy_bytes_are_the_recorded_ones(fp32_golden):
    prompt = fp32_golden.prompt(1)
    found = Reference(fp32_golden.config, fp32_golden.weights).greedy(prompt.ids, 64)
    assert found == prompt.decode_tokens[:64].tolist()


def test_every_sub_network_gives_the_recorded_output(fp32_golden):
    output = Reference(fp32_golden.config, fp32_golden.weights).forward(fp32_golden.prompt(1).ids, record_hidden=True)
    recorded = fp32_golden.hidden()
    assert set(recorded) == set(output.hidden)
    for path, expected in recorded.items():
        assert largest_difference(output.hidden[path], expected) <= 2e-5, path


def test_bfloat16_stays_as_near_to_the_record_as_rounding_allows(bf16_golden):
    model = Reference(bf16_golden.config, bf16_golden.weights)
    squares, same, flips, positions, verdicts = 0.0, 0, 0, 0, 0
    for prompt in bf16_golden.prompts():
        output = model.forward(prompt.fed_ids)
        assert output.logits.dtype == torch.bfloat16
        squares += float((output.logits.float() - prompt.fed_logits).square().sum())
        same += int((output.logits.float().argmax(dim=1) == prompt.fed_logits.argmax(dim=1)).sum())
        flips += int((output.boundaries[0] != prompt.fed_boundaries[0]).sum())
        positions += len(prompt.fed_ids)
        verdicts += len(prompt.fed_boundaries[0])
        for s in range(1, bf16_golden.config.num_routed_stages):
            # stages compare position by position only where the stage below agreed
            if torch.equal(output.boundaries[s - 1], prompt.fed_boundaries[s - 1]):
                flips += int((output.boundaries[s] != prompt.fed_boundaries[s]).sum())
                verdicts += len(prompt.fed_boundaries[s])
    assert math.sqrt(squares / (positions * 256)) <= 0.5
    assert same >= 0.75 * positions
    assert flips <= 0.01 * verdicts


def test_bfloat16_ties_of_the_record_are_ties_here(bf16_golden):
    model = Reference(bf16_golden.config, bf16_golden.weights)
    ties = 0
    for prompt in bf16_golden.prompts():
        output = model.forward(prompt.fed_ids)
        tied = prompt.fed_probabilities[0] == 0.5
        ties += int(tied.sum())
        assert not output.boundaries[0][tied].any()
    assert ties > 0


def test_float32_lies_within_rounding_of_float64(fp32_golden):
    prompt = fp32_golden.prompt(2)
    single = Reference(fp32_golden.config, fp32_golden.weights).forward(prompt.fed_ids)
    double = Reference(fp32_golden.config, fp32_golden.weights, torch.float64).forward(prompt.fed_ids)
    assert double.logits.dtype == torch.float64
    assert 0 < largest_difference(single.logits, double.logits) <= fp32_golden.logits_atol
    for p_single, p_double in zip(single.probabilities, double.probabilities, strict=True):
        assert largest_difference(p_single, p_double) <= fp32_golden.probability_atol
    for b_single, b_double in zip(single.boundaries, double.boundaries, strict=True):
        assert torch.equal(b_single, b_double)


# ── on models of every layout ─────────────────────────────────────────────────────────────────


def test_no_position_sees_a_later_byte(generated, sample_ids):
    model = Reference(generated.config, generated.weights, torch.float64)
    whole = model.forward(sample_ids)
    for length in (1, 2, 40, 111):
        part = model.forward(sample_ids[:length])
        assert largest_difference(part.logits, whole.logits[:length]) <= 1e-10
        for b_part, b_whole in zip(part.boundaries, whole.boundaries, strict=True):
            assert torch.equal(b_part, b_whole[: len(b_part)])


def test_every_generated_router_opens_some_chunks_and_not_all(generated, sample_ids):
    output = Reference(generated.config, generated.weights).forward(sample_ids)
    assert len(output.boundaries) == generated.config.num_routed_stages
    positions = len(sample_ids)
    for p, b in zip(output.probabilities, output.boundaries, strict=True):
        assert len(b) == positions
        assert 0.2 <= float(b.float().mean()) <= 0.6
        assert float((p - 0.5).abs().min()) > 1e-5
        positions = int(b.sum())


def test_every_tensor_of_a_generated_model_matters(make_case):
    config, weights = make_case(5, ["m1", ["T1m1", ["T1"], "t1"], "m1"], [64, 96, 128])
    ids = torch.tensor([254, *b"every tensor matters here, or a test upon it proves nothing"])
    before = Reference(config, weights).forward(ids).logits
    for key, tensor in weights.items():
        changed = torch.ones_like(tensor) if key.endswith("norm.weight") else torch.zeros_like(tensor)
        after = Reference(config, {**weights, key: changed}).forward(ids).logits
        assert largest_difference(before, after) > 1e-2, key


def test_the_same_seed_draws_the_same_weights(make_case):
    _, once = make_case(3, ["m1", ["T1"], "m1"], [64, 96])
    _, again = make_case(3, ["m1", ["T1"], "m1"], [64, 96])
    _, other = make_case(4, ["m1", ["T1"], "m1"], [64, 96])
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not torch.equal(once["embeddings.weight"], other["embeddings.weight"])


def test_tied_embeddings_are_an_untied_head_of_the_same_values(make_named_case, sample_ids):
    case = make_named_case("tied_embeddings")
    untied = ModelConfig.from_dict({**case.config.source, "tie_embeddings": False})
    weights = {**case.weights, "lm_head.weight": case.weights["embeddings.weight"]}
    assert torch.equal(
        Reference(case.config, case.weights).forward(sample_ids).logits,
        Reference(untied, weights).forward(sample_ids).logits,
    )


def test_bfloat16_keeps_skip_and_residual_in_float32(make_case):
    config, weights = make_case(1, ["m1", ["T1"], "m1"], [64, 96], dtype=torch.bfloat16)
    model = Reference(config, weights)
    wide = {key for key, tensor in model.weights.items() if tensor.dtype == torch.float32}
    assert wide == {key for key in weights if key.endswith("mixer.D") or ".residual_proj." in key}
    assert model.dtype == torch.bfloat16


# ── parts against closed forms ────────────────────────────────────────────────────────────────


def double_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_mamba2_loop_equals_its_attention_form():
    config = Mamba2Config(d_inner=128, d_state=6, d_conv=3)
    length, width, heads, channels = 17, 40, 2, 64
    weights = {
        "mixer.in_proj.weight": double_noise(config.in_proj_width, width, seed=1) / 6,
        "mixer.conv1d.weight": double_noise(config.conv_channels, 1, 3, seed=2),
        "mixer.conv1d.bias": double_noise(config.conv_channels, seed=3),
        "mixer.dt_bias": double_noise(heads, seed=4),
        "mixer.A_log": double_noise(heads, seed=5),
        "mixer.D": double_noise(heads, seed=6),
        "mixer.norm.weight": double_noise(config.d_inner, seed=7),
        "mixer.out_proj.weight": torch.eye(config.d_inner, dtype=torch.float64),
    }
    x = double_noise(length, width, seed=8)
    found = reference.mamba2(weights, "mixer", config, x)

    z, xbc, dt = (x @ weights["mixer.in_proj.weight"].T).split([128, config.conv_channels, heads], dim=1)
    conv = functional.conv1d(
        xbc.T[None], weights["mixer.conv1d.weight"], weights["mixer.conv1d.bias"], padding=2, groups=140
    )
    u, b, c = functional.silu(conv[0, :, :length].T).split([128, 6, 6], dim=1)
    u = u.reshape(length, heads, channels)
    delta = functional.softplus(dt + weights["mixer.dt_bias"])
    log_decay = -(delta * weights["mixer.A_log"].exp()).cumsum(dim=0)  # [T, H]
    decay = torch.exp(log_decay[:, None] - log_decay[None]).masked_fill(
        torch.ones(length, length).triu(1)[..., None] > 0, 0
    )
    y = torch.einsum("tn,jn,tjh,jh,jhp->thp", c, b, decay, delta, u) + weights["mixer.D"][:, None] * u
    gated = y.reshape(length, 128) * functional.silu(z)
    expected = functional.rms_norm(gated, (128,), weights["mixer.norm.weight"], 1e-5)
    assert largest_difference(found, expected) <= 1e-10


@pytest.mark.parametrize(("window", "rotary_dim"), [(-1, 0), (-1, 6), (0, 6), (3, 14), (50, 2)])
def test_attention_equals_a_loop_over_queries(window, rotary_dim):
    heads, head_dim, length = 3, 15, 12
    width = heads * head_dim
    config = AttentionConfig(heads, head_dim, rotary_dim, window)
    weights = {
        "mixer.Wqkv.weight": double_noise(3 * width, width, seed=1) / 4,
        "mixer.out_proj.weight": torch.eye(width, dtype=torch.float64),
    }
    x = double_noise(length, width, seed=2)
    found = reference.attention(weights, "mixer", config, x)

    half = rotary_dim // 2
    q, k, v = (x @ weights["mixer.Wqkv.weight"].T).reshape(length, 3, heads, head_dim).unbind(dim=1)

    def turned(vector: torch.Tensor, position: int) -> list[float]:
        out = vector.tolist()
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / rotary_dim)
            a, b = out[i], out[i + half]
            out[i], out[i + half] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
        return out

    for t in range(length):
        keys = range(0 if window < 0 else max(0, t - window), t + 1)
        for h in range(heads):
            query = turned(q[t, h], t)
            scores = [
                sum(a * b for a, b in zip(query, turned(k[j, h], j), strict=True)) / math.sqrt(head_dim) for j in keys
            ]
            total = sum(math.exp(score) for score in scores)
            row = sum(math.exp(score) / total * v[j, h] for score, j in zip(scores, keys, strict=True))
            assert largest_difference(found[t, h * head_dim : (h + 1) * head_dim], row) <= 1e-10


def two_stage(make_case) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config, weights = make_case(2, ["m1", ["T1"], "m1"], [64, 96])
    return config, {**weights, **{key: torch.eye(64) for key in weights if ".routing_module." in key}}


def test_a_probability_of_exactly_one_half_is_no_boundary(make_case):
    config, weights = two_stage(make_case)
    axes = torch.eye(64)[:3]  # orthogonal, so every cosine is exactly 0
    p, b = reference.route(weights, config.stages[0], axes)
    assert p.tolist() == [1.0, 0.5, 0.5]
    assert b.tolist() == [True, False, False]


def test_the_router_compares_q_of_the_previous_with_k_of_the_current(make_case):
    config, weights = two_stage(make_case)
    first, second = torch.eye(64)[:2]
    weights["backbone.routing_module.k_proj_layer.weight"] = torch.outer(second, first)  # k(first) = second, else 0
    same, _ = reference.route(weights, config.stages[0], torch.stack([second, first]))
    assert same.tolist() == [1.0, 0.0]  # q(second)·k(first) = 1
    apart, _ = reference.route(weights, config.stages[0], torch.stack([first, second]))
    assert apart.tolist() == [1.0, 0.5]  # q(first)·k(second) = 0


def test_the_first_chunk_enters_the_average_scaled_and_others_hold_between_boundaries():
    z_hat = torch.tensor([[1.0, -2.0], [3.0, 5.0]], dtype=torch.float64)
    p = torch.tensor([1.0, 0.2, 0.75, 0.5], dtype=torch.float64)
    b = p > 0.5
    first = 0.9999 * z_hat[0]
    second = 0.75 * z_hat[1] + 0.25 * first
    found = reference.dechunk(z_hat, p, b)
    assert torch.allclose(found, torch.stack([first, first, second, second]), rtol=0, atol=1e-12)


def test_the_inner_network_is_entered_wide_and_left_narrow(make_case):
    config, weights = make_case(1, ["m1", ["T1"], "m1"], [64, 96])
    inner = config.stages[1]
    widened = reference.widen(weights, inner, torch.ones(5, 64))
    assert widened.shape == (5, 96)
    assert torch.equal(widened[3, 64:], weights["backbone.main_network.pad_dimension"])
    output = Reference(config, weights).forward(torch.arange(9), record_hidden=True)
    chunks = int(output.boundaries[0].sum())
    assert output.hidden["backbone.main_network.main_network"].shape == (chunks, 96)
    assert output.hidden["backbone.main_network(out)"].shape == (chunks, 64)


# ── decoding, and what bad input gets ─────────────────────────────────────────────────────────


def test_greedy_ties_go_to_the_lowest_byte(make_case):
    config, weights = make_case(1, ["m1"], [64])
    flat = {**weights, "lm_head.weight": torch.zeros(256, 64)}
    assert Reference(config, flat).greedy([254], 3) == [0, 0, 0]
    pair = flat["lm_head.weight"].clone()
    pair[[9, 77]] = weights["lm_head.weight"][9]
    sign = Reference(config, {**flat, "lm_head.weight": pair}).forward(torch.tensor([254])).logits[0, 9].sign()
    assert Reference(config, {**flat, "lm_head.weight": sign * pair}).greedy([254], 1) == [9]


def test_hidden_outputs_are_recorded_only_on_request(make_case):
    config, weights = make_case(1, ["m1"], [64])
    assert Reference(config, weights).forward(torch.tensor([254])).hidden == {}


def test_a_missing_tensor_is_named(make_case):
    config, weights = make_case(1, ["m1"], [64])
    del weights["backbone.main_network.layers.0.mixer.D"]
    with pytest.raises(ValueError, match=r"missing tensor backbone\.main_network\.layers\.0\.mixer\.D"):
        Reference(config, weights)


def test_a_tensor_of_the_wrong_shape_is_named(make_case):
    config, weights = make_case(1, ["m1"], [64])
    weights["lm_head.weight"] = torch.zeros(255, 64)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(255, 64\), not \(256, 64\)"):
        Reference(config, weights)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "non-empty"),
        (torch.zeros(1, 3, dtype=torch.int64), "non-empty vector"),
        (torch.tensor([254, 256]), "0–255"),
        (torch.tensor([-1]), "0–255"),
    ],
)
def test_ids_that_are_not_a_sequence_of_bytes_are_refused(make_case, ids, message):
    config, weights = make_case(1, ["m1"], [64])
    with pytest.raises(ValueError, match=message):
        Reference(config, weights).forward(ids)
