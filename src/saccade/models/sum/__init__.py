"""SUM: one network that predicts where people look in photographs, shop pages and interfaces, told which it is shown.

"SUM: Saliency Unification through Mamba for Visual Attention Modeling", WACV 2025, arXiv 2406.17815.

    block:   y = x + out(SiLU(z) * M2(LN(M3(sum over k of scan_k(SiLU(dwconv u)))))),   [u, z] = in(M1(LN x))
    scan_k:  h_t = exp(D_t A) h_{t-1} + D_t B_t u_t,   y_t = C_t . h_t + S u_t         in four orders of the pixels
    M1 x = x (1 + scale_1) + shift_1,   M2 x = x (1 + scale_2) + shift_2,   M3 x = x (1 + scale_3)
    (shift_1, scale_1, shift_2, scale_2, scale_3) = MLP(P_condition)                   of each decoder block its own

A U of such blocks: the encoder's have no M; the decoder adds the input of an encoder stage before it doubles the
resolution. Linear in pixels, and each pixel sees all others.

| here | paper | default |
|---|---|---|
| `dims`, `depths`, `decoder_depths` | of the trained model: VMamba-S, and its decoder | 96 to 768; 2 2 27 2; 2 2 2 1 |
| `states` | N | 16 |
| `conditions`, `prompt_dim` | the rows of P and their width | 4, 128 |
| `condition` | which is meant where a call names none | "eye" |

Source of what the paper leaves open: the authors' code, through the card: five scalars where the paper's figure has a
shift and a scale for each norm; the skip joins before the resolution grows. The loss is `saliency_loss`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.sum.blocks import SS2D, Expand, VSSBlock
from saccade.models.sum.losses import saliency_loss
from saccade.models.sum.network import CONDITIONS, SUM

__all__ = ["CONDITIONS", "SS2D", "SUM", "Expand", "VSSBlock", "saliency_loss"]


register(
    "sum",
    kind="model",
    summary="Where people look, by a U of selective scans in four directions that is told what kind of image it sees.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "single",
    },
    efficiency="",
    complexity="time O(H W C N), memory O(H W C)",
    invariants=(
        "a block whose five scalars are 0 is the block without modulation",
        "with one set of parameters for all four directions and a symmetric kernel, turning the image by 180 degrees "
        "turns the output",
        "another condition gives another map, unless the prompts are the same",
        "a map's correlation with itself is 1, its divergence 0, its similarity 1",
    ),
    build=SUM,
    example={"dims": (8, 16), "depths": (1, 1), "decoder_depths": (1, 1), "states": 3, "prompt_dim": 8},
    inputs=lambda module, size: (torch.randn(2, 3, -(-size // 8) * 8, -(-size // 8) * 8 + 8), torch.tensor([3, 1])),
    tasks={"look": {"dims": (16, 32), "depths": (1, 1), "decoder_depths": (1, 1), "states": 4, "prompt_dim": 16}},
    published=(Published("SUM", {}, inputs={"pixel_values": (1, 3, 256, 256)}),),
)
