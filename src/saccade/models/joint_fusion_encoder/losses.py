"""Contrastive losses of retrieval, and gradients of a large batch that is encoded in small chunks.

Shape letters: N queries, M targets, D width, m targets of a query, n hard negatives, k negatives of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


def retrieval_loss(
    query_ND: Tensor, target_MD: Tensor, *, temperature: float = 0.02, symmetric: bool = False
) -> Tensor:
    """-log softmax over all targets of q_i . t_(i m) / T, its mean over queries.

    Args:
        query_ND: of unit length.
        target_MD: of unit length; each query's own m follow each other, its positive first and hard negatives after.
        temperature: T.
        symmetric: the mean of this and of the same from positives to queries.

    Raises:
        ValueError: if the targets are not m for each query, or the temperature is not positive.
    """
    count = len(query_ND)
    if not count or not len(target_MD) or len(target_MD) % count or query_ND.shape[1:] != target_MD.shape[1:]:
        raise ValueError(
            "targets must be as many for each query, and of their width, got "
            f"{tuple(query_ND.shape)} and {tuple(target_MD.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    each, own_N = len(target_MD) // count, torch.arange(count, device=query_ND.device)
    score_NM = query_ND.float() @ target_MD.float().T / temperature
    loss = F.cross_entropy(score_NM, each * own_N)
    return (loss + F.cross_entropy(score_NM[:, ::each].T, own_N)) / 2 if symmetric else loss


def late_fusion_loss(
    query_ND: Tensor,
    positive_ND: Tensor,
    logit_scale: Tensor,
    negative_NnD: Tensor | None = None,
    *,
    others: int = 0,
    own_positive: bool = False,
) -> Tensor:
    """Cross entropy of the positive among all positives or, with hard negatives, among those and `others`.

    Vectors are normalised here; scores are e^logit_scale times their cosines.

    Args:
        query_ND, positive_ND: row i of one belongs to row i of the other.
        logit_scale: of one number.
        negative_NnD: hard negatives of each query.
        others: with hard negatives, how many positives of other queries count too: at most N - 1.
        own_positive: take each query's own positive in their place, a slip of UniIR's code.

    Raises:
        ValueError: if shapes differ or `others` is negative.
    """
    if query_ND.ndim != 2 or query_ND.shape != positive_ND.shape or others < 0:
        raise ValueError(
            "queries and positives must be of one shape (items, width) and others not negative, got "
            f"{tuple(query_ND.shape)}, {tuple(positive_ND.shape)} and {others}"
        )
    query, positive = (F.normalize(x.float(), dim=-1) for x in (query_ND, positive_ND))
    scale, own_N = logit_scale.float().exp(), torch.arange(len(query), device=query.device)
    if negative_NnD is None:
        return F.cross_entropy(scale * query @ positive.T, own_N)
    if negative_NnD.ndim != 3 or negative_NnD.shape[::2] != query.shape:
        expected = f"({len(query)}, negatives, {query.shape[1]})"
        raise ValueError(f"negatives must be {expected}, got {tuple(negative_NnD.shape)}")
    hard_Nn = torch.einsum("nd,nkd->nk", query, F.normalize(negative_NnD.float(), dim=-1))
    step_k = torch.arange(1, min(len(query) - 1, others) + 1, device=query.device)
    which_Nk = own_N[:, None] + (0 * step_k if own_positive else step_k)
    other_Nk = torch.einsum("nd,nkd->nk", query, positive[which_Nk % len(query)])
    own_N1 = (query * positive).sum(1, keepdim=True)
    return F.cross_entropy(scale * torch.cat([own_N1, hard_Nn, other_Nk], 1), torch.zeros_like(own_N))


def cached_backward(
    encode: Callable[[T], Tensor], chunks: Mapping[str, Sequence[T]], loss: Callable[..., Tensor]
) -> Tensor:
    """The gradients of a loss on a whole batch, of which one chunk at a time is held in memory.

    All chunks are encoded without a graph, dL/dz is taken, and each chunk is encoded once more, with the random numbers
    of the first time, to backpropagate <dL/dz, z>. Gradients are added to what the parameters hold.

    Args:
        encode: a chunk -> vectors (rows, D).
        chunks: of each side of the loss, by the name of its argument.
        loss: (**vectors of all chunks of each side) -> a scalar; its own parameters have their gradients too.

    Returns:
        the loss, without a graph.

    Raises:
        ValueError: if a side has no chunks.
    """
    if not chunks or not all(len(side) for side in chunks.values()):
        raise ValueError(f"each side must have a chunk at least, got { ({k: len(v) for k, v in chunks.items()}) }")
    states: list[list[Tensor]] = []
    vectors: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}
    for name, side in chunks.items():
        found = []
        for chunk in side:
            states.append(_random_states())
            with torch.no_grad():
                found.append(encode(chunk))
        rows[name], vectors[name] = [len(x) for x in found], torch.cat(found).requires_grad_()
    value = loss(**vectors)
    value.backward()
    numbered = iter(states)
    for name, side in chunks.items():
        taken = vectors[name].grad
        gradient = torch.zeros_like(vectors[name]) if taken is None else taken
        for chunk, part in zip(side, gradient.split(rows[name])):
            with _as_then(next(numbered)):
                again = encode(chunk)
            again.backward(part)
    return value.detach()


def _random_states() -> list[Tensor]:
    """Of the CPU's generator, and of those of CUDA where it runs."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


@contextmanager
def _as_then(states: list[Tensor]) -> Iterator[None]:
    """With the generators as they were, and afterwards as they are."""
    now = _random_states()
    _set_random(states)
    try:
        yield
    finally:
        _set_random(now)


def _set_random(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
