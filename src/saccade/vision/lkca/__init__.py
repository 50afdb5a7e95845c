"""LKCA: self-attention whose matrix is one static large kernel over the token grid.

Li, Zhang, Zeng, Lu, Shi, Chen, Liu, Zhu, Yang, Shen, "LKCA: Large Kernel Convolutional Attention", 2024, arXiv
2401.05738 (v3: "Interpreting and Improving Attention From the Perspective of Large Kernel Convolution").

    V = X W_V,   O = mix(V, K),   Y = O W_O

with K of (2H - 1) x (2W - 1) for a grid of H x W tokens, and two equal views of mix. As attention: a window of H x W
slides over K from its lower right to its upper left corner, a step a token, and each window is a row of

    A[(y, x), (y', x')] = K[H-1 - y + y', W-1 - x + x'],    O = A V.

As convolution: O is the cross-correlation of the map V with K, padded by zeros. A is doubly block Toeplitz, the same
for all inputs; its entries may be negative and its rows do not sum to one (`normalize` is not in the sources). The
mixing is linear, every token sees every token, and no position embedding is needed.

Symbols: K `kernel`, one matrix for all channels (`num_heads` = 1, the paper's text), for each of h heads, or for each
channel (h = C: a depthwise convolution). A smaller `kernel_size` is K's centre, and zero elsewhere.

No authors' code could be had. Inferred, and switchable: W_V and W_O (the attention view multiplies values); the
initialisation (truncated normal, 0.02); mean pooling instead of a class token (`class_token`: it bypasses the grid,
and is mixed by the mean of V). Extensions: padding masks zero V; `causal` zeroes the taps ahead in raster order.

Other maps than the grid that K was made for: a larger one sees K as a band, a smaller one uses its centre.

`implementation`: "conv", "attention" (N x N by its definition), "fft", equal up to rounding; None takes the one that
`cheapest` expects to be fastest.
"""

from __future__ import annotations

from saccade.catalogue import register
from saccade.vision.lkca.gate import LKCA
from saccade.vision.lkca.operator import IMPLEMENTATIONS, attention_matrix, cheapest, fit, mix

__all__ = ["IMPLEMENTATIONS", "LKCA", "attention_matrix", "cheapest", "fit", "mix"]


register(
    "lkca",
    kind="gate",
    summary="Token mixing by a static kernel as large as the grid: self-attention with one matrix for all inputs.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "single",
        "positions": "soft",
        "representations": "single",
    },
    efficiency="",
    complexity="time O(N k^2 C) as a convolution, O(N^2 C + h N^2) as attention, O(C N log N) by FFT, and O(N C^2) for "
    "the projections; parameters h k^2 + 2 C^2 + 2 C",
    invariants=(
        "convolution, attention matrix and spectra give the same output and the same gradients",
        "the first row of the matrix is the kernel's lower right window, the last its upper left; it is Toeplitz",
        "a kernel of one at the centre is the identity, a constant full kernel the mean over all tokens",
        "every entry of a full kernel is used",
        "shifting a map whose support stays inside shifts the output",
        "a kernel per channel is a depthwise convolution",
        "the mixing is linear in its input",
    ),
    build=LKCA,
    example={"channels": 8, "size": 4, "num_heads": 2},
)
