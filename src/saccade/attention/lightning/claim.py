"""The paper's claim at laptop size: tokens per second by length, and what the decay is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.lightning.layer import TransNormerLM
from saccade.attention.lightning.operator import decay_slopes, lightning_attend
from saccade.catalogue import Claim, ClaimResult

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def _claim(lab: Lab) -> ClaimResult:
    heads, width = 4, 64
    lengths = lab.size((1024, 4096, 16384), (64, 128))
    slopes = torch.tensor(decay_slopes(heads))
    measured: dict[str, float] = {}
    rates: dict[str, list[float]] = {"lightning": [], "softmax": []}
    for length in lab.progress(lengths, "speed by length"):
        q, k, v = torch.randn(3, 1, heads, length, width, generator=lab.generator())
        ways = {
            "lightning": lambda q=q, k=k, v=v: lightning_attend(q, k, v, slopes),
            "softmax": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        for name, way in ways.items():
            rates[name].append(length / lab.seconds(way, 3))
            measured[f"{name}_tokens_per_second_at_{length}"] = rates[name][-1]
    bits = _train(lab, {"decay": None, "no_decay": [0.0] * heads})
    flat, falling = (rates[name][-1] / rates[name][0] for name in ("lightning", "softmax"))
    return ClaimResult(
        {**measured, **bits},
        holds=flat > 0.8 and falling < 0.5 and bits["decay_bits_per_byte"] < bits["no_decay_bits_per_byte"],
        note=f"rate at {lengths[-1]} over that at {lengths[0]} tokens: lightning {flat:.2f}, softmax {falling:.2f}",
    )


def _train(lab: Lab, slopes: Mapping[str, list[float] | None]) -> dict[str, float]:
    """Held-out bits per byte of a two-layer byte-level TransNormerLLM."""
    batch, length = lab.size((16, 256), (2, 32))
    text, held_out = lab.data.text_bytes("train"), lab.data.text_bytes("held-out")
    test = lab.data.windows(held_out, lab.size(64, 2), length, lab.held_out())

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0]).logits_BNV.flatten(0, 1), pair[1].flatten())

    trials = lab.forms(
        {name: partial(TransNormerLM, 256, 96, 2, 4, glu_dim=192, slopes=given) for name, given in slopes.items()},
        lambda generator: lab.data.windows(text, batch, length, generator),
        lambda trial: {"bits_per_byte": loss(trial.model, test).item() / math.log(2)},
        300, loss=loss, lr=4e-3,
    )  # fmt: skip
    return trials.means()


CLAIM = Claim(
    paper="training speed per token is constant for any sequence length, at the quality of a Transformer",
    expected="tokens per second at 16k at least 80 % of those at 1k, while softmax's at least halve; "
    "a small byte-level model with decay reaches a lower loss than without",
    run=_claim,
)
