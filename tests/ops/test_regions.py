"""RoIAlign beside its definition, point by point; boxes and what is kept of them."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.ops.boxes import area, suppress, suppress_each, to_centres, to_corners, union_shares
from saccade.ops.deformable import roi_align
from saccade.ops.deformable.regions import box_levels


def _bilinear(x_CHW: torch.Tensor, row: float, column: float) -> torch.Tensor:
    height, width = x_CHW.shape[1:]
    if not (-1 <= row <= height and -1 <= column <= width):
        return torch.zeros_like(x_CHW[:, 0, 0])
    row, column = min(max(row, 0.0), height - 1.0), min(max(column, 0.0), width - 1.0)
    r, c = int(row), int(column)
    r1, c1, a, b = min(r + 1, height - 1), min(c + 1, width - 1), row - r, column - c
    top = (1 - b) * x_CHW[:, r, c] + b * x_CHW[:, r, c1]
    return (1 - a) * top + a * ((1 - b) * x_CHW[:, r1, c] + b * x_CHW[:, r1, c1])


def _reference(maps, boxes_BN4, strides, size, samples):
    out = torch.zeros(*boxes_BN4.shape[:2], maps[0].shape[1], size, size, dtype=maps[0].dtype)
    for b, boxes in enumerate(boxes_BN4.tolist()):
        for n, (x0, y0, x1, y1) in enumerate(boxes):
            side = math.sqrt(max(x1 - x0, 0) * max(y1 - y0, 0))
            level = min(max(math.floor(math.log2(16 / strides[0] * (side / 224 + 1e-8))), 0), len(maps) - 1)
            x, stride = maps[level][b], strides[level]
            for i in range(size):
                for j in range(size):
                    for s in range(samples * samples):
                        row = y0 + (y1 - y0) * (i + (s // samples + 0.5) / samples) / size
                        column = x0 + (x1 - x0) * (j + (s % samples + 0.5) / samples) / size
                        out[b, n, :, i, j] += _bilinear(x, row / stride - 0.5, column / stride - 0.5) / samples**2
    return out


def _pyramid(sizes=((9, 7), (5, 4), (1, 1)), channels=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, *size, dtype=torch.double, generator=generator) for size in sizes]


@pytest.mark.parametrize(("size", "samples"), [(1, 1), (3, 2), (2, 3)])
def test_roi_align_is_its_definition(size: int, samples: int) -> None:
    maps, strides = _pyramid(), (32, 64, 128)
    corner = 400 * torch.rand(2, 6, 2, dtype=torch.double, generator=torch.Generator().manual_seed(1)) - 90
    extent = torch.tensor([3.0, 60.0, 700.0, 1300.0, 2600.0, 0.0], dtype=torch.double)[:, None] * torch.tensor([1, 0.7])
    boxes = torch.cat([corner, corner + extent], -1)
    assert box_levels(boxes, strides).unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(roi_align(maps, boxes, strides, size, samples=samples),
                               _reference(maps, boxes, strides, size, samples))  # fmt: skip


def test_roi_align_has_the_derivatives_of_its_definition() -> None:
    maps = [x.requires_grad_() for x in _pyramid(((4, 3), (2, 2)), channels=2)]
    boxes = torch.tensor([[[3.3, 5.1, 37.7, 61.9]], [[10.2, 20.4, 300.6, 301.9]]], dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, boxes: roi_align([a, b], boxes, (16, 32), 2), (*maps, boxes))


def test_roi_align_of_half_precision_and_of_no_boxes() -> None:
    maps, boxes = _pyramid(((8, 8),)), torch.tensor([[[1.0, 2, 50, 60]]] * 2)
    half = roi_align([maps[0].bfloat16()], boxes.bfloat16(), (8,), 3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), roi_align(maps, boxes.double(), (8,), 3), atol=0.05, rtol=0.05)
    assert roi_align(maps, boxes[:, :0], (8,), 3).shape == (2, 0, 3, 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": (8, 32)}, "strides must be one for each of 2 maps, each twice the one before"),
        ({"strides": (8,)}, "strides must be one for each of 2 maps"),
        ({"boxes_BN4": torch.zeros(1, 2, 4)}, r"boxes must be \(2, boxes, 4\), got \(1, 2, 4\)"),
        ({"maps": [torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 2, 2)]}, "maps must be"),
        ({"size": 0}, "size and samples must be positive, got 0 and 2"),
    ],
)
def test_roi_align_refuses(changes, message) -> None:
    given = {"maps": _pyramid(((4, 4), (2, 2))), "boxes_BN4": torch.zeros(2, 1, 4), "strides": (8, 16), **changes}
    with pytest.raises(ValueError, match=message):
        roi_align(**given)


def test_boxes_there_and_back() -> None:
    boxes = to_corners(torch.rand(5, 3, 4))
    torch.testing.assert_close(to_corners(to_centres(boxes)), boxes)
    torch.testing.assert_close(area(boxes), to_centres(boxes)[..., 2:].prod(-1))
    assert area(torch.tensor([2.0, 0, 1, 1])) == 0


def test_shares_of_the_union() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 0, 0]])
    b = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [4, 0, 6, 2]])
    torch.testing.assert_close(union_shares(a, b)[0], torch.tensor([1.0, 1 / 7, 0.0]))
    torch.testing.assert_close(union_shares(a, b, generalized=True)[0], torch.tensor([1.0, 1 / 7 - 2 / 9, -4 / 12]))
    assert union_shares(a, b, generalized=True).isfinite().all()
    assert union_shares(a.expand(3, 2, 4), b.expand(3, 3, 4)).shape == (3, 2, 3)


def test_suppression_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = to_corners(torch.rand(60, 4, generator=generator) * torch.tensor([1, 1, 0.5, 0.5]))
    scores, labels = torch.rand(60, generator=generator), torch.randint(2, (60,), generator=generator)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        shares = [float(union_shares(boxes[i : i + 1], boxes[j : j + 1])) for j in kept if labels[j] == labels[i]]
        if all(share <= 0.3 for share in shares):
            kept.append(i)
    assert len(kept) < 60 and suppress(boxes, scores, labels, most=0.3).tolist() == kept
    assert suppress(boxes[:0], scores[:0]).tolist() == []


def test_suppression_of_each_class_is_that_of_one() -> None:
    torch.manual_seed(0)
    low = 10 * torch.rand(40, 2)
    boxes, scores = torch.cat([low, low + 1 + 6 * torch.rand(40, 2)], 1), torch.rand(40, 5).mul(8).round()
    stays = suppress_each(boxes, scores, most=0.3)
    for of_one, column in zip(stays.T, scores.T, strict=True):
        expected = torch.zeros(40, dtype=torch.bool)
        expected[suppress(boxes, column, most=0.3)] = True
        assert torch.equal(of_one, expected) and 0 < expected.sum() < 40
    assert suppress_each(boxes[:0], scores[:0]).shape == (0, 5)
