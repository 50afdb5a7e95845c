"""How the authors' modules, parameters and arguments map to ours.

Shape letters: B batch, N queries, M keys, C channels, H heads, Z key width, V value width, E width of given values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.mega.layers import DampedEMA, MegaAttention, MegaCrossAttention, NormalizedFeedForward
from saccade.catalogue import AuthorsPort
from saccade.ops import masks
from saccade.ops.ema import ema

_NORM_NAMES = {
    "layernorm": "layer",
    "scalenorm": "scale",
    "rmsnorm": "rms",
    "batchnorm": "batch",
    "syncbatchnorm": "batch",
}


def _arguments(args: dict[str, Any], *taken: str) -> dict[str, Any]:
    """What several of their constructors have in common, in our names; and no argument that nobody knows."""
    names = {"zdim": "key_dim", "hdim": "value_dim", "ndim": "ema_dim", "attention_activation": "attention"}
    same = ("activation", "prenorm", "max_positions", "feature_dropout")
    ours = {}
    for name, value in args.items():
        if name in names:
            ours[names[name]] = value
        elif name in same:
            ours[name] = value
        elif name == "norm_type":
            ours["norm"] = _NORM_NAMES[value]
        elif name == "rel_pos_bias":
            ours["position"] = value
        elif name == "truncation":
            ours["truncation"] = value if value is not None and value > 0 else None
        elif not name.endswith("dropout") and name not in taken:  # dropouts do nothing where weights are read
            raise ValueError(f"{name!r} is not an argument of the authors' modules that is known here")
    return ours


def _build_ema(args: dict[str, Any]) -> nn.Module:
    ours = _arguments(args, "embed_dim", "bidirectional")
    return DampedEMA(args["embed_dim"], bidirectional=args.get("bidirectional", False), **ours)


def _run_ema(module: DampedEMA, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BNC = inputs["x"].transpose(0, 1)
    out = {"y": module(x_BNC).transpose(0, 1)}
    if "padding_mask" in inputs:
        out["y_padded"] = module(x_BNC, inputs["padding_mask"] == 0).transpose(0, 1)
    if not module.bidirectional:
        out["state"] = ema(x_BNC, *module.coefficients(), return_state=True)[1]
    return out


def _build_attention(args: dict[str, Any]) -> nn.Module:
    ours = {"position": "simple", **_arguments(args, "embed_dim", "bidirectional", "chunk_size")}
    size = args.get("chunk_size", -1)
    causal = not args.get("bidirectional", False)
    return MegaAttention(args["embed_dim"], causal=causal, chunk_size=size if size > 0 else None, **ours)


def _convert_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefixes = {"norm.norm.": "norm.", "move.": "ema.", "rel_pos_bias.rel_pos_bias": "bias.weight"}
    prefixes |= {"rel_pos_bias.": "bias."}
    ours = {}
    for name, tensor in state.items():
        for theirs, prefix in prefixes.items():
            if name.startswith(theirs):
                name = prefix + name[len(theirs) :]
                break
        if name == "norm.scalar":
            name = "norm.scale" if tensor.numel() == 1 else "norm.weight"
        ours[name] = tensor
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


def _build_cross(args: dict[str, Any]) -> nn.Module:
    ours = {"position": "simple", **_arguments(args, "embed_dim")}
    ours.pop("ema_dim", None)  # an argument of theirs that does nothing
    return MegaCrossAttention(args["embed_dim"], **ours)


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


def _build_ffn(args: dict[str, Any]) -> nn.Module:
    ours = _arguments(args, "embed_dim", "ffn_hidden_dim")
    return NormalizedFeedForward(args["embed_dim"], args["ffn_hidden_dim"], **ours)


PORTS = (
    *(AuthorsPort(name, build=_build_ema, convert=dict, run=_run_ema) for name in ("ema_uni", "ema_bi")),
    *(
        AuthorsPort(f"mega_attention{i}", build=_build_attention, convert=_convert_attention, run=_run_attention)
        for i in range(3)
    ),
    AuthorsPort("gated_cross_attention", build=_build_cross, convert=_convert_attention, run=_run_cross),
    AuthorsPort(
        "nffn",
        build=_build_ffn,
        convert=_convert_attention,
        run=lambda module, inputs, args: {"y": module(inputs["x"].transpose(0, 1)).transpose(0, 1)},
    ),
)
