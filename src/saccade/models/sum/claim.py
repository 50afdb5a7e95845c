"""The paper's claim at laptop size: discs and squares on noise; the condition says at which of them people look."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.sum.losses import correlation, saliency_loss
from saccade.models.sum.network import SUM

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE, _RADIUS, _SIGMA = 64, 5, 5.0


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images with two reddish discs and two bluish squares, the kind that is looked at, and the density of looks."""
    place = torch.randint(_RADIUS, _SIDE - _RADIUS, (count, 4, 2), generator=generator)
    grid = torch.arange(_SIDE)
    down, across = ((grid - place[..., axis, None]) for axis in (0, 1))
    far = down[:, :, :, None] ** 2 + across[:, :, None] ** 2
    disc = far[:, :2] <= _RADIUS**2
    square = (down[:, 2:, :, None].abs() < _RADIUS) & (across[:, 2:, None].abs() < _RADIUS)
    image = 0.4 * torch.randn(count, 3, _SIDE, _SIDE, generator=generator)
    colour = torch.rand(count, 4, 3, 1, 1, generator=generator)
    colour[:, :2, 0] += 1.5
    colour[:, 2:, 2] += 1.5
    for number, shape in enumerate(torch.cat([disc, square], 1).unbind(1)):
        image = torch.where(shape[:, None], colour[:, number], image)
    kind = torch.randint(2, (count,), generator=generator)
    bumps = (-far / (2 * _SIGMA**2)).exp().view(count, 2, 2, _SIDE, _SIDE).amax(2)
    return image, kind, bumps[torch.arange(count), kind]


class _Untold(nn.Module):
    """The network for which all images are of one kind."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.network = SUM(**sizes)

    def forward(self, image: Tensor, kind: Tensor) -> Any:
        return self.network(image, torch.zeros_like(kind))


def _loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    image, kind, density = batch
    return saliency_loss(model(image, kind).heatmap, density)[0]


def _claim(lab: Lab) -> ClaimResult:
    """A SUM of two stages that is told the kind of each image, and one that is not."""
    image, kind, density = scenes(lab.size(64, 4), lab.held_out())

    def measure(trial: Trial) -> dict[str, float]:
        with torch.no_grad():
            found = torch.cat([trial.model(*pair).heatmap for pair in zip(image.split(16), kind.split(16))])
        cc_B = correlation(found.flatten(1), density.flatten(1))
        of_kind = [cc_B[kind == k] for k in (0, 1)]
        return {f"cc_{name}": float(cc.mean()) for name, cc in zip(("discs", "squares"), of_kind) if len(cc)}

    sizes: dict[str, Any] = {
        "dims": lab.size((16, 32), (8, 16)), "depths": (1, 1), "decoder_depths": (2, 2), "states": 4, "prompt_dim": 32,
        "drop_path": 0.0,
    }  # fmt: skip
    forms: dict[str, Any] = {
        "told": partial(SUM, **sizes),
        "untold": partial(_Untold, **sizes),
    }
    draw = partial(scenes, lab.size(8, 2))
    measured = lab.forms(forms, draw, measure, 400, loss=_loss, lr=6e-3).means()
    told, untold = ([value for name, value in measured.items() if name.startswith(form)] for form in ("told", "untold"))
    return ClaimResult(
        measured,
        holds=min(told) > 0.9 and max(untold) < min(told),
        note="correlation with the density of looks; two reddish discs and two bluish squares on noise",
    )


CLAIM = Claim(
    paper="one network with a learned prompt for each kind of image predicts saliency of all kinds",
    expected="told the kind, a correlation above 0.9 on both; not told, that of a map which is right for neither",
    run=_claim,
)
