"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.moba.operator import moba_attend, moba_route
from saccade.catalogue.ports import of_function
from saccade.ops import masks


def _run_authors(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' call: packed q, k, v (tokens, heads, head_dim) with cu_seqlens."""
    size, top_k = int(args["moba_chunk_size"]), int(args["moba_topk"])
    edges = inputs["cu_seqlens"].long()
    lengths = edges.diff()
    q, k, v = (inputs[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    out = moba_attend(q, k, v, block_size=size, top_k=top_k, mask=masks.documents(ids))
    outputs = {"out": out[0].transpose(0, 1)}
    for i, (first, last) in enumerate(zip(edges.tolist(), edges[1:].tolist())):
        pad = (0, 0, 0, -(last - first) % size)
        here = [F.pad(x[:, :, first:last], pad) for x in (q, k)]
        chosen = moba_route(*here, block_size=size, top_k=top_k)[0, :, : last - first]
        own = torch.arange(last - first, device=q.device) // size
        selected = F.one_hot(own, here[0].shape[2] // size).expand(q.shape[1], -1, -1).clone()
        # -1 (none) is counted on the own block, which is chosen anyway
        selected.scatter_(2, torch.where(chosen < 0, own[:, None], chosen), 1)
        outputs[f"selected.{i}"] = selected.bool()
    return outputs


def _compare(
    name: str, ours: Tensor, recorded: Tensor, inputs: dict[str, Tensor], args: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Choices are compared among the blocks that have begun: the authors fill up with arbitrary future ones."""
    if not name.startswith("selected"):
        return ours, recorded
    own = torch.arange(ours.shape[1]) // int(args["moba_chunk_size"])
    past = torch.arange(ours.shape[2]) <= own[:, None]
    return ours & past, recorded & past


PORTS = (
    of_function(
        "moba_attention",
        run=_run_authors,
        compare=_compare,
    ),
)
