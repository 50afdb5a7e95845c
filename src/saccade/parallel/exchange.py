"""How tensors get from rank to rank: one collective, with its gradient, in which every byte is counted.

    exchange    each rank sends each other rank what that needs; backward, the gradients go the same way back
    gather      every rank gets every rank's tensor, in their order
    gather_parts    every rank gets every rank's rows, one after the other

All are torch's functional all-to-all with sizes, which sends nothing where there is nothing to send. They are called by
all ranks of the group in the same order, and backward too: an output that a rank does not use still has to be part of
its graph (`tied`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor

from saccade.ops.grad import first_derivatives_only

if TYPE_CHECKING:
    from saccade.parallel.context import Shards

_INSTEAD = "compute the gradient's gradient in one process"


def start(shards: Shards, flat: Tensor, send: Sequence[int], receive: Sequence[int], kind: str, direction: str) -> Any:
    """Begin to send the pieces of a flat tensor; `finish` gives what was received. No gradient.

    Args:
        shards: whose group.
        flat: what is sent to rank 0, 1, ..., one after the other; nothing to this rank itself.
        send, receive: elements to and from each rank.
        kind, direction: under which they are counted.
    """
    own = shards.rank
    if send[own] or receive[own]:
        raise RuntimeError(f"{kind}: a rank sends itself nothing, got {send[own]} and {receive[own]} elements")
    size = flat.element_size()
    shards.traffic.add(kind, direction, sum(send) * size, sum(receive) * size)
    if shards.ranks == 1:
        return flat.new_empty(0)
    with shards.named_errors(kind):
        return functional.all_to_all_single(flat.contiguous(), list(receive), list(send), shards.group)


def finish(shards: Shards, pending: Any, kind: str) -> Tensor:
    """What `start` began to receive, flat, in the order of the ranks.

    Args:
        shards, kind: as there.
        pending: what it gave.
    """
    with shards.named_errors(kind):
        return functional.wait_tensor(pending)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, shards: Shards, send: Sequence[int], receive: Sequence[int], kind: str
    ) -> Tensor:
        ctx.arguments = shards, send, receive, kind
        return finish(shards, start(shards, flat, send, receive, kind, "forward"), kind)

    @staticmethod
    @first_derivatives_only("an exchange between ranks", _INSTEAD)
    def backward(ctx: Any, grad: Tensor) -> Any:
        shards, send, receive, kind = ctx.arguments
        back = finish(shards, start(shards, grad, receive, send, kind, "backward"), kind)
        return back, None, None, None, None


def exchange(shards: Shards, flat: Tensor, send: Sequence[int], receive: Sequence[int], kind: str) -> Tensor:
    """Send each rank its piece of a flat tensor, with a gradient.

    Args:
        shards, flat, send, receive: as in `start`.
        kind: under which it is counted.

    Returns:
        What this rank was sent, flat, in the order of the ranks.
    """
    return _Exchange.apply(flat, shards, send, receive, kind)


def gather(shards: Shards, x: Tensor, kind: str) -> Tensor:
    """Every rank's tensor, stacked in front: (P, ...); all have the same shape. The gradient is summed at its owner.

    Args:
        shards: whose group.
        x: this rank's.
        kind: under which it is counted.
    """
    return gather_parts(shards, x[None], [1] * shards.ranks, kind)


def gather_parts(shards: Shards, x: Tensor, lengths: Sequence[int], kind: str) -> Tensor:
    """Every rank's rows one after the other, on all ranks. The gradient of a row is the sum of what all do with it.

    Args:
        shards: whose group.
        x: this rank's rows.
        lengths: how many rows each rank has.
        kind: under which it is counted.
    """
    own, row = shards.rank, prod(x.shape[1:])
    send = [0 if rank == own else x.numel() for rank in range(shards.ranks)]
    receive = [0 if rank == own else length * row for rank, length in enumerate(lengths)]
    got = exchange(shards, x.reshape(-1).repeat(shards.ranks - 1), send, receive, kind)
    parts = zip(got.split(receive), lengths)
    return torch.cat([x if r == own else part.view(n, *x.shape[1:]) for r, (part, n) in enumerate(parts)])


def tied(out: Tensor, *others: Tensor) -> Tensor:
    """`out`, with `others` in its graph, so that the backward pass of what made them runs.

    Args:
        out: as it is.
        others: what it does not depend on.
    """
    for other in others:
        if other.requires_grad:
            out = out + other.reshape(-1)[:0].sum().to(out.dtype)
    return out


def ask(shards: Shards, numbers: Sequence[int], kind: str) -> list[list[int]]:
    """What every rank says to a question that is answered in some integers, in the order of the ranks.

    Args:
        shards: whose group.
        numbers: this rank's answer.
        kind: under which it is counted.
    """
    with torch.no_grad():
        answer = torch.tensor(list(numbers), dtype=torch.int64, device=shards.device)
        return gather(shards, answer, kind).tolist()
