"""Scores of segmentation and saliency, against values by hand."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.train.metrics.segmentation import (
    boundary,
    boundary_f,
    max_f,
    mean_absolute_error,
    mean_dice,
    mean_iou,
    s_measure,
)


def square(top: int, left: int, side: int, size: int = 12) -> torch.Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.long)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def test_iou_and_dice_are_over_all_pixels_and_the_classes_there_are() -> None:
    truth, found = torch.tensor([[0, 0, 1, 1, 4, 4]]), torch.tensor([[0, 1, 1, 1, 4, 0]])
    assert mean_iou(found, truth) == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert mean_dice(found, truth) == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)
    assert mean_iou(truth, truth) == mean_dice(truth, truth) == 1
    # a class that is found and nowhere true counts 0
    assert mean_iou(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0])) == pytest.approx((2 / 3 + 0) / 2)


def test_boundary_pixels() -> None:
    mask = square(3, 4, 4)[0][None] == 1
    ring = boundary(mask)
    assert int(ring.sum()) == 12 and not ring[0, 4:6, 5:7].any() and not (ring & ~mask).any()
    assert not boundary(torch.ones(1, 5, 5, dtype=torch.bool)).any()  # the edge of the image is none
    corner = torch.zeros(1, 5, 5, dtype=torch.bool)
    corner[:, :2, :2] = True
    assert boundary(corner)[0].nonzero().tolist() == [[0, 1], [1, 0], [1, 1]]


def test_boundaries_are_matched_within_the_distance() -> None:
    truth = square(3, 3, 5)
    assert boundary_f(truth, truth) == 1
    assert boundary_f(square(3, 4, 5), truth) == 1  # a pixel aside
    far = square(3, 8, 3)
    # by all pairs of boundary pixels; and of the square itself by hand: of the 8 pixels of the found ring the 3 at
    # column 8 lie beside the true one, of whose 16 pixels the 3 of column 7 beside those are reached
    expected = []
    for k in (0, 1):
        found_at, true_at = (boundary(x == k)[0].nonzero().double() for x in (far, truth))
        near = torch.cdist(found_at, true_at) <= 1
        precision, recall = near.any(1).double().mean(), near.any(0).double().mean()
        expected.append(2 * precision * recall / (precision + recall))
    assert boundary_f(far, truth) == pytest.approx(float(sum(expected) / 2))
    p, r = 3 / 8, 3 / 16
    assert float(expected[1]) == pytest.approx(2 * p * r / (p + r))
    # two pixels aside, with more tolerance
    assert boundary_f(square(3, 5, 5), truth) < boundary_f(square(3, 5, 5), truth, tolerance=2.1 / math.hypot(12, 12))


def test_boundaries_of_one_side_only_count_nothing_and_of_none_are_left_out() -> None:
    empty, truth = torch.zeros(1, 12, 12, dtype=torch.long), square(3, 3, 5)
    assert boundary_f(empty, truth) == 0
    both = torch.cat([empty, truth])
    assert boundary_f(both, both) == 1  # the image without boundaries does not count
    with pytest.raises(ValueError, match="must have a boundary"):
        boundary_f(empty, empty)


def test_mean_absolute_error() -> None:
    assert mean_absolute_error(torch.tensor([[[0.25, 1.0]]]), torch.tensor([[[0, 1]]])) == 0.125


def test_max_f_is_taken_over_thresholds_of_mean_precision_and_recall() -> None:
    truth = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]])
    found = torch.tensor([[[1.0, 0.4, 0.4, 0.0]], [[0.4, 0.8, 0.0, 0.0]]])
    # above 0.8: P (1 + 0) / 2, R (1/2 + 0) / 2; at 0.8: P (1 + 0) / 2; at 0.4: P (2/3 + 1/2) / 2, R 1; at 0: P 3/8, R 1
    pairs = [(1 / 2, 1 / 4), (7 / 12, 1.0), (3 / 8, 1.0)]
    assert max_f(found, truth) == pytest.approx(max(1.3 * p * r / (0.3 * p + r) for p, r in pairs))
    assert max_f(truth.float(), truth) == pytest.approx(1)
    levels = (torch.arange(256) / 255).view(1, 16, 16)  # every grey value is at its own threshold
    for t in (0, 1, 100, 254, 255):
        assert max_f(levels, (levels >= t / 255).long()) == pytest.approx(1)
    # an image without a true pixel is left out
    more = torch.cat([found, torch.rand(1, 1, 4)]), torch.cat([truth, torch.zeros(1, 1, 4, dtype=torch.long)])
    assert max_f(*more) == pytest.approx(max_f(found, truth))
    with pytest.raises(ValueError, match="pixel that is 1"):
        max_f(found, torch.zeros_like(truth))


def test_s_measure_at_its_limits() -> None:
    torch.manual_seed(0)
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    map_ = torch.rand(1, 8, 8)
    assert s_measure(map_, truth) == pytest.approx(1 - float(map_.mean()))
    assert s_measure(map_, truth + 1) == pytest.approx(float(map_.mean()))
    truth[:, 2:6, 2:6] = 1
    assert s_measure(truth.float(), truth) == pytest.approx(1)
    assert s_measure(1 - truth.float(), truth) == 0


def test_s_measure_by_hand() -> None:
    """Four by four, the left half true: the centroid lies behind row 3 and column 2 (rounded up from 2.5 and 1.5)."""
    truth = torch.zeros(1, 4, 4, dtype=torch.long)
    truth[:, :, :2] = 1
    map_ = torch.zeros(1, 4, 4)
    map_[:, :, 0], map_[:, :, 1], map_[:, 0, 2] = 0.8, 0.6, 0.4
    on = torch.tensor([0.8] * 4 + [0.6] * 4, dtype=torch.double)
    off = 1 - torch.tensor([0.4] + [0.0] * 7, dtype=torch.double)
    objects = 0.5 * 2 * 0.7 / (0.7**2 + 1 + on.std().item())
    objects += 0.5 * 2 * 0.95 / (0.95**2 + 1 + off.std().item())
    # left parts: the truth is constant, so there is no covariance: 0; right above: likewise 0; right below: both are 0
    # everywhere, so 1, of 2 pixels
    assert s_measure(map_, truth) == pytest.approx(0.5 * objects + 0.5 * 2 / 16, rel=1e-6)
    assert s_measure(map_, truth, alpha=1.0) == pytest.approx(objects, rel=1e-6)


def test_s_measure_of_a_part() -> None:
    """The similarity of a part is the product of luminance and of contrast with structure, as in SSIM."""
    torch.manual_seed(1)
    truth = torch.zeros(1, 6, 6, dtype=torch.long)
    truth[:, 1:5, 1:5] = 1  # the centroid is in the middle: four parts of 3 x 3, or as rounded
    map_ = torch.rand(1, 6, 6).double()
    total = 0.0
    for rows in (slice(None, 4), slice(4, None)):
        for columns in (slice(None, 4), slice(4, None)):
            x, y = map_[0, rows, columns].flatten(), truth[0, rows, columns].flatten().double()
            covariance = torch.cov(torch.stack([x, y]))
            light = 2 * x.mean() * y.mean() / (x.mean() ** 2 + y.mean() ** 2)
            structure = 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1])
            total += len(x) / 36 * float(light * structure)
    assert s_measure(map_, truth, alpha=0.0) == pytest.approx(max(0.0, total))


def test_shapes_must_agree() -> None:
    for score in (mean_iou, boundary_f, mean_absolute_error, max_f, s_measure):
        with pytest.raises(ValueError, match="of one shape, got"):
            score(torch.zeros(1, 3, 3), torch.zeros(1, 3, 4))
