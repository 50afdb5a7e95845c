"""The measures of image fusion on values computed by hand; and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from saccade.cli import main
from saccade.models.images import to_picture
from saccade.train.metrics import fusion as measures
from saccade.train.metrics.fusion import METRICS, fusion_metrics

HALVES = torch.tensor([[0.0, 0.0, 255.0, 255.0]] * 4, dtype=torch.float64)  # left dark, right bright
ACROSS = HALVES.T.contiguous()  # above dark, below bright
FLAT = torch.full((4, 4), 100.0, dtype=torch.float64)


def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = torch.rand(2, 48, 44).double().mul(255).round() / 255
    return a, b, ((a + b) * 127.5).round() / 255


def test_entropy() -> None:
    assert measures.entropy(FLAT) == 0
    assert measures.entropy(HALVES) == pytest.approx(1)
    assert measures.entropy(torch.arange(256.0).view(16, 16)) == pytest.approx(8)
    # three quarters and a quarter: 2 - 3/4 log2 3
    assert measures.entropy(torch.tensor([[1.0, 1.0], [1.4, 9.0]])) == pytest.approx(2 - 0.75 * math.log2(3))


def test_spatial_frequency_gradient_and_deviation() -> None:
    x = torch.tensor([[1.0, 4.0], [1.0, 8.0], [3.0, 8.0]])
    # along rows 3, 7, 5; along columns 0, 2, 4, 0
    assert measures.spatial_frequency(x) == pytest.approx(math.sqrt((9 + 49 + 25) / 6 + (4 + 16) / 6))
    # of the upper two of the left column: (3, 0), (7, 2)
    assert measures.average_gradient(x) == pytest.approx((math.sqrt(9 / 2) + math.sqrt(53 / 2)) / 2)
    assert measures.standard_deviation(HALVES) == pytest.approx(127.5)
    assert measures.spatial_frequency(FLAT) == measures.average_gradient(FLAT) == measures.standard_deviation(FLAT) == 0


def test_mutual_information() -> None:
    assert measures.mutual_information(HALVES, HALVES) == pytest.approx(1)
    assert measures.mutual_information(HALVES, 255 - HALVES) == pytest.approx(1)  # one tells the other
    assert measures.mutual_information(HALVES, ACROSS) == pytest.approx(0, abs=1e-12)  # a quarter each: independent
    # joint (0, 0) 1/2, (1, 0) 1/4, (1, 1) 1/4: H(A) = 1, H(B) = 2 - 3/4 log2 3, H(A, B) = 3/2
    a, b = torch.tensor([[0.0, 0, 255, 255]]), torch.tensor([[0.0, 0, 0, 255]])
    information = 1 + (2 - 0.75 * math.log2(3)) - 1.5
    assert measures.mutual_information(a, b) == pytest.approx(information)
    found = measures.normalised_mutual_information(a, b)
    assert found == pytest.approx(2 * information / (3 - 0.75 * math.log2(3)))
    assert measures.normalised_mutual_information(FLAT, FLAT) == 0


def test_joint_distributions_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5]]).double()
    torch.testing.assert_close(
        measures.joint_distribution(p, p), torch.full((1, 2, 2), 0.25).double()
    )  # no correlation
    p, q = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).double(), torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double()
    # the values correlate by 1 and -1, and so do the extremes: pixel 1 of both has 0.75, and 0.75 + 0.25 - 1 = 0
    expected = torch.tensor([[[0.75, 0.0], [0.0, 0.25]], [[0.0, 0.75], [0.25, 0.0]]]).double()
    torch.testing.assert_close(measures.joint_distribution(p, q), expected)
    # correlation of values 1 with marginals that do not reach it: nothing but the extreme
    p, q = torch.tensor([[0.75, 0.25]]).double(), torch.tensor([[0.9, 0.1]]).double()
    expected = torch.tensor([[[0.75, 0.0], [0.15, 0.1]]]).double()
    torch.testing.assert_close(measures.joint_distribution(p, q), expected)


def test_joint_distributions_have_their_marginals() -> None:
    torch.manual_seed(0)
    p, q = torch.rand(2, 500, 9).double().pow(3)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    joint = measures.joint_distribution(p, q)
    assert joint.min() >= 0
    torch.testing.assert_close(joint.sum(2), p)
    torch.testing.assert_close(joint.sum(1), q)


def test_feature_mutual_information() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 20, 24).double() * 255
    assert measures.feature_mutual_information(a, a) == pytest.approx(1)
    assert measures.feature_mutual_information(a, 3 * a - 20) == pytest.approx(1)  # strengths in proportion
    assert 0 < measures.feature_mutual_information(a, b) < 0.5
    assert measures.feature_mutual_information(FLAT, FLAT + 1) == 1  # the same distributions
    assert measures.feature_mutual_information(FLAT, HALVES) == pytest.approx(0, abs=1e-12)  # all alike: no correlation


def test_edges_kept() -> None:
    def sigmoid(x: float, most: float, slope: float, middle: float) -> float:
        return most / (1 + math.exp(slope * (x - middle)))

    whole = sigmoid(1, 0.9994, -15, 0.5) * sigmoid(1, 0.9879, -22, 0.8)
    assert whole == pytest.approx(0.9748, abs=1e-4)
    assert measures.edges_kept(HALVES, HALVES, HALVES) == pytest.approx(whole)
    assert measures.edges_kept(HALVES, FLAT, 255 - HALVES) == pytest.approx(whole)  # the other way round: as strong
    # half as strong and where it was: G = 1/2, sigmoid 0.9994 / 2
    assert measures.edges_kept(HALVES, FLAT, HALVES / 2) == pytest.approx(
        0.9994 / 2 * whole / sigmoid(1, 0.9994, -15, 0.5)
    )
    # nothing kept: where the fused image has no edge, G = 0, and its orientation is taken as pi/2
    lost = sigmoid(0, 0.9994, -15, 0.5) * sigmoid(0, 0.9879, -22, 0.8)
    assert measures.edges_kept(HALVES, HALVES, FLAT) == pytest.approx(lost, rel=1e-6) and lost < 1e-9
    assert measures.edges_kept(FLAT, FLAT, HALVES) == 0


def test_correlations_of_differences() -> None:
    # F = A + B: F - B is A, F - A is B
    assert measures.correlations_of_differences(HALVES, ACROSS, HALVES + ACROSS) == pytest.approx(2)
    # F = A: F - B = A - B; of two independent halves r(A - B, A) = 1 / sqrt 2, and F - A is nothing
    assert measures.correlations_of_differences(HALVES, ACROSS, HALVES) == pytest.approx(1 / math.sqrt(2))
    assert measures.correlations_of_differences(FLAT, FLAT, FLAT) == 0


def test_those_of_torchmetrics() -> None:
    a, b, _ = scene()
    found = fusion_metrics(a, b, a, names=("VIF", "SSIM", "PSNR"))
    error = ((a - b) * 255).square().mean().item() / 2
    assert found["PSNR"] == pytest.approx(10 * math.log10(255**2 / error))
    assert 0.5 < found["SSIM"] < 0.6 and 0.5 < found["VIF"] < 0.6  # 1 with itself, little with the other
    same = fusion_metrics(a, a, a, names=("VIF", "SSIM", "PSNR"))
    assert same["SSIM"] == pytest.approx(1) and same["VIF"] == pytest.approx(1) and same["PSNR"] == math.inf


def test_any_range_and_any_of_the_shapes() -> None:
    images = scene()
    expected = fusion_metrics(*images)
    assert list(expected) == list(METRICS) and all(math.isfinite(value) for value in expected.values())
    for data_range in (255.0, 4095.0, 0.01):
        found = fusion_metrics(*(image * data_range for image in images), data_range=data_range)
        assert found == pytest.approx(expected, rel=1e-9)
    assert fusion_metrics(*(image[None, None] for image in images)) == expected
    single = fusion_metrics(*(image.float() for image in images))
    assert single == pytest.approx(expected, rel=1e-4)
    a, b, fused = images
    assert fusion_metrics(b, a, fused) == pytest.approx(expected)  # no input is the first


def test_refusals() -> None:
    a, b, fused = scene()
    for arguments, options, message in (
        ((a, b, fused[:-1]), {}, "must have one size, got 44 x 48, 44 x 48, 44 x 47"),
        ((a[:40], b[:40], fused[:40]), {}, r"at least 41, got \(40, 44\)"),
        ((a, b.expand(3, -1, -1), fused), {}, "b must be one grey image"),
        ((a, b, fused / 0), {}, "fused must be finite"),
        ((a, b, fused), {"data_range": 0.0}, "data_range must be positive"),
        ((a, b, fused), {"names": ("EN", "LPIPS")}, "names must be among EN, .*, got 'LPIPS'"),
    ):
        with pytest.raises(ValueError, match=message):
            fusion_metrics(*arguments, **options)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, image in zip("abf", scene()):
        to_picture(image.float().expand(3, -1, -1)).save(tmp_path / f"{name}.png")
    to_picture(torch.rand(3, 44, 48)).save(tmp_path / "turned.png")
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["fuse-metrics", *arguments])
    return int(exit_.value.code or 0), *capsys.readouterr()


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "a.png", "b.png", "f.png")
    assert code == 0 and not err and all(name in out for name in METRICS)
    code, out, _ = said(capsys, "a.png", "b.png", "f.png", "--json")
    assert code == 0 and json.loads(out) == pytest.approx(fusion_metrics(*scene()), rel=1e-4)
    code, out, _ = said(capsys, "a.png", "a.png", "a.png", "--json")
    assert code == 0 and json.loads(out)["PSNR"] is None  # no number is infinite in JSON


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.png", "b.png", "none.png"), "no image at none.png"),
        (("a.png", "text.png", "f.png"), "text.png is no image"),
        (("a.png", "b.png", "turned.png"), "must have one size, got 44 x 48, 44 x 48, 48 x 44"),
        (("a.png", "b.png"), "Missing argument"),
    ],
)
def test_bad_requests_are_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = said(capsys, *arguments)
    assert code == 2 and not out and len(err.splitlines()) == 1 and message in err
