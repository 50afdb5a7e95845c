"""MBT: modalities talk to each other through a few bottleneck tokens, and only from a chosen layer on.

Nagrani, Yang, Arnab, Jansen, Schmid, Sun, "Attention Bottlenecks for Multimodal Fusion", NeurIPS 2021,
arXiv 2107.00135.

    l <  L_f:   z_m <- Block_l,m(z_m)                                       each modality m for itself
    l >= L_f:   [z_m | z_b^m] = Block_l,m([z_m | z_b]),   z_b <- mean_m z_b^m

    Block(x):   x <- x + DropPath(Drop(MHA(LN x))),   x <- x + DropPath(MLP(LN x))

Symbols: L `depth`, L_f `fusion_layer`, z_m the tokens of modality m, z_b the N_b bottleneck tokens (`num_bottlenecks`),
learned, N(0, 0.02^2), without positions. All modalities read the bottleneck of the layer before (parallel update), so
that news needs two fused layers to get across: one writes it, the next reads it. MLP with tanh-GELU, LN with eps 1e-6,
attention with biases.

`BottleneckFusion` is that stack on token streams, for any number of modalities; `MBT` is the paper's model around it:
tokenisers for video and spectrogram, class tokens, positions, head.

Without bottleneck (`bottleneck=False`), as compared in the paper: with separate weights each modality's block reads
[the others | z_m] and keeps the last (cross attention); with shared weights one block runs on all tokens.

From the authors' code: one bottleneck token more where class tokens are used (`MBT`); `test_with_bottlenecks=False`
runs every layer without the bottleneck at test time; logits are the mean of the modalities' logits from one shared
head. Ours: padding masks (bottlenecks are always valid), modalities that are missing for all rows (None) or for single
rows (a mask of False only) are left out of the mean; drop path divides by the probability of keeping.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.fusion.bottleneck_fusion.fusion import MBT, Block, BottleneckFusion
from saccade.fusion.bottleneck_fusion.operator import MBTOutput, across, jointly, through_bottleneck

__all__ = ["MBT", "Block", "BottleneckFusion", "MBTOutput", "across", "jointly", "through_bottleneck"]


register(
    "bottleneck-fusion",
    kind="fusion",
    summary="Modalities exchange information through a few shared bottleneck tokens, from a chosen layer on.",
    supports=("missing-modality", "padding"),
    taxonomy={"sequences": "co-attention", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="a fused layer O(sum over modalities of (N + S)^2 C), against O((sum of N)^2 C) for joint attention",
    invariants=(
        "late fusion is independent encoders: no gradient crosses",
        "one fused layer carries nothing across, two do, at most S C numbers",
        "the order of the bottleneck tokens does not matter",
        "swapping modalities with their weights swaps the results",
        "a missing modality is left out of the mean",
    ),
    build=BottleneckFusion,
    example={"dim": 16, "num_heads": 4, "num_bottlenecks": 2},
)
