"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.attention.flex_attention.operator import create_block_mask, relative
from saccade.catalogue.ports import of_function
from saccade.ops import masks, score_mods
from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.score_mods import ScoreMod


def _recorded_masks(ids: Tensor, args: dict[str, Any]) -> dict[str, Mask]:
    return {
        "causal": masks.causal(),
        "sliding_window": masks.window(args["window"]),
        "prefix_lm": masks.prefix(args["prefix"]) | masks.causal(),
        "document_causal": masks.documents(ids) & masks.causal(),
    }


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    q, k, v, ids = inputs["q"], inputs["k"], inputs["v"], inputs["document_id"]
    out: dict[str, Tensor] = {}
    for name, mask in _recorded_masks(ids, args).items():
        out[f"{name}.out"], out[f"{name}.lse"] = attend(q, k, v, mask=mask, return_lse=True)
        lists = create_block_mask(mask, q.shape[2], k.shape[2], args["BLOCK_SIZE"])
        for field in (
            "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
        ):  # fmt: skip
            out[f"{name}.{field}"] = getattr(lists, field)
        out[f"{name}.dense_blocks"] = lists.to_dense()
    mods: dict[str, ScoreMod] = {
        "alibi": score_mods.alibi(q.shape[1]),
        "softcap": score_mods.soft_cap(args["soft_cap"]),
        "bias": score_mods.bias(inputs["bias"]),
        "relative": relative(),
    }
    for name, mod in mods.items():
        out[f"{name}_causal.out"] = attend(q, k, v, mask=masks.causal(), score_mod=mod)
    both = masks.documents(ids) & masks.window(args["window"])
    out["alibi_document_window.out"] = attend(q, k, v, mask=both, score_mod=mods["alibi"])
    return out


def _compare(
    name: str, ours: Tensor, recorded: Tensor, inputs: dict[str, Tensor], args: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Of a list of blocks, the entries that its count names; the others have no meaning."""
    if not name.endswith("_indices"):
        return ours, recorded
    which, field = name.rsplit(".", 1)
    mask = _recorded_masks(inputs["document_id"], args)[which]
    lists = create_block_mask(mask, inputs["q"].shape[2], inputs["k"].shape[2], args["BLOCK_SIZE"])
    count = getattr(lists, field.replace("indices", "num_blocks"))
    valid = torch.arange(ours.shape[-1]) < count[..., None]
    return ours * valid, recorded * valid


PORTS = (
    of_function(
        "flex_attention",
        run=_run_authors,
        compare=_compare,
    ),
)
