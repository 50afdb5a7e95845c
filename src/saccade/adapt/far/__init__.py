"""FaR: several look-alike concepts for a text-to-image model, by put-together images and held attention maps.

Tran, Che, Dam Vu, Pham, Nguyen, Le, M.-T. Tran, "FaR: Enhancing Multi-Concept Text-to-Image Diffusion via Concept
Fusion and Localized Refinement", arXiv 2504.03292.

    Concept Fusion:    with probability p_fuse a sample is two subjects, cut out and pasted on another ground, each with
                       its region M_j and "a photo of a V_1 c_1 and a V_2 c_2"
    Refinement (mse):  L_LR = sum_j mean_p (M_j - a_j)^2,     a_j = A[word j] / max A[word j], of the mean over layers
    (balanced_l1):     sum a (1 - M) / sum (1 - M) - sum a M / sum M           each layer and head by itself
    (leakage):         the mean of a_j over the other subjects' regions
    L = || target - unet(z_t, t, prompt) ||^2 + lambda_p L_prior + lambda L_LR

| here           | paper    | default                                    | rests on                          |
|----------------|----------|--------------------------------------------|-----------------------------------|
| `form`         | L_LR     | "mse"                                      | Break-A-Scene; FastComposer; ours |
| `weight`       | lambda   | 0.01 (mse, leakage), 1e-3 (balanced_l1)    | the same                          |
| `LAYERS`       | Lambda   | five cross attentions at latent / 4        | Break-A-Scene                     |
| `p_fuse`       |          | 0.3                                        | Seg-Mix                           |
| `placement`    |          | `halves`, 0.75 to 1 of what fits           | Seg-Mix; `scattered`: ours        |
| `prior_weight` | lambda_p | 1                                          | Break-A-Scene, Seg-Mix            |
| `trainable`    |          | "kv", and the words' vectors               | ours; Seg-Mix's is lora            |
| `grounds`      |          | 0.4 references, 0.4 priors, 0.2 white      | ours                              |

No code of the authors is known, and the paper's formulas could not be read: that these parts exist, and what each is
for, is confirmed, and their form is that of the nearest public systems, named above. `mse` is the default since it asks
for coverage of the region and silence outside of it, and, divided by its maximum, not for a share of all words. Nothing
changes at inference. Maps are read by hooks beside a layer's own kernel, so that no processor is exchanged.
"""

from __future__ import annotations

import torch

from saccade.adapt.far.fusion import (
    Concept,
    ConceptFusion,
    Place,
    Sample,
    compose,
    cut_out,
    emptied,
    fit,
    halves,
    scattered,
)
from saccade.adapt.far.refinement import FaR, balanced_l1, grid_of, refinement, region_maps, words_of
from saccade.adapt.far.tuning import add_words, cross_maps, only_rows, trainable, word_places
from saccade.catalogue import register
from saccade.layers.low_rank import LowRank

__all__ = [
    "Concept",
    "ConceptFusion",
    "FaR",
    "LowRank",
    "Place",
    "Sample",
    "add_words",
    "balanced_l1",
    "compose",
    "cross_maps",
    "cut_out",
    "emptied",
    "fit",
    "grid_of",
    "halves",
    "only_rows",
    "refinement",
    "region_maps",
    "scattered",
    "trainable",
    "word_places",
    "words_of",
]


def _inputs(module: torch.nn.Module, size: int) -> tuple[object, ...]:
    maps = [torch.randn(2, 3, size * size, 5).softmax(-1) for _ in range(2)]
    masks = torch.rand(2, 3, 2 * size, 2 * size)
    tokens, valid = torch.tensor([[1, 3, 0], [2, 1, 4]]), torch.tensor([[True, True, False], [True, True, True]])
    latents = torch.randn(2, 4, size, size), torch.randn(2, 4, size, size)
    return (*latents, maps, masks, tokens, valid)


register(
    "far",
    kind="objective",
    summary="Fine-tuning to several concepts: put-together images, and attention maps held to each subject's region.",
    taxonomy={"sequences": "co-attention", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="O(P T) a layer whose map is read, in training only; nothing at inference",
    invariants=(
        "mse is 0 where each map over its maximum is its mask, rises where two masks are exchanged, and does not "
        "change where a map is scaled",
        "balanced_l1 is 0 for a uniform map, less the mean inside for one that is inside, and lies in [-1, 1]",
        "masks of a composite do not overlap, and outside of them its ground is untouched",
        "a subject of factor f_max fits its half",
        "the refinement has no gradient by to_v of its layer",
        "images of classes alone leave the placeholders without a gradient by it",
    ),
    build=FaR,
    example={"masked": True},
    inputs=_inputs,
)
