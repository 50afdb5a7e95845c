"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.mosa.layer import MoSA
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Argument, Arguments, calls

_HEADS: dict[str, Argument] = {
    "h": "dim",
    "sparsity": "sparsity",
    "include_first": ("include_first", bool),
    "h_prim": "head_dim",
    "rotate_fraction": "rotate_fraction",
    "rope_base": "rope_base",
}
_BUILD_PURE = Arguments(
    MoSA, {**_HEADS, "n_heads": "num_heads"}, needed=("n_heads", "sparsity", "h_prim"), num_other_heads=0
)


def _window(args: dict[str, Any]) -> int | None:
    kinds = {"dense": None, "local": args["max_seq_len"] // args["sparsity"]}
    if args["hybrid_type"] not in kinds:
        raise ValueError(f"hybrid_type must be 'dense' or 'local', got {args['hybrid_type']!r}")
    return kinds[args["hybrid_type"]]


_BUILD_HYBRID = Arguments(
    MoSA,
    {**_HEADS, "num_other_heads": "num_other_heads", "max_seq_len": "max_length"},
    needed=("num_other_heads", "max_seq_len", "sparsity", "h_prim"),
    defaults={"hybrid_type": "dense"},
    derived={"num_heads": lambda args: args["num_mosa_heads"] + args["num_other_heads"], "window": _window},
)
_SPARSE = Names({"r.0.weight": "router.weight", "QKV.W": "qkv", "O.W": "out"})
_NAMES = Names(
    {
        **_SPARSE.within("", "sparse."),
        **_SPARSE.within("mosa_heads.", "sparse."),
        "other_heads.W_QKV.weight": "other.qkv.weight",
        "other_heads.W_O.weight": "other.out.weight",
        "{name*}.inv_freq": None,  # rotary frequencies, functions of the arguments
    }
)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Branches of zero heads are left out."""
    return _NAMES({name: tensor for name, tensor in state.items() if tensor.numel()})


def _run_pure(module: MoSA, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    assert module.sparse is not None
    position_EBS, gate_EBS, _ = module.sparse.route(inputs["x"])
    return {
        "out": module(inputs["x"]),
        "topk_scores": gate_EBS.transpose(0, 1),
        "topk_indices": position_EBS.transpose(0, 1),
    }


PORTS = (
    AuthorsPort("pure_mosa", build=_BUILD_PURE, convert=_convert, run=_run_pure),
    AuthorsPort(
        "mosa_hybrid",
        build=_BUILD_HYBRID,
        convert=_convert,
        run=calls("x", gives="out"),
    ),
)
