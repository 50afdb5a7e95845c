from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import saccade
from saccade import masks
from saccade.attention import prism
from saccade.attention.prism import (
    PrismAttention,
    claim,
    frequency_bands,
    mean_attenuation,
    prism_attend,
    prism_blocks,
    prism_sparsity,
)
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.attend import attend
from saccade.ops.rope import rotate

GOLDEN = Path(__file__).parents[1] / "golden" / "prism"
ALL = {"low_freq_threshold": 1.1, "high_freq_threshold": 1.1}
LEAST = {"low_freq_threshold": 0.0, "high_freq_threshold": 0.0}


def heads(N: int, *, H: int = 2, K: int | None = None, D: int = 16, M: int | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(N)
    K, M = K or H, M or N
    return torch.randn(2, H, N, D), torch.randn(2, K, M, D), torch.randn(2, K, M, D)


def bands(q: Tensor, k: Tensor, block_size: int, low: int, high: int) -> list[tuple[Tensor, Tensor]]:
    return prism.operator.band_scores(q, k, block_size, low, high, None, None, None)


@pytest.mark.parametrize("N", [1, 13, 64, 77])
def test_thresholds_above_one_are_dense_causal_attention(N: int) -> None:
    q, k, v = heads(N, H=4, K=2)
    out = prism_attend(q, k, v, block_size=8, **ALL)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


def test_thresholds_of_zero_keep_one_block_a_band_the_first_and_the_own() -> None:
    q, k, _ = heads(128)
    keep = prism_blocks(q, k, block_size=8, **LEAST)
    high, low = (share.argmax(-1, keepdim=True) for _, share in bands(q, k, 8, 12, 8))
    expected = torch.zeros_like(keep).scatter(-1, high, True).scatter(-1, low, True)
    assert torch.equal(prism_blocks(q, k, block_size=8, force_sink=False, force_recent=False, **LEAST), expected)
    expected[..., 0] = True
    assert torch.equal(keep, expected | torch.eye(16, dtype=torch.bool))


def test_the_map_is_causal_and_holds_the_first_and_the_own_block() -> None:
    q, k, _ = heads(100, H=4, K=2)
    keep = prism_blocks(q, k, block_size=8, low_freq_threshold=0.5, high_freq_threshold=0.4)
    assert keep.shape == (2, 4, 13, 13) and not keep.triu(1).any()
    assert keep[..., 0].all() and keep.diagonal(dim1=-2, dim2=-1).all()
    assert prism_sparsity(keep).min() > 0 and prism_sparsity(keep).max() < 1
    assert prism_sparsity(torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()).item() == 0


def test_heads_may_have_thresholds_of_their_own() -> None:
    q, k, _ = heads(64)
    taus = [0.3, 0.8]
    keep = prism_blocks(q, k, block_size=8, low_freq_threshold=taus, high_freq_threshold=torch.tensor(taus))
    for head, tau in enumerate(taus):
        alone = prism_blocks(q, k, block_size=8, low_freq_threshold=tau, high_freq_threshold=tau)
        assert keep[:, head].equal(alone[:, head])
    assert not keep[:, 0].equal(keep[:, 1])
    with pytest.raises(ValueError, match="low_freq_threshold must be one number or one per head"):
        prism_blocks(q, k, low_freq_threshold=[0.3, 0.8, 0.9])


def test_the_blocks_follow_the_definition_row_by_row() -> None:
    q, k, _ = heads(64, D=8)
    q = q * 3
    keep = prism_blocks(q, k, block_size=8, low_freq_threshold=0.6, high_freq_threshold=0.7)
    channels = {"high": [0, 1, 4, 5], "low": [1, 2, 3, 5, 6, 7]}
    for b in range(2):
        for h in range(2):
            q_means = torch.stack([x.mean(0) for x in q[b, h].split(8)])
            k_means = torch.stack([x.mean(0) for x in k[b, h].split(8)])
            chosen = torch.zeros(8, 8, dtype=torch.bool)
            for name, tau in (("high", 0.7), ("low", 0.6)):
                part = channels[name]
                t = math.sqrt(len(part) / 8)
                for means in (q_means, k_means):
                    t *= float((means[:, part] ** 2).mean().sqrt() / (means**2).mean().sqrt())
                for i in range(8):
                    scores = torch.stack([q_means[i, part] @ k_means[j, part] for j in range(i + 1)])
                    share = (scores / (math.sqrt(len(part)) * t)).softmax(0)
                    before = 0.0
                    for j in share.argsort(descending=True).tolist():
                        if before < tau:
                            chosen[i, j] = True
                        before += float(share[j])
            chosen[:, 0] = True
            chosen.fill_diagonal_(True)
            assert torch.equal(keep[b, h], chosen)


def test_bands_of_all_channels_are_plain_pooled_attention() -> None:
    q, k, _ = heads(96)
    means = [x.unflatten(2, (-1, 8)).mean(3) for x in (q, k)]
    logits = (means[0] @ means[1].mT / 4).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -math.inf)
    for t, share in bands(q, k, 8, 16, 16):
        assert torch.equal(t, torch.ones_like(t))
        torch.testing.assert_close(share, logits.softmax(-1))


def test_energies_of_disjoint_bands_sum_to_one() -> None:
    q, _, _ = heads(96)
    for low, high in ((12, 4), (8, 8), (2, 14)):
        # with k = q, t = (d / D)^(1/2) (rms_band / rms)^2
        total = sum(t * (d / 16) ** 0.5 for (t, _), d in zip(bands(q, q, 8, low, high), (high, low), strict=True))
        torch.testing.assert_close(total, torch.ones_like(total))


def test_scaling_q_or_k_leaves_the_temperature() -> None:
    q, k, _ = heads(96)
    for (t, share), (t_scaled, share_scaled) in zip(bands(q, k, 8, 12, 8), bands(3 * q, k / 2, 8, 12, 8), strict=True):
        torch.testing.assert_close(t, t_scaled)
        i = 11  # a row without a mask: logits are the logs of the shares, up to a constant
        logits, scaled = (s[:, :, i].log() - s[:, :, i].log().mean(-1, keepdim=True) for s in (share, share_scaled))
        torch.testing.assert_close(1.5 * logits, scaled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("D", "block_size"), [(16, 8), (64, 128), (10, 32)])
def test_the_mean_over_a_block_leaves_the_dirichlet_kernel(D: int, block_size: int) -> None:
    torch.manual_seed(0)
    content = torch.randn(1, D, dtype=torch.float64)
    rotated = rotate(content.expand(block_size, -1).float(), torch.arange(block_size)).double()
    pairs = torch.stack([rotated.mean(0)[: D // 2], rotated.mean(0)[D // 2 :]]).norm(dim=0)
    before = torch.stack([content[0, : D // 2], content[0, D // 2 :]]).norm(dim=0)
    torch.testing.assert_close(pairs / before, mean_attenuation(D, block_size), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("D", [2, 4, 6, 10, 16, 64, 80, 96, 128])
def test_bands_of_any_head_dim(D: int) -> None:
    high, low = frequency_bands(D)
    pairs = [{c % (D // 2) for c in band.tolist()} for band in (high, low)]
    assert [len(band) for band in (high, low)] == [2 * len(p) for p in pairs]
    assert pairs[0] | pairs[1] == set(range(D // 2)) and 0 in pairs[0] and D // 2 - 1 in pairs[1]
    if D % 8 == 0:
        assert (len(high), len(low)) == (D // 2, 3 * D // 4)
    q, k, v = heads(20, D=D)
    torch.testing.assert_close(
        prism_attend(q, k, v, block_size=4, **ALL), attend(q, k, v, mask=masks.causal()), atol=1e-5, rtol=1e-5
    )
    assert prism_blocks(q, k, block_size=4).any()


def test_a_slash_in_the_high_band_is_found_with_calibration_only() -> None:
    q, k = claim._slash_heads(1, 2048, 64, 576, torch.Generator().manual_seed(0))
    selectors = {"prism": {}, "uncalibrated": {"calibrate": False}, "plain": {"low_freq_dim": 64, "high_freq_dim": 64}}
    density, mass = {}, {}
    for name, options in selectors.items():
        keep = prism_blocks(q, k, low_freq_threshold=0.9, high_freq_threshold=0.9, **options)
        density[name], mass[name] = 1 - float(prism_sparsity(keep).mean()), claim._recall(q, k, keep, 128)
    assert mass["prism"] > 0.95 and mass["plain"] < 0.8
    assert density["prism"] < 0.7 * density["uncalibrated"] and density["uncalibrated"] > 0.7


def test_the_output_is_masked_attention_with_the_map() -> None:
    q, k, v = heads(90, H=4, K=2)
    options = {"block_size": 8, "low_freq_threshold": 0.4, "high_freq_threshold": 0.4}
    out, keep = prism_attend(q, k, v, return_map=True, **options)
    expected = attend(q, k, v, mask=masks.blocks(keep, 8) & masks.causal(), backend="reference")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert prism_sparsity(keep).mean() > 0.1


@pytest.mark.parametrize("N", [1, 8, 13, 24, 40])
def test_a_chunk_of_queries_stands_at_the_end(N: int) -> None:
    q, k, v = heads(N, H=4, K=2, M=40)
    out = prism_attend(q, k, v, block_size=8, **ALL)
    torch.testing.assert_close(out, attend(q, k, v, mask=masks.causal(40 - N)), atol=1e-5, rtol=1e-5)
    _, keep = prism_attend(q, k, v, block_size=8, return_map=True, low_freq_threshold=0.3, high_freq_threshold=0.3)
    n = keep.shape[2]
    assert n == 5 - (40 - N) // 8 and not keep.triu(6 - n).any()
    assert keep[..., 0].all() and keep[:, :, range(n), range(5 - n, 5)].all()


def test_padding_is_not_there() -> None:
    q, k, v = heads(50, H=4, K=2)
    options = {"block_size": 8, "low_freq_threshold": 0.5, "high_freq_threshold": 0.5}
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, 37:] = False
    out, keep = prism_attend(q, k, v, mask=mask, return_map=True, **options)
    alone, alone_keep = prism_attend(*(x[:1, :, :37] for x in (q, k, v)), return_map=True, **options)
    torch.testing.assert_close(out[:1, :, :37], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(keep[:1, :, :5, :5], alone_keep)
    torch.testing.assert_close(out[1:], prism_attend(*(x[1:] for x in (q, k, v)), **options), atol=1e-5, rtol=1e-5)
    mask[:] = False
    assert not prism_attend(q, k, v, mask=mask, **options).any()


def test_gradients_flow_through_the_kept_blocks() -> None:
    q, k, v = (x.double().requires_grad_() for x in heads(50))
    options = {"block_size": 8, "low_freq_threshold": 0.3, "high_freq_threshold": 0.3}
    out, keep = prism_attend(q, k, v, return_map=True, **options)
    expected = attend(q, k, v, mask=masks.blocks(keep, 8) & masks.causal(), backend="reference")
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_error_falls_as_thresholds_rise() -> None:
    q, k, v = heads(128)
    dense = attend(3 * q, k, v, mask=masks.causal())
    errors, before = [], None
    for tau in (0.1, 0.5, 0.8, 0.97):
        out, keep = prism_attend(
            3 * q, k, v, block_size=8, low_freq_threshold=tau, high_freq_threshold=tau, return_map=True
        )
        assert before is None or not (before & ~keep).any()
        before = keep
        errors.append(float((out - dense).abs().sum()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]


def test_recorded_output_from_recorded_queries() -> None:
    recorded = load_file(GOLDEN / "block_sparse_output.a.safetensors")
    q, k, v, keep = (recorded[f"input.{name}"] for name in ("q", "k", "v", "block_mask"))
    out, ours = prism_attend(q, k, v, block_size=8, low_freq_threshold=0.8, high_freq_threshold=0.8, return_map=True)
    assert torch.equal(ours, keep)
    torch.testing.assert_close(out, recorded["output.out"], atol=1e-5, rtol=1e-5)


def test_layer_takes_a_trained_layers_weights_and_decodes_densely() -> None:
    torch.manual_seed(0)
    dense = SoftmaxAttention(32, 4, causal=True, num_kv_heads=2)
    layer = PrismAttention.from_softmax(dense, block_size=8, **ALL)
    sparse = PrismAttention.from_softmax(dense, block_size=8, **LEAST)
    x = torch.randn(2, 40, 32)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)
    assert (sparse(x) - dense(x)).abs().max() > 1e-3
    cache, sparse_cache, other = layer.new_cache(2), sparse.new_cache(2), dense.new_cache(2)
    with torch.no_grad():
        for piece in x[:, :39].split([17, 13, 9], 1):
            torch.testing.assert_close(layer(piece, cache=cache), dense(piece, cache=other), atol=1e-5, rtol=1e-5)
        sparse(x[:, :39], cache=sparse_cache)
        expected = dense(x[:, 39:], cache=other)
        torch.testing.assert_close(sparse(x[:, 39:], cache=sparse_cache), expected, atol=1e-5, rtol=1e-5)


def test_in_a_transformers_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(64, (2, 40))
    real = torch.ones_like(tokens)
    real[0, :9] = 0
    with torch.no_grad():
        dense = model(tokens, attention_mask=real).logits[real.bool()]
        with saccade.switch(model, "prism", block_size=8, **ALL):
            out = model(tokens, attention_mask=real).logits[real.bool()]
            torch.testing.assert_close(out, dense, atol=1e-4, rtol=0)
        with saccade.switch(model, "prism", report=True, block_size=4, **LEAST) as report:
            sparse = model(tokens, attention_mask=real).logits[real.bool()]
            alone = model(tokens[:1, 9:]).logits[0]
            torch.testing.assert_close(sparse[:31], alone, atol=1e-4, rtol=0)
        assert 0.1 < report.density < 0.9 and (sparse - dense).abs().max() > 1e-3


def test_half_precision() -> None:
    q, k, v = heads(96)
    out = prism_attend(*(x.bfloat16() for x in (q, k, v)), block_size=8, **ALL)
    assert out.dtype == torch.bfloat16
    exact = attend(q, k, v, mask=masks.causal())
    assert (out.float() - exact).abs().sum() / exact.abs().sum() < 0.02


def test_bad_arguments() -> None:
    q, k, v = heads(32)
    for bad, message in (
        ({"causal": False}, "Prism is causal"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"low_freq_dim": 7}, r"low_freq_dim must be even, from 2 to the head_dim \(16\), got 7"),
        ({"high_freq_dim": 18}, "high_freq_dim must be even"),
        ({"low_freq_threshold": -0.1}, "low_freq_threshold must be a number of at least 0"),
        ({"high_freq_threshold": math.nan}, "high_freq_threshold must be"),
        ({"mask": masks.window(3)}, "Prism takes padding .*, got"),
        ({"mask": torch.ones(2, 31, dtype=torch.bool)}, "padding mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            prism_attend(q, k, v, **bad)
    for one, other, message in (
        (q[0], k, "4 axes"),
        (q[..., :4], k, "do not fit"),
        (heads(40)[0], k, "at most 32, got 40"),
        (heads(32, H=3)[0], k, "must divide the query heads"),
    ):
        with pytest.raises(ValueError, match=message):
            prism_attend(one, other, v)
    with pytest.raises(ValueError, match="key and value do not fit"):
        prism_attend(q, k, v[:, :, :8])
    with pytest.raises(ValueError, match="even head_dim"):
        prism_attend(*(x[..., :5] for x in (q, k, v)))
    with pytest.raises(ValueError, match="Prism is causal"):
        PrismAttention(16, 2, causal=False)
    with pytest.raises(ValueError, match="low_freq_dim"):
        PrismAttention(16, 2, low_freq_dim=3)
