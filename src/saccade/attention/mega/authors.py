"""How the authors' modules, parameters and arguments map to ours.

Shape letters: B batch, N queries, M keys, C channels, H heads, E width of given values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from saccade.attention.mega.attention import MegaAttention
from saccade.attention.mega.block import NormalizedFeedForward
from saccade.attention.mega.cross_attention import MegaCrossAttention
from saccade.attention.mega.ema import DampedEMA
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Argument, Arguments
from saccade.ops import masks
from saccade.ops.ema import ema

#: dropouts do nothing where weights are read
_INERT = ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout")


def _positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


_NORM: dict[str, Argument] = {
    "norm_type": (
        "norm",
        {
            "layernorm": "layer",
            "scalenorm": "scale",
            "rmsnorm": "rms",
            "batchnorm": "batch",
            "syncbatchnorm": "batch",
        },
    ),
    "prenorm": "prenorm",
    "activation": "activation",
    "feature_dropout": "feature_dropout",
}
_BUILD_EMA = Arguments(
    DampedEMA,
    {
        "embed_dim": "dim",
        "ndim": "ema_dim",
        "bidirectional": "bidirectional",
        "truncation": ("truncation", _positive),
    },
    inert=_INERT,
)
_GATED: dict[str, Argument] = {
    "embed_dim": "dim",
    "zdim": "key_dim",
    "attention_activation": "attention",
    "rel_pos_bias": "position",
    "max_positions": "max_positions",
    **_NORM,
}
_BUILD_ATTENTION = Arguments(
    MegaAttention,
    {
        **_GATED,
        "hdim": "value_dim",
        "ndim": "ema_dim",
        "truncation": ("truncation", _positive),
        "chunk_size": ("chunk_size", _positive),
        "bidirectional": ("causal", operator.not_),
    },
    defaults={"rel_pos_bias": "simple", "bidirectional": False},
    inert=_INERT,
)
_BUILD_CROSS = Arguments(
    MegaCrossAttention,
    _GATED,
    defaults={"rel_pos_bias": "simple"},
    inert=(*_INERT, "ndim"),  # an argument of theirs that does nothing
)
_BUILD_FFN = Arguments(
    NormalizedFeedForward, {"embed_dim": "dim", "ffn_hidden_dim": "hidden_dim", **_NORM}, inert=_INERT
)
_NAMES = Names(
    {
        "norm.norm.{leaf}": "norm.{leaf}",
        "move.{leaf}": "ema.{leaf}",
        "rel_pos_bias.rel_pos_bias": "bias.weight",
        "rel_pos_bias.{leaf}": "bias.{leaf}",
        "{name*}": "{name}",
    }
)


def _run_ema(module: DampedEMA, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BNC = inputs["x"].transpose(0, 1)
    out = {"y": module(x_BNC).transpose(0, 1)}
    if "padding_mask" in inputs:
        out["y_padded"] = module(x_BNC, inputs["padding_mask"] == 0).transpose(0, 1)
    if not module.bidirectional:
        out["state"] = ema(x_BNC, *module.coefficients(), return_state=True)[1]
    return out


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A scale norm has one scalar, an RMS norm a weight, both under one name."""
    ours = _NAMES(state)
    if "norm.scalar" in ours:
        scalar = ours.pop("norm.scalar")
        ours["norm.scale" if scalar.numel() == 1 else "norm.weight"] = scalar
    return ours


def _run_attention(module: MegaAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """They mask the attention by an argument, 1 = visible, not by a property of the layer."""
    x_BNC = inputs["x"].transpose(0, 1)
    B, N, _ = x_BNC.shape
    size = min(N, module.chunk_size or N)
    visible = inputs.get("attn_mask")
    causal = visible is not None and bool((visible.bool() == torch.ones_like(visible).tril().bool()).all())
    pairs = None if visible is None or causal else masks.dense(visible.bool())
    valid_BN = inputs["padding_mask"] == 0 if "padding_mask" in inputs else None
    units_BHNE = torch.eye(size).repeat(-(-N // size), 1)[:N].expand(B, module.num_heads, N, size)
    y_BNC = module._layer(x_BNC, valid_BN, causal, pairs)
    attn = module._weights(x_BNC, units_BHNE, valid_BN, causal, pairs)
    return {"y": y_BNC.transpose(0, 1), "attn": attn[:, 0].unflatten(1, (-1, size))}


def _run_cross(module: MegaCrossAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    query, key = inputs["query"].transpose(0, 1), inputs["key"].transpose(0, 1)
    mask_BM = None
    if "key_padding_mask" in inputs:
        mask_BM = inputs["key_padding_mask"] == 0
        if module.attention == "softmax":  # a row that is padding throughout they leave unmasked
            mask_BM = mask_BM | ~mask_BM.any(1, keepdim=True)
    units_BHME = torch.eye(key.shape[1]).expand(key.shape[0], module.num_heads, -1, -1)
    return {
        "y": module(query, key, mask=mask_BM).transpose(0, 1),
        "attn": module.mix(query, units_BHME, context=key, mask=mask_BM)[:, 0],
    }


PORTS = (
    *(AuthorsPort(name, build=_BUILD_EMA, convert=dict, run=_run_ema) for name in ("ema_uni", "ema_bi")),
    *(
        AuthorsPort(f"mega_attention{i}", build=_BUILD_ATTENTION, convert=_convert, run=_run_attention)
        for i in range(3)
    ),
    AuthorsPort("gated_cross_attention", build=_BUILD_CROSS, convert=_convert, run=_run_cross),
    AuthorsPort(
        "nffn",
        build=_BUILD_FFN,
        convert=_convert,
        run=lambda module, inputs, args: {"y": module(inputs["x"].transpose(0, 1)).transpose(0, 1)},
    ),
)
