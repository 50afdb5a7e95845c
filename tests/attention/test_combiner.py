from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import masks
from saccade.attention.combiner import Combiner, CombinerLayer, combiner_attend
from saccade.layers.softmax_attention import SoftmaxAttention

VARIANTS = ("fixed", "logn", "rowmajor", "mixture")


def heads(B: int, H: int, N: int, D: int, *, K: int | None = None) -> list[Tensor]:
    torch.manual_seed(B + 10 * H + 100 * N)
    shapes = (B, H, N, D), (B, K or H, N, D), (B, K or H, N, D)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def weights(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """p(j|i), (B, H, N, N)."""
    N = q.shape[2]
    return combiner_attend(q, k, torch.eye(N, dtype=q.dtype).expand(*q.shape[:2], -1, -1), **options)


def pooled(x: Tensor, kind: str) -> Tensor:
    return x.amax(0) if kind == "max" else x.mean(0) if kind == "mean" else x.sum(0)


def spans_of(i: int, N: int, variant: str, s: int, causal: bool) -> tuple[list[int], list[list[int]]]:
    """The direct tokens of i and its spans, as the paper lists them; "rowmajor" is no list of pooled spans."""
    a, b = divmod(i, s)
    rows = [[t for t in range(r * s, (r + 1) * s) if t < N] for r in range(-(-N // s))]
    columns = [[t for t in range(c, N, s)] for c in range(s)]
    if variant == "fixed":
        return [t for t in rows[a] if t <= i or not causal], rows[:a] if causal else rows
    if variant == "logn":
        blocks = []
        for level in range(20):
            block = i >> level
            if block % 2:
                blocks.append(list(range((block - 1) << level, block << level)))
        return [i], blocks
    if causal:
        direct = [t for t in columns[b] if t < i] + [t for t in rows[a] if t <= i]
        found = [[t for t in columns[c] if t < a * s] for c in range(s) if c != b]
        for row in rows[:a]:
            found += [row[:b], row[b + 1 :]]
        return direct, [span for span in found if span]
    direct = rows[a] + columns[b]
    found = []
    for c in range(s):
        found += [[t for t in columns[c] if t < a * s], [t for t in columns[c] if t >= (a + 1) * s]]
    for row in rows:
        found += [row[:b], row[b + 1 :]]
    return direct, [span for span in found if span]


def definition(q: Tensor, k: Tensor, v: Tensor, variant: str, s: int, causal: bool = True, kind: str = "max") -> Tensor:
    """Token by token, for one head (N, D)."""
    N, D = q.shape
    q = q / math.sqrt(D)
    out = []
    for i in range(N):
        direct, spans = spans_of(i, N, variant, s, causal)
        keys, values = [k[j] for j in direct], [v[j] for j in direct]
        for span in spans:
            inside = (k[span] @ pooled(q[span], kind)).softmax(0)
            keys.append(pooled(k[span], kind))
            values.append(inside @ v[span])
        out.append((torch.stack(keys) @ q[i]).softmax(0) @ torch.stack(values))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["max", "mean", "sum"])
@pytest.mark.parametrize(
    ("variant", "causal"),
    [("fixed", True), ("fixed", False), ("logn", True), ("mixture", True), ("mixture", False)],
)
def test_output_and_gradients_are_the_definitions(variant: str, causal: bool, kind: str) -> None:
    q, k, v = heads(1, 1, 14, 4)
    out = combiner_attend(q, k, v, variant=variant, segment=4, causal=causal, pooling=kind)
    expected = definition(q[0, 0], k[0, 0], v[0, 0], variant, 4, causal, kind)[None, None]
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rowmajor_is_its_definition() -> None:
    q, k, v = (x[0, 0] for x in heads(1, 1, 14, 4))
    mix = torch.randn(4, 4, dtype=torch.float64)
    out = combiner_attend(
        *(x[None, None] for x in (q, k, v)), variant="rowmajor", segment=4, row_keys=lambda o: o @ mix
    )
    scaled, rows = q / 2, [list(range(r, min(r + 4, 14))) for r in range(0, 14, 4)]
    row_out = torch.cat([(scaled[row] @ k[row].T).softmax(-1) @ v[row] for row in rows])
    for i in range(14):
        direct = list(range(i // 4 * 4, i + 1))
        above = list(range(i % 4, i // 4 * 4, 4))
        p = (torch.cat([k[direct], row_out[above] @ mix]) @ scaled[i]).softmax(0)
        torch.testing.assert_close(out[0, 0, i], p @ torch.cat([v[direct], row_out[above]]))


@pytest.mark.parametrize("N", [1, 2, 23])
def test_one_segment_and_segments_of_one_token_are_dense(N: int) -> None:
    q, k, v = heads(2, 4, N, 8, K=2)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for segment in (1, N, N + 5):
        torch.testing.assert_close(combiner_attend(q, k, v, segment=segment), dense)
    full = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    for segment in (1, N):
        torch.testing.assert_close(combiner_attend(q, k, v, segment=segment, causal=False, own_span=False), full)
    if N <= 2:
        torch.testing.assert_close(combiner_attend(q, k, v, variant="logn"), dense)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("N", [1, 5, 17, 32, 33])
def test_weights_are_a_distribution_over_the_past(variant: str, N: int) -> None:
    q, k, _ = heads(1, 2, N, 8)
    p = weights(q, k, variant=variant, segment=4)
    past = torch.ones(N, N, dtype=torch.bool).tril()
    assert (p[..., past] > 0).all() and not p[..., ~past].any()
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, N, dtype=p.dtype))


@pytest.mark.parametrize("variant", ["fixed", "mixture"])
def test_bidirectional_weights_are_a_distribution(variant: str) -> None:
    q, k, _ = heads(1, 2, 14, 8)
    p = weights(q, k, variant=variant, segment=4, causal=False)
    assert (p > 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, 14, dtype=p.dtype))


def test_how_often_a_token_is_covered() -> None:
    for i in range(20):
        for variant, times in (("fixed", 1), ("logn", 1), ("mixture", 2)):
            direct, spans = spans_of(i, 20, variant, 4, True)
            covered = torch.zeros(20, dtype=torch.long)
            for span in [direct, *spans]:
                covered[span] += 1
            once = torch.zeros(20, dtype=torch.bool)
            once[direct] = True
            assert (covered[: i + 1][once[: i + 1]] == 1).all() and not covered[i + 1 :].any()
            assert (covered[: i + 1][~once[: i + 1]] == times).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_past_is_unchanged_by_the_future(variant: str) -> None:
    q, k, v = heads(1, 2, 30, 8)
    changed = [torch.cat([x[:, :, :13], torch.randn_like(x[:, :, 13:])], 2) for x in (q, k, v)]
    ours, theirs = (combiner_attend(*x, variant=variant, segment=4)[:, :, :13] for x in ((q, k, v), changed))
    # rowmajor and mixture read whole rows, but only earlier ones
    torch.testing.assert_close(ours, theirs)


def test_a_span_of_equal_keys_weighs_like_one_token() -> None:
    q, k, v = heads(1, 1, 12, 8)
    k = torch.cat([k[:, :, :1].expand(-1, -1, 4, -1), k[:, :, 4:]], 2)
    out = combiner_attend(q, k, v, segment=4)[0, 0, 5]
    keys, values = torch.cat([k[0, 0, :1], k[0, 0, 4:6]]), torch.cat([v[0, 0, :4].mean(0, True), v[0, 0, 4:6]])
    torch.testing.assert_close(out, (keys @ q[0, 0, 5] / math.sqrt(8)).softmax(0) @ values)


def test_permuting_a_past_segment_changes_nothing_later() -> None:
    q, k, v = heads(1, 2, 16, 8)
    order = torch.tensor([2, 0, 3, 1, *range(4, 16)])
    out = combiner_attend(q, k, v, segment=4)
    moved = combiner_attend(*(x[:, :, order] for x in (q, k, v)), segment=4)
    torch.testing.assert_close(moved[:, :, 4:], out[:, :, 4:])


@pytest.mark.parametrize(
    ("variant", "causal"),
    [("fixed", True), ("fixed", False), ("logn", True), ("rowmajor", True), ("mixture", True), ("mixture", False)],
)
@pytest.mark.parametrize("kind", ["max", "mean"])
def test_padding_counts_for_nothing(variant: str, causal: bool, kind: str) -> None:
    q, k, v = (x.detach() for x in heads(3, 2, 22, 8))
    real = torch.ones(3, 22, dtype=torch.bool)
    real[0, 15:], real[1, :9], real[2] = False, False, False
    options: dict[str, Any] = {"variant": variant, "segment": 4, "causal": causal, "pooling": kind}
    out = combiner_attend(q, k, v, mask=real, **options)
    other = [torch.where(real[:, None, :, None], x, math.nan) for x in (q, k, v)]
    for mask in (real, masks.padding(real), real[:, None, None]):
        torch.testing.assert_close(combiner_attend(*other, mask=mask, **options), out)
    assert not out[~real[:, None].expand(-1, 2, -1)].any()
    torch.testing.assert_close(out[:1, :, :15], combiner_attend(*(x[:1, :, :15] for x in (q, k, v)), **options))
    p = weights(q[1:2], k[1:2], mask=real[1:2], **options)[:, :, 9:]
    assert not p[..., :9].any()
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, 13, dtype=p.dtype))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    combiner_attend(*leaves, mask=real, **options).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("pooling", ["max", "mean", "relu-sum", "deepset-mean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_the_parallel_form(variant: str, pooling: str) -> None:
    torch.manual_seed(0)
    layer = Combiner(16, 2, variant=variant, segment=4, pooling=pooling, rope=True).eval()
    x = torch.randn(2, 27, 16)
    with torch.no_grad():
        expected = layer(x)
        for prompt in (1, 4, 11):
            cache = layer.new_cache(2)
            pieces = [layer(x[:, :prompt], cache=cache)]
            pieces += [layer(x[:, t : t + 1], cache=cache) for t in range(prompt, 20)] + [layer(x[:, 20:], cache=cache)]
            torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-5)
            assert cache.length == 27


def test_the_cache_of_the_fixed_form_is_small() -> None:
    layer = Combiner(16, 2, segment=8).eval()
    cache = layer.new_cache(1)
    with torch.no_grad():
        layer(torch.randn(1, 67, 16), cache=cache)
    # 8 spans, and q, k, v, x of 3 tokens
    assert cache.nbytes == 4 * 16 * (8 * 2 + 3 * 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_given_values_are_mixed_with_the_layers_weights(variant: str) -> None:
    torch.manual_seed(0)
    layer = Combiner(16, 2, variant=variant, segment=4).double()
    x = torch.randn(1, 19, 16, dtype=torch.float64)
    p = layer.mix(x, torch.eye(19, dtype=torch.float64).expand(1, 2, -1, -1))
    v = layer.v_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(layer.out_proj((p @ v).transpose(1, 2).flatten(2)), layer(x))


def test_layer_starts_as_a_softmax_layer_in_the_limit() -> None:
    torch.manual_seed(0)
    dense = SoftmaxAttention(16, 2, causal=True, rope=False)
    x = torch.randn(2, 21, 16)
    for segment in (1, 21):
        layer = Combiner.from_softmax(dense, segment=segment)
        torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)


def test_layer_of_the_paper() -> None:
    torch.manual_seed(0)
    layer = CombinerLayer(16, 2, segment=4).eval()
    x = torch.randn(2, 13, 16)
    middle = x + layer.attention(layer.norm1(x))
    torch.testing.assert_close(layer(x), middle + layer.mlp(layer.norm2(middle)))


def test_bad_arguments() -> None:
    q, k, v = heads(1, 2, 16, 8)
    for bad, message in (
        ({"variant": "axial"}, "variant must be one of"),
        ({"variant": "logn", "causal": False}, "causal only, got causal=False"),
        ({"segment": 0}, "segment must be at least 1, got 0"),
        ({"pooling": "min"}, "pooling must be 'max', 'mean' or 'sum'"),
        ({"pooling": "deepset-max"}, "a transform belongs to"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"mask": masks.causal(), "causal": False}, r"takes padding .* as its mask, got causality"),
        ({"mask": torch.ones(1, 9, dtype=torch.bool)}, "mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            combiner_attend(q, k, v, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit"):
        combiner_attend(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ValueError, match="no cross-attention"):
        Combiner(16, 2)(torch.randn(1, 4, 16), torch.randn(1, 4, 16))
    with pytest.raises(ValueError, match="decoding needs a fixed segment"):
        Combiner(16, 2).new_cache(1)
