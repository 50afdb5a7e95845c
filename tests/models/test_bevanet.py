"""BEVANet: its parts at their limits, sizes, loss and bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from saccade.models.bevanet import (
    BGAF,
    CKS,
    DLKPPM,
    EVA,
    LSKA,
    SDLSKA,
    BEVANet,
    PagFM,
    Segmentation,
    boundaries,
    hard_cross_entropy,
    segmentation_loss,
)
from saccade.models.bevanet.parts import KERNELS

TINY = {"planes": 4, "blocks": (1, 1, 1, 1, 1), "expand": 2, "pyramid_channels": 4, "head_channels": 4}


def test_cks_without_weights_is_a_quarter_of_the_sum() -> None:
    torch.manual_seed(0)
    module = CKS(8).eval()
    for expand in module.expand:
        torch.nn.init.zeros_(expand[2].weight)
        torch.nn.init.zeros_(expand[2].bias)
    torch.nn.init.zeros_(module.squeeze.weight)
    torch.nn.init.zeros_(module.squeeze.bias)
    maps = [torch.randn(2, 8, 5, 4) for _ in range(3)]
    torch.testing.assert_close(module(*maps), sum(maps) / 4)


def test_cks_gates_of_channels_are_a_half_at_least() -> None:
    torch.manual_seed(0)
    module, maps = CKS(8).eval(), [torch.randn(2, 8, 5, 4) for _ in range(3)]
    torch.nn.init.zeros_(module.squeeze.weight)
    torch.nn.init.constant_(module.squeeze.bias, 100)  # every position open
    zero = torch.zeros_like(maps[0])
    for i in range(3):  # one map alone, of one sign, so that its factor can be read off
        alone = [m.abs() + 0.1 if i == j else zero for j, m in enumerate(maps)]
        ratio = module(*alone) / alone[i]
        assert (ratio >= 0.5 - 1e-6).all() and (ratio < 1).all()
        torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))


@pytest.mark.parametrize("kernel_size", sorted(KERNELS))
def test_the_gate_spans_its_kernel(kernel_size: int) -> None:
    """One output of the strips sees a cross of the strips, widened by the small kernel, and nothing else."""
    torch.manual_seed(0)
    module, kernel = SDLSKA(2, kernel_size).double(), KERNELS[kernel_size]
    side = kernel_size + 4
    x = torch.randn(1, 2, side, side, dtype=torch.float64, requires_grad=True)
    small = module.small(x)
    (module.across(small) + module.down(small))[0, 0, side // 2, side // 2].backward()
    assert x.grad is not None
    seen = x.grad[0, 0] != 0
    reach = (kernel.strip - 1) * kernel.dilation + kernel.small
    assert seen.any(0).sum() == reach and seen.any(1).sum() == reach and abs(reach - kernel_size) <= 4
    away = (torch.arange(side) - side // 2).abs() > kernel.small // 2
    assert not (seen & away[:, None] & away[None]).any()
    separable = LSKA(2, kernel_size).double()
    full = torch.zeros_like(x, requires_grad=True)
    separable.down(separable.across(separable.small_down(separable.small_across(full))))[
        0, 0, side // 2, side // 2
    ].backward()
    assert full.grad is not None
    assert (full.grad[0, 0] != 0).any(1).sum() == reach


def test_identities() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 7, 5)
    assert torch.equal(SDLSKA(8, 23, identity_init=True)(x), x)
    block = EVA(8, 7, 2)
    assert not torch.equal(block(x), x)
    torch.nn.init.zeros_(block.scale1)
    torch.nn.init.zeros_(block.scale2)
    assert torch.equal(block(x), x)


def test_start_of_a_block() -> None:
    torch.manual_seed(0)
    block = EVA(64, 35, 4)
    assert (block.scale1 == 1e-2).all() and (block.fc1.bias == 0).all()
    for layer in (block.fc1, block.fc2, block.mix):
        fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1] / layer.groups
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_exchange_of_branches() -> None:
    torch.manual_seed(0)
    module = PagFM(6, 3).eval()
    x, y = torch.randn(1, 6, 8, 10), torch.randn(1, 6, 4, 5)
    up = F.interpolate(y, (8, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(module(up, y), up)
    low, high = torch.minimum(x, up), torch.maximum(x, up)
    out = module(x, y)
    assert ((out >= low - 1e-6) & (out <= high + 1e-6)).all()
    torch.nn.init.zeros_(module.detail[1].weight)
    torch.testing.assert_close(module(x, y), (x + up) / 2)


def test_boundary_decides() -> None:
    torch.manual_seed(0)
    module, p, i = BGAF(4).eval(), torch.randn(1, 4, 6, 5), torch.randn(1, 4, 6, 5)
    detail, semantic = module.detail(p), module.semantic(i)
    on, off = (torch.full((1, 4, 6, 5), value) for value in (1e4, -1e4))
    torch.testing.assert_close(module.fuse(p, i, on), 2 * detail + semantic)
    torch.testing.assert_close(module.fuse(p, i, off), detail + 2 * semantic)
    assert BGAF(4, 7)(p, i, on).shape == (1, 7, 6, 5)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (11, 14)])
def test_pyramid_keeps_its_size(size: tuple[int, int]) -> None:
    module = DLKPPM(8, 4, 6).eval()
    assert module(torch.randn(1, 8, *size)).shape == (1, 6, *size)


def test_network() -> None:
    torch.manual_seed(0)
    model, x = BEVANet(3, **TINY), torch.randn(2, 3, 70, 64)
    out = model(x)
    assert out.logits.shape == (2, 3, 70, 64)
    assert out.auxiliary.shape == (2, 3, 9, 8) and out.boundary.shape == (2, 1, 9, 8)
    maps = model.features(x)
    for stride, channels, m in zip(model.strides, model.channels, maps, strict=True):
        assert m.shape == (2, channels, -(-70 // stride), 64 // stride)
    assert model.eval()(x).auxiliary is None
    plain = BEVANet(3, **TINY, semantic_kernels=(0, 0, 0), detail_kernels=(0, 0))
    assert plain(x).logits.shape == out.logits.shape
    assert not any(isinstance(m, EVA) for m in plain.modules())


@pytest.mark.parametrize("size", [(1, 1), (5, 33)])
def test_small_images(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    out = BEVANet(3, **TINY).eval()(torch.randn(1, 3, *size))
    assert out.logits.shape == (1, 3, *size) and out.logits.isfinite().all()


def test_camvid_flops() -> None:
    """The 20.1 thousand million multiply-adds at 960 x 720; norms and biases are not counted here."""
    with torch.device("meta"):
        model, x = BEVANet(11).eval(), torch.empty(1, 3, 720, 960)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(20.1, rel=0.0105)


def test_boundaries_are_where_labels_change() -> None:
    label = torch.zeros(1, 12, 12, dtype=torch.long)
    label[:, :, 6:] = 1
    edge = boundaries(label)
    assert edge.shape == label.shape and set(edge.unique().tolist()) == {0.0, 1.0}
    assert edge[0, :, 4:8].all() and edge.sum() == 4 * 12
    assert not boundaries(torch.ones(1, 5, 5, dtype=torch.long)).any()


def test_hard_pixels() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(1, 4, 6, 6), torch.randint(4, (1, 6, 6))
    labels[0, 0] = -100
    each = F.cross_entropy(logits, labels, reduction="none")[:, 1:]
    torch.testing.assert_close(hard_cross_entropy(logits, labels, keep=1), each[each.neg().exp() < 0.9].mean())
    # where all are sure, the worst few are kept: those below the k-th
    sure = torch.randn(1, 4, 6, 6) + 20 * F.one_hot(labels.clamp(min=0), 4).movedim(-1, 1)
    each = F.cross_entropy(sure.double(), labels, reduction="none")[:, 1:].flatten()
    found = hard_cross_entropy(sure.double(), labels, threshold=0.0, keep=5)
    torch.testing.assert_close(found, each.topk(4).values.mean())
    assert hard_cross_entropy(logits, torch.full_like(labels, -100)) == 0


def test_loss() -> None:
    torch.manual_seed(0)
    model, x = BEVANet(3, **TINY), torch.randn(2, 3, 64, 64)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 20:] = 1
    loss = segmentation_loss(model(x), labels)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    right = F.one_hot(labels, 3).movedim(-1, 1) * 20.0
    edge = boundaries(labels)[:, None] * 40 - 20
    assert segmentation_loss(Segmentation(right, right, edge), labels) < 1e-3
    with pytest.raises(ValueError, match="training"):
        segmentation_loss(model.eval()(x), labels)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        SDLSKA(8, 9)
    with pytest.raises(ValueError, match="expand"):
        EVA(8, 7, 0)
    with pytest.raises(ValueError, match="five"):
        BEVANet(3, blocks=(1, 1))
    with pytest.raises(ValueError, match="kernels"):
        BEVANet(3, semantic_kernels=(0, 35))
    with pytest.raises(ValueError, match="images"):
        BEVANet(3, **TINY)(torch.randn(1, 1, 8, 8))
