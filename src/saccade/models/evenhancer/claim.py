"""The paper's claim at laptop size: bars that move, at times and at a size that were not trained."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.evenhancer.events import intervals, simulated, voxels
from saccade.models.evenhancer.network import EvEnhancer, charbonnier

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: small pixels on a side, intervals between the frames, bars, frames of the simulation of events
_SIDE, _MOMENTS, _BARS, _MOVIE = 12, 2, 2, 33
#: trained and judged
_TIMES, _OTHER_TIMES = (0.25, 0.5, 0.75), (0.33, 0.6)
_SCALE, _OTHER_SCALE = 2, 3
#: samples of a pixel, on a side
_SAMPLES = 3


class _Scenes:
    """Soft bars of any direction, that move across themselves: seen at any time, with pixels of any size."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        angle = torch.rand(count, generator=generator) * torch.pi
        self.direction = torch.stack([angle.cos(), angle.sin()], 1)
        speed = 0.15 + 0.15 * torch.rand(count, generator=generator)
        self.speed = torch.where(torch.rand(count, generator=generator) < 0.5, speed, -speed)
        self.middle = 1.6 * torch.rand(count, _BARS, generator=generator) - 0.8
        self.width = 0.1 + 0.15 * torch.rand(count, _BARS, generator=generator)
        self.colour = 0.3 + 0.6 * torch.rand(count, _BARS, 3, generator=generator)
        self.ground = 0.05 + 0.2 * torch.rand(count, 3, generator=generator)

    def at(self, time: float, side: int) -> Tensor:
        """(count, 3, side, side)."""
        fine = _SAMPLES * side
        axis = (2 * torch.arange(fine) + 1) / fine - 1
        x, y = self.direction.view(-1, 2, 1, 1).unbind(1)
        along = x * axis + y * axis[:, None] - 2 * (time - 0.5) * self.speed.view(-1, 1, 1)
        distance = (along[:, None] - self.middle[..., None, None]).abs() - self.width[..., None, None]
        inside = torch.sigmoid(-distance / 0.015)[:, :, None]
        image = self.ground[:, :, None, None].expand(-1, -1, fine, fine)
        for bar in range(_BARS):
            image = torch.lerp(image, self.colour[:, bar, :, None, None].expand_as(image), inside[:, bar])
        return F.avg_pool2d(image, _SAMPLES)

    def given(self) -> tuple[Tensor, Tensor]:
        """The two frames, and the events between them."""
        movie = torch.stack([self.at(i / (_MOVIE - 1), _SIDE) for i in range(_MOVIE)], 1)
        events = [voxels(simulated(grey, positive=0.15, negative=0.15), _MOMENTS + 1, _SIDE, _SIDE)
                  for grey in movie.mean(2)]  # fmt: skip
        return movie[:, [0, -1]], intervals(torch.stack(events))

    def truth(self, scale: int, times: tuple[float, ...]) -> Tensor:
        return torch.stack([self.at(time, scale * _SIDE) for time in times], 1)


def _psnr(frames: Tensor, truth: Tensor) -> float:
    """The mean over frames, in dB."""
    return float((-10 * (frames.clamp(0, 1) - truth).square().mean((2, 3, 4)).log10()).mean())


def _claim(lab: Lab) -> ClaimResult:
    """A tiny network trained at scale 2 and three times; and the same without events, which sees zeros for them.

    Beside them bicubic enlargement of the linear blend of both frames.
    """
    learn, judge = _Scenes(lab.size(96, 4), lab.generator()), _Scenes(lab.size(24, 2), lab.held_out())
    frames, events = learn.given()
    truth = learn.truth(_SCALE, _TIMES)
    judged = judge.given()
    asked = {f"scale{_SCALE}": (_SCALE, _TIMES), f"scale{_OTHER_SCALE}_other_times": (_OTHER_SCALE, _OTHER_TIMES)}

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
        chosen = torch.randint(len(frames), (lab.size(4, 1),), generator=generator)
        time = int(torch.randint(len(_TIMES), (), generator=generator))
        return frames[chosen], events[chosen], truth[chosen, time], time

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, int], seen: float) -> Tensor:
        said = model(batch[0], seen * batch[1], float(_SCALE), [_TIMES[batch[3]]])
        return charbonnier(said.frames[:, 0], batch[2])

    def measure(trial: Trial, seen: float) -> dict[str, float]:
        return {
            name: _psnr(trial.model(judged[0], seen * judged[1], float(scale), times).frames, judge.truth(scale, times))
            for name, (scale, times) in asked.items()
        }

    sizes: dict[str, Any] = {
        "channels": lab.size(12, 4), "blocks": 1, "recurrent_blocks": 1, "groups": 2, "base_dim": lab.size(12, 4),
        "num_heads": 2, "hidden": lab.size((48, 48), (4,)), "moments": _MOMENTS,
    }  # fmt: skip
    measured: dict[str, float] = {}
    for form, seen in (("events", 1.0), ("no_events", 0.0)):
        trials = lab.forms(
            {form: partial(EvEnhancer, **sizes)},
            draw, partial(measure, seen=seen), 220, loss=partial(loss, seen=seen), lr=6e-3,
        )  # fmt: skip
        measured |= trials.means("{form}_{figure}_psnr_db")
    for name, (scale, times) in asked.items():
        blend = torch.stack([torch.lerp(judged[0][:, 0], judged[0][:, 1], time) for time in times], 1)
        large = F.interpolate(blend.flatten(0, 1), scale_factor=scale, mode="bicubic").unflatten(0, blend.shape[:2])
        measured[f"bicubic_blend_{name}_psnr_db"] = _psnr(large, judge.truth(scale, times))
    better = all(measured[f"events_{name}_psnr_db"] > measured[f"bicubic_blend_{name}_psnr_db"] for name in asked)
    other = f"scale{_OTHER_SCALE}_other_times_psnr_db"
    return ClaimResult(measured, holds=better and measured[f"events_{other}"] > measured[f"no_events_{other}"])


CLAIM = Claim(
    paper="events between two frames give frames at any time and of any size, also beyond the scales that were trained",
    expected="a tiny network that learns at scale 2 is better than bicubic enlargement of the blend of both frames, "
    "there and at scale 3 and other times, and better than without events",
    run=_claim,
)
