from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade
from saccade import masks
from saccade.attention.rectified_spaattn import (
    RectifiedBlocks,
    RectifiedSpaAttention,
    rectified_map,
    rectified_spaattn_attend,
)
from saccade.ops.attend import attend
from saccade.ops.hilbert import gilbert_order, neighbor_blocks

SMALL = {"block_q": 16, "block_k": 16}
PLAIN = {"ipar": False, "gapr": False}


def heads(N: int = 96, text: int = 0, *, H: int = 2, K: int | None = None, D: int = 8) -> tuple[Tensor, ...]:
    torch.manual_seed(N + text)
    return tuple(torch.randn(2, n, N + text, D) for n in (H, K or H, K or H))


def constant_blocks(N: int, size: int, *, D: int = 8) -> Tensor:
    return torch.randn(2, 2, -(-N // size), D).repeat_interleave(size, 2)[:, :, :N]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def by_hand(q: Tensor, k: Tensor, v: Tensor, size: int, top_k: int, p: float, text: int = 0) -> Tensor:
    """The equations, block after block, for one head."""
    V, D = q.shape[0] - text, q.shape[1]
    blocks = [range(i, min(i + size, V)) for i in range(0, V, size)]
    qs, ks, vs = ([F.pad(x[list(b)], (0, 0, 0, size - len(b))) for b in blocks] for x in (q, k, v))
    out = torch.zeros_like(v)
    for i, rows in enumerate(blocks):
        mean = qs[i].mean(0)
        product = torch.stack([mean @ other.mean(0) for other in ks])
        weight = torch.cat([size * (product * D**-0.5).exp(), (k[V:] @ mean * D**-0.5).exp()])
        weight = weight / weight.sum()
        share = torch.cat([weight[: len(blocks)], weight[len(blocks) :].sum()[None]] if text else [weight])
        order = share.argsort(descending=True)
        count = max(int((share[order].cumsum(0) <= p).sum()) + 1, top_k)
        critical = set(order[:count].tolist()) - {len(blocks)}
        keys = [t for j in sorted(critical) for t in blocks[j]] + list(range(V, V + text))
        sparse = torch.softmax(q[list(rows)] @ k[keys].mT * D**-0.5, -1) @ v[keys]
        factor, pooled = share[len(blocks)] if text else torch.tensor(0.0), torch.zeros(v.shape[1])
        for j in range(len(blocks)):
            error_q = (qs[i] - mean).abs().mean(0) @ ks[j].mean(0)
            error_k = mean @ (ks[j] - ks[j].mean(0)).abs().mean(0)
            if j in critical or product[j].abs() <= error_q.abs() + error_k.abs():
                factor = factor + share[j]
            else:
                pooled = pooled + share[j] * vs[j].mean(0)
        out[list(rows)] = factor * sparse + pooled
    if text:
        out[V:] = torch.softmax(q[V:] @ k.mT * D**-0.5, -1) @ v
    return out


@pytest.mark.parametrize("N", [16, 96, 101])
@pytest.mark.parametrize("text", [0, 11])
def test_the_equations(N: int, text: int) -> None:
    q, k, v = (x + constant_blocks(N + text, 16) for x in heads(N, text))
    out = rectified_spaattn_attend(q, k, v, text_tokens=text, top_k=2, cdf_threshold=0.4, **SMALL)
    expected = torch.stack([torch.stack([by_hand(*x, 16, 2, 0.4, text) for x in zip(*y)]) for y in zip(q, k, v)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    found = rectified_map(q, k, text_tokens=text, top_k=2, cdf_threshold=0.4, **SMALL)
    if N > 16:  # both sides of every rule are met
        assert 0 < found.gains_BHnm.float().mean() < 1 and 0 < found.kept().float().mean() < 1


@pytest.mark.parametrize("N", [1, 13, 96, 101])
@pytest.mark.parametrize("text", [0, 5, 32])
@pytest.mark.parametrize("tail", ["zeros", "real"])
def test_all_blocks_are_dense_attention(N: int, text: int, tail: str) -> None:
    q, k, v = heads(N, text, H=4, K=2)
    # the text counts as a block, so that with text a drop rate of 0 may leave one out
    every = [{"top_k": 99}, {"cdf_threshold": 2.0}] + [{"drop_rate": 0.0}] * (not text)
    for options in every:
        out = rectified_spaattn_attend(q, k, v, text_tokens=text, tail=tail, **SMALL, **options)
        torch.testing.assert_close(out, dense(q, k, v), atol=1e-5, rtol=1e-5)
    found = rectified_map(q, k, text_tokens=text, top_k=99, tail=tail, **SMALL)
    assert found.critical_BHnm.all() and found.kept().all()
    torch.testing.assert_close(found.factor(), torch.ones_like(found.factor()))


@pytest.mark.parametrize("text", [0, 5])
def test_shares_sum_to_one(text: int) -> None:
    q, k, _ = heads(96, text)
    found = rectified_map(q, k, text_tokens=text, top_k=1, **SMALL)
    assert ((found.factor() > 0) & (found.factor() <= 1 + 1e-6)).all()
    left_out = (found.share_BHnm * ~found.kept()).sum(-1)
    torch.testing.assert_close(found.factor() + left_out, torch.ones_like(left_out))
    assert found.kept(gapr=False).sum() <= found.kept().sum()


@pytest.mark.parametrize("text", [0, 5])
def test_constant_values_come_out_as_they_are(text: int) -> None:
    q, k, v = heads(96, text)
    q, k = (x + 2 * constant_blocks(96 + text, 16) for x in (q, k))
    v = v[:, :, :1].expand_as(v)
    for options in (SMALL, {"block_q": 16, "block_k": 8}):
        out = rectified_spaattn_attend(q, k, v, text_tokens=text, top_k=1, cdf_threshold=0.0, **options)
        torch.testing.assert_close(out, v, atol=1e-5, rtol=1e-5)
        half = rectified_spaattn_attend(q, k, v, text_tokens=text, top_k=1, cdf_threshold=0.0, gapr=False, **options)
        assert (half - v)[:, :, :96].abs().max() > 0.1
    ragged = tuple(x[:, :, :89] for x in (q, k, v))
    out = rectified_spaattn_attend(*ragged, top_k=1, tail="real", **SMALL)
    torch.testing.assert_close(out, ragged[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("N", "tail"), [(96, "zeros"), (96, "real"), (89, "real")])
@pytest.mark.parametrize("text", [0, 5])
def test_blocks_of_identical_rows_are_dense_for_any_choice(N: int, tail: str, text: int) -> None:
    """The method's central identity."""
    torch.manual_seed(N)
    q, k, v = (torch.cat([constant_blocks(N, 16), torch.randn(2, 2, text, 8)], 2) for _ in range(3))
    for top_k in (0, 1, 3):
        options = {"text_tokens": text, "top_k": top_k, "cdf_threshold": 0.0, "tail": tail, **SMALL}
        out, kept = rectified_spaattn_attend(q, k, v, return_map=True, **options)
        torch.testing.assert_close(out, dense(q, k, v), atol=1e-5, rtol=1e-5)
        assert kept.dense(N, N).float().mean() < 0.8
        plain = rectified_spaattn_attend(q, k, v, **options, **PLAIN)
        assert (plain - dense(q, k, v)).abs().max() > 0.1


def test_noise_is_left_to_the_sparse_output() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 256, 64) for _ in range(2))
    q, k = (x - x.unflatten(2, (-1, 16)).mean(3).repeat_interleave(16, 2) for x in (q, k))  # block means are zero
    found = rectified_map(q, k, top_k=2, **SMALL)
    assert found.gains_BHnm.float().mean() < 0.1 and found.factor().mean() > 0.9


def test_the_gain_test_does_not_see_the_scale() -> None:
    q, k, _ = (x + constant_blocks(101, 16) for x in heads(101))
    gains = rectified_map(q, k, **SMALL).gains_BHnm
    assert 0 < gains.float().mean() < 1
    for a, b in ((4.0, 1.0), (1.0, 0.25), (0.5, 8.0)):
        assert torch.equal(rectified_map(a * q, b * k, **SMALL).gains_BHnm, gains)


def test_permuting_tokens_inside_blocks_permutes_the_output() -> None:
    q, k, v = (x + constant_blocks(101, 16) for x in heads(96, 5))
    order = torch.cat([*(16 * i + torch.randperm(16) for i in range(6)), torch.arange(96, 101)])
    options = {"text_tokens": 5, "top_k": 2, **SMALL}
    out = rectified_spaattn_attend(q, k, v, **options)
    permuted = rectified_spaattn_attend(*(x[:, :, order] for x in (q, k, v)), **options)
    torch.testing.assert_close(permuted, out[:, :, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("N", [96, 101])
def test_without_the_corrections_it_is_masked_attention_with_the_map(N: int, text: int) -> None:
    q, k, v = heads(N, text, H=4, K=2)
    mask = torch.rand(2, N + text) > 0.2
    for valid in (None, mask):
        options = {"text_tokens": text, "top_k": 2, "mask": valid, **SMALL}
        out, kept = rectified_spaattn_attend(q, k, v, return_map=True, **options, **PLAIN)
        expected = attend(q, k, v, mask=kept.dense(N + text, N + text), backend="reference")
        if valid is not None:
            expected = expected * valid[:, None, :, None]
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert not kept.dense(N + text, N + text).all() and "blocks" in repr(kept) and kept.to("cpu").batch == 2


def test_blocks_that_are_critical_in_any_case() -> None:
    q, k, _ = heads()
    options = {"top_k": 1, "cdf_threshold": 0.0, **SMALL}
    near = neighbor_blocks((6, 4, 4), None, 16)
    assert near.sum() == 16
    found = rectified_map(q, k, **options).critical_BHnm
    assert (found.sum(-1) == 1).all()
    assert torch.equal(rectified_map(q, k, neighbors=near, **options).critical_BHnm, found | near)
    first = torch.zeros(6, 6, dtype=torch.bool)
    first[:2, :2] = True
    assert torch.equal(rectified_map(q, k, first_frame_blocks=2, **options).critical_BHnm, found | first)
    # the text's share counts as a block
    text = torch.cat([k, 9 * q[:, :, :5]], 2)
    many = rectified_map(torch.cat([q, q[:, :, :5]], 2), text, text_tokens=5, top_k=2, cdf_threshold=0.0, **SMALL)
    assert set(many.critical_BHnm.sum(-1).unique().tolist()) <= {1, 2}


def test_errors_fall_with_the_corrections_and_the_rate() -> None:
    torch.manual_seed(0)
    field = F.interpolate(torch.randn(6, 16, 16), size=256, mode="linear", align_corners=True).mT
    q, k, v = (field.view(1, 3, 2, 256, 16) * torch.tensor([1.5, 1.5, 1.0]).view(3, 1, 1, 1)).unbind(1)
    q, k, v = (x + 0.2 * torch.randn_like(x) for x in (q, k, v))

    def error(**options: object) -> float:
        out = rectified_spaattn_attend(q, k, v, cdf_threshold=0.0, **SMALL, **options)
        return float((out - dense(q, k, v)).abs().mean())

    rates = (0.0, 0.5, 0.8, 0.95)
    both = [error(drop_rate=rate) for rate in rates]
    assert both == sorted(both) and both[0] < 1e-6
    for rate, rectified in zip(rates[1:], both[1:]):
        assert rectified < 0.9 * error(drop_rate=rate, **PLAIN)
        assert rectified < error(drop_rate=rate, ipar=False)


def test_padding_is_as_if_it_were_not_there() -> None:
    q, k, v = (x + constant_blocks(75, 16) for x in heads(64, 11))
    mask = torch.ones(2, 75, dtype=torch.bool)
    mask[:, 70:] = False
    options = {"top_k": 2, **SMALL}
    out = rectified_spaattn_attend(q, k, v, text_tokens=11, mask=mask, **options)
    short = rectified_spaattn_attend(*(x[:, :, :70] for x in (q, k, v)), text_tokens=6, **options)
    torch.testing.assert_close(out[:, :, :70], short, atol=1e-5, rtol=1e-5)
    assert (out[:, :, 70:] == 0).all()
    # visual padding, of less and of more than a block
    mask = torch.arange(75) < torch.tensor([[53], [35]])
    out = rectified_spaattn_attend(q, k, v, mask=mask, **options)
    for row, length in enumerate((53, 35)):
        one = (x[row : row + 1, :, :length] for x in (q, k, v))
        torch.testing.assert_close(
            out[row : row + 1, :, :length], rectified_spaattn_attend(*one, **options), atol=1e-5, rtol=1e-5
        )
    assert rectified_spaattn_attend(q, k, v, mask=torch.zeros(2, 75, dtype=torch.bool)).eq(0).all()


def test_inputs_are_left_as_they_are() -> None:
    q, k, v = heads(64, 32)
    before = [x.clone() for x in (q, k, v)]
    mask = (torch.arange(96) < 70)[None]
    with torch.no_grad():
        rectified_spaattn_attend(q, k, v, text_tokens=32, mask=mask, top_k=1, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v)))


def test_gradients_are_those_of_the_definition() -> None:
    q, k, v = (x[:1, :1].double().requires_grad_() for x in heads(21, 3, D=4))
    options = {"text_tokens": 3, "top_k": 1, "block_q": 8, "block_k": 4, "cdf_threshold": 0.0}
    assert torch.autograd.gradcheck(lambda *x: rectified_spaattn_attend(*x, **options), (q, k, v))


def test_half_precision() -> None:
    q, k, v = (x + constant_blocks(101, 16) for x in heads(96, 5))
    options = {"text_tokens": 5, "top_k": 2, **SMALL}
    exact = rectified_spaattn_attend(*(x.bfloat16().float() for x in (q, k, v)), **options)
    half = rectified_spaattn_attend(*(x.bfloat16() for x in (q, k, v)), **options)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=2e-2, rtol=2e-2)


def test_the_layer_on_a_grid() -> None:
    torch.manual_seed(0)
    grid, x = (3, 4, 6), torch.randn(2, 72 + 5, 16)
    options = {"text_tokens": 5, "block_q": 8, "block_k": 8, "rope": True}
    every = RectifiedSpaAttention(16, 2, grid=grid, top_k=9, **options)
    plain = saccade.create("softmax", dim=16, num_heads=2)
    plain.load_state_dict(every.state_dict())
    torch.testing.assert_close(every(x), plain(x), atol=1e-5, rtol=1e-5)

    layer = RectifiedSpaAttention(16, 2, grid=grid, top_k=2, **options)
    assert torch.equal(layer.neighbors, neighbor_blocks(grid, gilbert_order(grid), 8))
    assert "order" not in layer.state_dict()
    mask = torch.arange(77)[None] < 75
    assert (layer(x, mask=mask.expand(2, -1)) - layer(x)).abs().max() > 1e-4
    # tokens that stand along the curve to begin with
    order = gilbert_order(grid, after=5)
    still = RectifiedSpaAttention(16, 2, top_k=2, **{**options, "rope": False})
    layer = RectifiedSpaAttention(16, 2, grid=grid, top_k=2, **{**options, "rope": False})
    layer.neighbors = None
    layer.load_state_dict(still.state_dict())
    torch.testing.assert_close(layer(x)[:, order], still(x[:, order]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="77, got 70"):
        layer(x[:, :70])


def test_starts_from_softmax_as_dense_attention() -> None:
    theirs = saccade.create("softmax", dim=16, num_heads=2, rope=False)
    ours = RectifiedSpaAttention.from_softmax(theirs, drop_rate=0.0, block_q=8, block_k=8)
    x = torch.randn(2, 30, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_its_attention_map_has_rows_that_sum_to_one() -> None:
    layer = RectifiedSpaAttention(16, 2, top_k=1, block_q=8, block_k=8, cdf_threshold=0.0)
    weights = saccade.attention_map(layer, torch.randn(1, 32, 16))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_the_mask_of_a_map_in_words() -> None:
    keep = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    keep[..., 1, 2] = True
    kept = RectifiedBlocks(keep, 4, 2, 6)
    allowed = kept.dense(8, 8)[0, 0]
    for i in range(8):
        for j in range(8):
            assert allowed[i, j] == (i >= 6 or j >= 6 or (i >= 4 and j >= 4))
    assert RectifiedBlocks(keep[:, :, :0, :0], 4, 2, 0).dense(3, 3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True}, "bidirectional"),
        ({"block_q": 0}, "at least 1, got 0"),
        ({"drop_rate": 1.5}, "drop_rate must be from 0 to 1, got 1.5"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"cdf_threshold": float("nan")}, "cdf_threshold"),
        ({"first_frame_blocks": -1}, "first_frame_blocks"),
        ({"tail": "none"}, "'zeros' or 'real', got 'none'"),
        ({"text_tokens": 97}, "from 0 to the number of tokens \\(96\\), got 97"),
        ({"neighbors": torch.ones(2, 2, dtype=torch.bool)}, "neighbors must be bool \\(1, 1\\)"),
        ({"mask": torch.ones(2, 95, dtype=torch.bool)}, "padding mask must be .* \\(2, 96\\)"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rectified_spaattn_attend(*heads(), **options)


def test_bad_inputs() -> None:
    q, k, v = heads()
    for bad in ((q, k[:, :, :9], v), (q, k, v[:1]), (q[0], k, v), (q.long(), k, v), (q[:, :1], k, v)):
        with pytest.raises(ValueError):
            rectified_spaattn_attend(*bad)
    layer = RectifiedSpaAttention(16, 2)
    x = torch.randn(1, 5, 16)
    with pytest.raises(ValueError, match="no context"):
        layer(x, x)
    with pytest.raises(ValueError, match=r"takes padding .* as its mask"):
        layer(x, mask=masks.causal())
    with pytest.raises(ValueError, match="bidirectional"):
        RectifiedSpaAttention(16, 2, causal=True)
