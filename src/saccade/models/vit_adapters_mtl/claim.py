"""The paper's claim at laptop size: two dense tasks on a Swin that stays as it was drawn."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.vit_adapters_mtl.network import MultitaskSwin

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE = 32

Batch = tuple[Tensor, Tensor, Tensor]


def squares(count: int, generator: Generator) -> Batch:
    """Images (B, 3, 32, 32) with two squares on noise, where they are (B, 32, 32), and their brightness there.

    A square's brightness, from 0.2 to 1, stands in all channels beside a colour of its own and noise.
    """
    at = torch.arange(_SIDE)
    image, where = 0.3 * torch.randn(count, 3, _SIDE, _SIDE, generator=generator), torch.zeros(count, _SIDE, _SIDE)
    brightness = torch.zeros(count, _SIDE, _SIDE)
    for _ in range(2):
        corner_B2 = torch.randint(_SIDE - 10, (count, 2), generator=generator)
        length_B = torch.randint(5, 11, (count, 1), generator=generator)
        rows, columns = ((at >= corner_B2[:, i, None]) & (at < corner_B2[:, i, None] + length_B) for i in (0, 1))
        inside = rows[:, :, None] & columns[:, None]
        bright_B = 0.2 + 0.8 * torch.rand(count, generator=generator)
        colour_B3 = torch.rand(count, 3, generator=generator)
        colour_B3 = colour_B3 - colour_B3.mean(1, keepdim=True)
        shown = (2 * bright_B[:, None] + colour_B3)[:, :, None, None]
        image = torch.where(inside[:, None], image + shown - 1, image)
        where, brightness = torch.where(inside, 1.0, where), torch.where(inside, bright_B[:, None, None], brightness)
    return image, where.long(), brightness


def network(lab: Lab, adapted: bool) -> nn.Module:
    """A small Swin, frozen as it is drawn: with adapters and task-adapted blocks, or its decoders alone."""
    model = MultitaskSwin(
        ("squares", "brightness"), (2, 1), image_size=_SIDE, patch_size=4, embed_dim=lab.size(16, 4), depths=(2, 2),
        num_heads=(2, 2), decoder_depths=(1, 1), window_size=4, mlp_ratio=2.0, drop_path=0.0, decoder_drop=0.0,
        conditioned_blocks=((1,), (0, 1)) if adapted else ((), ()), adapter=adapted,
    ).freeze()  # fmt: skip
    if not adapted:
        model.embed.requires_grad_(False)
        model.norm.requires_grad_(False)
        model.task_embedding.requires_grad_(False)
    return model


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    image, where, brightness = batch
    squares_B2HW, bright_B1HW = model(image).logits
    error = (bright_B1HW[:, 0] - brightness).abs()[where == 1].mean()  # around the squares there is nothing to be told
    return F.cross_entropy(squares_B2HW, where) + error


def _claim(lab: Lab) -> ClaimResult:
    """IoU of the squares and error of their brightness: adapters and decoders, or decoders alone; two seeds."""
    image, where, brightness = squares(lab.size(128, 4), lab.held_out())

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(MultitaskSwin, trial.model)
        said = [model(part).logits for part in image.split(32)]
        found = torch.cat([logits[0] for logits in said]).argmax(1) == 1
        bright = torch.cat([logits[1] for logits in said])[:, 0]
        both, either = (found & (where == 1)).sum(), (found | (where == 1)).sum()
        error = (bright - brightness).abs()[where == 1].mean()
        return {"iou_percent": 100 * float(both / either.clamp(min=1)), "error_percent": 100 * float(error)}

    forms: dict[str, Any] = {name: partial(network, lab, name == "adapted") for name in ("adapted", "decoders_only")}
    trials = lab.forms(forms, partial(squares, lab.size(16, 2)), measure, 200, loss=_loss, lr=3e-3, seeds=2)
    measured = trials.means("{form}_{figure}")
    return ClaimResult(
        {**measured, **trials.spreads("{form}_{figure}_spread")},
        holds=measured["adapted_iou_percent"] > measured["decoders_only_iou_percent"]
        and measured["adapted_error_percent"] < measured["decoders_only_error_percent"],
        note="means of 2 seeds; the encoder is drawn at random and frozen, but for what the paper trains",
    )


CLAIM = Claim(
    paper="adapters on a frozen Swin beat single-task Swin, InvPT, TaskPrompter and MulT on NYUDv2 and Taskonomy",
    expected="two dense tasks on a small frozen Swin: adapters and task-adapted blocks have the higher IoU and the "
    "lower error of brightness than decoders alone",
    run=_claim,
)
