"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.spargeattn.operator import spargeattn_attend
from saccade.attention.spargeattn.prediction import block_statistics, sparge_block_map
from saccade.catalogue.ports import of_function
from saccade.ops.selection import one_per_head


def _map_options(args: dict[str, Any]) -> dict[str, Any]:
    """The authors' names of what decides the map."""
    options: dict[str, Any] = {
        "causal": bool(args.get("is_causal", False)),
        "similarity_threshold": args.get("simthreshd1", 0.1),
        "attention_sink": bool(args.get("attention_sink", False)),
        "short_blocks": "keep",
    }
    if args.get("topk") is not None:
        return options | {"top_k": args["topk"]}
    return options | {"cdf_threshold": 0.9 if args.get("cdfthreshd") is None else args["cdfthreshd"]}


def _run_block_map(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k = inputs["q"], inputs["k_smoothed"]
    size_q, size_k = int(args["BLKQ"]), int(args["BLKK"])
    outputs = {
        f"block_map.{i}": sparge_block_map(q, k, block_q=size_q, block_k=size_k, **_map_options(variant))
        for i, variant in enumerate(args["variants"])
    }
    theta = _map_options(args["variants"][0])["similarity_threshold"]
    for name, x, size in (("q", q, size_q), ("k", k, size_k)):
        mean, similarity = block_statistics(x, size)
        similar = similarity > one_per_head(theta, "simthreshd1", x.shape[1], x.device)[:, None]
        similar[..., x.shape[2] // size :] = False
        outputs |= {f"pooled_{name}": mean, f"sim_{name}": similar}
    return outputs


def _run_int8(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    sizes: dict[str, Any] = {"block_q": int(args.get("BLKQ", 128)), "block_k": int(args.get("BLKK", 64))}
    if args.get("smooth_k", True):
        k = k - k.mean(2, keepdim=True)
    options = _map_options({"simthreshd1": 0.3, "cdfthreshd": 0.96} | args)
    keep = sparge_block_map(q, k, **sizes, **options)
    out = spargeattn_attend(q.float(), k.float(), v.float(), smooth_k=False, quantize=True, **sizes, **options)
    return {"out": out.to(q.dtype), "block_map": keep}


PORTS = (
    of_function(
        "block_map",
        run=_run_block_map,
    ),
    of_function(
        "sparge_attention_int8",
        run=_run_int8,
        tolerance=3e-3,
        reason="the authors' kernel multiplies P and V in fp16, accumulates in fp16 and rounds its output to fp16",
    ),
)
