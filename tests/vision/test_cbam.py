"""CBAM: the card's invariants, its block and its initialisation, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import saccade
from saccade.catalogue import part
from saccade.ops.statistics import STATISTICS, channel_gate
from saccade.train.lab import Lab
from saccade.vision.cbam import CBAM, POOLS, BasicBlock, Bottleneck, initialize
from saccade.vision.cbam.claim import shapes


@pytest.fixture
def x():
    return torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(0))


def _random(**arguments):
    torch.manual_seed(1)
    gate = CBAM(16, 4, **arguments)
    if gate.norm is not None:
        nn.init.normal_(gate.norm.weight)
        nn.init.normal_(gate.norm.bias)
    return gate.eval()


def test_zero_weights_give_a_quarter(x):
    gate = _random()
    for parameter in (gate.expand.weight, gate.expand.bias, gate.conv.weight, gate.norm.bias):
        nn.init.zeros_(parameter)
    assert torch.equal(gate(x), x / 4)


def test_average_pooling_alone_is_squeeze_and_excitation(x):
    gate = _random(pool_types=["avg"], spatial=False)
    hidden = F.relu(F.linear(x.mean((2, 3)), gate.reduce.weight, gate.reduce.bias))
    excitation = torch.sigmoid(F.linear(hidden, gate.expand.weight, gate.expand.bias))
    torch.testing.assert_close(gate(x), x * excitation[:, :, None, None])


def test_poolings_are_those_of_the_card(x):
    torch.testing.assert_close(STATISTICS["lp"](x, (2, 3), False), F.lp_pool2d(x, 2, kernel_size=(9, 7))[..., 0, 0])
    torch.testing.assert_close(STATISTICS["max"](x, (2, 3), False), F.max_pool2d(x, (9, 7))[..., 0, 0])
    torch.testing.assert_close(STATISTICS["lse"](x, (2, 3), False), x.double().exp().sum((2, 3)).log().float())
    assert STATISTICS["lse"](x + 200, (2, 3), False).isfinite().all()
    gates = {pool: channel_gate(x, lambda z: z / 8, [pool]) for pool in POOLS}
    both = channel_gate(x, lambda z: z / 8, list(POOLS))
    torch.testing.assert_close(both.logit(), sum(gate.logit() for gate in gates.values()), rtol=1e-3, atol=1e-3)


def test_channel_gate_does_not_see_positions(x):
    gate = _random(spatial=False)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(2))
    moved = x.flatten(2)[..., order].reshape(x.shape)
    torch.testing.assert_close(gate(moved), gate(x).flatten(2)[..., order].reshape(x.shape))


def test_gates_lie_between_zero_and_one(x):
    gate = _random()
    factor = gate.gate(x)
    assert ((factor > 0) & (factor < 1)).all()
    y = gate(x)
    assert (y.abs() <= x.abs()).all() and torch.equal(y.sign(), x.sign())
    torch.testing.assert_close(y, x * factor)
    plain = _random(spatial=False)
    torch.testing.assert_close(plain(x), x * plain.gate(x))


def test_constant_input_counts_the_mlp_twice():
    gate = _random()
    x = torch.randn(2, 16, 1, 1).expand(2, 16, 5, 4)
    mlp = gate.expand(F.relu(gate.reduce(x[..., 0, 0])))
    torch.testing.assert_close(gate.channel_gate(x)[..., 0, 0], torch.sigmoid(2 * mlp))


def test_spatial_gate_does_not_see_the_order_of_channels(x):
    gate = _random()
    torch.testing.assert_close(gate.spatial_gate(x[:, torch.randperm(16)]), gate.spatial_gate(x))


def test_authors_initialisation_opens_the_spatial_gate_halfway(x):
    gate = initialize(CBAM(16, 4))
    before = gate.train()(x)
    assert torch.equal(gate.spatial_gate(x), torch.full((2, 1, 9, 7), 0.5))
    before.sum().backward()
    assert gate.norm.weight.grad.abs().item() > 0
    nn.init.normal_(gate.conv.weight)
    assert torch.equal(gate(x), before)
    block = initialize(Bottleneck(16, 4))
    assert (block.gate.norm.weight == 0).all() and (block.norm3.weight == 1).all()


def test_parameters_are_as_many_as_the_card_says():
    assert sum(p.numel() for p in CBAM(64).parameters()) == 2 * 64 * 4 + 4 + 64 + 2 * 49 + 2


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks(block, stride):
    torch.manual_seed(0)
    module = block(16, 16, stride).eval()
    x = torch.randn(2, 16, 7, 5)
    y = module(x)
    out = 16 * getattr(block, "expansion", 1)
    assert y.shape == (2, out, -(-7 // stride), -(-5 // stride)) and (y >= 0).all()
    torch.testing.assert_close(y, F.relu(module.gate(module.branch(x)) + module.shortcut(x)))
    assert isinstance(block(16, 16, gate=None).gate, nn.Identity)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(x, memory_format):
    gate, x = _random(), x.contiguous(memory_format=memory_format)
    assert gate(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (2, 3), (17, 5)])
def test_any_size(size):
    x = torch.randn(2, 16, *size, requires_grad=True)
    y = _random(pool_types=tuple(POOLS))(x)
    y.square().sum().backward()
    assert y.shape == x.shape and x.grad.isfinite().all()


def test_gradients_in_double():
    gate = _random(pool_types=tuple(POOLS)).double()
    assert torch.autograd.gradcheck(gate, torch.randn(1, 16, 3, 2, dtype=torch.double, requires_grad=True))


def test_zero_map_has_finite_gradients():
    x = torch.zeros(1, 16, 4, 4, requires_grad=True)
    _random(pool_types=tuple(POOLS))(x).sum().backward()
    assert x.grad.isfinite().all()


def test_half_precision(x):
    gate = _random()
    want = gate(x)
    got = gate.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("module", ["cbam", "bottleneck"])
def test_equals_the_authors_code(module):
    port = saccade.catalogue.port("cbam", module)
    with safe_open(f"tests/golden/cbam/{module}.a.safetensors", "pt") as file:
        import json

        args = json.loads(file.metadata()["args"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    group = {
        kind: {k[len(kind) + 1 :]: t for k, t in tensors.items() if k.startswith(kind + ".")}
        for kind in ("param", "input", "output")
    }
    ours = port.build(args).eval()
    ours.load_state_dict(port.convert(group["param"]))
    got = port.run(ours, group["input"], args)
    for name, want in group["output"].items():
        assert (got[name] - want).abs().max() <= 1e-5 * want.abs().max()


def test_port_takes_the_authors_other_arguments():
    port = saccade.catalogue.port("cbam", "cbam")
    gate = port.build({"gate_channels": 32, "pool_types": ["lp", "lse"], "no_spatial": True})
    assert gate.conv is None and gate.pool_types == ("lp", "lse") and gate.reduce.out_features == 2
    block = saccade.catalogue.port("cbam", "bottleneck").build({"inplanes": 32, "planes": 16, "stride": 2})
    assert isinstance(block.gate, nn.Identity) and len(block.shortcut) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be positive, got 0"),
        ({"channels": 8}, r"reduction must be between 1 and the number of channels \(8\), got 16"),
        ({"channels": 16, "reduction": 0}, "reduction must be"),
        ({"channels": 16, "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"channels": 16, "pool_types": ()}, "pool_types must be some of avg, max, lp, lse"),
        ({"channels": 16, "pool_types": ("avg", "median")}, "pool_types must be some of"),
        ({"channels": 16, "pool_types": "avg"}, "pool_types must be some of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CBAM(**arguments)


def test_bad_input(x):
    with pytest.raises(ValueError, match=r"x must be \(batch, 16, height, width\), got \(2, 8, 9, 7\)"):
        CBAM(16)(x[:, :8])
    with pytest.raises(ValueError, match="x must be"):
        CBAM(16).gate(x[0])
    with pytest.raises(ValueError, match="has no spatial gate"):
        CBAM(16, spatial=False).spatial_gate(x)


def test_shapes_lie_where_the_map_says():
    image, label, where = shapes(64, torch.Generator().manual_seed(0))
    assert image.shape == where.shape == (64, 1, 32, 32)
    lit = where.sum((1, 2, 3))
    assert {25.0, 13.0, 24.0, 28.0} == set(lit.tolist()) and torch.equal(lit, torch.tensor([25, 13, 24, 28.0])[label])


def test_claim_runs():
    pytest.importorskip("saccade.train.loop")
    result = part("cbam").claim.run(Lab(smoke=True))
    assert result.measured["spatial_gate_on_shape_over_off_ratio"] > 0
