from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import masks
from saccade.attention.spargeattn import (
    SpargeAttention,
    SpargeThresholds,
    calibrate_spargeattn,
    self_similarity,
    sparge_block_map,
    sparge_sparsity,
    spargeattn_attend,
)
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.attend import attend
from saccade.ops.hilbert import hilbert_order

SMALL = {"block_q": 16, "block_k": 8}


def heads(N: int, *, H: int = 2, K: int | None = None, D: int = 8, M: int | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(N)
    K, M = K or H, M or N
    return torch.randn(2, H, N, D), torch.randn(2, K, M, D), torch.randn(2, K, M, D)


def structured(N: int = 512, *, H: int = 2, D: int = 32, noise: float = 0.3) -> tuple[Tensor, ...]:
    """Four topics with their own direction and value, a new one every 16 tokens, and noise."""
    torch.manual_seed(N)
    key, value = 2 * torch.randn(H, 4, D), torch.randn(H, 4, D)
    q_topic, k_topic = (torch.randint(4, (N // 16,)).repeat_interleave(16) for _ in range(2))
    clean = key[None, :, q_topic], key[None, :, k_topic], value[None, :, k_topic]
    return tuple(x + noise * torch.randn_like(x) for x in clean)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"similarity_threshold": 1.0}, {"top_k": 1.0}])
def test_keeping_everything_is_dense_attention(causal: bool, options: dict[str, float]) -> None:
    q, k, v = heads(77, H=4, K=2)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    for more in ({}, {"pv_threshold": math.inf}, {"smooth_k": False}):
        out = spargeattn_attend(q, k, v, causal=causal, **SMALL, **options, **more)
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


def test_the_map_follows_the_definition_block_by_block() -> None:
    q, k, _ = structured(160)
    theta, tau = 0.5, 0.7
    keep = sparge_block_map(q, k, similarity_threshold=theta, cdf_threshold=tau, **SMALL)
    for h in range(2):
        q_blocks, k_blocks = q[0, h].split(16), k[0, h].split(8)

        def similar(block: Tensor) -> bool:
            unit = block / block.norm(dim=-1, keepdim=True)
            return bool((unit @ unit.mT).mean() > theta)

        for i, q_block in enumerate(q_blocks):
            scores = torch.tensor(
                [float(q_block.mean(0) @ b.mean(0)) / 32**0.5 if similar(b) else -math.inf for b in k_blocks]
            )
            share = scores.softmax(0)
            expected, total, any_yet = [False] * len(k_blocks), 0.0, False
            for j in share.argsort(descending=True).tolist():
                total += float(share[j])
                if total <= tau or not any_yet:
                    expected[j] = any_yet = True
                if total > tau:
                    break
            for j, block in enumerate(k_blocks):
                expected[j] = expected[j] or not similar(block) or not similar(q_block)
            assert keep[0, h, i].tolist() == expected


def test_theta_minus_one_keeps_exactly_the_counted_blocks() -> None:
    q, k, _ = heads(128)
    for share, count in ((0.0, 1), (0.3, 4), (0.5, 8), (1.0, 16)):
        keep = sparge_block_map(q, k, similarity_threshold=-1.0, top_k=share, **SMALL)
        assert (keep.sum(-1) == count).all()
    everything = sparge_block_map(q, k, similarity_threshold=-1.0, cdf_threshold=1.0, **SMALL)
    assert (everything.sum(-1) >= 15).all()
    assert (sparge_block_map(q, k, similarity_threshold=-1.0, cdf_threshold=0.0, **SMALL).sum(-1) == 1).all()


def test_thresholds_per_head() -> None:
    q, k, _ = heads(128)
    keep = sparge_block_map(q, k, similarity_threshold=[-1.0, 1.0], cdf_threshold=torch.tensor([0.5, 0.5]), **SMALL)
    assert keep[:, 1].all() and not keep[:, 0].all()


def test_causal_map_and_the_sink() -> None:
    q, k, _ = heads(100)
    keep = sparge_block_map(q, k, causal=True, similarity_threshold=-1.0, top_k=0.2, **SMALL)
    visible = torch.arange(13) * 8 < (torch.arange(7)[:, None] + 1) * 16
    assert not (keep & ~visible).any()
    sink = sparge_block_map(q, k, causal=True, similarity_threshold=-1.0, top_k=0.2, attention_sink=True, **SMALL)
    assert sink[..., 0].all() and torch.equal(sink[..., 1:], keep[..., 1:])
    dense = sparge_block_map(q, k, causal=True, similarity_threshold=1.0, **SMALL)
    assert torch.equal(dense, visible.expand_as(dense))
    assert sparge_sparsity(dense, causal=True, **SMALL).abs().max() < 1e-6


def test_the_output_is_masked_attention_with_the_map() -> None:
    for causal in (False, True):
        q, k, v = heads(90, H=4, K=2)
        out, keep = spargeattn_attend(
            q, k, v, causal=causal, similarity_threshold=-1.0, top_k=0.3, return_map=True, **SMALL
        )
        mask = masks.blocks(keep, (16, 8))
        expected = attend(q, k, v, mask=mask & masks.causal() if causal else mask, backend="reference")
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert 0.3 < sparge_sparsity(keep, causal=causal, **SMALL).mean() < 0.9


def test_no_causal_row_is_left_without_keys() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        q, k, v = torch.randn(3, 1, 2, 128, 8)
        out, keep = spargeattn_attend(
            q, k, v, causal=True, similarity_threshold=-1.0, top_k=0.0, return_map=True, **SMALL
        )
        allowed = (masks.blocks(keep, (16, 8)) & masks.causal()).dense(128, 128)
        assert allowed.any(-1).all() and out.abs().amax(-1).min() > 0


def test_stage_two() -> None:
    q, k, v = structured()
    options = {"cdf_threshold": 0.9, **SMALL}
    one_stage = spargeattn_attend(q, k, v, **options)
    for rows in (16, 8):
        same = spargeattn_attend(q, k, v, pv_threshold=math.inf, pv_rows=rows, **options)
        torch.testing.assert_close(same, one_stage, atol=1e-5, rtol=1e-5)
    skipping, authors = (
        (spargeattn_attend(q, k, v, pv_threshold=t, **options) - one_stage).abs().sum() / one_stage.abs().sum()
        for t in (0.0, 50.0)
    )
    assert 1e-4 < skipping < 0.5 and authors < 1e-5


def test_stage_two_at_zero_uses_the_blocks_that_raise_a_maximum() -> None:
    q, k, v = heads(16)
    q = q[:, :, :1].expand(-1, -1, 16, -1)  # all rows alike: a group decides as its rows do
    out = spargeattn_attend(
        q, k, v, similarity_threshold=1.0, pv_threshold=0.0, block_q=16, block_k=1, pv_rows=16, smooth_k=False
    )
    scores = (q[:, :, :1] @ k.mT)[:, :, 0] / 8**0.5
    records = scores >= scores.cummax(-1).values
    weights = scores.masked_fill(~records, -math.inf).softmax(-1)
    torch.testing.assert_close(out[:, :, 0], (weights[:, :, None] @ v)[:, :, 0], atol=1e-5, rtol=1e-5)


def test_smoothing_changes_nothing_but_the_choice() -> None:
    q, k, v = heads(64)
    k = k + 5
    similar = [self_similarity(x, 8).mean() for x in (k, k - k.mean(2, keepdim=True))]
    assert similar[0] > 0.9 and similar[1] < 0.5
    outs = [spargeattn_attend(q, k, v, similarity_threshold=1.0, smooth_k=smooth, **SMALL) for smooth in (True, False)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_self_similarity() -> None:
    torch.manual_seed(0)
    row = torch.randn(1, 1, 1, 16)
    same, opposite = row.expand(1, 1, 32, 16), torch.cat([row, -row], 2).repeat(1, 1, 16, 1)
    torch.testing.assert_close(self_similarity(same, 16), torch.ones(1, 1, 2))
    torch.testing.assert_close(self_similarity(opposite, 16), torch.zeros(1, 1, 2))
    noise = self_similarity(torch.randn(4, 4, 640, 64), 64).mean()
    assert abs(noise - 1 / 64) < 0.003
    x = torch.randn(1, 1, 21, 4)
    unit = F.normalize(x[0, 0, 16:], dim=-1)
    torch.testing.assert_close(self_similarity(x, 8)[0, 0, 2], (unit @ unit.mT).mean())


def test_a_short_block_is_measured_or_kept() -> None:
    q, k, _ = structured(160)
    q, k = q[:, :, :156], k[:, :, :156]
    options = {"similarity_threshold": 0.3, "cdf_threshold": 0.3, **SMALL}
    measured, kept = (sparge_block_map(q, k, short_blocks=how, **options) for how in ("measure", "keep"))
    assert not measured[..., -1].all() and not measured[..., -1, :].all()
    assert kept[..., -1].all() and kept[..., -1, :].all()


def test_error_falls_as_tau_rises() -> None:
    q, k, v = structured()
    dense = attend(q, k, v)
    errors = [
        float((spargeattn_attend(q, k, v, cdf_threshold=tau, **SMALL) - dense).abs().sum()) for tau in (0.2, 0.6, 0.95)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_noise_is_left_dense_and_structure_is_not() -> None:
    q, k, v = structured()
    out, keep = spargeattn_attend(q, k, v, cdf_threshold=0.9, return_map=True, **SMALL)
    dense = attend(q, k, v)
    assert sparge_sparsity(keep).mean() > 0.5
    assert (out - dense).abs().sum() / dense.abs().sum() < 0.1
    q, k, v = heads(256, D=32)
    assert sparge_block_map(q, k, cdf_threshold=0.9, **SMALL).all()


@pytest.mark.parametrize("causal", [False, True])
def test_int8_is_close(causal: bool) -> None:
    q, k, v = structured()
    options = {"causal": causal, "cdf_threshold": 0.9, **SMALL}
    exact, rounded = (spargeattn_attend(q, k, v, quantize=quantize, **options) for quantize in (False, True))
    error = (rounded - exact).abs().sum() / exact.abs().sum()
    assert 0 < error < 0.05


def test_fewer_queries_than_keys_under_a_causal_mask_are_dense() -> None:
    q, k, v = heads(3, M=40)
    out, keep = spargeattn_attend(q, k, v, causal=True, top_k=0.1, return_map=True, **SMALL)
    torch.testing.assert_close(out, attend(q, k, v, mask=masks.causal(37)))
    assert keep.all()


def test_gradients_flow_through_the_kept_blocks() -> None:
    q, k, v = (x.double().requires_grad_() for x in heads(50))
    options = {"similarity_threshold": -1.0, "top_k": 0.3, **SMALL}
    out, keep = spargeattn_attend(q, k, v, return_map=True, **options)
    expected = attend(q, k, v, mask=masks.blocks(keep, (16, 8)), backend="reference")
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_calibration(tmp_path: Path) -> None:
    q, k, v = structured(128)
    noise = torch.randn(1, 1, 128, 32)
    # the second head is noise: nothing can be left out there
    q, k = (torch.cat([x[:, :1], noise + 0.1 * i], 1) for i, x in enumerate((q, k)))
    found = calibrate_spargeattn([(q, k, v)], l1=0.05, pv_l1=0.08, **SMALL)
    assert found.sparsity[0] > 0.3
    out, keep = spargeattn_attend(q, k, v, return_map=True, pv_rows=16, **found.options(), **SMALL)
    dense = attend(q, k, v)
    error = (out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    assert error[0] < 0.08
    if found.sparsity[1] <= 0.1:
        assert found.similarity[1] == found.cdf[1] == 1.0 and keep[:, 1].all()
    found.save(tmp_path / "thresholds.json")
    assert SpargeThresholds.load(tmp_path / "thresholds.json") == found
    (tmp_path / "thresholds.json").write_text('{"similarity": [1]}')
    with pytest.raises(ValueError, match="holds no SpargeAttn thresholds"):
        SpargeThresholds.load(tmp_path / "thresholds.json")
    layer = SpargeAttention(64, 2, thresholds=found, **SMALL)
    assert layer(torch.randn(1, 128, 64)).isfinite().all()


def test_hilbert_order() -> None:
    for size in ((8, 8, 8), (4, 16, 16), (3, 5, 7), (1, 1, 9), (6,)):
        order = hilbert_order(size)
        assert torch.equal(order.sort().values, torch.arange(math.prod(size)))
        assert torch.equal(order[order.argsort()], torch.arange(math.prod(size)))
    steps = torch.stack(torch.unravel_index(hilbert_order((8, 8, 8)), (8, 8, 8)), -1).diff(dim=0)
    assert (steps.abs().sum(-1) == 1).all()
    order = hilbert_order((2, 2, 2), before=3, after=2)
    assert order[:3].tolist() == [0, 1, 2] and order[-2:].tolist() == [11, 12]
    assert torch.equal(order.sort().values, torch.arange(13))


def test_hilbert_order_raises_self_similarity_and_is_lossless() -> None:
    torch.manual_seed(0)
    field = F.interpolate(torch.randn(1, 16, 3, 3, 3), size=(8, 16, 16), mode="trilinear", align_corners=True)
    x = field.flatten(2).mT[:, None]
    order = hilbert_order((8, 16, 16))
    assert self_similarity(x[:, :, order], 64).mean() > self_similarity(x, 64).mean() + 0.02
    q, k, v = (x + 0.1 * torch.randn_like(x) for _ in range(3))
    curved = attend(*(t[:, :, order] for t in (q, k, v)))
    torch.testing.assert_close(curved[:, :, order.argsort()], attend(q, k, v), atol=1e-5, rtol=1e-5)


def test_layer_takes_a_trained_layers_weights() -> None:
    torch.manual_seed(0)
    dense = SoftmaxAttention(32, 4, causal=True, num_kv_heads=2)
    layer = SpargeAttention(32, 4, causal=True, num_kv_heads=2, similarity_threshold=1.0, **SMALL)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(2, 40, 32)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)
    cache, other = layer.new_cache(2), dense.new_cache(2)
    with torch.no_grad():
        for piece in x.split([30, 9, 1], 1):
            torch.testing.assert_close(layer(piece, cache=cache), dense(piece, cache=other), atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    q, k, v = structured()
    out = spargeattn_attend(*(x.bfloat16() for x in (q, k, v)), cdf_threshold=0.9, **SMALL)
    assert out.dtype == torch.bfloat16
    exact = spargeattn_attend(q, k, v, cdf_threshold=0.9, **SMALL)
    assert (out.float() - exact).abs().sum() / exact.abs().sum() < 0.05


def test_bad_arguments() -> None:
    q, k, v = heads(32)
    for bad, message in (
        ({"top_k": 1.5}, "top_k must be a number from 0 to 1"),
        ({"top_k": 0.5, "cdf_threshold": 0.9}, "either cdf_threshold or top_k"),
        ({"cdf_threshold": [0.1, 0.2, 0.3]}, "one per head"),
        ({"similarity_threshold": float("nan")}, "similarity_threshold must be a number"),
        ({"block_q": 0}, "at least 1"),
        ({"pv_threshold": -1.0}, "pv_threshold must be a number of at least 0"),
        ({"pv_threshold": 1.0, "pv_rows": 24}, "pv_rows must divide"),
        ({"short_blocks": "drop"}, "short_blocks must be"),
    ):
        with pytest.raises(ValueError, match=message):
            spargeattn_attend(q, k, v, **bad)
    with pytest.raises(ValueError, match="do not fit"):
        spargeattn_attend(q, k[..., :4], v)
    with pytest.raises(ValueError, match="4 axes"):
        spargeattn_attend(q[0], k, v)
    with pytest.raises(ValueError, match="has no gradient"):
        spargeattn_attend(q.requires_grad_(), k, v, quantize=True)
    with pytest.raises(ValueError, match="at most 32, got 40"):
        spargeattn_attend(heads(40)[0], k, v, causal=True)
    with pytest.raises(ValueError, match="takes causality as its mask, got padding"):
        SpargeAttention(16, 2)(torch.randn(1, 5, 16), mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="top_k must be"):
        SpargeAttention(16, 2, top_k=2.0)
    with pytest.raises(ValueError, match="take the place of cdf_threshold"):
        SpargeAttention(16, 1, thresholds=SpargeThresholds((1.0,), (1.0,), (1.0,), (0.0,)), cdf_threshold=0.5)
    with pytest.raises(ValueError, match="at least one input"):
        calibrate_spargeattn([])
    with pytest.raises(ValueError, match="l1 < pv_l1"):
        calibrate_spargeattn([(q, k, v)], l1=0.1, pv_l1=0.05)
    with pytest.raises(ValueError, match="positive on every axis"):
        hilbert_order((2, 0))
