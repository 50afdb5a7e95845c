"""Networks that say when something happens: their outputs, files of features in, a time line and a table out.

| network | asked | says |
|---|---|---|
| `EventParser` | streams that go together, such as sound and picture | which events happen when, in each of them |
| `MomentFinder` | a stream, and a question in words | the moments that answer it, and how well each step does |

Both answer "when does this happen?": `found` gives spans with scores, the surest first, `curve` a number for each step.

Shape letters: B batch, T steps, M streams, K classes, N moments, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.arrays import read_array
from saccade.models.complete import Complete, labels
from saccade.models.images import colours
from saccade.ops.boxes import union_shares
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: what is kept of probabilities from 0 and 1 in losses
EPS = 1e-7
#: of a time line, in pixels
_WIDTH, _NAMES, _ROW = 480, 160, 20
_INK, _PAPER, _CURVE = (30, 30, 30), (255, 255, 255), (120, 160, 220)


@output
@dataclass
class EventOutput:
    """What happens when, in each of several streams.

    Attributes:
        probabilities: (B, T, M, K).
        streams: (B, M, K), that it happens in a stream at any time.
        whole: (B, K), that it happens at all.
        logits: (B, T, 1 + K), of no event and of each, where it is one of them.
        mask: (B, T), which steps there are; None for all.
        seconds: of the whole stream; None in what `forward` gives.
    """

    probabilities: Tensor
    streams: Tensor
    whole: Tensor
    logits: Tensor | None = None
    mask: Tensor | None = None
    seconds: float | None = None

    def curve(self, asked_B: Tensor) -> Tensor:
        """How sure it is that a class of each item happens in any stream, step by step, (B, T)."""
        return self.probabilities.amax(2)[torch.arange(len(asked_B)), :, asked_B]

    def found(self, asked_B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """When a class of each item happens: spans (N, 2) as shares of the stream, and scores (N,)."""
        return [runs(curve_T) for curve_T in self.curve(asked_B)]


@output
@dataclass
class MomentOutput:
    """The moments of a stream that answer a question.

    Attributes:
        logits: (B, N, 2), of a moment and of none.
        pred_spans: (B, N, 2), middle and width as shares of the stream.
        saliency: (B, T), the larger the better a step answers.
        mask: (B, T), which steps there are; None for all.
        seconds: of the whole stream; None in what `forward` gives.
    """

    logits: Tensor
    pred_spans: Tensor
    saliency: Tensor
    mask: Tensor | None = None
    seconds: float | None = None

    def curve(self, asked_B: Tensor | None = None) -> Tensor:
        """`saliency`; what is asked, the network knew."""
        return self.saliency

    def found(self, asked_B: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """The moments of each item: spans (N, 2) as start and end, shares of the stream, and scores (N,)."""
        scores, order = self.logits.detach().float().softmax(-1)[..., 0].sort(dim=1, descending=True, stable=True)
        spans = to_ends(self.pred_spans.detach().float()).clamp(0, 1).gather(1, order[..., None].expand(-1, -1, 2))
        return list(zip(spans, scores))


def to_ends(spans: Tensor) -> Tensor:
    """(middle, width) -> (start, end), (..., 2).

    >>> to_ends(torch.tensor([0.5, 0.5])).tolist()
    [0.25, 0.75]
    """
    middle, width = spans.unbind(-1)
    return torch.stack([middle - width / 2, middle + width / 2], -1)


def to_middles(spans: Tensor) -> Tensor:
    """(start, end) -> (middle, width), (..., 2)."""
    start, end = spans.unbind(-1)
    return torch.stack([(start + end) / 2, end - start], -1)


def overlaps(a_N2: Tensor, b_M2: Tensor, *, generalized: bool = False) -> Tensor:
    """IoU, or GIoU, of each pair of spans by their ends, (N, M); see `ops.boxes.union_shares`.

    >>> overlaps(torch.tensor([[0.0, 0.5]]), torch.tensor([[0.25, 0.75], [0.6, 0.7]])).tolist()
    [[0.3333333432674408, 0.0]]
    """
    return union_shares(a_N2, b_M2, generalized=generalized)


def runs(curve_T: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Unbroken steps at or above a threshold, as spans (N, 2), shares of all steps, with their mean value (N,).

    The highest mean comes first. Where no step reaches the threshold, the highest is a span alone.

    Args:
        curve_T: a value for each step.
        threshold: of a step.

    >>> spans, scores = runs(torch.tensor([0.1, 0.9, 0.7, 0.2, 0.6]))
    >>> spans.tolist(), [round(score, 2) for score in scores.tolist()]
    ([[0.20000000298023224, 0.6000000238418579], [0.800000011920929, 1.0]], [0.8, 0.6])
    """
    curve_T = curve_T.detach().float()
    over_T = curve_T >= min(threshold, float(curve_T.max()))
    edges = F.pad(over_T.int(), (1, 1)).diff()
    start_N, end_N = torch.nonzero(edges == 1)[:, 0], torch.nonzero(edges == -1)[:, 0]
    total = F.pad(curve_T.cumsum(0), (1, 0))
    score_N = (total[end_N] - total[start_N]) / (end_N - start_N)
    order = score_N.argsort(descending=True, stable=True)
    return torch.stack([start_N, end_N], -1)[order] / len(curve_T), score_N[order]


class StreamNetwork(Complete):
    """Base of the networks that run on files of features, `.npy` of (steps, channels) each; a task stands over it.

    Attributes:
        step_seconds: how long a step of the first stream is.
        threshold: moments of this score and more are told and drawn; the surest always is.
    """

    documents: ClassVar[tuple[str, ...]] = (".csv",)
    step_seconds: float = 1.0
    threshold: float = 0.5

    def predict(self, files: str | Path | Sequence[str | Path]) -> Any:
        """What the network says of files of features, in evaluation and without gradients.

        Args:
            files: one for each of `views`, in their order.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if they are not as many as the views, or one holds no (steps, channels).
        """
        paths = [files] if isinstance(files, (str, Path)) else list(files)
        if len(paths) != len(self.views):
            raise ValueError(f"files must be {len(self.views)} ({', '.join(self.views)}), got {len(paths)}")
        weight, training, streams = next(self.parameters()), self.training, []
        for path, view in zip(paths, self.views):
            array = read_array(path, f"stream of {view} features")
            if array.ndim != 2:
                raise ValueError(f"{path} must hold (steps, channels) of {view}, got {tuple(array.shape)}")
            streams.append(array.to(weight.device, weight.dtype))
        try:
            with torch.no_grad():
                said = self.eval()(*(stream[None] for stream in streams))
        finally:
            self.train(training)
        return replace(said, seconds=self.step_seconds * self.steps(said))

    @staticmethod
    def steps(said: Any) -> int:
        """How many steps an output has."""
        raise NotImplementedError

    def rows(self, said: Any, names: Sequence[str] | None) -> list[tuple[str, Tensor, tuple[Tensor, Tensor]]]:
        """What an output of one item tells, row by row: a name, a curve (T,), and moments with their scores."""
        raise NotImplementedError

    def told(self, said: Any, names: Sequence[str] | None) -> list[tuple[str, float, float, float]]:
        """Name, start and end in seconds, and score of the moments that are sure enough, row by row."""
        if said.seconds is None:
            raise ValueError("output must be one of predict, which knows the seconds; this one does not")
        found = []
        for name, _, (spans, scores) in self.rows(said, names):
            for (start, end), score in zip((spans * said.seconds).tolist(), scores.tolist()):
                if score >= self.threshold:
                    found.append((name, start, end, score))
        return found

    def answer(self, output: Any, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """When what happens, in seconds, and how sure that is; where nothing is sure enough, how sure the surest is.

        Args:
            output: of `predict`.
            names: of the classes; their numbers where None.

        Raises:
            ValueError: if the output is not one of `predict`, or the names are not as many as the classes.
        """
        told = self.told(output, names)
        if told:
            return [{f"{name} {start:.1f} to {end:.1f} s": score for name, start, end, score in told}]
        best = max(float(scores.max()) for _, _, (_, scores) in self.rows(output, names))
        return [{f"no moment of {self.threshold:.0%} or more": f"the surest has {best:.1%}"}]

    def picture(self, output: Any, names: Sequence[str] | None = None) -> Picture:
        """A time line: in each row the moments as bars, the paler the less sure, and the curve of the steps."""
        if output.seconds is None:
            raise ValueError("output must be one of predict, which knows the seconds; this one does not")
        image, draw, font = (need(f"PIL.{name}", "drawing") for name in ("Image", "ImageDraw", "ImageFont"))
        letters, told = font.load_default(), self.rows(output, names)
        sheet = image.new("RGB", (_NAMES + _WIDTH, _ROW * (len(told) + 1)), _PAPER)
        pen = draw.Draw(sheet)
        for row, ((name, curve, (spans, scores)), ink) in enumerate(zip(told, (255 * colours(len(told))).tolist())):
            top = _ROW * row
            pen.text((4, top + 5), name, fill=_INK, font=letters)
            for (start, end), score in reversed(list(zip(spans.tolist(), scores.tolist()))):
                if score >= min(self.threshold, float(scores[0])):
                    fill = tuple(round(255 - (255 - part) * score) for part in ink)
                    pen.rectangle((_NAMES + _WIDTH * start, top + 2, _NAMES + _WIDTH * end, top + _ROW - 3), fill=fill)
            scaled = (curve.float() - curve.min()) / (curve.max() - curve.min()).clamp(min=1e-6)
            points = [
                (_NAMES + _WIDTH * (step + 0.5) / len(scaled), top + _ROW - 3 - (_ROW - 5) * value)
                for step, value in enumerate(scaled.tolist())
            ]
            pen.line(points, fill=_CURVE)
        pen.text((_NAMES, _ROW * len(told) + 5), "0 s", fill=_INK, font=letters)
        end = f"{output.seconds:.1f} s"
        pen.text((_NAMES + _WIDTH - pen.textlength(end, letters), _ROW * len(told) + 5), end, fill=_INK, font=letters)
        return sheet

    def document(self, output: Any, place: Path, files: Sequence[Path]) -> dict[Path, bytes]:
        """A table: what, start and end in seconds, score; a line for each moment of any score."""
        lines = ["what,start,end,score"]
        for name, _, (spans, scores) in self.rows(output, None):
            for (start, end), score in zip((spans * output.seconds).tolist(), scores.tolist()):
                lines.append(f"{name},{start:.3f},{end:.3f},{score:.6f}")
        return {place: ("\n".join(lines) + "\n").encode()}


class EventParser(StreamNetwork):
    """Base of the networks that say which events happen when in streams; a subclass gives `forward(audio, video)`.

    Attributes:
        streams: the names of the M streams of the output.
    """

    views: ClassVar[tuple[str, ...]] = ("audio", "video")
    streams: tuple[str, ...] = ("audio", "video")

    def loss(self, said: EventOutput, truth_BTMK: Tensor) -> Tensor:
        """Binary cross entropy of each step, stream and class, and of each class in the whole; steps of padding are
        left out.

        Args:
            said: of `forward`.
            truth_BTMK: what happens when; M is 2 also where the output has one stream, in which all is joined.
        """
        truth_BTMK = truth_BTMK.to(said.probabilities.dtype)
        if said.mask is not None:
            truth_BTMK = truth_BTMK * said.mask[..., None, None]
        whole = event_loss(said.whole, truth_BTMK.amax((1, 2)))
        if said.probabilities.shape[2] == 1:
            truth_BTMK = truth_BTMK.amax(2, keepdim=True)
        kept = slice(None) if said.mask is None else said.mask
        return event_loss(said.probabilities[kept], truth_BTMK[kept]) + whole

    @staticmethod
    def steps(said: EventOutput) -> int:
        return said.probabilities.shape[1]

    def rows(self, said: EventOutput, names: Sequence[str] | None) -> list[tuple[str, Tensor, tuple[Tensor, Tensor]]]:
        """Of each stream each class that reaches the threshold at any step; where none does, the surest of all."""
        table_TMK = said.probabilities[0].float()
        called, best_MK = labels(table_TMK.shape[2], names), table_TMK.amax(0)
        chosen = torch.nonzero(best_MK >= min(self.threshold, float(best_MK.max()))).tolist()
        return [
            (f"{called[k]} ({self.streams[m]})", table_TMK[:, m, k], runs(table_TMK[:, m, k], self.threshold))
            for m, k in chosen
        ]


class MomentFinder(StreamNetwork):
    """Base of the networks that find the moments which answer a question; a subclass gives `forward(video, text)`."""

    views = ("video", "text")

    def loss(self, said: MomentOutput, spans: Sequence[Tensor], saliency_BT: Tensor) -> Tensor:
        """What training makes small.

        Args:
            said: of `forward` in training.
            spans: of each item the true moments (G, 2), start and end as shares of the stream.
            saliency_BT: how well each step answers, 0 where not at all.
        """
        raise NotImplementedError

    @staticmethod
    def steps(said: MomentOutput) -> int:
        return said.saliency.shape[1]

    def rows(self, said: MomentOutput, names: Sequence[str] | None) -> list[tuple[str, Tensor, tuple[Tensor, Tensor]]]:
        return [("moment", said.saliency[0], said.found()[0])]


def event_loss(probability: Tensor, truth: Tensor, smooth: float = 1.0) -> Tensor:
    """Binary cross entropy of probabilities kept within 1e-7 of 0 and 1, the truth smoothed to s y + (1 - s) / 2.

    Args:
        probability, truth: of one shape.
        smooth: s; 1 leaves the truth as it is.
    """
    wanted, said = smooth * truth.float() + (1 - smooth) / 2, probability.float().clamp(EPS, 1 - EPS)
    return -(wanted * said.log() + (1 - wanted) * (1 - said).log()).mean()


def check_streams(**streams: tuple[Tensor, int]) -> None:
    """Raise ValueError unless these are streams (B, T, C) of as many items, with the channels given beside them.

    Args:
        **streams: by name, each with its channels.
    """
    batch = None
    for name, (x, channels) in streams.items():
        if x.ndim != 3 or x.shape[2] != channels or not x.shape[1]:
            raise ValueError(f"{name} must be (batch, steps, {channels}) of a step at least, got {tuple(x.shape)}")
        batch = len(x) if batch is None else batch
        if len(x) != batch:
            raise ValueError(f"{name} must be of {batch} items like the others, got {len(x)}")


def check_mask(mask_BT: Tensor | None, like: Tensor, name: str = "mask") -> None:
    """Raise ValueError unless a mask is bool (B, T), with a step of each item at least.

    Args:
        mask_BT: or None.
        like: (B, T, C).
        name: in the message.
    """
    if mask_BT is not None and (mask_BT.shape != like.shape[:2] or mask_BT.dtype != torch.bool):
        raise ValueError(f"{name} must be bool {tuple(like.shape[:2])}, got {mask_BT.dtype} {tuple(mask_BT.shape)}")
