"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.attention.slay.layer import SLAYAttention, YatAttention
from saccade.attention.slay.operator import SMALL, Variant
from saccade.catalogue import AuthorsPort

#: arguments that do not change what a module computes at inference
_INERT = ("chunk_size", "dropout", "max_seq_len", "context_len", "block_size", "causal", "bias")


_NAMES = {
    "out.weight": "out_proj.weight",
    "quad_nodes": "nodes",
    "quad_weights": "node_weights",
    "anchor_vectors": "anchors",
    "nystrom_anchors": "anchors",
    "nystrom_W": "whitening",
}


def _build(args: dict[str, Any], variant: Variant | None) -> nn.Module:
    names = {
        "embed_dim": "dim",
        "n_heads": "num_heads",
        "epsilon": "epsilon",
        "delta": "delta",
        "num_quadrature_nodes": "num_nodes",
        "num_features" if variant in SMALL else "num_prf_features": "num_features",
        "poly_dim": "num_anchors",
        "nystrom_reg": "ridge",
    }
    strange = [name for name in args if name not in names and name not in _INERT]
    if strange:
        raise ValueError(f"the authors' arguments must be among {', '.join(names)}, got {strange[0]!r}")
    given: dict[str, Any] = {names[name]: value for name, value in args.items() if name in names}
    return YatAttention(**given) if variant is None else SLAYAttention(**given, variant=variant)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {_NAMES.get(name, name): tensor for name, tensor in state.items() if not name.startswith("qkv.")}
    parts = state["qkv.weight"].chunk(3)
    return ours | {f"{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}


def _port(module: str, variant: Variant | None) -> AuthorsPort:
    return AuthorsPort(
        module,
        build=partial(_build, variant=variant),
        convert=_convert,
        run=lambda module, inputs, args: {"y": module(inputs["x"])},
    )


PORTS = (
    _port("spherical_yat", None),
    _port("slay_anchor", "anchor"),
    _port("slay_nystrom", "nystrom"),
    _port("slay_hadamard", "hadamard"),
    _port("slay_laplace", "laplace"),
)
