"""OAT: at which object of a shelf does who searches look next? The objects themselves are the answers to point at.

Fang et al., "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", arXiv 2407.13335 (ECCV 2024).

    e = encoder([objects; target]),     d = decoder([BOS; f_1 .. f_t] + time, e),     a token is [appearance; position]
    A_h(t, i) = (Wd_h d_t) . (We_h e_i) / sqrt(d_k),  and 0 for "nothing";     logits = readout([A_1; A_2])

| here | paper | default |
|---|---|---|
| `dim`, `num_heads`, `hidden`, `depth` | E, heads, FFN, layers of each side | 512, 4, 512, 4 |
| `pointers`, `key_dim` | heads and d_k of the object attention, each of full width | 2, 512 |
| class i < n | object i; n: the target's own token, which means stop; n + 1: nothing | |
| `sigma` | similarity of places i and j is exp(-(i - j)^2 / (2 sigma^2)) | 2 |
| `levels` | of the pyramid over an object's picture; 0 takes pictures of one size, pooled by 3 | 0 |

Any number of objects, other than in training too. The table of places is not learned with the network: its rows have
one length, and cosines as said. The authors find it by 10,000 steps of Adam (`learnt_table`); the default has it in
closed form, exactly, where rows are no more than columns (`distance_table`); `positions="sinusoid"` takes theirs for
comparison. The middle of the grid, where a search starts, is rounded down to a whole place.

Pictures of what is no object (start, stop, nothing) are white; the authors take black ones when they generate, where
only the start's matters: `blank`.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.oat.network import OAT, ObjectAttention
from saccade.models.oat.search import behaviour, behaviour_difference, next_object_loss
from saccade.models.oat.tokens import Appearance, Places, distance_table, learnt_table, sinusoid_table

__all__ = [
    "OAT",
    "Appearance",
    "ObjectAttention",
    "Places",
    "behaviour",
    "behaviour_difference",
    "distance_table",
    "learnt_table",
    "next_object_loss",
    "sinusoid_table",
]

register(
    "oat",
    kind="model",
    summary="Scanpaths of a search over objects, by a transformer whose decoder points at the objects' tokens.",
    taxonomy={"sequences": "distinctive", "levels": "single", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="objects^2 once an image, then steps x (steps + objects)",
    invariants=(
        "permuted objects permute the logits",
        "the logit of nothing is the readout's bias",
        "cosines of places are a Gaussian of their distance",
        "later fixations change no earlier logits",
        "the number of objects may change from call to call",
    ),
    build=OAT,
    example={"grid": (2, 3), "dim": 24, "num_heads": 4, "hidden": 32, "depth": 1, "key_dim": 24, "levels": 2},
    inputs=lambda module, size: (
        torch.rand(2, 6, 3, 20, 24),
        torch.tensor([1, 4]),
        torch.arange(max(1, size)).expand(2, -1) % 6,
    ),
    tasks={"look": {"grid": (3, 4), "dim": 64, "num_heads": 4, "hidden": 128, "depth": 2, "key_dim": 64, "levels": 2}},
)
