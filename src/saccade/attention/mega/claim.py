"""The paper's claim at laptop size: what the average is worth, and what chunks cost.

Shape letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.mega.attention import MegaAttention
from saccade.attention.mega.block import MegaBlock
from saccade.attention.mega.ema import DampedEMA
from saccade.catalogue import Claim, ClaimResult

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


class _NoAverage(DampedEMA):
    """The layer with its average taken out: SiLU(omega x)."""

    def forward(self, x_BNC: Tensor, valid_BN: Tensor | None = None) -> Tensor:
        return F.silu(self.omega * x_BNC)


class _ByteModel(nn.Module):
    def __init__(self, average: bool, **layer: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(MegaBlock(64, causal=True, key_dim=32, **layer) for _ in range(2)))
        if not average:
            for block in self.blocks:
                block.attention.ema = _NoAverage(64)  # type: ignore[union-attr]
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 256)

    def forward(self, tokens_BN: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens_BN))))


def _claim(lab: Lab) -> ClaimResult:
    models: dict[str, dict[str, Any]] = {
        "mega": {"average": True},
        "mega_chunk_32": {"average": True, "chunk_size": 32},
        "without_average": {"average": False},
        "without_average_and_position": {"average": False, "position": None},
    }
    batch, width = lab.size((16, 128), (2, 32))
    text, held_out = lab.data.text_bytes("train"), lab.data.text_bytes("held-out")
    test = lab.data.windows(held_out, lab.size(64, 2), width, lab.held_out())
    trials = lab.forms(
        {name: partial(_ByteModel, **arguments) for name, arguments in models.items()},
        lambda generator: lab.data.windows(text, batch, width, generator),
        lambda trial: {"bits_per_byte": lab.loss(trial.model, test).item() / math.log(2)},
        300, lr=4e-3,
    )  # fmt: skip
    bits, measured = trials.means("{form}"), trials.means()
    times: dict[str, list[float]] = {"chunk": [], "full": []}
    for length in lab.progress(lab.size((2048, 8192), (64, 128)), "time by length"):
        x = torch.randn(1, length, 64, generator=lab.generator())
        for name, size in (("chunk", 128), ("full", None)):
            layer = MegaAttention(64, causal=True, chunk_size=size).eval()
            with torch.no_grad():
                times[name].append(lab.seconds(partial(layer, x), 3))
    measured |= {f"{name}_time_ratio_at_4_times_the_length": taken[1] / taken[0] for name, taken in times.items()}
    holds = (
        bits["mega"] < bits["without_average"] - 0.1
        and bits["mega"] < bits["without_average_and_position"] - 0.5
        and bits["mega_chunk_32"] < bits["mega"] + 0.1
        and times["chunk"][1] < 6 * times["chunk"][0]
    )
    return ClaimResult(measured, holds=holds)


CLAIM = Claim(
    paper="the moving average gives attention its inductive bias of positions; Mega-chunk has linear cost at "
    "little loss",
    expected="a byte-level model: 0.1 bit per byte better than without the average, 0.5 better than without "
    "average and positions; chunks of 32 within 0.1 bit; 4 times the length in less than 6 times the time",
    run=_claim,
)
