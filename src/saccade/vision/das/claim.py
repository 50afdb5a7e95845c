"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.vision.das.gate import DAS, beside

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


class _Reader(nn.Module):
    """A 3x3 convolution and a gate; logits (B, K) from the pixel that is marked."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(5, 16, 3, padding=1), nn.ReLU(), gate)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor, mark_B2: Tensor) -> Tensor:
        maps = self.body(image)
        return self.head(maps[torch.arange(len(maps)), :, mark_B2[:, 0], mark_B2[:, 1]])


def _claim(lab: Lab) -> ClaimResult:
    """The same reader with DAS and with DAS whose offsets are held at zero; error by seeds, offsets, time by pixels."""
    seeds = lab.size(2, 1)
    errors: dict[str, list[float]] = {"das": [], "plain_convolution": []}
    moved = []
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        test, label_B, mark_B2 = beside(lab.size(500, 8), torch.Generator().manual_seed(1000 + seed))
        for name in errors:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                gate = DAS(16, alpha=0.5)
                network = _Reader(gate)
            gate.offset.requires_grad_(name == "das")
            lab.train(network, _batches(seed, lab.size(32, 4)), _loss, 400, lr=1e-2, description=name)
            with torch.no_grad():
                errors[name].append(100 * (network.eval()(test, mark_B2).argmax(1) != label_B).float().mean().item())
                if name == "das":
                    moved.append(gate.offset(gate.bottleneck(network.body[:2](test))).abs().mean().item())
    gate = DAS(64).eval()
    times = []
    for side in lab.size((32, 64), (4, 8)):
        x_BCHW = torch.randn(1, 64, side, side)
        with torch.no_grad():
            times.append(lab.seconds(lambda x_BCHW=x_BCHW: gate(x_BCHW)))  # type: ignore[misc]
    mean = {name: sum(values) / seeds for name, values in errors.items()}
    spread = {f"spread_{name}_percent": max(values) - min(values) for name, values in errors.items()}
    return ClaimResult(
        {
            **{f"error_{name}_percent": value for name, value in mean.items()},
            **spread,
            "mean_offset_pixels": sum(moved) / seeds,
            "time_at_four_times_the_pixels_ratio": times[1] / times[0],
        },
        holds=mean["das"] < mean["plain_convolution"] and times[1] / times[0] < 8,
        note=f"means of {seeds} seeds; three quarters is chance; offsets start at 0; 16 would be quadratic time",
    )


def _batches(seed: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield beside(size, generator)


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    image, label_B, mark_B2 = batch
    return F.cross_entropy(network(image, mark_B2), label_B)


CLAIM = Claim(
    paper="DAS beats other attention of CNNs at like cost, because its gate sees salient places beyond the "
    "kernel's square, in time linear in the pixels",
    expected="where the answer lies 4 to 8 pixels away, lower error than with the offsets held at zero; offsets "
    "grow; four times the pixels take about four times as long",
    run=_claim,
)
