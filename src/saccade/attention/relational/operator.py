"""Relational attention as a function: weights times relations, and weights times symbols, without N x M x R.

Shape letters: B batch, N queries, M keys, H heads, K key heads, D head dim of the scores, E of the values (the
paper's d), R relations, P relation dim (its p), c queries of a piece.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.ops import masks
from saccade.ops.grad import needs_grad
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


#: queries per piece
_ROWS = 64


def relational_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    q_rel_BRNP: Tensor,
    k_rel_BRMP: Tensor,
    symbols: Tensor,
    relation_weights_HER: Tensor,
    *,
    activation: str = "identity",
    mask: Mask | None = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
    memory_mb: float = 32.0,
) -> Tensor:
    """Relational attention: sum_j alpha_ij (W_r r_ij + W_v s_j), without an N x M x R or N x M x E tensor.

    Args:
        q_BHND, k_BKMD: what the weights alpha are made of; K divides H.
        q_rel_BRNP, k_rel_BRMP: what the relations are made of; scaled by P ** -0.5.
        symbols: the projected symbols W_v s: of tokens (B, K, M, E); of clipped distances j - i in -m .. m as a table
            (K, 2 m + 1, E); or of pairs (1 or B, N, M, K, E).
        relation_weights_HER: W_r.
        activation: sigma, a name of `ACTIVATIONS`.
        mask: over query-key pairs. A query that may attend to nothing gives zeros.
        causal: query i attends to keys up to i + `offset`.
        offset: the key at which query 0 stands (for `causal` and the table of distances).
        scale: of the attention scores, D ** -0.5 where None.
        memory_mb: bound of a piece's weights and relations, in MiB.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: if the activation is unknown or the shapes do not fit.
    """
    B, H, N, D = q_BHND.shape
    M, R = k_BKMD.shape[2], q_rel_BRNP.shape[1]
    _check_shapes(q_BHND, k_BKMD, q_rel_BRNP, k_rel_BRMP, symbols, relation_weights_HER, activation)
    if mask is not None:
        mask.check(N, M)
        if mask.batch not in (1, B) or mask.heads not in (1, H):
            raise ValueError(f"mask is for {mask.batch} batch rows and {mask.heads} heads, got {B} and {H}")
    k_BHMD = repeat_heads(k_BKMD, H)
    if symbols.ndim == 3:
        reach = min(symbols.shape[1] // 2, max(1, N + offset, M))  # farther entries are never read
        middle = symbols.shape[1] // 2
        symbols = symbols[:, middle - reach : middle + reach + 1].repeat_interleave(H // symbols.shape[0], 0)
    elif symbols.ndim == 4:
        symbols = repeat_heads(symbols, H)
    else:
        symbols = symbols.repeat_interleave(H // symbols.shape[3], 3)
    scale = D**-0.5 if scale is None else scale
    per_row = 3 * max(1, B) * (H + R) * max(1, M) * q_BHND.element_size()
    rows = int(max(1, min(_ROWS, memory_mb * 2**20 // per_row)))
    tensors = (q_BHND, k_BHMD, q_rel_BRNP, k_rel_BRMP, symbols, relation_weights_HER)
    again = rows < N and needs_grad(*tensors)
    pieces = []
    for first in range(0, max(1, N), rows):
        arguments = (*tensors, first, min(first + rows, N), activation, mask, causal, offset, scale)
        if again:
            pieces.append(checkpoint(_piece, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(_piece(*arguments))
    return torch.cat(pieces, 2)


def _piece(
    q: Tensor,
    k: Tensor,
    q_rel: Tensor,
    k_rel: Tensor,
    symbols: Tensor,
    relation_weights: Tensor,
    first: int,
    last: int,
    activation: str,
    mask: Mask | None,
    causal: bool,
    offset: int,
    scale: float,
) -> Tensor:
    """The outputs of queries `first` to `last`, (B, H, c, E)."""
    end = min(k.shape[2], last + offset) if causal else k.shape[2]
    scores_BHcM = (q[:, :, first:last] * scale) @ k[:, :, :end].mT
    weights_BHcM = _softmax(scores_BHcM, mask, causal, first, offset)
    relations_BRcM = compare(q_rel[:, :, first:last], k_rel[:, :, :end], activation)
    sums_BcHR = weights_BHcM.transpose(1, 2) @ relations_BRcM.permute(0, 2, 3, 1)
    out_BHcE = torch.einsum("bchr,her->bhce", sums_BcHR, relation_weights)
    if symbols.ndim == 4:
        return out_BHcE + weights_BHcM @ symbols[:, :, :end]
    if symbols.ndim == 5:
        return out_BHcE + torch.einsum("bhij,bijhe->bhie", weights_BHcM, symbols[:, first:last, :end])
    return out_BHcE + _by_distance(weights_BHcM, first + offset, symbols.shape[1] // 2) @ symbols


def _softmax(scores: Tensor, mask: Mask | None, causal: bool, first: int, offset: int) -> Tensor:
    c, M = scores.shape[2:]
    precise = torch.promote_types(scores.dtype, torch.float32)
    query = torch.arange(first, first + c, device=scores.device)[:, None]
    if mask is None:
        if causal:
            seen = min(first + offset + 1, M)  # by all of these queries
            future = torch.arange(seen, M, device=scores.device) > query + offset
            tail = scores[..., seen:].masked_fill(future, float("-inf"))
            scores = torch.cat([scores[..., :seen], tail], -1) if seen < M else scores
        return scores.softmax(-1, dtype=precise).to(scores.dtype)
    b = torch.arange(scores.shape[0], device=scores.device)[:, None, None, None]
    h = torch.arange(scores.shape[1], device=scores.device)[:, None, None]
    key = torch.arange(M, device=scores.device)
    allowed: Tensor = mask.allowed(b, h, query, key)
    if causal:
        allowed = allowed & (key <= query + offset)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=precise).to(scores.dtype).masked_fill(~allowed, 0.0)


def compare(q_rel: Tensor, k_rel: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation]((q_rel * q_rel.shape[-1] ** -0.5) @ k_rel.mT)


def _by_distance(weights_BHcM: Tensor, first: int, reach: int) -> Tensor:
    """Sums of the weights over the keys at each clipped distance, (B, H, c, 2 reach + 1)."""
    c, M = weights_BHcM.shape[2:]
    device = weights_BHcM.device
    distance_cM = torch.arange(M, device=device) - torch.arange(first, first + c, device=device)[:, None]
    left = weights_BHcM.masked_fill(distance_cM > -reach, 0.0).sum(-1, keepdim=True)
    right = weights_BHcM.masked_fill(distance_cM < reach, 0.0).sum(-1, keepdim=True)
    key = torch.arange(first, first + c, device=device)[:, None] + torch.arange(1 - reach, reach, device=device)
    inside = (key >= 0) & (key < M)
    near = weights_BHcM.gather(-1, key.clamp(0, M - 1).expand(*weights_BHcM.shape[:2], -1, -1))
    return torch.cat([left, near.masked_fill(~inside, 0.0), right], -1)


def relational_attend_reference(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    q_rel_BRNP: Tensor,
    k_rel_BRMP: Tensor,
    symbols: Tensor,
    relation_weights_HER: Tensor,
    *,
    activation: str = "identity",
    mask: Mask | None = None,
    causal: bool = False,
    offset: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, every message W_r r_ij + W_v s_j materialised: out, alpha (B, H, N, M), r (B, N, M, R).

    Args:
        q_BHND, k_BKMD, q_rel_BRNP, k_rel_BRMP, symbols, relation_weights_HER: as in `relational_attend`.
        activation, mask, causal, offset, scale: as in `relational_attend`.
    """
    H, N, D = q_BHND.shape[1:]
    M = k_BKMD.shape[2]
    pairs = masks.window(N + M, N + M) if mask is None else mask
    allowed = (pairs & masks.causal(offset) if causal else pairs).dense(N, M, q_BHND.device)
    scores = q_BHND @ repeat_heads(k_BKMD, H).mT * (D**-0.5 if scale is None else scale)
    alpha = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    r = ACTIVATIONS[activation](torch.einsum("brnp,brmp->bnmr", q_rel_BRNP, k_rel_BRMP) * q_rel_BRNP.shape[-1] ** -0.5)
    if symbols.ndim == 3:
        reach = symbols.shape[1] // 2
        distance = torch.arange(M) - torch.arange(N)[:, None] - offset
        symbols = symbols[:, distance.clamp(-reach, reach) + reach].permute(1, 2, 0, 3)[None]
    elif symbols.ndim == 4:
        symbols = symbols.transpose(1, 2)[:, None].expand(-1, N, -1, -1, -1)
    messages = torch.einsum("bnmr,her->bnmhe", r, relation_weights_HER)
    messages = messages + symbols.repeat_interleave(H // symbols.shape[3], 3)
    return torch.einsum("bhnm,bnmhe->bhne", alpha, messages), alpha, r


def _check_shapes(q: Tensor, k: Tensor, q_rel: Tensor, k_rel: Tensor, symbols: Tensor, w: Tensor, name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"the relation activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    B, H, N, D = q.shape
    K, M = k.shape[1:3]
    if H % K or k.shape[3] != D:
        raise ValueError(f"query and key do not fit: {tuple(q.shape)} and {tuple(k.shape)}")
    if q_rel.shape[2] != N or k_rel.shape[:3] != (B, q_rel.shape[1], M) or q_rel.shape[3] != k_rel.shape[3]:
        raise ValueError(f"the relations' queries and keys do not fit: {tuple(q_rel.shape)} and {tuple(k_rel.shape)}")
    E = symbols.shape[-1]
    if w.shape != (H, E, q_rel.shape[1]):
        raise ValueError(f"relation_weights must be {(H, E, q_rel.shape[1])}, got {tuple(w.shape)}")
    heads = {3: 0, 4: 1, 5: 3}.get(symbols.ndim)
    fits = heads is not None and symbols.shape[heads] > 0 and H % symbols.shape[heads] == 0
    if symbols.ndim == 3:
        fits = fits and symbols.shape[1] % 2 == 1 and symbols.shape[1] >= 3
    elif symbols.ndim == 4:
        fits = fits and symbols.shape[0] == B and symbols.shape[2] == M
    else:
        fits = fits and symbols.shape[0] in (1, B) and symbols.shape[1:3] == (N, M)
    if not fits:
        raise ValueError(
            f"symbols must be (B, K, M, E), (K, 2 m + 1, E) or (1 or B, N, M, K, E) for B={B}, N={N}, M={M}, H={H}, "
            f"got {tuple(symbols.shape)}"
        )
