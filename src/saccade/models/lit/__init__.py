"""LIT: a backbone with no attention in its early stages, and deformable merging of tokens between stages.

Pan, Zhuang, He, Liu, Cai, "Less is More: Pay Less Attention in Vision Transformers", arXiv 2105.14217 (AAAI 2022).

    stages 1, 2: x += MLP(LN(x))                                            no token sees another
    stages 3, 4: x += W_o softmax(q k^T / sqrt(D) + b_(query - key)) v,  x += MLP(LN(x))    over all tokens
    between:     y(p) = GELU(BN(sum_k W_k x(2 p + p_k + dp_k(p)))),   dp = a 2 x 2 convolution of stride 2 of x

The offsets dp start at zero, where merging is a 2 x 2 convolution of stride 2. The samples are bilinear, and zero
outside of the map. The paper speaks of merging in general; kernel, stride and one group of offsets are the code's.

| here           | paper / code | meaning                                                 | default (LIT-S)            |
|----------------|--------------|---------------------------------------------------------|----------------------------|
| `dim`          | C            | channels of the first stage, doubled by every merging   | 96                         |
| `attention`    | has_msa      | which stages have attention                             | False, False, True, True   |
| `positions`    |              | of tokens: "relative" tables, or "absolute" (LIT-Ti)    | "relative"                 |
| `class_token`  |              | joins the last stage and is classified (LIT-Ti)         | False                      |
| `image_size`   |              | for whose maps the tables of position biases are made   | 224                        |

LIT-Ti, the smallest size, is of another make: widths and MLPs of their own per stage, learned positions added to every
stage's map in the place of b, a class token. There is no recording of it: it is held to its figures and invariants,
and its checkpoints are not loaded. Ours: every norm of it has epsilon 1e-6, positions and token start with deviation
0.02, and the token stands before the map.

For images of another size the tables are stretched bicubically. Maps that patches or mergings do not divide are filled
up with zeros, right and below, which is ours. Drop path grows linearly from 0 over the blocks. Dropout of attention
weights, 0 in the authors' runs, is not offered.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.lit.network import LIT, POSITIONS, DeformableTokenMerging, RelativeAttention

__all__ = ["LIT", "POSITIONS", "DeformableTokenMerging", "RelativeAttention"]


_TI = {
    "dim": (64, 128, 320, 512),
    "depths": (3, 4, 6, 3),
    "num_heads": (1, 2, 5, 8),
    "mlp_ratio": (8, 8, 4, 4),
    "positions": "absolute",
    "class_token": True,
    "norm_eps": 1e-6,
}


_M = {"depths": (2, 2, 18, 2)}


#: of LIT-S, -M and -B it prints 27, 48 and 86
_README = "parameters as in the authors' README, which is 0.9 to 1.4 M short of their code at the other sizes too"


register(
    "lit",
    kind="model",
    summary="A backbone with MLPs alone in its early stages, attention in its late ones, and deformable token merging.",
    supports=(),
    taxonomy={"sequences": "self", "levels": "multi", "positions": "soft", "representations": "single"},
    efficiency="",
    complexity="early stages: time 2 r N C^2; late ones: 2 N^2 C more; merging: 4 C C' and 32 C per merged token",
    invariants=(
        "merging with zero offsets, as at the start, is convolution, batch normalisation and GELU",
        "merging with whole offsets reads shifted pixels, and zeros outside",
        "in a stage without attention a token depends on itself alone",
        "attention with a table of zeros is multi-head attention",
        "the parameters of LIT-S, -M and -B, exactly",
        "a class token sees the last stage's map, and the stages before do not see it",
    ),
    build=LIT,
    example={
        "dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "attention": (False, True),
        "mlp_ratio": 2,
        "image_size": 24,
        "num_classes": 5,
    },
    inputs=lambda module, size: (torch.randn(2, 3, size, size + 5),),
    published=(
        Published("LIT-Ti", _TI, 19, 3.6, tolerance=0.05, note=_README),
        Published("LIT-S", {}, 27.973720, 4.1),
        Published("LIT-M", _M, 49.372264, 8.6),
        Published("LIT-B", {**_M, "dim": 128, "num_heads": (4, 8, 16, 32)}, 87.292384, 15.0),
    ),
)
