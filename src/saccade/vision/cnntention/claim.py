"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def digit_batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = torch.randint(len(data.train_labels), (lab.size(64, 4),), generator=generator)
            yield data.train_images[chosen], data.train_labels[chosen]

    def mark_batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield marks(generator, lab.size(32, 4))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    held_out = marks(torch.Generator().manual_seed(10**6), lab.size(400, 4))
    tests = {"digits": (data.test_images, data.test_labels), "far_marks": held_out}
    forms: dict[str, tuple[Form | None, dict[str, Any]]] = {
        "plain": (None, {}),
        "self": ("self", {}),
        "multi_head": ("multi-head", {}),
        "cbam": ("cbam", {"reduction": 8}),
    }
    for task, batches in (("digits", digit_batches), ("far_marks", mark_batches)):
        for name, (form, arguments) in forms.items():
            right = []
            for seed in range(lab.seed, lab.seed + 2):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = ResNet20(10, form, in_channels=1, blocks=blocks, **arguments)
                generator = torch.Generator().manual_seed(seed)
                lab.train(model, batches(generator), loss, 120, lr=3e-3, description=f"{task}, {name}")
                with torch.no_grad():
                    right.append((model.eval()(tests[task][0]).argmax(-1) == tests[task][1]).float().mean().item())
            measured[f"{task}_{name}_accuracy"] = sum(right) / len(right)
            measured[f"{task}_{name}_spread"] = max(right) - min(right)
    best = max(measured["far_marks_self_accuracy"], measured["far_marks_multi_head_accuracy"])
    return ClaimResult(measured, holds=best > max(measured[f"far_marks_{n}_accuracy"] for n in ("plain", "cbam")))


CLAIM = Claim(
    paper="CIFAR-10 error 8.6 % with self-attention, 8.9 % multi-head and CBAM, 9.0 % plain: slightly lower",
    expected="self-attention relates two far marks better than the plain network and CBAM; digits about equal",
    run=_claim,
)
