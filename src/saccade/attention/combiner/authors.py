"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from saccade.attention.combiner.layer import Combiner
from saccade.attention.combiner.operator import Variant
from saccade.catalogue import AuthorsPort, Names, laid
from saccade.catalogue.ports import Late, calls


def _widths(args: dict[str, Any], state: Mapping[str, Tensor], variant: Variant) -> Combiner:
    """The authors' arguments do not say the width."""
    inner, dim = state["q_proj.weight"].shape
    heads = int(args["num_heads"])
    segment = None if variant == "logn" else int(args["max_seg_len"])
    return Combiner(dim, heads, head_dim=inner // heads, variant=variant, segment=segment)


def _into_heads(weight_CHD: Tensor) -> Tensor:
    return weight_CHD.flatten(1).mT.contiguous()


def _out_of_heads(weight_HDC: Tensor) -> Tensor:
    return weight_HDC.flatten(0, 1).mT.contiguous()


_NAMES = Names(
    {
        "query": laid("q_proj.weight", _into_heads),
        "key": laid("k_proj.weight", _into_heads),
        "value": laid("v_proj.weight", _into_heads),
        "row_key": laid("row_key.weight", _into_heads),
        "out": laid("out_proj.weight", _out_of_heads),
        "row_proj": laid("row_proj.weight", _out_of_heads),
        "row_norm_scale": "row_norm.weight",
        "row_norm_bias": "row_norm.bias",
    }
)
_VARIANTS: dict[str, Variant] = {
    "combiner_fixed": "fixed",
    "combiner_logn": "logn",
    "combiner_axial_rowmajor": "rowmajor",
    "combiner_axial_mixture": "mixture",
}

PORTS = tuple(
    AuthorsPort(
        module,
        build=partial(Late, partial(_widths, variant=variant)),
        convert=_NAMES,
        run=calls("x", gives="out"),
    )
    for module, variant in _VARIANTS.items()
)
