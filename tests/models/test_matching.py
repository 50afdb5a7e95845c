"""What networks that match have in common: points in pixels of the file, answers, pictures, CSV, COLMAP's text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.models.images import to_picture
from saccade.models.matching import Matcher, MatchOutput, check_pair, colmap_text, csv_text, in_image
from saccade.report import predictions


class Still(Matcher):
    """Three points, or none, where they were."""

    longest = 64

    def __init__(self, points: int = 3) -> None:
        super().__init__()
        self.sure = torch.nn.Parameter(torch.tensor([0.2, 0.9, 0.4])[:points])

    def forward(self, image0: Tensor, image1: Tensor) -> MatchOutput:
        check_pair(image0, image1, 1, 8)
        points = torch.tensor([[0.0, 0.0], [8.0, 16.0], [31.0, 15.0]])[: len(self.sure)]
        return MatchOutput(points, points.clone(), self.sure, torch.zeros(len(points), dtype=torch.long))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    torch.manual_seed(0)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, ((64, 128), (40, 52))):
        to_picture(torch.rand(3, *size)).save(path)
    return paths


def test_points_are_in_pixels_of_the_files_and_the_surest_first(files: list[Path]) -> None:
    model = Still()
    output = model.predict(files)
    # 128 x 64 is seen as 64 x 32, 52 x 40 as 48 x 40
    first, second, sure = output.of(0)
    assert sure.tolist() == pytest.approx([0.9, 0.4, 0.2])
    torch.testing.assert_close(first[0], torch.tensor([8.5 * 2 - 0.5, 16.5 * 2 - 0.5]))
    torch.testing.assert_close(second[0], torch.tensor([8.5 * 52 / 48 - 0.5, 16.0]))
    (said,) = model.answer(output)
    assert said["matches"] == "3" and said["median confidence"] == pytest.approx(0.4)
    assert model.picture(output).size == (128 + 52, 64)


def test_no_match_is_an_answer(files: list[Path], tmp_path: Path) -> None:
    model = Still(0)
    output = model.predict(files)
    assert output.keypoints0.shape == (0, 2) and model.answer(output) == [{"matches": "0"}]
    assert model.picture(output).size == (180, 64)
    assert csv_text(output) == "x0,y0,x1,y1,confidence\n"
    predictions.write(model, output, tmp_path / "none.txt", files=files)
    assert (tmp_path / "none.txt").read_text() == "a.png b.png\n\n"


def test_csv_and_what_colmap_reads(files: list[Path], tmp_path: Path) -> None:
    model = Still()
    output = model.predict(files)
    predictions.write(model, output, tmp_path / "out" / "matches.csv", files=files)
    rows = (tmp_path / "out" / "matches.csv").read_text().splitlines()
    assert rows[0] == "x0,y0,x1,y1,confidence" and rows[1].endswith(",0.900000") and len(rows) == 4
    predictions.write(model, output, tmp_path / "out" / "matches.txt", files=files)
    assert (tmp_path / "out" / "matches.txt").read_text() == "a.png b.png\n0 0\n1 1\n2 2\n\n"
    points = (tmp_path / "out" / "a.png.txt").read_text().splitlines()
    assert points[0] == "3 128" and len(points[1].split()) == 4 + 128
    x, y = (float(number) for number in points[1].split()[:2])
    assert (x, y) == (17.0, 33.0)  # the middle of the first pixel is a half
    assert (tmp_path / "out" / "b.png.txt").exists()
    with pytest.raises(ValueError, match=r"both are called a\.png"):
        model.document(output, tmp_path / "matches.txt", [files[0], tmp_path / "x" / "a.png"])
    with pytest.raises(ValueError, match="choose another name"):
        model.document(output, tmp_path / "a.png.txt", files)
    assert set(colmap_text(output, ["p", "q"])[0]) == {"p", "q"}


def test_inside_and_bad_pairs() -> None:
    points = torch.tensor([[0.0, 0.0], [4.4, 3.4], [4.6, 0.0], [-0.6, 0.0], [float("nan"), 0.0]])
    assert in_image(points, 4, 5).tolist() == [True, True, False, False, False]
    image = torch.zeros(2, 1, 16, 24)
    for other, message in (
        (torch.zeros(2, 3, 16, 24), r"image1 must be images \(batch, 1"),
        (torch.zeros(2, 1, 16, 20), "height and width of image1 must be multiples of 8, got 16 and 20"),
        (torch.zeros(2, 1, 0, 8), "multiples of 8"),
        (torch.zeros(1, 1, 16, 24), "as many"),
    ):
        with pytest.raises(ValueError, match=message):
            check_pair(image, other, 1, 8)
