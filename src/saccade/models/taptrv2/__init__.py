"""TAPTRv2: points are followed through a video as a detector follows boxes; where attention looks moves them.

"TAPTRv2: Attention-based Position Update Improves Tracking Any Point", NeurIPS 2024, arXiv 2407.16291.

    key-aware:   a = q . K(r + o) / sqrt(D),   y = Wo sum softmax(a) V(r + o)    o = Wd x, softmax over levels, points
    APU:         r <- r + sum softmax(M a) o / size          M an MLP, softmax over all heads, levels and points
    layer:       x <- LN(x + key-aware), APU, LN(x + attention over frames), LN(x + attention over points), LN(x + FFN)

| here                          | paper                                        | default |
|-------------------------------|----------------------------------------------|---------|
| `dim`, `num_heads`            | d, H                                         | 256, 8  |
| `num_points`                  | P, samples on each of 4 levels               | 4       |
| `encoder_layers`, `decoder_layers` | deformable encoder and decoder          | 2, 5    |
| `window`, `stride`            | frames that are seen at once, and step       | 8, 4    |
| `temperature`                 | of the sine embeddings                       | 10      |

A video is read in windows that overlap; what one says of its last frame is what all later frames start from.
`tracking_loss` is what it is trained by (AdamW 2e-4, backbone 1e-5, offsets a tenth of that; 150 epochs of 24 frames
with 800 points).

Source of what the paper leaves open: the authors' code, through the card. There offsets, which are (x, y), are divided
by (height, width) in the APU: the same on square maps, on which it is trained; here by (width, height), unless
`transposed`, which their weights bring with them. A point is a box (x, y, w, h) whose size means nothing; classes are
three, 0 hidden, 1 visible, 2 without a meaning.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.taptrv2.attention import KeyAwareDeformableAttention, PositionUpdate, sine_embedding
from saccade.models.taptrv2.decoder import DecoderLayer, TrackDecoder
from saccade.models.taptrv2.losses import focal_loss, tracking_loss
from saccade.models.taptrv2.network import TAPTRv2, windows

__all__ = [
    "DecoderLayer",
    "KeyAwareDeformableAttention",
    "PositionUpdate",
    "TAPTRv2",
    "TrackDecoder",
    "focal_loss",
    "sine_embedding",
    "tracking_loss",
    "windows",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Five frames, and points that are given in the first three."""
    points = torch.cat([torch.arange(3.0)[:, None], 0.1 + 0.8 * torch.rand(3, 2)], 1)
    return torch.randn(1, 5, 3, size, size + 2), points[None]


register(
    "taptrv2",
    kind="model",
    summary="Points are followed through a video: key-aware deformable attention, whose weights also move each point.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "multi",
        "positions": "local",
        "representations": "multi-representational",
    },
    efficiency="",
    complexity="O(T Q (H L P d + W d + Q d)) for Q points in T frames, windows of W; the encoder O(T S L P d)",
    invariants=(
        "without offsets nothing moves",
        "a weight of 1 on one sample moves the point there; a move lies among the offsets",
        "one sample for each head and level, and equal keys: plain deformable attention with equal weights",
        "where a point is given, and before, it stays as it was given, bit for bit",
        "points that are tracked do not see those that are not yet",
    ),
    build=TAPTRv2,
    example={
        "dim": 16,
        "num_heads": 2,
        "feedforward": 24,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_points": 2,
        "window": 4,
        "stride": 2,
        "groups": 4,
        "depth": 18,
        "width": 4,
        "stages": 2,
    },
    inputs=_inputs,
    tasks={
        "track": {
            "dim": 32,
            "num_heads": 4,
            "feedforward": 64,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "groups": 8,
            "depth": 18,
            "width": 16,
            "stages": 3,
            "image_size": (64, 64),
        }
    },
    published=(Published("TAPTRv2", {}, inputs={"video": (1, 8, 3, 512, 512), "points": (1, 16, 3)}),),
)
