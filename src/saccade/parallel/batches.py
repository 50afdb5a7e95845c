"""A tensor or a batch cut into the ranks' parts, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from saccade.parallel.context import Mesh, Shards, places_of, shards_of
from saccade.parallel.exchange import gather_parts

__all__ = ["shard", "unshard"]

#: of a batch, what describes the whole sequence on every rank
WHOLE = ("attention_mask",)

#: label of a token that no loss counts, as transformers has it
IGNORED = -100


@overload
def shard(x: Tensor, mesh: Mesh, *, dim: int = 1, balance: str = "contiguous", unit: int = 1) -> Tensor: ...


@overload
def shard(
    x: Mapping[str, Any], mesh: Mesh, *, dim: int = 1, balance: str = "contiguous", unit: int = 1
) -> dict[str, Any]: ...


def shard(
    x: Tensor | Mapping[str, Any],
    mesh: Mesh,
    *,
    dim: int = 1,
    balance: str = "contiguous",
    unit: int = 1,
) -> Any:
    """This rank's part of what every rank holds whole. Nothing is sent.

    Of a batch for a transformers model, tensors whose axis `dim` is as long as that of `input_ids` (or
    `inputs_embeds`) are cut, but for `attention_mask`, which stays whole, as masks do. `position_ids` come in where
    they are missing. With `labels` come `shift_labels`, each the next token's, which may be another rank's, and
    `num_items_in_batch`, the labels that count in the whole: by these the model's loss is this rank's share of the
    loss of one process.

    Args:
        x: a tensor, or a batch by name.
        mesh: as `parallel` takes it, or what it yields.
        dim: axis of the tokens.
        balance, unit: as in `parallel`; what `parallel` yields knows its own.

    Raises:
        ValueError: if a batch has no tokens.
    """
    shards = shards_of(mesh, balance, unit)
    if isinstance(x, Tensor):
        return _part(x, shards, dim)
    tokens = next((x[name] for name in ("input_ids", "inputs_embeds") if x.get(name) is not None), None)
    if tokens is None:
        raise ValueError(f"a batch has input_ids or inputs_embeds, got {', '.join(x) or 'nothing'}")
    batch, length = dict(x), tokens.shape[dim]
    if batch.get("position_ids") is None:
        batch["position_ids"] = torch.arange(length, device=tokens.device).expand(tokens.shape[0], -1)
    if batch.get("labels") is not None:
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        batch.setdefault("num_items_in_batch", (batch["shift_labels"] != IGNORED).sum())
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == length and name not in WHOLE:
            batch[name] = _part(value, shards, dim)
    return batch


def unshard(x: Tensor, mesh: Mesh, *, dim: int = 1, balance: str = "contiguous", unit: int = 1) -> Tensor:
    """The whole of which every rank holds a part, on every rank. All ranks call it.

    The gradient of a part is the sum of what all ranks do with it.

    Args:
        x: this rank's part.
        mesh, dim, balance, unit: as in `shard`.

    Raises:
        ValueError: if the parts are not as `shard` cuts them.
    """
    shards = shards_of(mesh, balance, unit)
    layout = shards.layouts(x.shape[dim])[0]
    parts = gather_parts(shards, x.movedim(dim, 0), layout.shares, "unshard")
    order = torch.cat([places_of(layout, rank) for rank in range(shards.ranks)]).argsort().to(x.device)
    return parts.index_select(0, order).movedim(0, dim)


def _part(x: Tensor, shards: Shards, dim: int) -> Tensor:
    pieces = shards.layout(x.shape[dim]).pieces(shards.rank)
    cut = [x.narrow(dim, piece.start, len(piece)) for piece in pieces]
    return torch.cat(cut, dim) if cut else x.narrow(dim, 0, 0)
