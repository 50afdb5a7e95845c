"""What every task gives: data, the model around a mechanism, loss, quality; and which parts it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.train.data import IGNORE
from saccade.train.entries import NONE, Entry
from saccade.train.records import Metric
from saccade.train.tasks.settings import Settings

ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True)

#: steps that a run takes before the next one has its turn
TURN = 4

#: streams of random numbers that never meet: training, evaluation, the sample of the attention maps
TRAIN, HELD_OUT, SAMPLE = 0, 1, 2


class Task:
    """One task at one size. Subclasses give what the table above says; `batch` is a function of (seed, step) alone.

    Args:
        settings: the sizes.
        device: where models and batches are.
    """

    name: str
    #: the kinds of parts that it takes, by name, and what these must support
    kinds: tuple[str, ...] = ("sequence",)
    needs: tuple[str, ...] = ()
    metric: Metric = ACCURACY
    #: baseline that is added to every comparison
    baseline: str | None = None
    #: what files it takes in place of its own data, in words; "" where it takes none
    files: str = ""
    #: what the rows of its further figures are, where it names them "row: figure"; these are shown as a table
    rows: str = ""
    #: whether seeing later tokens means seeing the answer
    predicts_next = False
    #: a run with fewer steps is hardly trained
    least_steps = 100
    budgets: dict[str, Settings]

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device

    @classmethod
    def on_files(cls, settings: Settings, device: torch.device, data: Any) -> Task:
        """The task on the caller's data in place of its own, where `files` says that it takes any.

        Args:
            settings, device: as for the constructor.
            data: file names, or a tensor.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if the data are not of the form that it takes.
        """
        raise NotImplementedError

    @classmethod
    def takes(cls, part: catalogue.Summary) -> bool:
        """Whether a part can be compared on it."""
        return part.kind in cls.kinds and not cls.lacking(part)

    @classmethod
    def lacking(cls, part: catalogue.Summary) -> list[str]:
        """What the task needs and a part does not support. Teacher-forced parts are compared in causal tasks: the
        comparison measures whether they see the future."""
        forced = {"causal"} if "teacher-forced" in part.supports else set()
        return [need for need in cls.needs if need not in {*part.supports, *forced}]

    @classmethod
    def check(cls, mechanism: Entry) -> None:
        """Raise ValueError, naming parts that would fit, unless the task takes the mechanism."""
        if mechanism.slug in (None, cls.baseline):
            return
        fitting = f"fitting: {', '.join(part.slug for part in catalogue.parts() if cls.takes(part)) or 'none yet'}"
        if mechanism.slug == NONE:
            raise ValueError(f"task {cls.name!r} has no baseline without a mechanism; {fitting}")
        part = catalogue.part(mechanism.slug)
        if part.kind not in cls.kinds:
            wanted = " or ".join(catalogue.KINDS[kind].words for kind in cls.kinds)
            raise ValueError(
                f"{mechanism.name!r} is {part.kind.words}, but task {cls.name!r} needs {wanted}; {fitting}"
            )
        if lacking := cls.lacking(part):
            raise ValueError(
                f"{mechanism.name!r} does not support {', '.join(lacking)}, which task {cls.name!r} needs; {fitting}"
            )

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        """A new model with the mechanism in it."""
        raise NotImplementedError

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        """The mechanism alone, at the model's width."""
        raise NotImplementedError

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """Random inputs of that length for it."""
        raise NotImplementedError

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The mechanisms in a model, named."""
        raise NotImplementedError

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        """The batch of a step."""
        raise NotImplementedError

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        """The held-out batches, or the first `share` of them; the same for every seed."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The logits; the last entry of a batch is the targets."""
        return model(*batch[:-1])

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """Cross entropy in nats."""
        return F.cross_entropy(self.outputs(model, batch).flatten(0, -2), batch[-1].flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        """The metric on held-out data."""
        model.eval()
        right = scored = 0
        for batch in self.held_out(share):
            counts = batch[-1] != IGNORE
            right += int(((self.outputs(model, batch).argmax(-1) == batch[-1]) & counts).sum())
            scored += int(counts.sum())
        return right / scored

    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """Further figures of held-out data by name, kept beside the quality of each run; that one may be among them."""
        return {}

    def chance(self) -> float | None:
        """The quality that guessing reaches: always the commonest answer, and two standard errors. None: not known."""
        answers = torch.cat([batch[-1].flatten() for batch in self.held_out()])
        answers = answers[answers != IGNORE]
        right = float(answers.bincount().max()) / len(answers)
        return min(1.0, right + 2 * math.sqrt(right * (1 - right) / len(answers)))

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.length

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """What a trained model makes of held-out images, in place of attention maps: rows of (P, H, W, 3) by name."""
        return {}

    def remarks(self, model: nn.Module) -> list[str]:
        """What a reader must know of how a trained model took part, a sentence each."""
        return []

    def sample(self) -> tuple[Any, ...]:
        """One held-out input for attention maps (without targets)."""
        return next(iter(self.held_out()))[:-1]

    def to_device(self, batch: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(item.to(self.device) if isinstance(item, Tensor) else item for item in batch)

    def batches(self, share: float) -> int:
        """How many batches `share` of the evaluation's size makes."""
        return max(1, round(share * self.settings.evaluation_size / self.settings.batch))

    def in_batches(self, items: Sequence[Tensor], share: float) -> Iterator[tuple[Any, ...]]:
        """The first `share` of the evaluation's size of a data set, in order."""
        count = min(len(items[-1]), max(1, round(share * min(self.settings.evaluation_size, len(items[-1])))))
        for start in range(0, count, self.settings.batch):
            yield self.to_device(item[start : min(count, start + self.settings.batch)] for item in items)
