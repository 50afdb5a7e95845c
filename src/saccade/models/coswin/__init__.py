"""CoSwin: a Swin Transformer for small images, with a convolution beside each window attention.

Khadka, Rizk, Wang, Santosh, "CoSwin: Convolution Enhanced Hierarchical Shifted Window Attention For Small-Scale
Vision", arXiv 2509.08959. No authors' code could be had; this follows the card.

    u   = LN(z)                                          all tokens of the stage, also as an image: to_map(u)
    z'  = (S)W-MSA(u) + LFM(to_map(u)) + z               windows of M x M, shifted by M // 2 in every other block
    z'' = MLP(LN(z')) + z'
    LFM = 1x1( GELU( BN( depthwise 3x3 ) ) )             crosses the borders of the windows

Confirmed by the sources: four stages with patch merging, LN before and residual after both sub-layers, an image of all
tokens of a stage, the local module inside each attention block. Open, and options here with the card's recommendation
as default:

| option        | values                                                                                              |
|---------------|-----------------------------------------------------------------------------------------------------|
| `local_block` | "dw" (as above); "conv": GELU(BN(dense 3x3)); "dwonly": depthwise 3x3                               |
| `local_norm`  | "batch"; "layer" over the channels of a position; "none"                                            |
| `fusion`      | "sum"; "gate": G + lambda L, lambda per channel, 1 at first; "concat": Linear(2C -> C)([G, L]);     |
|               | "pre": G(u + L); "value": L of the values' map, added before the output projection                  |
| `local`       | False leaves the branch out: a plain Swin                                                           |

Sizes: "cos4" (default; four stages, Swin-T's numbers) and "small3" (three stages, of the public Swin baseline on small
data; with `local=False` its published 242.3 M multiply-adds), for 32 x 32 images; `patch_size=4` for 64 x 64.

Any image size: patches, merges and the convolution pad with zeros at the right and lower border; windows that do not
fill are smaller (equal to padding and masking); an axis no longer than the window is one window without shift, and
reads the part of the bias table that it needs. Drop path rises linearly over the blocks, as in Swin.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.models.coswin.network import (
    FUSIONS,
    LOCAL_BLOCKS,
    LOCAL_NORMS,
    SIZES,
    CoSwin,
    CoSwinBlock,
    FusedAttention,
    LocalBranch,
    to_map,
    to_tokens,
)

__all__ = [
    "FUSIONS",
    "LOCAL_BLOCKS",
    "LOCAL_NORMS",
    "SIZES",
    "CoSwin",
    "CoSwinBlock",
    "FusedAttention",
    "LocalBranch",
    "to_map",
    "to_tokens",
]


register(
    "coswin",
    kind="model",
    summary="A Swin Transformer for small images with a convolution beside each window attention.",
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "local",
        "representations": "multi-representational",
    },
    efficiency="sparse/fixed/window",
    complexity="attention: time 4 N C^2 + 2 M^2 N C; local branch: 9 N C + N C^2",
    invariants=(
        "with a local branch of zeros a block is Swin's, for sum, gate, pre and value",
        "without the attention's output a token reaches exactly its 3 x 3 neighbours, across windows",
        "plain windows are never left",
        "tokens to image to tokens is the identity",
        "constant tokens give constant attention, shifted or not",
        "a window as large as the map is dense attention with relative bias, unshifted",
    ),
    build=CoSwin,
    example={
        "num_classes": 5,
        "embed_dim": 8,
        "depths": (2, 1),
        "num_heads": (2, 4),
        "mlp_ratio": 2.0,
    },
)
