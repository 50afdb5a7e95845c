"""The paper's claim at laptop size: is a thing in the picture, asked of a reader that has expectations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.adapt.agla.wrapper import AGLA
from saccade.catalogue import Claim, ClaimResult

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

_THINGS, _GRID, _PATCH, _PRESENT = 8, 12, 4, 3


def _pictures(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, things, 48, 48), a channel a thing, and which things are in them (B, things).

    Each of the present things is on a square of 2 x 2 patches; everywhere there is clutter.
    """
    side = _GRID * _PATCH
    images = 0.1 * torch.rand(count, _THINGS, side, side, generator=g)
    present = torch.zeros(count, _THINGS)
    things = torch.rand(count, _THINGS, generator=g).argsort(1)[:, :_PRESENT]
    cells = torch.rand(count, (_GRID // 3) ** 2, generator=g).argsort(1)[:, :_PRESENT]
    for image in range(count):
        for thing, cell in zip(things[image].tolist(), cells[image].tolist()):
            y, x = (3 * part * _PATCH for part in divmod(cell, _GRID // 3))
            images[image, thing, y : y + 2 * _PATCH, x : x + 2 * _PATCH] += 0.6
            present[image, thing] = 1
    return images.clamp(0, 1), present


class _Reader(nn.Module):
    """Says "no" or "yes" to "is thing t there": by what it sees of the thing, and by what else it sees.

    Where a thing is, others are expected or not: that is what it hallucinates by. A prompt is the thing's number.
    """

    def __init__(self, together: Tensor) -> None:
        super().__init__()
        self.register_buffer("together", together)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        one = 0.45 * (2 * _PATCH) ** 2  # what one thing brings
        seen = (pixel_values - 0.2).clamp_min(0).sum((-1, -2)) / one
        expected = seen @ self.together  # type: ignore[operator]
        yes = (seen - 0.5 + expected).gather(1, input_ids)
        return torch.stack([-yes, yes], -1) / 4


def _finds(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """A matcher that knows a thing when it sees one: its channel, by patches."""
    thing = torch.tensor([int(prompt) for prompt in prompts])
    channel = images[torch.arange(len(images)), thing]
    return nn.functional.avg_pool2d(channel[:, None], _PATCH)[:, 0], images.new_ones(len(images))


def _blind(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """A matcher that points anywhere."""
    cor = torch.rand(len(images), _GRID, _GRID, generator=torch.Generator().manual_seed(0))
    return cor.to(images), images.new_ones(len(images))


def _claim(lab: Lab) -> ClaimResult:
    """Right answers, and things seen that are not there: the bare reader, AGLA, and AGLA with a blind matcher."""
    g = lab.held_out()
    count = lab.size(256, 4)
    images, present = _pictures(count, g)
    together = torch.randn(_THINGS, _THINGS, generator=g).fill_diagonal_(0) / 2
    reader = _Reader(together)
    thing = torch.arange(_THINGS).repeat(count)
    call = {"pixel_values": images.repeat_interleave(_THINGS, 0), "input_ids": thing[:, None]}
    truth = present.flatten().bool()
    questions = [str(int(t)) for t in thing]
    forms = {
        "bare": None,
        "agla": AGLA(_finds, question=questions, size=_GRID * _PATCH),
        "blind": AGLA(_blind, question=questions, size=_GRID * _PATCH),
        "cut_alone": AGLA(_finds, alpha=0.0, question=questions, size=_GRID * _PATCH),
    }
    measured: dict[str, float] = {}
    for name, wrapper in forms.items():
        with torch.no_grad():
            if wrapper is None:
                logits = reader(**call)
            else:
                with wrapper(reader):
                    logits = reader(**call)
        yes = logits[:, -1].argmax(-1).bool()
        measured[f"{name}_accuracy_percent"] = 100 * float((yes == truth).float().mean())
        measured[f"{name}_hallucinated_percent"] = 100 * float(yes[~truth].float().mean())
    gain = measured["agla_accuracy_percent"] - measured["bare_accuracy_percent"]
    blind = measured["blind_accuracy_percent"] - measured["bare_accuracy_percent"]
    fewer = measured["agla_hallucinated_percent"] < measured["bare_hallucinated_percent"]
    return ClaimResult(
        measured,
        holds=gain > 3 and blind < gain / 2 and fewer,
        note="the reader is no language model: yes and no by what it sees of a thing and by what else it sees; what "
        "is shown is that to hide what the question is not about weighs evidence more than company",
    )


CLAIM = Claim(
    paper="POPE, LLaVA-1.5-7B: +5.5 % accuracy, +5.1 % F1 over ordinary sampling; fewer objects that are not there",
    expected="questions about things in pictures, of a reader that is misled by other things: at least 3 points more "
    "are right, fewer absent things are seen, and a matcher that points anywhere gains less than half of that",
    run=_claim,
)
