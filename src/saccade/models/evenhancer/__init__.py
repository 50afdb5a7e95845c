"""EvEnhancer: frames at any time and of any size, from two small frames and the events between them.

"EvEnhancer: Empowering Effectiveness, Efficiency and Generalizability for Continuous Space-Time Video Super-Resolution
with Events", CVPR 2025, arXiv 2505.04657.

    EMA:   o = lrelu(conv o) + P_o(o) P_e(e),   a = DCN(f; o)       from coarse to fine, either frame for each interval
    BRC:   h_t = R[CF(x_t, e_t); h_(t-1)],   back, then on with the state of the way back
    LIVT:  A_n = softmax_n(q . k_n / sqrt(D) + W [sin, cos](b (p - p_n))),   rgb = MLP [A_n v_n; q; cell]

| here                 | paper                                          | default |
|----------------------|------------------------------------------------|---------|
| `channels`           | n_feats                                        | 64      |
| `blocks`             | residual blocks of the pyramids                | 5       |
| `base_dim`           | d of LIVT; 16 in EvEnhancer-light              | 64      |
| `num_heads`          | H                                              | 8       |
| `radius`, `radius_t` | r and r_t: (2 r + 1)^2 neighbours, 2 r_t + 1 frames | 1, 1 |
| `moments`            | E intervals between two frames                 | 7       |
| `groups`             | deformable groups                              | 8       |

It is trained by `charbonnier` with Adam at 1e-4, cosine to 1e-7 with restarts every 150,000 steps: 450,000 steps at
scale 4, then 150,000 at scales drawn from [1, 4] for each batch; windows of 32 x 32 small pixels, batches of 2, events
simulated (`simulated`) at thresholds from 0.05 to 0.5.

Source of what the paper leaves open: the authors' code, through the card. There the bias sees no displacement in x:
`encode="tyx"` does. As values are not summed over neighbours but laid side by side, LIVT is no attention in the usual
sense: its MLP sees each of them. A feed-forward branch of the channel fusion, whose result the code does not use, is
not here.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.evenhancer.alignment import EventAlignment, EventModulation, FeaturePyramid, ModulatedConv
from saccade.models.evenhancer.decoder import LIVT, PositionBias
from saccade.models.evenhancer.events import intervals, read_events, simulated, voxels
from saccade.models.evenhancer.network import EvEnhancer, charbonnier
from saccade.models.evenhancer.recurrence import ChannelFusion, CompensationLayer, RecurrentCompensation

__all__ = [
    "LIVT",
    "ChannelFusion",
    "CompensationLayer",
    "EvEnhancer",
    "EventAlignment",
    "EventModulation",
    "FeaturePyramid",
    "ModulatedConv",
    "PositionBias",
    "RecurrentCompensation",
    "charbonnier",
    "intervals",
    "read_events",
    "simulated",
    "voxels",
]

_INPUTS = {"frames": (1, 2, 3, 32, 32), "events": (1, 7, 2, 32, 32)}

register(
    "evenhancer",
    kind="model",
    summary="Frames at any time and of any size from two frames and the events between: deformable alignment by "
    "events, a recurrence both ways, and local attention that is asked pixel by pixel.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "local",
        "representations": "single",
    },
    efficiency="",
    complexity="time O((2 r + 1)^2 (2 r_t + 1) d) and the MLP for each pixel that is asked for; O(E h w n^2) before",
    invariants=(
        "pixels asked in pieces are those asked at once",
        "weights of a frame's neighbours sum to 1",
        "at scale 1 and a latent frame's time the query is the map's own value",
        "channel fusion starts as a convolution of x + y, the deformable one as half the plain one",
        "a video played backwards, with its events reversed and the directions' weights exchanged, gives the latent "
        "frames backwards",
    ),
    build=EvEnhancer,
    example={
        "channels": 8,
        "blocks": 1,
        "recurrent_blocks": 1,
        "groups": 2,
        "base_dim": 8,
        "num_heads": 2,
        "hidden": (12,),
        "scale": 1.5,
        "moments": 1,
    },
    inputs=lambda module, size: (torch.rand(2, 2, 3, size, size + 2), torch.randn(2, 1, 2, size, size + 2)),
    published=(
        Published("EvEnhancer", {}, inputs=_INPUTS),
        Published("EvEnhancer-light", {"base_dim": 16}, inputs=_INPUTS),
    ),
)
