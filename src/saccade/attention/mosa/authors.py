"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.mosa.layer import MoSA
from saccade.catalogue import AuthorsPort


def _build_pure(args: dict[str, Any]) -> MoSA:
    return MoSA(
        args["h"],
        args["n_heads"],
        num_other_heads=0,
        sparsity=args["sparsity"],
        include_first=bool(args.get("include_first", 0)),
        head_dim=args["h_prim"],
        rotate_fraction=args.get("rotate_fraction", 0.5),
        rope_base=args.get("rope_base", 10000),
    )


def _build_hybrid(args: dict[str, Any]) -> MoSA:
    hybrid_type = args.get("hybrid_type", "dense")
    if hybrid_type not in ("dense", "local"):
        raise ValueError(f"hybrid_type must be 'dense' or 'local', got {hybrid_type!r}")
    return MoSA(
        args["h"],
        args["num_mosa_heads"] + args["num_other_heads"],
        num_other_heads=args["num_other_heads"],
        sparsity=args["sparsity"],
        window=args["max_seq_len"] // args["sparsity"] if hybrid_type == "local" else None,
        include_first=bool(args.get("include_first", 0)),
        head_dim=args["h_prim"],
        rotate_fraction=args.get("rotate_fraction", 0.5),
        rope_base=args.get("rope_base", 10000),
        max_length=args["max_seq_len"],
    )


_NAMES = {
    "r.0.weight": "sparse.router.weight",
    "QKV.W": "sparse.qkv",
    "O.W": "sparse.out",
    **{f"mosa_heads.{theirs}": f"sparse.{ours}" for theirs, ours in (("QKV.W", "qkv"), ("O.W", "out"))},
    "mosa_heads.r.0.weight": "sparse.router.weight",
    "other_heads.W_QKV.weight": "other.qkv.weight",
    "other_heads.W_O.weight": "other.out.weight",
}


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renamed; branches of zero heads and tables of rotary frequencies (functions of the arguments) are left out."""
    return {
        _NAMES.get(name, name): tensor
        for name, tensor in state.items()
        if tensor.numel() and not name.endswith("inv_freq")
    }


def _run_pure(module: MoSA, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    assert module.sparse is not None
    position_EBS, gate_EBS, _ = module.sparse.route(inputs["x"])
    return {
        "out": module(inputs["x"]),
        "topk_scores": gate_EBS.transpose(0, 1),
        "topk_indices": position_EBS.transpose(0, 1),
    }


PORTS = (
    AuthorsPort("pure_mosa", build=_build_pure, convert=_convert, run=_run_pure),
    AuthorsPort(
        "mosa_hybrid",
        build=_build_hybrid,
        convert=_convert,
        run=lambda module, inputs, args: {"out": module(inputs["x"])},
    ),
)
