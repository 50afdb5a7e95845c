"""What every detector gives: boxes in pixels of the file, words, a picture; and the measure of them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saccade.models.average_precision import Boxes, average_precision
from saccade.models.detection import Detection, Detector, surest
from saccade.models.images import to_picture


class Two(Detector):
    """Always the same two boxes: of the left half and of the middle."""

    image_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor([[3.0, -9.0], [-9.0, 1.0]]))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, pixel_values: Tensor) -> Detection:
        self.seen.append(tuple(pixel_values.shape))
        boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.2, 0.5]])
        return Detection(self.logit.expand(len(pixel_values), -1, -1), boxes.expand(len(pixel_values), -1, -1))


def test_files_of_any_sizes_go_together(tmp_path: Path) -> None:
    for name, size in (("a.png", (40, 80)), ("b.png", (20, 30))):
        to_picture(torch.rand(3, *size)).save(tmp_path / name)
    model = Two()
    out = model.predict([tmp_path / "a.png", tmp_path / "b.png"])
    assert model.seen == [(2, 3, 32, 32)] and out.labels is not None and out.scores is not None
    torch.testing.assert_close(out.boxes[:, :2], torch.tensor([
        [[0.0, 0, 40, 40], [32, 10, 48, 30]], [[0.0, 0, 15, 20], [12, 5, 18, 15]]
    ]))  # fmt: skip
    assert out.labels[:, :2].tolist() == [[0, 1]] * 2
    said = model.answer(out, ["left", "middle"])
    assert said[0] == pytest.approx({"left (0, 0, 40, 40)": 0.953, "middle (32, 10, 48, 30)": 0.731}, abs=1e-3)
    picture = model.picture(out)
    assert picture.size == (80, 60)
    plain = to_picture(out.images[0])
    assert picture.getpixel((48, 20)) != plain.getpixel((48, 20)) and picture.getpixel((60, 35)) == plain.getpixel(
        (60, 35)
    )


def test_boxes_that_overlap_a_surer_one_of_their_class_stand_last() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.38], [0.2, 0.2, 0.1, 0.1]])
    logits = torch.tensor([[2.0, -2], [1, -1], [0, -3]])
    found, sizes = Detection(logits[None], boxes[None]), torch.tensor([[10.0, 10.0]])
    plain, kept = surest(found, sizes), surest(found, sizes, overlap=0.5)
    assert plain[1].tolist() == [[0, 0, 0, 1, 1, 1]]
    torch.testing.assert_close(plain[2][0].logit(), torch.tensor([2.0, 1, 0, -1, -2, -3]))
    assert kept[1].tolist() == [[0, 0, 1, 1, 0, 1]]
    torch.testing.assert_close(kept[2][0, :4].logit(), torch.tensor([2.0, 0, -1, -3]))
    assert kept[2][0, 4:].eq(0).all() and torch.equal(kept[0][0, 4], plain[0][0, 1])


def test_where_nothing_is_sure_enough(tmp_path: Path) -> None:
    to_picture(torch.rand(3, 8, 8)).save(tmp_path / "a.png")
    model = Two()
    model.threshold = 0.99
    assert model.answer(model.predict(tmp_path / "a.png")) == [{"no box of 99% or more": "the surest has 95.3%"}]
    with pytest.raises(ValueError, match="predict"):
        model.answer(model(torch.rand(1, 3, 32, 32)))


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows).view(-1, 4)


def found(corners: Tensor, scores: list[float], labels: list[int] | None = None) -> Boxes:
    return Boxes(corners, torch.tensor(labels or [0] * len(scores), dtype=torch.long), torch.tensor(scores))


def there(corners: Tensor, labels: list[int] | None = None) -> Boxes:
    return Boxes(corners, torch.tensor(labels or [0] * len(corners), dtype=torch.long))


A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (50.0, 50.0, 60.0, 60.0)


def test_average_precision_by_hand() -> None:
    truth = [there(boxes(A, B))]
    assert average_precision([found(boxes(B, A), [0.2, 0.9])], truth) == {"ap": 1.0, "ap50": 1.0, "ap75": 1.0}
    # right, wrong, right: precision 1 up to recall 1/2 (51 of 101 recalls), then 2/3
    measured = average_precision([found(boxes(A, C, B), [0.9, 0.8, 0.7])], truth)
    assert measured["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    # one of two is never found; a second box on the same object is wrong
    measured = average_precision([found(boxes(A, A), [0.9, 0.8])], truth)
    assert measured["ap"] == pytest.approx(51 / 101)
    # an IoU of 0.7 is right at 0.5 .. 0.7, five thresholds of ten
    assert average_precision([found(boxes((0, 0, 10, 7)), [0.5])], [there(boxes(A))]) == {
        "ap": 0.5, "ap50": 1.0, "ap75": 0.0
    }  # fmt: skip
    assert average_precision([found(boxes(), [])], truth)["ap"] == 0


def test_average_precision_over_images_and_classes() -> None:
    # scores of all images stand in one order: wrong (0.9), right (0.8): precision 1/2 up to recall 1/2
    said = [found(boxes(C), [0.9]), found(boxes(A), [0.8])]
    truth = [there(boxes(A)), there(boxes(A))]
    assert average_precision(said, truth)["ap"] == pytest.approx(51 / 101 / 2)
    # a class that is nowhere does not count, one that is never found counts 0
    said = [found(boxes(A, B, C), [0.9, 0.8, 0.7], [0, 7, 0])]
    assert average_precision(said, [there(boxes(A, B), [0, 1])])["ap"] == pytest.approx(0.5)
    # each object is taken once, by the surest box, which takes the one that it overlaps most
    near = (0.0, 0.0, 10.0, 8.0)
    said = [found(boxes(A, near), [0.9, 0.8])]
    assert average_precision(said, [there(boxes(near, A))])["ap"] == 1.0
    # of each class and image `most` boxes count
    assert average_precision([found(boxes(C, A), [0.9, 0.8])], [there(boxes(A))], most=1)["ap"] == 0


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="same images"):
        average_precision([], [there(boxes(A))])
    with pytest.raises(ValueError, match="scores"):
        average_precision([there(boxes(A))], [there(boxes(A))])
    with pytest.raises(ValueError, match="object"):
        average_precision([found(boxes(A), [0.5])], [there(boxes())])
