"""What the switched layers of one model know of its present call: the denoising step, the grid, the tokens' order."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saccade.integrations.diffusers.models import GRIDS
from saccade.ops.hilbert import gilbert_order, neighbor_blocks


@dataclass
class Clock:
    """Which denoising step it is, over all models of a pipeline."""

    dense_steps: int
    step: int = -1
    last: float | None = None

    def tick(self, timestep: Any) -> None:
        if not self.dense_steps:
            return
        now = None if timestep is None else float(torch.as_tensor(timestep).max())
        if now is not None and self.last is not None and now > self.last:
            self.step = 0
        elif now is None or self.last is None or now < self.last:
            self.step += 1
        self.last = now

    @property
    def warming_up(self) -> bool:
        return 0 <= self.step < self.dense_steps


@dataclass
class Run:
    """What the layers of one model know of its present call."""

    model: nn.Module
    clock: Clock
    curve: bool | tuple[int, int, int]
    grid: tuple[int, int, int] | None = None
    orders: dict[Any, Tensor | None] = field(default_factory=dict)
    touching: dict[Any, Tensor] = field(default_factory=dict)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        call = dict(zip(names, args)) | kwargs
        self.clock.tick(call.get("timestep"))
        if self.curve is True:
            read = GRIDS.get(type(model).__name__)
            if read is None:
                raise ValueError(f"the grid of {type(model).__name__} is not known: curve=(frames, rows, columns)")
            self.grid = read(model, call)
        elif self.curve:
            self.grid = self.curve

    def order(self, visual: int, tokens: int, begin: int, front: bool | None, device: torch.device) -> Tensor | None:
        """The order in which the mechanism sees the tokens; None where it is their own.

        Args:
            begin: where the visual tokens begin.
            front: text goes before them, after them, or (None) stays where it is.
        """
        key = (self.grid, visual, tokens, begin, front, device)
        if key not in self.orders:
            pixels = torch.arange(visual)
            if self.grid is not None:
                T, H, W = self.grid
                if visual != T * H * W:
                    raise ValueError(f"curve: a grid of {T} x {H} x {W} is not the layer's {visual} visual tokens")
                pixels = gilbert_order(self.grid)
            place = torch.arange(tokens)
            words = torch.cat([place[:begin], place[begin + visual :]])
            first = words.numel() if front or (front is None and begin) else 0
            order = torch.cat([words[:first], pixels + begin, words[first:]])
            self.orders[key] = None if torch.equal(order, place) else order.to(device)
        return self.orders[key]

    def neighbors(self, block_q: int, block_k: int, device: torch.device) -> Tensor:
        """The blocks along the curve that touch in the grid."""
        assert self.grid is not None
        key = (self.grid, block_q, block_k, device)
        if key not in self.touching:
            near = neighbor_blocks(self.grid, gilbert_order(self.grid), (block_q, block_k))
            self.touching[key] = near.to(device)
        return self.touching[key]
