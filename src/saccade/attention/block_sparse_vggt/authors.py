"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from saccade.attention.block_sparse_vggt.layer import BlockSparseGlobalAttention, GlobalAttention
from saccade.attention.block_sparse_vggt.operator import block_sparse_vggt_attend, places, pooled_shares
from saccade.catalogue import AuthorsPort
from saccade.catalogue.ports import Late


def _widths(args: dict[str, Any], state: Mapping[str, Tensor]) -> BlockSparseGlobalAttention:
    """The authors' layer, whose widths are known from its weights only."""
    rope = args.get("rope")
    special = int(args.get("num_special_tokens", 5))
    return BlockSparseGlobalAttention(
        state["proj.weight"].shape[0],
        int(args.get("num_heads", 16)),
        tokens_per_frame=special + int(args["H"]) * int(args["W"]) if "H" in args else None,
        num_special_tokens=special,
        cdf_threshold=args.get("cdf_threshold"),
        sparse_ratio=args.get("sparse_ratio"),
        top_k=args.get("topk"),
        block_q=int(args.get("q_block", 128)),
        block_k=int(args.get("k_block", 64)),
        pool="max" if args.get("pool_mode") == "max" else "mean",
        packed=True,
        qkv_bias="qkv.bias" in state,
        proj_bias="proj.bias" in state,
        qk_norm="q_norm.weight" in state,
        rope=bool(rope),
        rope_base=float(rope) if isinstance(rope, (int, float)) and rope else 10000.0,
    )


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    layer, x, pos = module.made, inputs["x"], inputs.get("pos")
    q, k, v = layer._project(x, pos)
    frames, options = layer._frames(x.shape[1], pos), layer.options
    _, mask = block_sparse_vggt_attend(q, k, v, frames=frames, return_map=True, **options)
    patch_T, _ = places(frames, x.shape[1] // frames, options["special_tokens"], None, x.device)
    dense = GlobalAttention.attend(layer, q, k, v, pos)
    return {
        "out": layer(x, pos=pos),
        "dense_out": layer.proj(dense.transpose(1, 2).flatten(2)),
        "pooled_prob": pooled_shares(
            q[:, :, patch_T], k[:, :, patch_T], options["block_q"], options["block_k"], options["pool"], None
        ),
        "block_mask": mask.keep_BHnm,
    }


PORTS = (AuthorsPort("global_attention", build=partial(Late, _widths), convert=dict, run=_run_authors),)
