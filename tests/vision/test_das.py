"""DAS: the card's invariants, its options, small and odd maps, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saccade
from saccade.vision.das import DAS
from saccade.vision.das.claim import beside


@pytest.fixture
def x():
    return torch.randn(2, 12, 9, 7, generator=torch.Generator().manual_seed(0))


def _random(offsets=1.0, channels=12, **arguments):
    torch.manual_seed(1)
    gate = DAS(channels, **{"alpha": 0.33, **arguments})
    nn.init.normal_(gate.offset.weight, std=offsets)
    nn.init.normal_(gate.offset.bias, std=offsets)
    nn.init.normal_(gate.norm.weight)
    nn.init.normal_(gate.norm.bias)
    return gate


def plain(gate, x):
    """D by grid sampling, a tap at a time: the plainest deformable convolution."""
    c, k = gate.bottleneck(x), gate.conv.kernel_size[0]
    offset, weight = gate.offset(c), gate.conv.weight
    H, W = c.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    out = gate.conv.bias.view(1, -1, 1, 1).to(c)
    for tap in range(k * k):
        y = rows + tap // k - k // 2 + offset[:, 2 * tap]
        z = columns + tap % k - k // 2 + offset[:, 2 * tap + 1]
        grid = torch.stack([(2 * z + 1) / W - 1, (2 * y + 1) / H - 1], -1)
        taken = F.grid_sample(c, grid, padding_mode="zeros", align_corners=False)
        out = out + torch.einsum("ec,bchw->behw", weight[:, :, tap // k, tap % k], taken)
    return out


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("norm_dims", ["C", "CHW"])
def test_equals_the_plainest_form(x, kernel_size, norm_dims):
    gate, x = _random(kernel_size=kernel_size, norm_dims=norm_dims).double(), x.double()
    d = plain(gate, x)
    if norm_dims == "C":
        normed = F.layer_norm(d.movedim(1, 3), (12,), gate.norm.weight, gate.norm.bias).movedim(3, 1)
    else:
        normed = F.group_norm(d, 1, gate.norm.weight, gate.norm.bias)
    torch.testing.assert_close(gate(x), x * normed.sigmoid())


def test_bottleneck_is_the_cards(x):
    gate = _random()
    u = gate.pointwise(gate.depthwise(x))
    torch.testing.assert_close(gate.bottleneck(x), F.gelu(F.instance_norm(u)))
    for act, function in (("relu", torch.relu), ("none", lambda t: t)):
        torch.testing.assert_close(_random(act=act).bottleneck(x), function(F.instance_norm(u)))


def test_zero_offsets_are_an_ordinary_convolution(x):
    gate = DAS(12)
    assert not gate.offset.weight.any() and not gate.offset.bias.any()
    c = gate.bottleneck(x)
    torch.testing.assert_close(gate.logits(c), gate.norm(gate.conv(c).movedim(1, 3)).movedim(3, 1))


def test_zero_deformable_convolution_gives_a_half(x):
    gate = DAS(12)
    nn.init.zeros_(gate.conv.weight)
    nn.init.zeros_(gate.conv.bias)
    assert torch.equal(gate(x), x / 2)


def test_signs_stay_and_magnitudes_fall(x):
    gate = _random()
    y, a = gate(x), gate.gate(x)
    assert ((a > 0) & (a < 1)).all()
    assert (y.abs() <= x.abs()).all() and torch.equal(y.sign(), x.sign())
    assert torch.equal(y, x * a)


def test_constant_offset_shifts(x):
    gate = _random()
    nn.init.zeros_(gate.offset.weight)
    gate.offset.bias.data = torch.tensor([0.0, 1.0]).repeat(9)
    c = gate.bottleneck(x)
    shifted = gate.norm(gate.conv(c.roll(-1, 3)).movedim(1, 3)).movedim(3, 1)
    torch.testing.assert_close(gate.logits(c)[..., 1:-1, 1:-2], shifted[..., 1:-1, 1:-2])


def test_scale_of_the_bottlenecks_channels_does_not_matter(x):
    gate = _random().double()
    x = x.double()
    before = gate.gate(x)
    factor = torch.rand(gate.pointwise.out_channels, dtype=torch.float64) + 0.5
    gate.pointwise.weight.data *= factor.view(-1, 1, 1, 1)
    gate.pointwise.bias.data *= factor
    torch.testing.assert_close(gate.gate(x), before, rtol=0, atol=1e-2)
    assert (gate.gate(x) - before).abs().mean() < 1e-3


def test_mean_of_the_logits(x):
    for dims, over in (("C", 1), ("CHW", (1, 2, 3))):
        gate = _random(norm_dims=dims)
        nn.init.ones_(gate.norm.weight)
        nn.init.zeros_(gate.norm.bias)
        assert gate.logits(gate.bottleneck(x)).mean(over).abs().max() < 1e-5


def test_what_is_gated(x):
    plainly, residual, inner = _random(), _random(residual=True), _random(gate_on="bottleneck")
    torch.testing.assert_close(residual(x), plainly(x) + x)
    assert inner(x).shape == (2, 4, 9, 7) and inner.out_channels == 4 and inner.conv.weight.shape == (4, 4, 3, 3)
    torch.testing.assert_close(inner(x), inner.bottleneck(x) * inner.gate(x))
    both = _random(gate_on="bottleneck", residual=True)
    torch.testing.assert_close(both(x), inner(x) + inner.bottleneck(x))


def test_gradient_reaches_the_offsets_from_zero(x):
    gate = DAS(12)
    gate(x).square().sum().backward()
    for parameter in gate.offset.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 1, 1, 5), (1, 7, 2, 2)])
def test_small_maps_in_training(shape):
    gate = _random(channels=shape[1])
    y = gate.train()(torch.randn(shape, requires_grad=True))
    assert y.shape == shape and y.isfinite().all()


def test_one_pixel_leaves_the_biases():
    gate = _random()
    a = gate.gate(torch.randn(3, 12, 1, 1))
    torch.testing.assert_close(a[..., 0, 0], gate.norm(gate.conv.bias).sigmoid().expand(3, 12))


def test_memory_format_stays_and_the_input_is_not_changed(x):
    gate, kept = _random(), x.clone()
    flat, last = gate(x), gate(x.contiguous(memory_format=torch.channels_last))
    assert flat.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, flat)
    assert torch.equal(x, kept)


def test_half_precision_samples_in_single(x):
    gate = _random()
    expected = gate(x)
    ours = gate.bfloat16()(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - expected).abs().mean() < 0.05


@pytest.mark.parametrize(("channels", "alpha", "width"), [(64, 0.2, 13), (10, 0.33, 3), (2, 0.1, 1)])
def test_parameters(channels, alpha, width):
    gate, C, m = DAS(channels, alpha), channels, width
    expected = 9 * C + C + C * m + m + (18 * 9 * m + 18) + 9 * C * m + C + 2 * C
    assert sum(p.numel() for p in gate.parameters()) == expected


def test_images_of_the_claim():
    image, label, mark = beside(6, torch.Generator().manual_seed(0))
    batch = torch.arange(6)
    assert (image[batch, 4, mark[:, 0], mark[:, 1]] > 0.5).all()
    row = image[batch, label, mark[:, 0]]  # the label's colour in the mark's row, to the right of it
    assert all((row[i, mark[i, 1] + 2 : mark[i, 1] + 11] > 0.5).sum() == 5 for i in range(6))
    assert ((image[:, :4] > 0.5).sum((2, 3)) == 25).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha must be above 0 and at most 1, got 0"),
        ({"alpha": 1.1}, "alpha must be"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"act": "tanh"}, "act must be one of gelu, relu, none, got 'tanh'"),
        ({"norm_dims": "HW"}, "norm_dims must be one of C, CHW"),
        ({"gate_on": "output"}, "gate_on must be one of input, bottleneck"),
        ({"channels": 0}, "channels must be positive, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        saccade.create("das", **{"channels": 8, **arguments})


def test_bad_input():
    for shape in ((2, 4, 5, 5), (8, 5, 5), (2, 8, 0, 3)):
        with pytest.raises(ValueError, match=r"x must be \(batch, 8, height, width\), got"):
            DAS(8)(torch.randn(shape))
