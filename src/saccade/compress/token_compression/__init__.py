"""Cluster & Aggregate: a vision-language model reads the means of clusters of visual tokens instead of the tokens.

Omri, Shroff, Tambe, "Token Sequence Compression for Efficient Multimodal Computing", arXiv 2504.17892.

    X in R^{N x D}, an image's tokens behind the projector  ->  clusters c = 1 ... m of it, and
    t_c = (1 / N_c) sum_{j in c} x_j,     in the order of the mean index of their members

No training; decoding is as ever, with m instead of N keys an image. Beside it stand the methods that it was compared
with, so that anyone can see how much of an encoder's tokens is redundant:

| `method`           | what is left                                                                                |
|--------------------|---------------------------------------------------------------------------------------------|
| "cluster"          | means of clusters: `cluster` "k-means", "density-peaks" or "agglomerative"                  |
| "random"           | m tokens by lot                                                                             |
| "spatial"          | evenly spread tokens: rows and columns floor((i + 1/2) side / sqrt m), else of the raster   |
| "pool"             | means of blocks                                                                             |
| "saliency"         | the m tokens that the encoder's class token, or the prompt's text, looks at most            |
| "merging"          | ToMe's bipartite matching, round by round                                                   |
| "saliency-cluster" | the most salient as they are, the others clustered, as VisionZip does                       |

| here                | paper         | default                                                                 |
|---------------------|---------------|-------------------------------------------------------------------------|
| `tokens`, `share`   | m, m / N      | 64 (11 % of LLaVA-1.5's 576)                                            |
| `cluster`           | not at hand   | "k-means": the mean is its objective's own representative               |
| `distance`          | not at hand   | "euclidean"                                                             |
| `start`             | not at hand   | "k-means++"; "strided" has no lot in it                                 |
| `order`             | not at hand   | "mean"                                                                  |
| `positions`         | not at hand   | "consecutive"; of several axes (Qwen2-VL) those of the clusters' middles |

There is no authors' code. What the summaries of the paper leave open is an option above. `token_compression` puts it
between a model's projector and its language model; what is compressed is a run of image tokens, so a crop where crops
are marked apart (SmolVLM), and all of an image with its newlines elsewhere.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.compress.token_compression.compressor import Compressed, TokenCompression
from saccade.compress.token_compression.grouping import agglomerate, density_peaks, group_means, k_means, merge_in_pairs
from saccade.compress.token_compression.wrapper import CompressionReport, token_compression

__all__ = [
    "Compressed",
    "CompressionReport",
    "TokenCompression",
    "agglomerate",
    "density_peaks",
    "group_means",
    "k_means",
    "merge_in_pairs",
    "token_compression",
]


register(
    "token-compression",
    kind="compressor",
    summary="Visual tokens of a vision-language model as the means of their clusters; and seven ways beside it.",
    supports=("training-free", "padding"),
    taxonomy={"sequences": "self", "levels": "single", "positions": "hard", "representations": "single"},
    efficiency="",
    complexity="k-means O(N m D iterations) an image; prefill (m + T)^2 for (N + T)^2, keys and values m + T",
    invariants=(
        "m = N gives the tokens back, m = 1 their mean",
        "sum_c N_c t_c = sum_j x_j, and each mean lies within its members",
        "m distinct values are given back by density peaks and agglomeration",
        "k-means' objective does not rise, and permuted tokens permute its groups",
        "what is chosen is a row of the input, in rising order; equal scores fall back to the order",
        "means of a given partition commute with a linear projector",
    ),
    build=TokenCompression,
    example={"tokens": 5, "start": "strided"},
    inputs=lambda module, size: (torch.randn(2, size, 8),),
    data_dependent=True,
)
