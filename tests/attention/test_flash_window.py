"""Flash Window Attention: the invariants of its card, Swin's layer, Swin's models."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.flash_window import FlashWindowAttention, flash_window_attend, retrofit_swin
from saccade.ops.maps import attention_map


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * q @ k.mT
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def windows(W: int, H: int, T: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(W, H, T, D).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("T", "D"), [(49, 32), (64, 16), (121, 48), (7, 64), (1, 16)])
def test_equals_the_plain_core_forward_and_backward(T: int, D: int, with_bias: bool, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    leaves = windows(3, 2, T, D, dtype) + ([torch.randn(2, T, T).to(dtype).requires_grad_()] if with_bias else [])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = flash_window_attend(*leaves, scale=0.3)
    want = plain(*exact[:3], exact[3] if with_bias else None, 0.3)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(want, exact, grad.double())
    assert out.dtype == dtype
    for a, b in zip((out, *gradients), (want, *expected), strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max())


def test_bias_gradient_is_the_sum_over_windows() -> None:
    q, k, v = windows(5, 2, 9, 8, torch.float64)
    bias = torch.randn(2, 9, 9, dtype=torch.float64, requires_grad=True)
    together = torch.autograd.grad(flash_window_attend(q, k, v, bias).square().sum(), bias)[0]
    alone = sum(
        torch.autograd.grad(flash_window_attend(q[i, None], k[i, None], v[i, None], bias).square().sum(), bias)[0]
        for i in range(5)
    )
    torch.testing.assert_close(together, alone)


def test_windows_are_independent_and_a_diagonal_bias_gives_the_values() -> None:
    q, k, v = windows(6, 2, 16, 8)
    order = torch.randperm(6)
    bias = torch.randn(2, 16, 16)
    out = flash_window_attend(q, k, v, bias)
    torch.testing.assert_close(flash_window_attend(q[order], k[order], v[order], bias), out[order])
    diagonal = torch.full((2, 16, 16), -1e4).masked_fill(torch.eye(16, dtype=torch.bool), 0.0)
    torch.testing.assert_close(flash_window_attend(q, k, v, diagonal), v)


def test_the_mask_is_part_of_a_bias_per_window() -> None:
    q, k, v = windows(6, 2, 16, 8)
    bias, mask = torch.randn(2, 16, 16), torch.where(torch.rand(3, 16, 16) < 0.4, -100.0, 0.0)
    want = plain(q, k, v, bias + mask.repeat(2, 1, 1)[:, None], 8**-0.5)
    torch.testing.assert_close(flash_window_attend(q, k, v, bias, mask_PTT=mask), want)


def test_no_weights_are_kept_for_the_backward_pass() -> None:
    W, H, T, D = 16, 2, 49, 8
    q, k, v = windows(W, H, T, D)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        flash_window_attend(q, k, v, torch.zeros(H, T, T, requires_grad=True))
    assert all(x.numel() <= W * H * T * D for x in kept)
    assert sum(x.numel() for x in kept) <= 4 * W * H * T * D + W * H * T + H * T * T < W * H * T * T


def swin(layer: FlashWindowAttention, x: Tensor) -> Tensor:
    """Swin's block around the layer by its own definition: fill up, roll, cut, mask, join, roll back, crop."""
    w, s = layer.window_size[0], layer.shift[0]
    B, height, width, C = x.shape
    x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
    rows, columns = x.shape[1:3]
    x = x.roll((-s, -s), (1, 2))
    region = torch.zeros(rows, columns)
    for axis, n in ((0, rows), (1, columns)):
        i = torch.arange(n)
        part = ((i >= n - w).float() + (i >= n - s).float()) * (3 if axis == 0 else 1)
        region += part[:, None] if axis == 0 else part

    def cut(y: Tensor) -> Tensor:
        y = y.unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3)
        return y.flatten(0, 2).flatten(1, 2)

    places = cut(region[None, ..., None])[..., 0]
    mask = torch.where(places[:, :, None] == places[:, None], 0.0, -100.0)
    y = layer(cut(x), mask=mask if s else None)
    y = y.view(B, rows // w, columns // w, w, w, C).transpose(2, 3).reshape(B, rows, columns, C)
    return y.roll((s, s), (1, 2))[:, :height, :width]


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (5, 6)])
def test_a_map_equals_swins_roll_cut_mask_and_join(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    layer = FlashWindowAttention(12, 3, window_size=4, shift=shift)
    x = torch.randn(2, *size, 12)
    out = layer(x)
    torch.testing.assert_close(out, swin(layer, x), atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(x.flatten(1, 2), size).view_as(x), out)
    cut = FlashWindowAttention(12, 3, window_size=4, shift=shift, border="cut")
    cut.load_state_dict(layer.state_dict())
    whole = all(n % 4 == 0 for n in size)
    assert torch.allclose(cut(x), out, atol=1e-5) == whole


def test_other_numbers_of_axes() -> None:
    torch.manual_seed(0)
    for window, shape in (((5,), (13,)), ((2, 3, 4), (4, 5, 6))):
        layer = FlashWindowAttention(8, 2, window_size=window, shift=True, border="cut")
        x = torch.randn(2, *shape, 8)
        out = layer(x)
        assert out.shape == x.shape
        torch.testing.assert_close(layer(x.flatten(1, -2), shape).view_as(x), out)


def test_attention_map_shows_the_windows() -> None:
    torch.manual_seed(0)
    layer = FlashWindowAttention(8, 2, window_size=3, shift=1, border="cut")
    x = torch.randn(1, 5, 6, 8)
    weights = attention_map(layer, x.flatten(1, 2), size=(5, 6))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 30))
    row, column = (torch.arange(5) + 2) // 3, (torch.arange(6) + 2) // 3
    window = (10 * row[:, None] + column).flatten()
    assert torch.equal(weights[0, 0] > 0, window[:, None] == window)
    v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4))[:, :, 2].transpose(1, 2)
    torch.testing.assert_close(layer.proj((weights @ v).transpose(1, 2).flatten(2)).view_as(x), layer(x))


def test_a_swin_model_gives_the_same_with_this_attention() -> None:
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=24, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0
    )
    model = SwinModel(config).eval()
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)
    for side in (24, 30):  # 12 x 12 and 6 x 6 tokens; 15 x 15 and 8 x 8, which four does not divide
        images = torch.randn(2, 3, side, side, requires_grad=True)
        want = model(images, interpolate_pos_encoding=True).last_hidden_state
        slope = torch.autograd.grad(want.square().mean(), images)[0]
        replaced = retrofit_swin(model)
        assert len(replaced) == 4
        got = model(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(torch.autograd.grad(got.square().mean(), images)[0], slope, atol=1e-6, rtol=1e-4)
        for path, layer in replaced.items():
            model.set_submodule(path, layer)
        torch.testing.assert_close(model(images, interpolate_pos_encoding=True).last_hidden_state, want)
    block = model.encoder.layers[0].blocks[1]
    layer = FlashWindowAttention.from_swin(block.attention, shift=block.shift_size)
    x = torch.randn(2, 12 * 12, 8)
    want = block(x, (12, 12))[0]
    ours = x + layer(block.layernorm_before(x), (12, 12))
    torch.testing.assert_close(ours + block.mlp(block.layernorm_after(ours)), want, atol=1e-5, rtol=1e-5)


def test_bad_arguments() -> None:
    for bad, message in (
        ({"num_heads": 3}, r"divide dim \(16\), got 3"),
        ({"causal": True}, "no causal form"),
        ({"window_size": 0}, "positive lengths, got 0"),
        ({"shift": 4}, "below the window"),
        ({"shift": (1, 1, 1)}, "below the window"),
        ({"border": "reflect"}, "'zeros' or 'cut', got 'reflect'"),
    ):
        with pytest.raises(ValueError, match=message):
            FlashWindowAttention(**{"dim": 16, "num_heads": 2, "window_size": 4, **bad})
    layer = FlashWindowAttention(16, 2, window_size=4)
    with pytest.raises(ValueError, match="size must be given for 20 tokens"):
        layer(torch.randn(2, 20, 16))
    with pytest.raises(ValueError, match="product of 20 tokens"):
        layer(torch.randn(2, 20, 16), (4, 6))
    with pytest.raises(ValueError, match="a map of"):
        layer(torch.randn(2, 4, 5, 16), (4, 5))
    with pytest.raises(ValueError, match="mask is for windows"):
        layer(torch.randn(2, 4, 5, 16), mask=torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="mask must be"):
        layer(torch.randn(2, 16, 16), mask=torch.zeros(16, 16))
    with pytest.raises(ValueError, match="query must be"):
        flash_window_attend(*(torch.randn(2, 9, 8) for _ in range(3)))
    with pytest.raises(ValueError, match="no layer of type SwinAttention"):
        retrofit_swin(layer)
    with pytest.raises(ValueError, match="has 0 tables"):
        FlashWindowAttention.from_swin(nn.MultiheadAttention(16, 2))
