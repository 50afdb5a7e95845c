"""The paper's claim at laptop size: two far marks that are to be compared, and digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.vision.cnntention.gate import Form, ResNet20

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    """Do two far marks look alike? And digits: the plain network and the three modules, two seeds, equal steps."""
    data = lab.data.digits()
    measured: dict[str, float] = {}
    blocks = (1, 1, 1)

    def marks(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Two of four marks in opposite corners of a noisy 20 x 20 image; 1 where they are the same."""
        shapes = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]).float().view(4, 2, 2)
        first = torch.randint(4, (batch,), generator=generator)
        same = torch.randint(2, (batch,), generator=generator)
        second = torch.where(same == 1, first, (first + torch.randint(1, 4, (batch,), generator=generator)) % 4)
        images = 0.1 * torch.randn(batch, 1, 20, 20, generator=generator)
        images[:, 0, 1:3, 1:3] += shapes[first] * 2 - 1
        images[:, 0, 17:19, 17:19] += shapes[second] * 2 - 1
        return images, same

    held_out = marks(torch.Generator().manual_seed(10**6), lab.size(400, 4))
    forms: dict[str, tuple[Form | None, dict[str, Any]]] = {
        "plain": (None, {}),
        "self": ("self", {}),
        "multi_head": ("multi-head", {}),
        "cbam": ("cbam", {"reduction": 8}),
    }
    networks = {
        name: partial(ResNet20, 10, form, in_channels=1, blocks=blocks, **arguments)
        for name, (form, arguments) in forms.items()
    }
    tasks: dict[str, tuple[Callable[[torch.Generator], tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
        "digits": (
            lambda generator: lab.data.rows(lab.size(64, 4), generator, data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        ),
        "far_marks": (lambda generator: marks(generator, lab.size(32, 4)), held_out),
    }
    for task, (draw, test) in tasks.items():
        trials = lab.forms(
            networks,
            draw,
            lambda trial, test=test: {"accuracy": lab.accuracy(trial.model, test)},  # type: ignore[misc]
            120, lr=3e-3, seeds=2, task=task,
        )  # fmt: skip
        measured |= trials.means(f"{task}_{{form}}_accuracy") | trials.spreads(f"{task}_{{form}}_spread")
    best = max(measured["far_marks_self_accuracy"], measured["far_marks_multi_head_accuracy"])
    return ClaimResult(measured, holds=best > max(measured[f"far_marks_{n}_accuracy"] for n in ("plain", "cbam")))


CLAIM = Claim(
    paper="CIFAR-10 error 8.6 % with self-attention, 8.9 % multi-head and CBAM, 9.0 % plain: slightly lower",
    expected="self-attention relates two far marks better than the plain network and CBAM; digits about equal",
    run=_claim,
)
