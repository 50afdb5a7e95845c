"""FEAT: a denoiser of video latents whose attention is linear in space and time, and over channels.

Wang et al., "FEAT: Full-Dimensional Efficient Attention Transformer for Medical Video Generation", arXiv 2506.04956
(MICCAI 2025). Latents of frames are patches x; for each pair of blocks, in the order space, time, channels:

    x <- x + gamma1 gate_a Mixer(mod(LN(x)), res)       x <- x + gamma2 gate_f GDFN(mod(LN(x)))
    Mixer:  x <- x + DWConv(x);  k, v, r = W_k x, W_v x, sigmoid(W_r x)
            g = res - v;  v <- v + alpha_0 res;  v <- WKV(k, v), row by row, then column by column;  v <- v + alpha_1 g
            W_o (r v)
    channels:  softmax(tau normalise(q) normalise(k)^T) v over C / E x C / E channels, q, k, v by 1 x 1 and 3 x 3

| here             | paper                         | default                              |
|------------------|-------------------------------|--------------------------------------|
| `Mixer`          | WKV in space (R = 2) and time | R = 1: one scan over the frames      |
| `wkv`            | Bi-WKV                        | w = decay / T, u = first / T         |
| res, `alpha`     | RVGM                          | the embedded input; alpha starts at 0 |
| mod              | adaLN of the diffusion step   | z (1 + scale) + shift                |
| `ChannelBlock`   | global channel attention      | Restormer's                          |

At the start the WKV blocks' gates are 0 and the output is a 1 x 1 convolution of the input.

Where paper and code differ, the code's way is the default: distances of WKV are those of the released kernel
(`distance="published"`: Vision-RWKV's), SiLU is divided by 0.596 in the step's embedding and the WKV blocks, and the
channel blocks get no residual guidance. `diffusion`, from saccade.models, is Endora's training, which FEAT follows.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.feat.mixer import ChannelAttention, ChannelBlock, GatedConvolution, Mixer, WKVBlock
from saccade.models.feat.network import FEAT

__all__ = ["FEAT", "ChannelAttention", "ChannelBlock", "GatedConvolution", "Mixer", "WKVBlock"]


register(
    "feat",
    kind="model",
    summary="Video diffusion with bidirectional WKV over space and time, channel attention, and guidance by the input.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="WKV O(T C) over T tokens of space or frames, channel attention O(N C^2 / E)",
    invariants=(
        "without decay and bonus WKV is the mean of the values by softmax(k), the same at every token",
        "with a bonus of +inf, or for equal values, WKV returns the values",
        "alpha 0 is no guidance",
        "at the start the WKV blocks change nothing and the network is its 1 x 1 convolution of the input",
        "channel attention commutes with the order of tokens, its rows sum to 1",
        "still images behind the clip pass the blocks of time unchanged",
    ),
    build=FEAT,
    example={"in_channels": 3, "dim": 12, "depth": 2, "num_heads": 3, "expansion": 2.0},
    inputs=lambda module, size: (torch.randn(1, 3, 3, 2 * (size // 2 + 1), 6), torch.tensor([500])),
    published=(
        Published("FEAT-S", {"dim": 512, "num_heads": 8}, inputs={"latents": (1, 16, 4, 16, 16), "step": (1,)}),
        Published("FEAT-L", {"dim": 1024, "num_heads": 16}, inputs={"latents": (1, 16, 4, 16, 16), "step": (1,)}),
    ),
)
