"""When does it happen? Events in generated streams of sound and picture are told, or found for a question in words.

Shape letters: B batch, T steps, M streams, K classes, N moments, P items that are shown.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.moments import EventOutput, EventParser, MomentFinder
from saccade.train.data.streams import AUDIO, CLASSES, TEXT, VIDEO, Streams, streams
from saccade.train.entries import Entry
from saccade.train.metrics import moments as measures
from saccade.train.result import Metric
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: height of a strip in a picture, and of each of its steps the width
_HEIGHT, _WIDTH = 12, 4


class Localise(NetworkTask):
    """Streams of sound and picture in which things happen (`saccade.train.data.streams`), `length` steps long.

    A parser of events (`saccade.models.moments.EventParser`) takes sound and picture and says what happens when; a
    finder of moments (`MomentFinder`) takes both, channel beside channel, and a question in words which names one
    class. Either tells when that class happens, heard or seen: so both are judged by the same questions. Quality is the
    mAP of moments, over IoU 0.5 to 0.95; R1 at 0.5 and 0.7, mIoU, HIT@1 and the mAP of steps stand beside it, and of
    parsers the F1 of what is heard, seen and both, step by step and event by event.

    Each network learns by its own loss: a parser from the truth of each step, a finder from that of the question.

    Raises:
        ValueError: if the length is less than 16.
        ImportError: if scikit-learn is not installed.
    """

    name = "localise"
    metric = Metric("map", "mAP", higher_is_better=True)
    square, least = False, 16
    budgets = {
        "quick": Settings(length=32, batch=32, steps=300, lr=2e-3, lengths=(32, 128, 512), evaluation_size=256),
        "standard": Settings(length=32, batch=64, steps=2000, lr=1e-3, lengths=(32, 128, 512), evaluation_size=512),
        "long": Settings(length=64, batch=64, steps=10000, lr=5e-4, lengths=(32, 128, 512), evaluation_size=512),
    }

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        """What the network's kind needs to know of the streams."""
        made = mechanism.factory if mechanism.slug is None else catalogue.part(mechanism.slug).build
        if isinstance(made, type) and issubclass(made, MomentFinder):
            return {"video_dim": AUDIO + VIDEO, "text_dim": TEXT}
        return {"num_classes": CLASSES, "audio_dim": AUDIO, "video_dim": VIDEO}

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        return tuple(streams(count, self.settings.length, generator))

    def call(self, model: nn.Module, batch: tuple[Any, ...]) -> Any:
        given = Streams(*batch)
        if isinstance(model, MomentFinder):
            both = torch.cat([given.audio, given.video], -1)
            return model(video=both, text=given.text, text_mask=given.words)
        return model(audio=given.audio, video=given.video)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The network's own."""
        assert isinstance(model, (EventParser, MomentFinder))
        given, said = Streams(*batch), self.call(model, batch)
        if isinstance(model, EventParser):
            return model.loss(said, given.truth)
        there_BTM = wanted(given)
        return model.loss(said, [measures.spans_of(each.any(1)) for each in there_BTM], there_BTM.sum(2).float())

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """The scores of the class's table on held-out streams."""
        model.eval()
        pairs = [(self.call(model, batch), Streams(*batch)) for batch in self.held_out(share)]
        found = [tuple(x.cpu() for x in each) for said, given in pairs for each in said.found(given.asked)]
        curves = [curve.cpu() for said, given in pairs for curve in said.curve(given.asked)]
        there = [each.any(1).cpu() for _, given in pairs for each in wanted(given)]
        scores = measures.moment_scores(found, [measures.spans_of(each) for each in there])  # type: ignore[arg-type]
        scores |= measures.highlight_scores(curves, there)
        if isinstance(pairs[0][0], EventOutput) and pairs[0][0].probabilities.shape[2] == 2:
            said = torch.cat([said.probabilities for said, _ in pairs]).cpu() >= 0.5
            scores |= parsing_scores(said, torch.cat([given.truth for _, given in pairs]).cpu())
        return scores

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """An item of so many steps."""
        given = Streams(*(x[:1] for x in self.drawn(1, torch.Generator().manual_seed(0))))
        repeats = -(-length // self.settings.length)
        audio, video = (x.repeat(1, repeats, 1)[:, :length].to(self.device) for x in (given.audio, given.video))
        return audio, video, given.text.to(self.device)

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        return _Alone(self.model(mechanism, 0))

    def chance(self) -> float:
        """The mAP of the whole stream as the answer to every question."""
        there = [each.any(1) for each in wanted(Streams(*self.test))]
        whole = (torch.tensor([[0.0, 1.0]]), torch.ones(1))
        return measures.moment_scores([whole] * len(there), [measures.spans_of(each) for each in there])["map"]

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Time lines: what happens that is asked for, the curve of steps, and the surest moment."""
        batch = next(self.held_out())
        given, said = Streams(*batch), self.call(model.eval(), batch)
        there, curve = wanted(given).any(2).float(), said.curve(given.asked).float()
        curve = (curve - curve.amin(1, True)) / (curve.amax(1, True) - curve.amin(1, True)).clamp(min=1e-6)
        middle_T = (torch.arange(curve.shape[1], device=curve.device) + 0.5) / curve.shape[1]
        best = torch.stack([spans[0] for spans, _ in said.found(given.asked)])
        inside = ((middle_T >= best[:, :1]) & (middle_T < best[:, 1:])).float()
        sound = given.audio.norm(dim=2) / given.audio.norm(dim=2).amax(1, True)
        rows = {"loudness": sound, "truth": there, "curve": curve, "surest": inside}
        return {name: shown(_strips(x)) for name, x in rows.items()}


class _Alone(nn.Module):
    """A network of either kind on one item: for its time and memory, that depend on sizes alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, audio: Tensor, video: Tensor, text: Tensor) -> Any:
        if isinstance(self.network, MomentFinder):
            return self.network(torch.cat([audio, video], -1), text)
        return self.network(audio, video)


def wanted(given: Streams) -> Tensor:
    """When what is asked for is heard, and when seen: bool (B, T, 2)."""
    return given.truth[torch.arange(len(given.asked)), :, :, given.asked]


def parsing_scores(said_BTMK: Tensor, truth_BTMK: Tensor) -> dict[str, float]:
    """F1 of what is heard (`audio`), seen (`visual`), both at a time (`av`), the mean of the three (`type`), and of all
    events of both streams (`all`); each by steps (`segment_..._f1`) and by events (`event_..._f1`).

    Args:
        said_BTMK, truth_BTMK: bool, heard first, then seen.
    """
    scores: dict[str, float] = {}
    for name, score in (("segment", measures.segment_f1), ("event", measures.event_f1)):
        of = {
            "audio": score(said_BTMK[:, :, 0], truth_BTMK[:, :, 0]),
            "visual": score(said_BTMK[:, :, 1], truth_BTMK[:, :, 1]),
            "av": score(said_BTMK.all(2), truth_BTMK.all(2)),
        }
        of["type"] = sum(of.values()) / 3
        of["all"] = score(said_BTMK.flatten(2), truth_BTMK.flatten(2))
        scores |= {f"{name}_{stream}_f1": value for stream, value in of.items()}
    return scores


def _strips(x_BT: Tensor) -> Tensor:
    return x_BT[:, None, None].repeat_interleave(_WIDTH, 3).expand(-1, 1, _HEIGHT, -1)
