"""UniMatch: optical flow, stereo and depth of two views by one network, whose matching has no parameters.

"Unifying Flow, Stereo and Depth Estimation", TPAMI 2023, arXiv 2211.05783 (GMFlow, GMStereo, GMDepth).

    block:      x + LN(merge attend(x, x)),   then   x + LN(MLP [x; LN(merge attend(x, other image))])
    flow        sum_j softmax_j(f0_i . f1_j / sqrt(C)) position_j - position_i              over all pixels
    disparity   position_i - sum_{j <= i} softmax_j(f0_i . f1_j / sqrt(C)) position_j       along rows
    depth       1 / sum_d softmax_d(f0_i . f1(seen at depth d) / sqrt(C)) inverse depth_d
    propagate   softmax(q k^T / sqrt(C)) values,   q = Wq f0, k = Wk q                      into what is hidden

Then convex upsampling, or recurrent refinement before it. Nothing of all pairs is kept: matching and propagation are
`ops.matching` and `attend` with positions and values as values.

| here | paper | default |
|---|---|---|
| `scales` | 1/8, or 1/8 and 1/4 with a residual by local matching | 1 |
| `splits`, `cross` | windows of attention, which shift in every second block | 2, 8; windows, rows for stereo |
| `radii`, `propagation` | of local matching and propagation, -1 for all pixels | -1, 4; -1, 1 |
| `refinements` | 6 for flow, 3 for stereo, 1 for depth | 0 |
| `chained` | k = Wk Wq f0, as published weights have it | True |

Source of what the paper leaves open: the authors' code, through the card: the residual block's extra ReLU, the chained
key, a GRU whose state starts anew in each turn, "depths" that are inverse depths. The losses of training are
`flow_loss`, `disparity_loss` and `depth_loss`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.unimatch.losses import depth_loss, disparity_loss, flow_loss
from saccade.models.unimatch.matching import Propagation
from saccade.models.unimatch.network import TASKS, UniMatch
from saccade.models.unimatch.transformer import FeatureTransformer

__all__ = [
    "TASKS",
    "FeatureTransformer",
    "Propagation",
    "UniMatch",
    "depth_loss",
    "disparity_loss",
    "flow_loss",
]

_FLOW = {"image0": (1, 3, 448, 1024), "image1": (1, 3, 448, 1024)}
_STEREO = {"image0": (1, 3, 384, 1248), "image1": (1, 3, 384, 1248)}
_DEPTH = {
    "image0": (1, 3, 480, 640),
    "image1": (1, 3, 480, 640),
    "intrinsics": (1, 3, 3),
    "pose": (1, 4, 4),
}

register(
    "unimatch",
    kind="model",
    summary="Flow, stereo and depth of two images: features made aware of each other, matched by one softmax.",
    supports=(),
    taxonomy={
        "sequences": "co-attention",
        "levels": "multi",
        "positions": "soft",
        "representations": "single",
    },
    efficiency="",
    complexity="time O(N^2 C) in N pixels at 1/8, memory O(N C)",
    invariants=(
        "orthonormal features scaled large match a shifted image exactly where the target is in the image",
        "local matching with a window over the whole map is global matching",
        "a disparity lies between 0 and x; in column 0 it is 0",
        "attention in one window is attention over the whole map; places repeat in each window",
        "a constant flow stays as it is by propagation over all pixels",
        "under the identity as pose all depths are as probable: the mean candidate",
        "with the images exchanged, forward and backward are exchanged",
    ),
    build=UniMatch,
    example={"dim": 8, "layers": 2, "width": 4, "expansion": 2},
    inputs=lambda module, size: tuple(
        255 * torch.rand(2, 3, -(-size // 16) * 16, -(-size // 16) * 16 + 16) for _ in "01"
    ),
    published=(
        Published("GMFlow", {}, parameters=4.7, inputs=_FLOW),
        Published("GMFlow-scale2", {"scales": 2}, parameters=4.7, inputs=_FLOW),
        Published("GMFlow-scale2-refine6", {"scales": 2, "refinements": 6}, parameters=7.4, inputs=_FLOW),
        Published("GMStereo", {"task": "stereo"}, parameters=4.7, inputs=_STEREO),
        Published("GMStereo-scale2", {"task": "stereo", "scales": 2}, parameters=4.7, inputs=_STEREO),
        Published(
            "GMStereo-scale2-refine3", {"task": "stereo", "scales": 2, "refinements": 3}, parameters=7.4, inputs=_STEREO
        ),
        Published("GMDepth", {"task": "depth"}, parameters=4.7, inputs=_DEPTH),
        Published("GMDepth-refine1", {"task": "depth", "refinements": 1}, parameters=7.3, inputs=_DEPTH),
    ),
)
