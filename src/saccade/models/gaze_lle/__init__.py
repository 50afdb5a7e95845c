"""Gaze-LLE: where people in a picture look, by a small decoder on one frozen encoder's features of the whole scene.

Ryan et al., "Gaze-LLE: Gaze Target Estimation via Large-Scale Learned Encoders", arXiv 2412.09586 (CVPR 2025).

    x = linear(encoder(image)) + p;     x_person = x + M e
    t = blocks([io; x_person]);         heat map = sigmoid(conv(up(t_1 ..))),   in the picture? sigmoid(MLP(t_0))

| here | paper | default |
|---|---|---|
| `channels`, `dim` | widths of encoder and decoder | 768, 256 |
| M | 1 in the cells of the person's head box, 0 elsewhere | box rounded to cells |
| e | learned, the person prompt | |
| p | sines and cosines of x and y, not learned | |
| io | learned token, only where `inout` | False |

Every person of an image is one more pass through the decoder alone; the encoder sees the image once. It is any module
that gives maps or tokens: `GazeLLE(channels=384).on(vit)`, or the name or folder of a transformers model as `encoder`.
It is not trained, and not saved with this network, as in the released files.

Beside the paper: `stem` puts a few convolutions that are learned in the encoder's place, for pictures of a few dozen
pixels, and `least_cell` keeps the prompt of a head that is smaller than a cell, which rounding would take away.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.gaze_lle.network import GazeLLE, head_maps, people_of, place_code
from saccade.models.gaze_lle.training import augmented, gaze_loss, learning_rates

__all__ = ["GazeLLE", "augmented", "gaze_loss", "head_maps", "learning_rates", "people_of", "place_code"]

_NONE = "the card gives no figure of the models that also tell whether a target is in the picture"

register(
    "gaze-lle",
    kind="model",
    summary="Where each person in a picture looks, by a prompt at the head and three blocks on a frozen encoder's map.",
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="once a picture the encoder, once a person 3 blocks over H W / 196 tokens; 2.8 M parameters learn",
    invariants=(
        "the prompt covers the rounded box; no box is an empty prompt",
        "people in one call get what each gets alone",
        "with the prompt at 0 all people of a picture get one map",
        "gradients reach the decoder alone",
    ),
    build=GazeLLE,
    example={"stem": (4, 8), "dim": 16, "num_layers": 2, "inout": True, "out_size": None},
    inputs=lambda module, size: (
        torch.rand(2, 3, max(size, 4), size + 6),
        torch.tensor([[[0.1, 0.2, 0.6, 0.7]], [[0.3, 0.1, 0.9, 0.4]]]),
    ),
    tasks={"look": {"stem": (24, 48, 64), "dim": 64, "num_layers": 3, "inout": True, "out_size": None}},
    published=(
        Published(
            "gazelle_dinov2_vitb14",
            {"channels": 768},
            2.8,
            inputs={"features": (1, 768, 32, 32)},
            note="the decoder alone",
        ),
        Published(
            "gazelle_dinov2_vitl14",
            {"channels": 1024},
            2.9,
            inputs={"features": (1, 1024, 32, 32)},
            note="the decoder alone",
        ),
        Published(
            "gazelle_dinov2_vitb14_inout",
            {"channels": 768, "inout": True},
            inputs={"features": (1, 768, 32, 32)},
            note=_NONE,
        ),
        Published(
            "gazelle_dinov2_vitl14_inout",
            {"channels": 1024, "inout": True},
            inputs={"features": (1, 1024, 32, 32)},
            note=_NONE,
        ),
    ),
)
