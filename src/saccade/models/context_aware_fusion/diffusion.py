"""Diffusion over boxes: noise for training, and DDIM from noise to boxes, by `saccade.ops.diffusion`.

    signal  x0 = (2 box - 1) scale,  box = (x, y, width, height) in shares of the image

Shape letters: B batch, N proposals, K classes, T times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from saccade.layers.constants import Constants
from saccade.ops.diffusion import cosine_alphas, ddim_step, noised

#: centre and deviation of the boxes that fill up the objects of an image, and their smallest side
CENTRE, DEVIATION, SMALLEST = 0.5, 1 / 6, 1e-4

#: noisy boxes (B, N, 4) in shares and their times (B,) -> logits (B, N, K) and better boxes (B, N, 4), in shares
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def fill(objects: Sequence[Tensor], count: int, generator: Generator | None = None) -> Tensor:
    """The objects' boxes of each image, filled up with Gaussian ones: (B, N, 4).

    Where there are more objects than proposals, `count` of them are drawn.

    Args:
        objects: boxes (objects, 4) of each image, (x, y, width, height) in shares.
        count: N.
        generator: of what is drawn.
    """
    rows = []
    for boxes in objects:
        if len(boxes) > count:
            boxes = boxes[torch.randperm(len(boxes), generator=generator)[:count].to(boxes.device)]
        more = torch.randn(count - len(boxes), 4, generator=generator).to(boxes) * DEVIATION + CENTRE
        more = torch.cat([more[:, :2], more[:, 2:].clamp(min=SMALLEST)], 1)
        rows.append(torch.cat([boxes, more]))
    return torch.stack(rows)


class BoxDiffusion(Constants):
    """The process: boxes to noise, and back by what a network says.

    Args:
        times: T.
        scale: of the signal; larger is less noise.

    Raises:
        ValueError: if a number is not positive.
    """

    alphas_T: Tensor

    def __init__(self, times: int = 1000, scale: float = 2.0) -> None:
        super().__init__()
        if times < 1 or scale <= 0:
            raise ValueError(f"times and scale must be positive, got {times} and {scale}")
        self.times, self.scale = times, scale
        self.constant("alphas_T", partial(cosine_alphas, times))

    def signal(self, boxes: Tensor) -> Tensor:
        """x0 of boxes (..., 4) in shares."""
        return (2 * boxes - 1) * self.scale

    def boxes(self, signal: Tensor) -> Tensor:
        """Boxes in [0, 1] of signals, which are cut off at the scale."""
        return (signal.clamp(-self.scale, self.scale) / self.scale + 1) / 2

    def noised(self, boxes_BN4: Tensor, times_B: Tensor, noise_BN4: Tensor) -> Tensor:
        """x_t of boxes in shares, not cut off.

        Args:
            boxes_BN4: (x, y, width, height).
            times_B: t of each image, from 0 to T - 1.
            noise_BN4: eps.
        """
        return noised(self.signal(boxes_BN4), noise_BN4, self._alpha(times_B, boxes_BN4))

    def step(self, x_BN4: Tensor, start_BN4: Tensor, time: int, earlier: int, noise_BN4: Tensor, eta: float) -> Tensor:
        """One step of DDIM, from `time` to an `earlier` one; below 0 is the end, x0 itself.

        Args:
            x_BN4: the signal at `time`.
            start_BN4: x0 as the network has it.
            time, earlier: t and s.
            noise_BN4: z.
            eta: 0 is deterministic, 1 as much noise as the process itself adds.
        """
        if earlier < 0:
            return start_BN4
        return ddim_step(x_BN4, start_BN4, self.alphas_T[time], self.alphas_T[earlier], noise_BN4, eta)

    def sample(
        self,
        predict: Predict,
        noise_BN4: Tensor,
        steps: int = 1,
        *,
        eta: float = 1.0,
        renew: float | None = 0.5,
        generator: Generator | None = None,
        alike: bool = False,
    ) -> list[tuple[Tensor, Tensor]]:
        """What the network says at each of some steps from noise to boxes, the last one last.

        Args:
            predict: the network.
            noise_BN4: what is begun with, drawn from N(0, 1).
            steps: how many.
            eta: see `step`.
            renew: boxes whose best class has a lower probability are drawn anew; None keeps all. Unlike the authors',
                which does so on the first image of a batch alone, each image has its own.
            generator: of the noise of the steps.
            alike: all images get the same noise.

        Raises:
            ValueError: if `steps` is not between 1 and T.
        """
        if not 1 <= steps <= self.times:
            raise ValueError(f"steps must be between 1 and {self.times}, got {steps}")
        x_BN4, said = noise_BN4, []
        marks = torch.linspace(-1, self.times - 1, steps + 1).int().tolist()[::-1]
        for time, earlier in zip(marks, marks[1:]):
            times_B = torch.full(x_BN4.shape[:1], time, device=x_BN4.device)
            logits_BNK, boxes_BN4 = predict(self.boxes(x_BN4), times_B)
            said.append((logits_BNK, boxes_BN4))
            start_BN4 = self.signal(boxes_BN4).clamp(-self.scale, self.scale)
            x_BN4 = self.step(x_BN4, start_BN4, time, earlier, noise(x_BN4, generator, alike), eta)
            if renew is not None and earlier >= 0:
                stays_BN1 = logits_BNK.sigmoid().amax(-1, keepdim=True) > renew
                x_BN4 = torch.where(stays_BN1, x_BN4, noise(x_BN4, generator, alike))
        return said

    def _alpha(self, times_B: Tensor, like: Tensor) -> Tensor:
        return self.alphas_T[times_B].to(like.dtype)[:, None, None]


def noise(like_BN4: Tensor, generator: Generator | None, alike: bool = False) -> Tensor:
    """From N(0, 1), of the shape of `like`; for all images the same where they are to be alike."""
    shape = like_BN4.shape[1:] if alike else like_BN4.shape
    device = None if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device).to(like_BN4).expand(like_BN4.shape)
