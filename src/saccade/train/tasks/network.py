"""Tasks whose parts are whole networks: images in, maps or images out, each at a size of its own for the task.

A network that takes part says so on its card, in `register(..., tasks={"restore": {"widths": (8, 16, 16)}})`: the
task's name, and constructor arguments of a size that a laptop trains. The task adds its own (`arguments`), like the
number of classes, so that networks of like size meet under one budget.

A subclass gives data and truth (`drawn`), what the network is called with (`inputs`, by name), the loss on what it
returns, `figures` of that, the quality among them, and pictures of the first held-out images.

Shape letters: B batch, C channels, H height, W width, P pictures that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.train.data import generator_at
from saccade.train.entries import Entry
from saccade.train.tasks.base import HELD_OUT, TRAIN, Task
from saccade.train.tasks.settings import Settings

#: held-out images that are shown
SHOWN = 4


class NetworkTask(Task):
    """A task for networks that name it on their cards. Images are squares of `length` pixels.

    Attributes:
        inputs: the names under which the network takes a batch's tensors, all but the last, which is the truth.
        multiple, least: what the side of an image is a multiple of, and at least.
        square: False where items are no images: the side is the length itself then.

    Raises:
        ValueError: if the length is no square of such a side.
    """

    kinds = ("model",)
    baseline = None
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    multiple: ClassVar[int] = 1
    least: ClassVar[int] = 1
    square: ClassVar[bool] = True

    def __init__(self, settings: Settings, device: torch.device) -> None:
        if not self.square and settings.length < self.least:
            raise ValueError(f"length must be at least {self.least} for {self.name}, got {settings.length}")
        self.side = math.isqrt(settings.length) if self.square else settings.length
        if self.square and (self.side**2 != settings.length or self.side % self.multiple or self.side < self.least):
            side = f"a multiple of {self.multiple} pixels for {self.name}"
            if self.multiple == 1:
                side = f"at least {self.least} pixels for {self.name} ({self.least**2})"
            raise ValueError(f"length must be the square of {side}, got {settings.length}")
        super().__init__(settings, device)

    @classmethod
    def lacking(cls, part: catalogue.Summary) -> list[str]:
        """The task itself, where the card does not name it."""
        return [] if cls.name in part.tasks else [f"the task {cls.name}"]

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        """Constructor arguments that the task asks of every network; those of the card go before them."""
        return {}

    def model(self, mechanism: Entry, seed: int) -> nn.Module:
        card: Mapping[str, Any] = {} if mechanism.slug is None else catalogue.part(mechanism.slug).tasks[self.name]
        arguments = {**self.arguments(mechanism), **card}
        torch.manual_seed(seed)
        return mechanism.build(self.settings.length, seed=seed, **arguments)

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        return self.model(mechanism, 0)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """Images of some `length` pixels: the first two held-out ones, repeated or cut. One alone would give norms over
        a batch a single value where a map has shrunk to a pixel, and these refuse that in training."""
        side = max(1, math.isqrt(length))
        return tuple(self._at(x[:2], side, length // side) for x in self.sample())

    def parts_of(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [("network", model)]

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """So many inputs, and their truth.

        Args:
            count: B.
            generator: of all that is random.
            judge: from what is not learned from.
        """
        raise NotImplementedError

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        return self.to_device(self.drawn(self.settings.batch, generator_at(seed, step, TRAIN)))

    @cached_property
    def test(self) -> tuple[Tensor, ...]:
        """All held-out inputs and their truth."""
        return self.drawn(self.settings.evaluation_size, generator_at(0, 0, HELD_OUT), judge=True)

    def held_out(self, share: float = 1.0) -> Iterator[tuple[Any, ...]]:
        yield from self.in_batches(self.test, share)

    def quality(self, model: nn.Module, share: float = 1.0) -> float:
        return self.figures(model, share)[self.metric.name]

    def call(self, model: nn.Module, batch: tuple[Any, ...]) -> Any:
        """What the network returns on a batch."""
        return model(**dict(zip(self.inputs, batch[:-1], strict=True)))

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Inputs, outputs, truth and errors of the first held-out images, a row each: (P, H, W, 3) in [0, 1]."""
        raise NotImplementedError

    def chance(self) -> float | None:
        return None

    @property
    def tokens_per_step(self) -> int:
        """Pixels."""
        return self.settings.batch * self.settings.length

    @staticmethod
    def _at(x_BCHW: Tensor, height: int, width: int) -> Tensor:
        repeats = (1, 1, -(-height // x_BCHW.shape[2]), -(-width // x_BCHW.shape[3]))
        return x_BCHW.repeat(repeats)[..., :height, :width]


def shown(x_BCHW: Tensor) -> Tensor:
    """The first images of a batch as `NetworkTask.pictures` wants them: (P, H, W, 3) in [0, 1].

    Args:
        x_BCHW: of one channel, or three.
    """
    x_PCHW = x_BCHW[:SHOWN].detach().float().cpu().clamp(0, 1)
    return x_PCHW.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
