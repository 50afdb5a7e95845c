"""A front-end for click models: which features get an embedding, how each is represented, before any interaction.

Lyu, Tang, Liu, Wu, Ma, He, Liu, "Feature Representation Learning for Click-through Rate Prediction: A Review and New
Perspectives", arXiv 2302.02241. A survey: what stands here are the methods that it frames.

    e_i = E_i x_i,   p = sigmoid(f(g_1 e_1 .. g_F e_F, pairs) + sum_i w[x_i] + b)

| question | argument | forms |
|---|---|---|
| which fields | `selection` | autofield, adafs (for each row), lpfs, lpfs++, kept |
| which values | `table` | optfs, optembed (rows) |
| which pairs | `generation` | optinter, optfeature, autofis |
| how wide | `table` | optembed (numbers), pep, dnis, mde, autodim; `saliency`, `prune` |
| of what parts | `table` | hash, double-hash, quotient-remainder, deep-hash, tensor-train, codebook |
| how precise | `table` | full, int8 |
| numbers | `numbers` | scaled, buckets, autodis |

The default of every argument is the baseline: one full table of D = 16 and DeepFM of 1024, 512, 256. What is searched
with: `three_steps` (AutoField, AdaFS), `LPFS.shrink`, `optfs_temperature` and `Rewind`, `evolve` (OptEmbed),
`OptInter.decide`; without a network `mutual_information`, and of any network `permutation_importance`.

The survey's own table of methods could not be read: that a method stands in a class is inferred. Sources: for
AutoField, AdaFS, LPFS, OptFS, OptEmbed, OptInter and OptFeature the code of the survey's first author, where the
architecture step uses the training batch and no noise; for the rest what the papers are known for. Not built are
AutoCross, AutoFeature, PROFIT, BP-FIS, AIM, AutoEmb, ESAPN, DeepLight's decay, AutoSrh, and sharing by clusters.
"""

from __future__ import annotations

import torch

from saccade.catalogue import register
from saccade.models.ctr_representation_survey.composition import (
    CodebookTable,
    DeepHashTable,
    DoubleHashTable,
    HashTable,
    QuotientRemainderTable,
    TensorTrainTable,
)
from saccade.models.ctr_representation_survey.dimension import (
    AutoDimTable,
    BlockGatedTable,
    MixedTable,
    OptEmbedTable,
    OptFSTable,
    PEPTable,
    RoundedTable,
    binary_step,
)
from saccade.models.ctr_representation_survey.generation import (
    AutoFIS,
    OptFeature,
    OptInter,
    cross_rows,
    cross_sizes,
    frequent,
)
from saccade.models.ctr_representation_survey.network import ClickModel
from saccade.models.ctr_representation_survey.numeric import AutoDis, Buckets
from saccade.models.ctr_representation_survey.search import (
    Rewind,
    evolve,
    mutual_information,
    optfs_temperature,
    permutation_importance,
    prune,
    saliency,
    three_steps,
)
from saccade.models.ctr_representation_survey.selection import (
    LPFS,
    AdaFS,
    AutoField,
    Kept,
    autofield_gates,
    lpfs_gates,
    lpfs_plus_gates,
    shrunk,
    temperature_at,
)
from saccade.models.ctr_representation_survey.tables import Table

__all__ = [
    "LPFS",
    "AdaFS",
    "AutoDimTable",
    "AutoDis",
    "AutoFIS",
    "AutoField",
    "BlockGatedTable",
    "Buckets",
    "ClickModel",
    "CodebookTable",
    "DeepHashTable",
    "DoubleHashTable",
    "HashTable",
    "Kept",
    "MixedTable",
    "OptEmbedTable",
    "OptFSTable",
    "OptFeature",
    "OptInter",
    "PEPTable",
    "QuotientRemainderTable",
    "Rewind",
    "RoundedTable",
    "Table",
    "TensorTrainTable",
    "autofield_gates",
    "binary_step",
    "cross_rows",
    "cross_sizes",
    "evolve",
    "frequent",
    "lpfs_gates",
    "lpfs_plus_gates",
    "mutual_information",
    "optfs_temperature",
    "permutation_importance",
    "prune",
    "saliency",
    "shrunk",
    "temperature_at",
    "three_steps",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[torch.Tensor, ...]:
    """So many rows."""
    ids = torch.stack([torch.randint(count, (size,)) for count in (5, 3, 7)], 1)
    return ids, torch.randn(size, 2)


register(
    "ctr-representation-survey",
    kind="model",
    summary="Tables, selection gates, generated pairs and numbers, interchangeable before any network of clicks.",
    taxonomy={
        "sequences": "distinctive",
        "levels": "single",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="O(F D) a row before the interaction; the table is sum V_i D numbers, less what is composed or dropped",
    invariants=(
        "gates of 1, full widths and no hashing give the baseline exactly",
        "a gate of 0 removes a field's vector; with the first-order term gated too the field has no say",
        "AutoField's gates sum to 1 over fields, and become one-hot as the temperature falls",
        "LPFS is 0 at 0 and 1 far away, LPFS++ is odd, the proximal step hits 0 exactly",
        "OptFS's gates are 1 at the start, and agree with the ticket at high temperatures",
        "OptEmbed's thresholds up to 0 keep every row that is not 0",
        "OptInter's one-hot rows are a table of combinations, a product of two vectors, or nothing",
        "quotient and remainder tell values apart, a hash does not where these are alike modulo m",
        "PEP makes numbers smaller and keeps their signs",
        "AutoDis is continuous, and hard at low temperatures",
    ),
    build=ClickModel,
    example={
        "fields": (5, 3, 7),
        "numeric": 2,
        "dim": 4,
        "selection": "autofield",
        "generation": "optinter",
        "generation_options": {"width": 3},
        "hidden": (6, 5),
    },
    inputs=_inputs,
    tasks={"click": {"dim": 8, "hidden": (64, 32)}},
)
