"""Human attention and models: does a model look where people look, and what gaze does for it.

Cartella, Cornia, Cuculo, D'Amelio, Zanca, Boccignone, Cucchiara, "Trends, Applications, and Challenges in Human
Attention Modelling", IJCAI 2024, arXiv 2402.18673.

    NSS = mean over fixations of (P - mean) / std,   CC = corr(P, G),   KL = sum G log(eps + G / (P + eps))
    loss = task + lambda KL(G || A)                  F' = F (1 + S)                  w_kl KL + w_cc CC + w_nss NSS

| here                    | the survey                                       | default |
|-------------------------|--------------------------------------------------|---------|
| `saccade.explain.gaze`  | metrics of maps and scanpaths                    | as MIT's benchmark |
| `agreement_with_gaze`   | use 4, evaluation: a model's maps and gaze       | beside centre, noise and people |
| `agreement_with_reading` | the same of a text's tokens                     |         |
| `GazeSupervision`       | use 2, supervision                               | KL, lambda 0.5 |
| `modulated`, `along`    | uses 1 and 3: input, sequence                    | F (1 + S) |
| `saliency_loss`         | losses of saliency                               | 10 KL - 2 CC - NSS |
| `scanpath_loss`, `position_loss` | losses of scanpaths                     |         |
| `scanned`               | winner takes all, with inhibition of return      | 0.1 of the longer side |
| `SYSTEMS`, `systems`    | the taxonomy, tagged                             |         |

The measures stand in `saccade.explain.gaze`, since training and other rooms use them; tools of six of the authors are
their recordings, and the ports of this room. Where those tools differ from the standard definitions an argument gives
theirs. The survey has no experiments; the claim is one that it makes of gaze supervision. Source of what it leaves
open: that of its tags and years is its companion list; a gap in them is a gap in our source.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.explain.human_attention_survey.agreement import (
    AgreementWithGaze,
    GazeAgreement,
    agreement_with_gaze,
    agreement_with_reading,
)
from saccade.explain.human_attention_survey.supervision import (
    GazeSupervision,
    along,
    modulated,
    position_loss,
    saliency_loss,
    scanned,
    scanpath_loss,
)
from saccade.explain.human_attention_survey.systems import DATA_SETS, SYSTEMS, TAGS, System, overview, systems

__all__ = [
    "DATA_SETS",
    "SYSTEMS",
    "TAGS",
    "AgreementWithGaze",
    "GazeAgreement",
    "GazeSupervision",
    "System",
    "agreement_with_gaze",
    "agreement_with_reading",
    "along",
    "modulated",
    "overview",
    "position_loss",
    "saliency_loss",
    "scanned",
    "scanpath_loss",
    "systems",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    fixations = torch.zeros(size, size + 2, dtype=torch.long)
    fixations[size // 2, :: max(2, size // 3)] = 1
    return torch.rand(3, size, size + 2), fixations


register(
    "human-attention-survey",
    kind="analysis",
    summary="A model's maps against human gaze beside chance and people; gaze as supervision; systems as data.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(P H W (H + W))",
    invariants=(
        "the density of the fixations agrees with itself: CC and SIM are 1, KL is 0",
        "an affine change of a map leaves NSS, CC and AUC",
        "a map that tells nothing has NSS 0 and AUC 1/2",
        "a centre prior has a high AUC and a shuffled AUC of 1/2 where all look at the middle",
        "supervision is 0 where attention is gaze",
    ),
    build=AgreementWithGaze,
    example={},
    inputs=_inputs,
    data_dependent=True,
)
