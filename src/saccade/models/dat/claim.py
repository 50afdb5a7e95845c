"""The card's experiment: the colour of a bright blob at a random place, to be told from a corner of the map.

Shape letters: B batch, H, W map, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.dat.attention import DeformableAttention

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

_SIZE = 16


def blobs(count: int, generator: torch.Generator, size: int = _SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, size, size) of noise with a blob, its colour (B, 3), and where it is: (y, x) in [-1, 1], (B, 2)."""
    colour_B3 = torch.rand(count, 3, generator=generator) * 2 - 1
    place_B2 = torch.rand(count, 2, generator=generator) * 1.6 - 0.8
    axis = torch.linspace(-1, 1, size)
    distance = (axis[:, None] - place_B2[:, 0, None, None]) ** 2 + (axis - place_B2[:, 1, None, None]) ** 2
    blob_BHW = torch.exp(-distance / (2 * 0.15**2))
    noise = 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return noise + blob_BHW[:, None] * colour_B3[:, :, None, None], colour_B3, place_B2


class Corner(nn.Module):
    """A convolution, one attention of 16 points, and a regression from the corner."""

    def __init__(self, offsets: bool, dim: int = 32) -> None:
        super().__init__()
        self.near = nn.Conv2d(3, dim, 3, padding=1)
        self.norm = nn.LayerNorm(dim)
        self.attention = DeformableAttention(
            dim, 4, _SIZE, groups=1, stride=4, kernel_size=9, offset_range=4.0, offsets=offsets, reference="symmetric"
        )
        self.head = nn.Linear(dim, 3)

    def attend(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        x_BHWC = self.norm(F.gelu(self.near(image_BCHW)).permute(0, 2, 3, 1))
        y_BHWC, position, _ = self.attention.attend(x_BHWC)
        return self.head(y_BHWC[:, 0, 0]), position

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.attend(image_BCHW)[0]


def _batches(seed: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield blobs(size, generator)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@torch.no_grad()
def _measure(model: Corner, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Squared error, and the mean distance of points from the blob, in half lengths of the image."""
    out, position = model.attend(batch[0])
    distance = (position.flatten(1, 3) - batch[2][:, None]).norm(dim=-1)
    return F.mse_loss(out, batch[1]).item(), distance.mean().item()


def _claim(lab: Lab) -> ClaimResult:
    """Deformable points against points that stay and read means of 4 x 4 pixels, same seeds and steps."""
    seeds = lab.size(3, 1)
    errors: dict[bool, list[float]] = {True: [], False: []}
    before, after = [], []
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        test = blobs(lab.size(512, 8), torch.Generator().manual_seed(1000 + seed))
        for offsets in (True, False):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = Corner(offsets)
            start = _measure(model, test)[1]
            lab.train(model, _batches(seed, lab.size(16, 4)), _loss, 300, lr=3e-3, description="corner")
            error, distance = _measure(model.eval(), test)
            errors[offsets].append(error)
            if offsets:
                before.append(start)
                after.append(distance)
    spread = {k: stdev(v) if len(v) > 1 else 0.0 for k, v in errors.items()}
    return ClaimResult(
        {
            "error_deformable_mse": mean(errors[True]),
            "error_deformable_spread_mse": spread[True],
            "error_fixed_points_mse": mean(errors[False]),
            "error_fixed_points_spread_mse": spread[False],
            "distance_to_blob_at_the_start_half_lengths": mean(before),
            "distance_to_blob_after_training_half_lengths": mean(after),
        },
        holds=mean(errors[True]) < mean(errors[False]) and mean(after) < mean(before),
        note=f"means and standard deviations of {seeds} seeds; the variance of the colours is 1/3",
    )


CLAIM = Claim(
    paper="points moved by the queries find what matters anywhere on the map with few keys",
    expected="lower error than points that stay, and points that are closer to the object after training",
    run=_claim,
)
