"""The paper's claim at laptop size: character models with shortcuts and without, of one size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from saccade.attention.layerwise_shortcuts.decoder import ShortcutDecoder
from saccade.catalogue import Claim, ClaimResult

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def _claim(lab: Lab) -> ClaimResult:
    """Character language models with and without shortcuts, the plain one with as many parameters as the largest."""
    layers, depths, dim, length, batch = 6, (2, 4, 5), lab.size(64, 16), 64, lab.size(16, 2)
    rows: dict[str, dict[str, Any]] = {
        "shortcuts_as_default": {"depths": depths},
        "shortcuts_residual": {"depths": depths, "residual_mlp": True},
        "shortcuts_added": {"depths": depths, "residual_mlp": True, "last_layer": "add"},
        # what the additional attention does without a choice of depths
        "layer_below_added": {"depths": depths[-1:], "residual_mlp": True, "last_layer": "add"},
    }

    def build(options: Mapping[str, Any]) -> ShortcutDecoder:
        return ShortcutDecoder(256, dim, 4, layers=layers, **options)

    def parameters(options: Mapping[str, Any]) -> int:
        return sum(parameter.numel() for parameter in build(options).parameters())

    with lab.seeded():
        missing = parameters(rows["shortcuts_added"]) - parameters({"depths": None})
    # a feed-forward layer of width F has 2 C F + F + C parameters
    rows = {"plain": {"depths": None, "ffn_dim": 4 * dim + round(missing / (layers * (2 * dim + 1)))}, **rows}
    text, held_out = lab.data.text_bytes("train"), lab.data.text_bytes("held-out")
    tokens, targets = lab.data.windows(held_out, lab.size(256, 2), length, torch.Generator().manual_seed(10**6))

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(ShortcutDecoder, trial.model)
        losses_BN = F.cross_entropy(model(tokens).mT, targets, reduction="none")
        found = {"held_out_nats_per_byte": losses_BN.mean().item(), "parameters": trial.parameters}
        if model.stack.depths == depths:
            shares_BNS = model.depth_shares(tokens).mean(1)
            for i, depth in enumerate(depths):
                found[f"share_of_depth_{depth}"] = shares_BNS[..., i].mean().item()
            found["share_std_between_tokens"] = shares_BNS.std((0, 1)).mean().item()
            easy = losses_BN <= losses_BN.median()
            gap = shares_BNS[..., -1][~easy].mean() - shares_BNS[..., -1][easy].mean()
            found["share_of_deepest_hard_less_easy_tokens"] = gap.item()
        return found

    trials = lab.forms(
        {name: partial(build, options) for name, options in rows.items()},
        lambda generator: lab.data.windows(text, batch, length, generator),
        measure,
        200, lr=3e-3,
    )  # fmt: skip
    measured = trials.means()
    plain = measured["plain_held_out_nats_per_byte"]
    replaced = measured["shortcuts_residual_held_out_nats_per_byte"]
    return ClaimResult(
        measured,
        holds=replaced <= plain and measured["shortcuts_residual_share_std_between_tokens"] > 0.01,
        note="holds if shortcuts in place of the last self-attention, begun as residual features, do not lose against "
        "the plain decoder and their shares differ between tokens; one seed, differences below 0.02 are noise",
    )


CLAIM = Claim(
    paper="lower next-token loss than a GPT-like baseline of the same size on four data sets; depth maps show "
    "shallow layers for easy tokens, deep ones for hard ones",
    expected="held-out loss of a six-layer character model no higher than the plain decoder's with as many "
    "parameters, and shares of the depths that differ between tokens; in trials of 200 to 400 steps the shares "
    "differ where features start as the layers, and all losses are within noise or behind the plain decoder",
    run=_claim,
)
