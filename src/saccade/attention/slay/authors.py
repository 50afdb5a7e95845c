"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from saccade.attention.slay.layer import SLAYAttention, YatAttention
from saccade.attention.slay.operator import SMALL, Variant
from saccade.catalogue import AuthorsPort, Names, split
from saccade.catalogue.ports import Arguments, calls

#: arguments that do not change what a module computes at inference
_INERT = ("chunk_size", "dropout", "max_seq_len", "context_len", "block_size", "causal", "bias")
_ARGUMENTS = {"embed_dim": "dim", "n_heads": "num_heads", "epsilon": "epsilon", "delta": "delta"}
_FEATURES = {"num_quadrature_nodes": "num_nodes", "poly_dim": "num_anchors", "nystrom_reg": "ridge"}
_NAMES = Names(
    {
        "qkv.weight": split("{part}_proj.weight", "q", "k", "v"),
        "out.weight": "out_proj.weight",
        "quad_nodes": "nodes",
        "quad_weights": "node_weights",
        "anchor_vectors": "anchors",
        "nystrom_anchors": "anchors",
        "nystrom_W": "whitening",
        "{name*}": "{name}",
    }
)
#: of the recordings
_VARIANTS: tuple[Variant, ...] = ("anchor", "nystrom", "hadamard", "laplace")


def _build(variant: Variant) -> Arguments:
    features = {"num_features" if variant in SMALL else "num_prf_features": "num_features"}
    return Arguments(SLAYAttention, {**_ARGUMENTS, **_FEATURES, **features}, inert=_INERT, variant=variant)


PORTS = (
    AuthorsPort(
        "spherical_yat", build=Arguments(YatAttention, _ARGUMENTS, inert=_INERT), convert=_NAMES, run=calls("x")
    ),
    *(AuthorsPort(f"slay_{variant}", build=_build(variant), convert=_NAMES, run=calls("x")) for variant in _VARIANTS),
)
