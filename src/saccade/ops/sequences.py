"""The sequences of a batch, padded or packed into rows, each for itself.

Shape letters: B batch, H query heads, K key heads, N tokens of a row, M the same as keys, D head dim, E width of
values, S sequences, L their length, T tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saccade.ops.sharding import in_parts

__all__ = ["attend_apart", "documents_of", "sequences", "take"]


def sequences(
    batch: int, tokens: int, valid_BM: Tensor | None = None, ids_BN: Tensor | None = None
) -> Iterator[Tensor]:
    """Token indices (S, L), into all rows laid end to end, of the sequences of each length L that occurs.

    Args:
        batch, tokens: B rows of N tokens.
        valid_BM: which of them are real; all where None.
        ids_BN: the sequences that are packed into a row, by number; one sequence per row where None.

    >>> [index.tolist() for index in sequences(2, 3, torch.tensor([[True, True, True], [False, True, True]]))]
    [[[4, 5]], [[0, 1, 2]]]
    """
    given = valid_BM if valid_BM is not None else ids_BN
    device = None if given is None else given.device
    row_B1 = torch.arange(batch, device=device)[:, None]
    if ids_BN is None:
        ids_BN = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    ids_BN = ids_BN.long() + row_B1 * (ids_BN.max().long() + 1)
    token_T = torch.arange(batch * tokens, device=device)
    if valid_BM is not None:
        token_T = token_T[valid_BM.expand(batch, tokens).flatten()]
    id_T, order_T = ids_BN.flatten()[token_T].sort(stable=True)
    length_s = id_T.unique_consecutive(return_counts=True)[1]
    start_s = length_s.cumsum(0) - length_s
    for length in length_s.unique().tolist():
        position_SL = start_s[length_s == length][:, None] + torch.arange(length, device=device)
        yield token_T[order_T[position_SL]]


def take(x_BHND: Tensor, index_SL: Tensor) -> Tensor:
    """The tokens of `sequences`, (S, H, L, D)."""
    return x_BHND.transpose(1, 2).flatten(0, 1)[index_SL].transpose(1, 2)


@in_parts
def documents_of(positions_BN: Tensor) -> Tensor | None:
    """The number of each token's sequence in its row, (B, N): one begins where positions do not go on by one.

    None where every row is one sequence.

    Args:
        positions_BN: of the tokens.

    >>> documents_of(torch.tensor([[0, 1, 2, 0, 1]])).tolist()
    [[0, 0, 0, 1, 1]]
    """
    ids_BN = torch.cat([torch.ones_like(positions_BN[:, :1]), positions_BN.diff()], 1).ne(1).cumsum(1)
    return ids_BN if bool(ids_BN.any()) else None


@in_parts
def attend_apart(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    valid_BM: Tensor | None = None,
    ids_BM: Tensor | None = None,
) -> Tensor:
    """What a function gives each sequence alone, (B, H, N, E); zeros for tokens that are padding.

    Args:
        attend: the function, of queries, keys and values (S, H, L, D).
        q_BHND, k_BKMD, v_BKME: as many queries as keys.
        valid_BM, ids_BM: as in `sequences`.
    """
    B, H, N, _ = q_BHND.shape
    out_THE = q_BHND.new_zeros(B * N, H, v_BKME.shape[3])
    for index_SL in sequences(B, N, valid_BM, ids_BM):
        out_THE[index_SL] = attend(*(take(x, index_SL) for x in (q_BHND, k_BKMD, v_BKME))).transpose(1, 2)
    return out_THE.unflatten(0, (B, N)).transpose(1, 2)
