"""Triplet attention: the card's invariants, both forms, memory format, bad arguments."""

import pytest
import torch
from torch import nn

import saccade
from saccade.vision.triplet import TripletAttention, z_pool
from saccade.vision.triplet.claim import digits_on_noise


@pytest.fixture
def x():
    return torch.randn(2, 12, 9, 7, generator=torch.Generator().manual_seed(0))


def _random(**arguments):
    torch.manual_seed(1)
    module = TripletAttention(**arguments)
    for gate in (module.cw, module.hc, module.hw):
        if gate is not None:
            nn.init.normal_(gate.norm.weight)
            nn.init.normal_(gate.norm.bias)
            nn.init.uniform_(gate.norm.running_var, 0.5, 2)
    return module.eval()


def permuting(module, x):
    """The authors' form: turn, gate, turn back, average."""

    def gated(t, gate):
        return t * gate(z_pool(t, 1))

    branches = [
        gated(x.permute(0, 2, 1, 3), module.cw).permute(0, 2, 1, 3),
        gated(x.permute(0, 3, 2, 1), module.hc).permute(0, 3, 2, 1),
    ]
    if module.hw is not None:
        branches.append(gated(x, module.hw))
    return sum(branches) / len(branches)


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_one_product_equals_the_permuting_form(x, spatial, kernel_size):
    module = _random(kernel_size=kernel_size, spatial=spatial).double()
    x = x.double()
    torch.testing.assert_close(module(x), permuting(module, x), rtol=1e-12, atol=1e-12)
    module.train()  # batch statistics too
    torch.testing.assert_close(module(x), permuting(module, x), rtol=1e-12, atol=1e-12)


def test_zero_convolutions_give_a_half(x):
    module = _random()
    for gate in (module.cw, module.hc, module.hw):
        nn.init.zeros_(gate.conv.weight)
        nn.init.zeros_(gate.norm.bias)
        gate.norm.running_mean.zero_()
    assert torch.equal(module(x), x / 2)


def test_signs_stay_and_magnitudes_fall(x):
    module = _random()
    y = module(x)
    assert (y.abs() <= x.abs()).all() and torch.equal(y.sign(), x.sign())
    for gate in module.gates(x):
        assert ((gate > 0) & (gate < 1)).all()
    assert torch.equal(y, x * module.gate(x))


def test_height_and_width_exchange_with_their_kernels(x):
    module, turned = _random(), _random()
    for ours, theirs in (("cw", "hc"), ("hc", "cw"), ("hw", "hw")):
        state = getattr(module, theirs).state_dict()
        getattr(turned, ours).load_state_dict({**state, "conv.weight": state["conv.weight"].transpose(2, 3)})
    torch.testing.assert_close(turned(x.transpose(2, 3)), module(x).transpose(2, 3))


def test_without_the_spatial_gate(x):
    full, part = _random(), _random(spatial=False)
    part.load_state_dict({name: t for name, t in full.state_dict().items() if not name.startswith("hw.")})
    torch.testing.assert_close(2 * part(x) + x * full.gates(x)[2], 3 * full(x))


def test_order_of_channels_matters(x):
    module, order = _random(), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert not torch.allclose(module(x[:, order]), module(x)[:, order], atol=1e-3)
    # rows and columns, too: every axis is slid over
    assert not torch.allclose(module(x.roll(3, 2)), module(x).roll(3, 2), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 1, 3), (2, 1, 4, 4)])
def test_one_module_takes_any_map(shape):
    x = torch.randn(shape)
    assert _random()(x).shape == x.shape


def test_memory_format_stays_and_the_input_is_not_changed(x):
    module, kept = _random(), x.clone()
    flat = module(x)
    last = module(x.contiguous(memory_format=torch.channels_last))
    assert flat.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, flat)
    assert torch.equal(x, kept)


def test_parameters():
    assert sum(p.numel() for p in TripletAttention(256).parameters()) == 300
    assert sum(p.numel() for p in TripletAttention(16, 3, spatial=False).parameters()) == 2 * (18 + 2)


def test_digits_on_noise():
    images, labels = torch.full((3, 1, 8, 8), 100.0), torch.tensor([4, 5, 6])
    image, label = digits_on_noise(images, labels, 5, torch.Generator().manual_seed(0))
    assert image.shape == (5, 1, 20, 20) and ((image > 100).sum((1, 2, 3)) == 64).all()
    assert set(label.tolist()) <= {4, 5, 6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kernel_size": 4}, "kernel_size must be odd, got 4"), ({"channels": 0}, "channels must be positive, got 0")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        saccade.create("triplet", **arguments)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(batch, 8, height, width\), got \(2, 4, 5, 5\)"):
        TripletAttention(8)(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match="x must be"):
        TripletAttention()(torch.randn(4, 5, 5))
