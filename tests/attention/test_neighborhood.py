"""Neighbourhood attention: the card's invariants on the function and the layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import attention_map, catalogue
from saccade.attention.neighborhood import (
    NeighborhoodAttention,
    RollingCache,
    neighborhood_attend,
    neighborhood_scores,
    neighborhood_sum,
)
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops import masks


def tokens(n: int, H: int = 2, K: int = 2, D: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, n, D, dtype=torch.float64, requires_grad=True) for heads in (H, K, K)]


def table(H: int, *kernel: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(H, *(2 * w - 1 for w in kernel), dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (ours, expected))):
        torch.testing.assert_close(a, b)


GRIDS = {
    "1-D": ((19,), (5,), 2, 1, False),
    "1-D causal, stride": ((20,), (6,), 2, 3, True),
    "2-D even": ((7, 10), (3, 4), (2, 1), 1, False),
    "2-D, one axis causal": ((7, 8), (3, 2), (2, 3), (2, 1), (True, False)),
    "3-D causal in time": ((4, 5, 6), (2, 3, 3), (1, 1, 2), 1, (True, False, False)),
}


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_fused_form_equals_the_unfused_one(grid, with_bias: bool) -> None:
    size, kernel, dilation, stride, causal = grid
    q, k, v = tokens(int(torch.Size(size).numel()), H=4)
    bias = table(4, *kernel) if with_bias else None
    options = {"dilation": dilation, "stride": stride, "causal": causal, "bias": bias}
    out, lse = neighborhood_attend(q, k, v, size, kernel, return_lse=True, **options)
    mask = masks.neighborhood(size, kernel, dilation, causal, stride=stride)
    scores = neighborhood_scores(q, k, mask, bias)
    assert scores.shape[-1] == torch.Size(kernel).numel()
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    leaves = [q, k, v] + ([] if bias is None else [bias])
    assert_same(out, neighborhood_sum(scores.softmax(-1), v, mask), leaves)
    torch.testing.assert_close(neighborhood_attend(q, k, v, size, kernel, **options), out)


def test_bias_is_read_at_key_minus_query() -> None:
    q, k, v = tokens(30)
    values = torch.zeros(2, 5, 3, dtype=torch.float64)
    values[1, 0, 2] = 50.0  # head 1: two up, one to the right
    out = neighborhood_attend(q, k, v, (6, 5), (3, 2), bias=values)
    place = torch.arange(30).view(6, 5)
    # the last row's windows are moved up by one, the first column's to the right
    torch.testing.assert_close(out[:, 1, place[5, 0]], v[:, 1, place[3, 1]])
    assert torch.equal(
        neighborhood_attend(q, k, v, (6, 5), (3, 2), bias=torch.zeros_like(values), return_lse=True)[0][:, 0], out[:, 0]
    )
    torch.testing.assert_close(out[:, 0], neighborhood_attend(q, k, v, (6, 5), (3, 2))[:, 0])


def test_extra_keys_are_one_softmax_over_the_union() -> None:
    q, k, v = tokens(30, H=4)
    extra = tuple(torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out, lse = neighborhood_attend(q, k, v, (5, 6), 3, extra=extra, return_lse=True)
    allowed = F.pad(masks.neighborhood((5, 6), 3).dense(30, 30), (0, 7), value=True)
    keys, values = (torch.cat(pair, 2).repeat_interleave(2, 1) for pair in zip((k, v), extra))
    scores = (q @ keys.mT / 2).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert_same(out, scores.softmax(-1) @ values, [q, k, v, *extra])


def test_padding_hides_keys() -> None:
    q, k, v = tokens(30)
    real = torch.rand(2, 30) > 0.4
    real[1] = False
    out, lse = neighborhood_attend(q, k, v, (5, 6), 3, mask=real, return_lse=True)
    allowed = masks.neighborhood((5, 6), 3).dense(30, 30) & real[:, None, None]
    scores = (q @ k.mT / 2).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1).nan_to_num(0.0) @ v)
    assert not out[1].any()


def test_limits() -> None:
    q, k, v = tokens(30)
    torch.testing.assert_close(neighborhood_attend(q, k, v, (5, 6), (5, 6)), F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(neighborhood_attend(q, k, v, (5, 6), 1), v)
    # stride = kernel: windows by themselves
    out = neighborhood_attend(q, k, v, (5, 6), (5, 3), stride=(5, 3)).unflatten(2, (5, 6))
    half = [x.unflatten(2, (5, 6))[..., 3:, :].flatten(2, 3) for x in (q, k, v)]
    torch.testing.assert_close(out[..., 3:, :].flatten(2, 3), F.scaled_dot_product_attention(*half))


@pytest.mark.parametrize("n", [1, 3, 8, 11, 30])
def test_causal_axes_may_be_short(n: int) -> None:
    q, k, v = tokens(n * 4)
    out = neighborhood_attend(q, k, v, (n, 4), (4, 3), dilation=(3, 1), causal=(True, False))
    t, x = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(4), indexing="ij"))
    start = (x - 1).clamp(0, 1)
    back = t[:, None] - t
    near = (back >= 0) & (back % 3 == 0) & (back < 12) & (x >= start[:, None]) & (x < start[:, None] + 3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=near))


def test_images_and_videos_are_grids() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(16, 4, kernel_size=3, dilation=2)
    for size in ((7, 9), (6, 7, 8)):
        x = torch.randn(2, *size, 16)
        out = layer(x)
        assert out.shape == x.shape
        torch.testing.assert_close(layer(x.flatten(1, -2), size=size), out.flatten(1, -2))
        changed = x.clone()
        changed[:, 0, 0] += 1.0
        assert torch.equal(layer(changed)[:, 1, 1], out[:, 1, 1]) and not torch.equal(layer(changed), out)
    # what is too short: dilation first, then the kernel
    fitted = [layer._fitted(size)[:2] for size in ((3, 5), (2, 6), (1, 1))]
    assert fitted == [([3, 3], [1, 1]), ([2, 3], [1, 2]), ([1, 1], [1, 1])]
    assert layer(torch.randn(2, 1, 4, 16)).shape == (2, 1, 4, 16)


def test_layer_with_context_equals_joint_attention() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(16, 2, kernel_size=(7, 7), relative_bias=True).double()
    x, context = torch.randn(2, 7, 7, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    joint = torch.cat([x.flatten(1, 2), context], 1)
    dense = SoftmaxAttention.from_softmax(layer_without_bias(layer), rope=False)
    torch.testing.assert_close(layer(x, context).flatten(1, 2), dense(joint)[:, :49])
    nn.init.normal_(layer.bias)
    assert not torch.allclose(layer(x, context).flatten(1, 2), dense(joint)[:, :49])
    grads = torch.autograd.grad(layer(x, context).square().sum(), list(layer.parameters()))
    assert all(g.any() for g in grads)


def layer_without_bias(layer: NeighborhoodAttention) -> NeighborhoodAttention:
    plain = NeighborhoodAttention(16, 2, kernel_size=7).double()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "bias"})
    return plain


def test_bias_of_a_smaller_kernel_is_the_tables_middle() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, kernel_size=(5,), relative_bias=True)
    nn.init.normal_(layer.bias)
    small = NeighborhoodAttention(8, 2, kernel_size=(3,), relative_bias=True)
    small.load_state_dict({**layer.state_dict(), "bias": layer.bias[:, 2:7]})
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(layer(x), small(x))


@pytest.mark.parametrize(
    "options", [{}, {"rope": True}, {"dilation": 3}, {"relative_bias": True, "dilation": 2}], ids=str
)
def test_decoding_keeps_a_window_and_equals_the_parallel_form(options) -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(16, 4, True, kernel_size=(4,), num_kv_heads=2, **options).eval()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 50, 16)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :9] = False
    for real in (None, mask):
        cache, pieces, held = layer.new_cache(2), [], []
        assert isinstance(cache, RollingCache) and cache.nbytes == 0
        with torch.no_grad():
            for a, b in [(0, 5), *((t, t + 1) for t in range(5, 30)), (30, 33), (33, 50)]:
                pieces.append(layer(x[:, a:b], mask=None if real is None else real[:, :b], cache=cache))
                held.append(cache.nbytes)
            expected = layer(x, mask=real)
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-5)
        room = 3 * options.get("dilation", 1)
        assert cache.length == 50 and max(held) == held[-1] == 2 * 2 * 2 * room * 4 * 4


def test_from_softmax_with_a_wide_window_is_that_layer() -> None:
    torch.manual_seed(0)
    source = nn.MultiheadAttention(16, 4, batch_first=True)
    layer = NeighborhoodAttention.from_softmax(source, kernel_size=20)
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(layer(x), source(x, x, x)[0])
    assert not torch.allclose(NeighborhoodAttention.from_softmax(source, kernel_size=5)(x), source(x, x, x)[0])


def test_attention_map_shows_the_window() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, kernel_size=(3, 2), dilation=(1, 2))
    weights = attention_map(layer, torch.randn(1, 20, 8), size=(4, 5))
    allowed = masks.neighborhood((4, 5), (3, 2), (1, 2)).dense(20, 20)
    assert torch.equal(weights > 0, allowed.expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 20))


def test_port_takes_ints_scale_and_additional_keys() -> None:
    torch.manual_seed(0)
    port = catalogue.port("neighborhood", "na2d")
    inputs = {name: torch.randn(1, 5, 6, heads, 4) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    inputs |= {f"additional_{name}": torch.randn(1, 3, 2, 4) for name in ("keys", "values")}
    got = port.run(port.build({}), inputs, {"kernel_size": 3, "scale": 0.3})
    allowed = F.pad(got["mask"], (0, 3), value=True)
    k, v = (
        torch.cat([inputs[x].flatten(1, 2), inputs[f"additional_{name}"]], 1).transpose(1, 2).repeat_interleave(2, 1)
        for x, name in (("k", "keys"), ("v", "values"))
    )
    q = inputs["q"].flatten(1, 2).transpose(1, 2)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3)
    torch.testing.assert_close(got["out"].flatten(1, 2).transpose(1, 2), want)


def test_bad_arguments() -> None:
    q, k, v = tokens(12)
    for match, size, kernel, options in [
        ("12 tokens|15 tokens", (3, 5), 3, {}),
        ("kernel \\* dilation", (3, 4), (3, 3), {"dilation": 2}),
        ("one entry per axis", (3, 4), (3, 3, 3), {}),
        ("stride must be", 12, 3, {"stride": 4}),
        ("bias must be", 12, 3, {"bias": torch.zeros(2, 4)}),
        ("mask must be bool", 12, 3, {"mask": torch.ones(2, 11, dtype=torch.bool)}),
    ]:
        with pytest.raises(ValueError, match=match):
            neighborhood_attend(q, k, v, size, kernel, **options)
    for match, options in [
        ("same one to three axes", {"kernel_size": (3, 3), "dilation": (1, 2, 1)}),
        ("kernel_size of each axis", {"kernel_size": 3, "relative_bias": True}),
        ("stride between", {"kernel_size": 3, "stride": 4}),
        ("rotary positions are for sequences", {"kernel_size": (3, 3), "rope": True}),
    ]:
        with pytest.raises(ValueError, match=match):
            NeighborhoodAttention(16, 2, **options)
    x = torch.randn(1, 12, 16)
    image = NeighborhoodAttention(16, 2, kernel_size=(3, 3))
    with pytest.raises(ValueError, match="grid of 2 axes"):
        image(x)
    with pytest.raises(ValueError, match="of 12 tokens"):
        image(x, size=(3, 5))
    with pytest.raises(ValueError, match="decodes with a cache"):
        image(x, size=(3, 4), cache=image.new_cache(1))
    with pytest.raises(ValueError, match="context must be"):
        image(x, torch.randn(1, 3, 8), size=(3, 4))
