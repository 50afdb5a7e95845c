"""What networks of time share: spans, runs, files of features, time lines and tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saccade.models.moments import (
    EventOutput,
    EventParser,
    MomentFinder,
    MomentOutput,
    check_mask,
    check_streams,
    event_loss,
    overlaps,
    runs,
    to_ends,
    to_middles,
)
from saccade.report import predictions


class Loud(EventParser):
    """Says that class k happens where channel k is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))

    def forward(self, audio: Tensor, video: Tensor) -> EventOutput:
        p = (self.weight * torch.stack([audio, video], 2)).sigmoid()
        return EventOutput(p, p.amax(1), p.amax((1, 2)))


class Middle(MomentFinder):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, video: Tensor, text: Tensor) -> MomentOutput:
        logits = torch.tensor([[[0.0, 3.0], [3.0, 0.0]]]) * self.weight
        return MomentOutput(logits, torch.tensor([[[0.2, 0.1], [0.5, 0.5]]]), video[..., 0])


def saved(folder: Path, **arrays: Tensor) -> list[Path]:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.numpy())
    return [folder / f"{name}.npy" for name in arrays]


def test_spans_in_both_notations() -> None:
    spans = torch.rand(3, 4, 2).sort(-1).values
    torch.testing.assert_close(to_ends(to_middles(spans)), spans)
    a, b = torch.tensor([[0.0, 0.4]]), torch.tensor([[0.2, 0.6], [0.8, 1.0]])
    torch.testing.assert_close(overlaps(a, b), torch.tensor([[1 / 3, 0.0]]))
    torch.testing.assert_close(overlaps(a, b, generalized=True), torch.tensor([[1 / 3, -0.4]]))


def test_runs_are_what_reaches_the_threshold_or_the_highest_step() -> None:
    spans, scores = runs(torch.tensor([0.6, 0.5, 0.0, 1.0]))
    assert spans.tolist() == [[0.75, 1.0], [0.0, 0.5]] and scores.tolist() == pytest.approx([1.0, 0.55])
    spans, scores = runs(torch.tensor([0.1, 0.3, 0.2]))
    assert spans.tolist() == [pytest.approx([1 / 3, 2 / 3])] and scores.tolist() == pytest.approx([0.3])


def test_events_of_files(tmp_path: Path) -> None:
    audio, video = -torch.ones(10, 2), -torch.ones(10, 2)
    audio[2:5, 0], video[8:, 1] = 1, 1
    model = Loud().train()
    model.step_seconds = 0.5
    said = model.predict(saved(tmp_path, audio=audio, video=video))
    assert model.training and said.seconds == 5.0
    (answer,) = model.answer(said, ["bark", "car"])
    assert answer.keys() == {"bark (audio) 1.0 to 2.5 s", "car (video) 4.0 to 5.0 s"}
    assert model.document(said, tmp_path / "a.csv", [])[tmp_path / "a.csv"].decode().splitlines()[:2] == [
        "what,start,end,score",
        "class 0 (audio),1.000,2.500,0.999955",
    ]
    picture = model.picture(said)
    assert len(set(picture.getdata())) > 5
    predictions.write(model, said, tmp_path / "out.csv")
    predictions.write(model, said, tmp_path / "out.png")
    assert (tmp_path / "out.csv").read_text().count("\n") == 3
    quiet = model.predict(saved(tmp_path, audio=-audio.abs(), video=-video.abs()))
    assert list(model.answer(quiet)[0]) == ["no moment of 50% or more"]
    with pytest.raises(ValueError, match="one for each of 2 classes, got 1"):
        model.answer(said, ["bark"])
    with pytest.raises(ValueError, match="one of predict"):
        model.picture(model(audio[None], video[None]))
    with pytest.raises(ValueError, match=r"files must be 2 \(audio, video\), got 1"):
        model.predict(tmp_path / "audio.npy")
    with pytest.raises(ValueError, match=r"must hold \(steps, channels\) of audio, got \(10,\)"):
        model.predict(saved(tmp_path, audio=torch.ones(10), video=video))


def test_moments_of_files(tmp_path: Path) -> None:
    model = Middle()
    said = model.predict(saved(tmp_path, video=torch.rand(8, 3), text=torch.rand(4, 2)))
    assert list(model.answer(said)[0]) == ["moment 2.0 to 6.0 s"]
    assert model.picture(said).height == 40 and said.found()[0][0][1].tolist() == pytest.approx([0.15, 0.25])


def test_the_loss_of_a_parser() -> None:
    truth = torch.rand(2, 6, 2, 3) < 0.4
    p = truth.float()
    right = EventOutput(p, p.amax(1), p.amax((1, 2)))
    model = Loud()
    assert model.loss(right, truth) < 1e-5 < model.loss(EventOutput(1 - p, p.amax(1), p.amax((1, 2))), truth)
    joined = EventOutput(p.amax(2, keepdim=True), p.amax(1), p.amax((1, 2)))
    assert model.loss(joined, truth) < 1e-5
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    hidden = p.clone()
    hidden[1, 3:] = 1 - hidden[1, 3:]
    whole = (p * mask[..., None, None]).amax((1, 2))
    assert model.loss(EventOutput(hidden, p.amax(1), whole, mask=mask), truth) < 1e-5
    assert float(event_loss(torch.tensor([0.9]), torch.tensor([1.0]), 0.8)) == pytest.approx(0.3251, abs=1e-4)


def test_bad_streams() -> None:
    with pytest.raises(ValueError, match=r"audio must be \(batch, steps, 3\) of a step at least, got \(2, 0, 3\)"):
        check_streams(audio=(torch.ones(2, 0, 3), 3))
    with pytest.raises(ValueError, match="video must be of 2 items like the others, got 1"):
        check_streams(audio=(torch.ones(2, 4, 3), 3), video=(torch.ones(1, 4, 3), 3))
    with pytest.raises(ValueError, match=r"mask must be bool \(2, 4\), got torch.float32 \(2, 4\)"):
        check_mask(torch.ones(2, 4), torch.ones(2, 4, 3))
