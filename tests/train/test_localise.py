"""The task of moments and events: its streams, and that it tells who knows from who does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.moments import EventOutput, EventParser, MomentFinder, MomentOutput, to_middles
from saccade.train.data import generator_at, streams
from saccade.train.data.streams import AUDIO, CLASSES, TEXT, VIDEO, WORDS
from saccade.train.entries import Entry
from saccade.train.metrics.moments import spans_of
from saccade.train.tasks.localise import Localise, wanted


@pytest.fixture(scope="module")
def task() -> Localise:
    settings = Localise.budgets["quick"].changed({"batch": 16, "evaluation_size": 16})
    return Localise(settings, torch.device("cpu"))


def test_streams_hold_what_the_truth_says() -> None:
    given = streams(400, 32, generator_at(0, 0))
    assert given.audio.shape == (400, 32, AUDIO) and given.video.shape == (400, 32, VIDEO)
    assert given.text.shape == (400, WORDS, TEXT) and given.words.sum(1).min() >= 2
    assert given.truth.shape == (400, 32, 2, CLASSES) and wanted(given).flatten(1).any(1).all()
    share = given.truth.float().mean((0, 1))
    assert share.min() > 0.05 and share.max() < 0.3
    for m, x in enumerate((given.audio, given.video)):  # each class adds its pattern, and the noise has 1
        solution = torch.linalg.lstsq(given.truth[:, :, m].flatten(0, 1).float(), x.flatten(0, 1)).solution
        left = x.flatten(0, 1) - given.truth[:, :, m].flatten(0, 1).float() @ solution
        assert left.std() == pytest.approx(1, abs=0.02) and solution.norm(dim=1).min() > 1.2
    again = streams(400, 32, generator_at(0, 0))
    assert all(map(torch.equal, given, again))
    with pytest.raises(ValueError, match="2 or more, got 1"):
        streams(1, 1, generator_at(0, 0))


class Parser(EventParser):
    def __init__(self, truth: Tensor | None = None, num_classes: int = 0, audio_dim: int = 0, video_dim: int = 0):
        super().__init__()
        self.weight, self.truth = nn.Parameter(torch.zeros(())), truth

    def forward(self, audio: Tensor, video: Tensor) -> EventOutput:
        if self.truth is None or len(self.truth) != len(audio):
            p = torch.rand(*audio.shape[:2], 2, CLASSES) + self.weight
        else:
            p = self.truth.float() * 0.9 + 0.05
        return EventOutput(p, p.amax(1), p.amax((1, 2)))


class Finder(MomentFinder):
    def __init__(self, spans: Sequence[Tensor] | None = None, video_dim: int = 0, text_dim: int = 0):
        super().__init__()
        self.weight, self.spans, self.dims = nn.Parameter(torch.zeros(())), spans, (video_dim, text_dim)

    def forward(self, video: Tensor, text: Tensor, text_mask: Tensor | None = None) -> MomentOutput:
        B, T = video.shape[:2]
        middle = (torch.arange(T) + 0.5) / T
        if self.spans is None:
            return MomentOutput(torch.randn(B, 3, 2), torch.rand(B, 3, 2), torch.randn(B, T) + self.weight)
        most = max(map(len, self.spans))
        spans = torch.stack([F.pad(to_middles(each), (0, 0, 0, most - len(each))) for each in self.spans])
        sure = torch.stack([torch.arange(most) < len(each) for each in self.spans]).float()
        inside = torch.stack([((middle >= s[:, :1]) & (middle < s[:, 1:])).any(0) for s in self.spans])
        return MomentOutput(torch.stack([4 * sure, 0 * sure], -1), spans, inside.float() + self.weight)

    def loss(self, said: MomentOutput, spans: Sequence[Tensor], saliency_BT: Tensor) -> Tensor:
        return F.mse_loss(said.saliency, (saliency_BT > 0).float())


def test_who_knows_is_told_from_who_does_not(task: Localise) -> None:
    torch.manual_seed(0)
    batch = task.to_device(task.test)
    truth, there = batch[-1], wanted(streams(16, 32, generator_at(0, 0, 1)))
    assert torch.equal(truth, task.test[-1]) and there.shape == (16, 32, 2)
    given = type(streams(2, 16, generator_at(0, 0)))(*batch)
    spans = [spans_of(each.any(1)) for each in wanted(given)]
    for kind, answer in ((Parser, truth), (Finder, spans)):
        good, bad = task.figures(kind(answer)), task.figures(kind())
        assert good["map"] == pytest.approx(1) and good["hit1"] == good["r1_70"] == 1
        assert bad["map"] < 0.3 and bad["highlight_map"] < 0.6
        assert task.loss(kind(answer), batch) < task.loss(kind(), batch)
        rows = task.pictures(kind(answer))
        assert len({row.shape for row in rows.values()}) == 1 and torch.equal(rows["truth"], rows["surest"]) == (
            all(len(each) == 1 for each in spans[:4])
        )
        part = task.part(Entry("mine", None, {}, kind), 64)
        assert part(*task.part_inputs(64)) is not None
        task.loss(kind(), batch).backward()
    assert {v for name, v in task.figures(Parser(truth)).items() if name.endswith("f1")} == {1.0}
    assert 0 < task.chance() < 0.3


def test_networks_are_told_what_they_need(task: Localise) -> None:
    assert task.model(Entry("mine", None, {}, Finder), 0).dims == (AUDIO + VIDEO, TEXT)
    assert set(task.arguments(Entry("mine", None, {}, Parser))) == {"num_classes", "audio_dim", "video_dim"}
    with pytest.raises(ValueError, match="at least 16 for localise, got 8"):
        Localise(task.settings.changed({"length": 8}), torch.device("cpu"))
    assert task.tokens_per_step == 16 * 32
