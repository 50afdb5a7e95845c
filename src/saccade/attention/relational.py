"""Dual attention: heads that send features of the sender, beside heads that send its relations to the receiver.

Altabaa, Lafferty, "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
arXiv 2405.16727 (the Dual Attention Transformer, DAT).

    alpha^h_ij = softmax_j(<W_q^h x_i, W_k^h x_j> / sqrt(d))                    (masks and rotary positions here only)
    r_ij[l]    = sigma(<W_q,rel^l x_i, W_k,rel^l x_j> / sqrt(p)),   l = 1 .. R,   p = n d / R
    RA:  a^h_i = sum_j alpha^h_ij (W_r^h r_ij + W_v^h s_j)                       (relational head: symbol s_j, not x_j)
    SA:  e^h_i = sum_j alpha^h_ij W_v^h x_j                                      (sensory head: standard attention)
    out = concat(W_o concat_h(e^h), W_o' concat_h(a^h))

A symbol s_j tags the sender: retrieved from a library by attention over learned templates (symbolic attention), by
position, by relative position s_ij, or by comparisons with the neighbours (relational symbolic attention).

No pair has its relations or messages stored: sum_j alpha_ij r_ij is made for 64 queries at a time, as a product of
each query's weights (n x M) with its relations (M x R), and W_r is applied to the sums; a backward pass makes each
piece again. Time O(N M (n d + R p + n R)), memory linear in N + M. (sum_j alpha_ij r_ij[l] = <q_i,rel^l, sum_j alpha_ij
k_j,rel^l> / sqrt(p) would do with a fused kernel, but costs n R p a pair, measured 1.5 to 2 times as long at n = 4.)

| here                  | paper / code    | meaning                                          | default             |
|-----------------------|-----------------|--------------------------------------------------|---------------------|
| `relational_heads`    | n_heads_ra      | of the `num_heads`                               | half (this library) |
| `num_relations`       | R, n_relations  | comparisons per pair, shared by the heads        | n_heads_ra          |
| `relation_activation` | sigma           | identity, relu, sigmoid, tanh, gelu (tanh), silu | identity            |
| `symmetric`           | symmetric_rels  | W_k,rel = W_q,rel                                | False               |

The attention's scale is 1/sqrt(d) also where `key_dim` differs (authors' code). In relational symbolic attention the
neighbours stand in the order i-1, i-2, .. (as recorded); this library puts the token itself, where asked for, before
them, and right neighbours i+1, i+2, .. after. With cross-attention (not in the paper) symbols are those of the context.

Shape letters: B batch, N queries, M keys, C channels, H heads, K key heads, D head dim of the scores, E of the
values (the paper's d), R relations, P relation dim (its p), W neighbours, V vocabulary, c queries of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.cache import KVCache, NamedCache
from saccade.ops.heads import repeat_heads
from saccade.ops.layer import QKVAttention, as_mask
from saccade.ops.masks import Mask
from saccade.ops.rope import rotate

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

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
    again = rows < N and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
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
    relations_BRcM = _relations(q_rel[:, :, first:last], k_rel[:, :, :end], activation)
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


def _relations(q_rel: Tensor, k_rel: Tensor, activation: str) -> Tensor:
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
    """The definition, every message W_r r_ij + W_v s_j materialised: out, alpha (B, H, N, M), r (B, N, M, R)."""
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


class SymbolicAttention(nn.Module):
    """Symbols s = softmax((W x + b) F^T / sqrt(C / H)) S, by head: what the token looks like chooses its symbol.

    Args:
        dim, num_heads: C and the heads into which F and S are split.
        num_symbols: entries of the templates F and the library S.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, or a number is below 1.
    """

    def __init__(self, dim: int, num_heads: int = 4, num_symbols: int = 512) -> None:
        super().__init__()
        if min(num_heads, num_symbols) < 1 or dim % num_heads:
            raise ValueError(
                f"symbol heads must divide dim ({dim}), with num_symbols >= 1, got {num_heads}, {num_symbols}"
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.template_features = nn.Parameter(torch.randn(num_symbols, dim))
        self.symbol_library = nn.Parameter(torch.randn(num_symbols, dim))

    def forward(self, x_BNC: Tensor, *, start: int = 0, past_BWC: Tensor | None = None) -> Tensor:
        """Symbols (B, N, C)."""
        B = x_BNC.shape[0]
        queries, keys, values = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for x in (self.q_proj(x_BNC), self.template_features, self.symbol_library)
        )
        return attend(queries, keys.expand(B, -1, -1, -1), values.expand(B, -1, -1, -1)).transpose(1, 2).flatten(2)


class PositionalSymbols(nn.Module):
    """Symbols s_i = S[i].

    Args:
        max_length: tokens for which there are symbols.
    """

    def __init__(self, dim: int, max_length: int = 2048) -> None:
        super().__init__()
        self.symbol_library = nn.Parameter(torch.randn(max_length, dim))

    def forward(self, x_BNC: Tensor, *, start: int = 0, past_BWC: Tensor | None = None) -> Tensor:
        """Symbols (B, N, C) of the positions from `start` on.

        Raises:
            ValueError: if they go beyond `max_length`.
        """
        end = start + x_BNC.shape[1]
        if end > self.symbol_library.shape[0]:
            raise ValueError(f"there are symbols for {self.symbol_library.shape[0]} positions, got {end}")
        return self.symbol_library[start:end].expand(x_BNC.shape[0], -1, -1)


class PositionRelativeSymbols(nn.Module):
    """Symbols s_ij = E[clip(j - i, -m, m) + m], kept as their table.

    Args:
        max_distance: m.

    Raises:
        ValueError: if it is below 1.
    """

    def __init__(self, dim: int, max_distance: int = 64) -> None:
        super().__init__()
        if max_distance < 1:
            raise ValueError(f"max_distance must be at least 1, got {max_distance}")
        self.max_distance = max_distance
        self.table = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * max_distance + 1, dim)))

    def forward(self, x_BNC: Tensor, *, start: int = 0, past_BWC: Tensor | None = None) -> Tensor:
        """The table (2 m + 1, C), which `RelationalAttention` takes as it is."""
        return self.table

    def pairs(self, N: int) -> Tensor:
        """s_ij (N, N, C)."""
        place = torch.arange(N, device=self.table.device)
        reach = self.max_distance
        return self.table[(place - place[:, None]).clamp(-reach, reach) + reach]


class RelationalSymbolicAttention(nn.Module):
    """Symbolic attention on what a token's comparisons with its neighbours are, instead of on the token.

        c_i = softmax over the neighbours j of <W_q x_i, W_k x_j> / sqrt(C / relation_heads), per head
        s_i = SymbolicAttention(W flatten(c_i) + b)

    Args:
        relation_heads: heads of the comparison.
        num_heads, num_symbols: of the symbolic attention.
        distance: Delta, neighbours i-1 .. i-Delta, and i+1 .. i+Delta where not `causal`; beyond the ends of the
            sequence stands its first or last token.
        causal: left neighbours only.
        include_self: the token is its own neighbour, too.

    Raises:
        ValueError: if heads do not divide `dim`, or `distance` is below 1.
    """

    def __init__(
        self,
        dim: int,
        relation_heads: int = 4,
        num_heads: int = 4,
        num_symbols: int = 512,
        *,
        distance: int = 2,
        causal: bool = True,
        include_self: bool = False,
    ) -> None:
        super().__init__()
        if relation_heads < 1 or dim % relation_heads or distance < 1:
            raise ValueError(
                f"relation_heads must divide dim ({dim}), distance be >= 1, got {relation_heads}, {distance}"
            )
        self.relation_heads, self.distance, self.causal = relation_heads, distance, causal
        near = range(1, distance + 1)
        self.steps = (
            ([0] if include_self else []) + [-step for step in near] + ([] if causal else [step for step in near])
        )
        self.past_tokens = distance
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.in_proj = nn.Linear(len(self.steps) * relation_heads, dim)
        self.symbolic_attention = SymbolicAttention(dim, num_heads, num_symbols)

    def forward(self, x_BNC: Tensor, *, start: int = 0, past_BWC: Tensor | None = None) -> Tensor:
        """Symbols (B, N, C).

        Args:
            start: position of the first token.
            past_BWC: up to `distance` tokens before it (all there were, if fewer).
        """
        N = x_BNC.shape[1]
        known_BMC = x_BNC if past_BWC is None else torch.cat([past_BWC, x_BNC], 1)
        before = known_BMC.shape[1] - N
        place_NW = torch.arange(before, before + N, device=x_BNC.device)[:, None] + torch.tensor(
            self.steps, device=x_BNC.device
        )
        place_NW = place_NW.clamp(0, max(0, before + N - 1))
        query_BNHD = self.q_proj(x_BNC).unflatten(-1, (self.relation_heads, -1))
        key_BNWHD = self.k_proj(known_BMC).unflatten(-1, (self.relation_heads, -1))[:, place_NW]
        scores_BNWH = (query_BNHD[:, :, None] * key_BNWHD).sum(-1) * query_BNHD.shape[-1] ** -0.5
        return self.symbolic_attention(self.in_proj(scores_BNWH.softmax(2).flatten(2)))


RETRIEVERS: dict[str, type[nn.Module]] = {
    "symbolic": SymbolicAttention,
    "positional": PositionalSymbols,
    "relative": PositionRelativeSymbols,
    "relational": RelationalSymbolicAttention,
}


class SensoryAttention(QKVAttention):
    """Standard attention whose output projection stays on its own heads (n_sa d -> n_sa d); rotary pairs interleaved.

    Args:
        key_dim: width of queries and keys, `head_dim` where None; the scale is `head_dim` ** -0.5 all the same.
        dropout: of the output.
        **arguments: `QKVAttention`'s.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        key_dim: int | None = None,
        dropout: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **arguments)
        width = num_heads * self.head_dim
        self.out_proj = nn.Linear(width, width, bias=self.out_proj.bias is not None)
        if key_dim is not None and key_dim != self.head_dim:
            if key_dim < 1 or (self.rope and key_dim % 2):
                raise ValueError(f"key_dim must be positive, and even with rotary positions, got {key_dim}")
            self.q_proj = nn.Linear(dim, num_heads * key_dim, bias=self.q_proj.bias is not None)
            self.k_proj = nn.Linear(dim, self.num_kv_heads * key_dim, bias=self.k_proj.bias is not None)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BNC: Tensor, context_BMC: Tensor | None = None, **arguments: Any) -> Tensor:
        return self.dropout(super().forward(x_BNC, context_BMC, **arguments))

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        if causal and not (offset and q_BHND.shape[2] == 1):
            mask = masks.and_causal(mask, offset)
        return attend(q_BHND, k_BKMD, v_BKME, mask=mask, scale=self.head_dim**-0.5)

    def _heads(self, x_BNC: Tensor, heads: int) -> Tensor:
        return x_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _queries_and_keys(self, x_BNC: Tensor, context_BMC: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        q_BHND = self._heads(self.q_proj(x_BNC), self.num_heads)
        k_BKMD = self._heads(self.k_proj(x_BNC if context_BMC is None else context_BMC), self.num_kv_heads)
        if self.rope and context_BMC is None:
            place_N = torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)
            # pairs to halves: products do not see in which order the channels stand
            halves = (x.unflatten(-1, (-1, 2)).mT.flatten(-2) for x in (q_BHND, k_BKMD))
            q_BHND, k_BKMD = (rotate(x, place_N, base=self.rope_base) for x in halves)
        return q_BHND, k_BKMD


class RelationalAttention(SensoryAttention):
    """Relational heads: `module(x, symbols)`.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, proj_bias, key_dim, dropout: as in
            `SensoryAttention`; grouped heads share keys and symbol values, not relations.
        num_relations: R, `num_heads` where None.
        relation_dim: p, num_heads * head_dim / R where None.
        relation_activation: a name of `ACTIVATIONS`.
        symmetric: r_ij = r_ji.

    Raises:
        ValueError: if R does not divide num_heads * head_dim (where `relation_dim` is not given), or the activation
            is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        num_relations: int | None = None,
        relation_dim: int | None = None,
        relation_activation: str = "identity",
        symmetric: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **arguments)
        width = num_heads * self.head_dim
        self.num_relations = num_heads if num_relations is None else num_relations
        if self.num_relations < 1 or (relation_dim is None and width % self.num_relations):
            raise ValueError(f"num_relations must divide the heads' width ({width}), got {num_relations}")
        if relation_activation not in ACTIVATIONS:
            raise ValueError(
                f"relation_activation must be one of {', '.join(ACTIVATIONS)}, got {relation_activation!r}"
            )
        self.relation_activation = relation_activation
        relation_width = width if relation_dim is None else self.num_relations * relation_dim
        self.q_rel_proj = nn.Linear(dim, relation_width, bias=False)
        self.k_rel_proj = self.q_rel_proj if symmetric else nn.Linear(dim, relation_width, bias=False)
        self.relation_weights = nn.Parameter(torch.empty(num_heads, self.head_dim, self.num_relations))
        nn.init.kaiming_uniform_(self.relation_weights, a=math.sqrt(5))

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        symbols: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: NamedCache | None = None,
    ) -> Tensor:
        """(B, N, num_heads * head_dim).

        Args:
            symbols: of the tokens that are attended to (B, M, C), with a cache of the new ones; a table of distances
                (2 m + 1, C); or of pairs (1 or B, N, M, C).
            mask: as in `QKVAttention.forward`.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        self._check(x_BNC, context_BMC, cache)  # type: ignore[arg-type]
        if symbols.ndim not in (2, 3, 4) or symbols.shape[-1] != self.dim:
            raise ValueError(
                f"symbols must be (B, M, {self.dim}), a table (2 m + 1, {self.dim}) or pairs (B, N, M, {self.dim}), "
                f"got {tuple(symbols.shape)}"
            )
        start = 0 if cache is None else cache.length
        q, k = self._queries_and_keys(x_BNC, context_BMC, start)
        source = x_BNC if context_BMC is None else context_BMC
        q_rel, k_rel = self._relation_heads(self.q_rel_proj(x_BNC)), self._relation_heads(self.k_rel_proj(source))
        values = self.v_proj(symbols).unflatten(-1, (self.num_kv_heads, -1))
        values = values if symbols.ndim == 4 else values.transpose(-3, -2)
        if cache is not None:
            k, k_rel = cache.append("key", k), cache.append("relation key", k_rel)
            values = cache.append("symbol", values) if symbols.ndim == 3 else values
        out = relational_attend(
            q,
            k,
            q_rel,
            k_rel,
            values,
            self.relation_weights,
            activation=self.relation_activation,
            mask=as_mask(mask, k),
            causal=self.causal and context_BMC is None,
            offset=start,
            scale=self.head_dim**-0.5,
        )
        return self.dropout(self.out_proj(out.transpose(1, 2).flatten(2)))

    def relations(self, x_BNC: Tensor, context_BMC: Tensor | None = None) -> Tensor:
        """r (B, N, M, R), for looking inside; quadratic."""
        keys = self.k_rel_proj(x_BNC if context_BMC is None else context_BMC)
        pair = self._relation_heads(self.q_rel_proj(x_BNC)), self._relation_heads(keys)
        return _relations(*pair, self.relation_activation).permute(0, 2, 3, 1)

    def new_cache(  # type: ignore[override]
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NamedCache:
        return NamedCache()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_relations={self.num_relations}"

    def _relation_heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.num_relations, -1)).transpose(1, 2)


class DualCache:
    """Keys and values of the sensory heads; keys, symbol values and relation keys of the relational ones; the last
    tokens, where symbols look back at them."""

    def __init__(self) -> None:
        self.sensory, self.relational = KVCache(), NamedCache()
        self.tail_BWC: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return max(self.sensory.length, self.relational.length)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        tail = 0 if self.tail_BWC is None else self.tail_BWC.numel() * self.tail_BWC.element_size()
        return self.sensory.nbytes + self.relational.nbytes + tail


class DualAttention(nn.Module):
    """Sensory and relational heads side by side, with symbols of their own.

    Args:
        dim, num_heads, causal: channels, all heads, no token attends to a later one.
        relational_heads: how many of the heads are relational, half where None; 0 is multi-head attention.
        symbols: "symbolic", "positional", "relative" or "relational" (see `RETRIEVERS`), or None: `forward` gets them.
        symbol_options: the retriever's further arguments.
        num_kv_heads: key heads of all heads; or a pair, of the sensory and of the relational heads. Grouped alike.
        rope, rope_base, proj_bias, dropout: of both branches.
        share_attention: both branches have the same W_q and W_k (as many heads each).
        **relational: `RelationalAttention`'s num_relations, relation_dim, relation_activation, symmetric, key_dim.

    Raises:
        ValueError: if the head counts do not fit together, or an argument is wrong.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        relational_heads: int | None = None,
        symbols: str | None = "symbolic",
        symbol_options: dict[str, Any] | None = None,
        num_kv_heads: int | tuple[int | None, int | None] | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        proj_bias: bool = False,
        dropout: float = 0.0,
        share_attention: bool = False,
        **relational: Any,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, both at least 1, got {num_heads} and {dim}")
        relational_heads = num_heads // 2 if relational_heads is None else relational_heads
        if not 0 <= relational_heads <= num_heads:
            raise ValueError(f"relational_heads must be between 0 and num_heads ({num_heads}), got {relational_heads}")
        if symbols is not None and symbols not in RETRIEVERS:
            raise ValueError(f"symbols must be one of {', '.join(RETRIEVERS)}, or None, got {symbols!r}")
        sensory_heads = num_heads - relational_heads
        if share_attention and sensory_heads != relational_heads:
            raise ValueError(f"share_attention needs as many heads in both, got {sensory_heads} and {relational_heads}")
        self.dim, self.num_heads, self.causal, self.relational_heads = dim, num_heads, causal, relational_heads
        if isinstance(num_kv_heads, int):
            group = num_heads // num_kv_heads if num_kv_heads > 0 and num_heads % num_kv_heads == 0 else 0
            if not group or sensory_heads % group or relational_heads % group:
                raise ValueError(
                    f"num_kv_heads must group {sensory_heads} sensory and {relational_heads} relational heads alike, "
                    f"got {num_kv_heads}"
                )
            num_kv_heads = (sensory_heads // group or None, relational_heads // group or None)
        sensory_kv, relational_kv = num_kv_heads or (None, None)
        common: dict[str, Any] = {
            "head_dim": dim // num_heads,
            "rope": rope,
            "rope_base": rope_base,
            "proj_bias": proj_bias,
            "dropout": dropout,
        }
        self.sensory = self.relational = self.retriever = None
        if sensory_heads:
            key_dim = relational.get("key_dim") if share_attention else None
            self.sensory = SensoryAttention(
                dim, sensory_heads, causal, num_kv_heads=sensory_kv, key_dim=key_dim, **common
            )
        if relational_heads:
            self.relational = RelationalAttention(
                dim, relational_heads, causal, num_kv_heads=relational_kv, **common, **relational
            )
            if symbols is not None:
                options = {"causal": causal} if symbols == "relational" else {}
                self.retriever = RETRIEVERS[symbols](dim, **{**options, **(symbol_options or {})})
        if share_attention and self.sensory is not None and self.relational is not None:
            if self.sensory.k_proj.weight.shape != self.relational.k_proj.weight.shape:
                raise ValueError(f"share_attention needs the same key heads in both, got {num_kv_heads}")
            self.sensory.q_proj, self.sensory.k_proj = self.relational.q_proj, self.relational.k_proj

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        symbols: Tensor | None = None,
        mask: Tensor | Mask | None = None,
        cache: DualCache | None = None,
    ) -> Tensor:
        """concat(sensory heads, relational heads), (B, N, C).

        Args:
            symbols: instead of the retriever's; see `RelationalAttention.forward`.
            mask: bool (B, M) or over pairs, the same for every head.

        Raises:
            ValueError: if the arguments do not fit together, or there are no symbols.
        """
        QKVAttention._check(self, x_BNC, context_BMC, cache)  # type: ignore[arg-type]
        start = 0 if cache is None else cache.length
        by_head = mask.heads if isinstance(mask, Mask) else mask.shape[1] if mask is not None and mask.ndim == 4 else 1
        if by_head != 1:
            raise ValueError("the mask must be the same for every head, got one by head")
        parts = []
        if self.relational is not None and symbols is None:
            symbols = self._symbols(x_BNC if context_BMC is None else context_BMC, start, mask, cache)
        if self.sensory is not None:
            inner = None if cache is None else cache.sensory
            parts.append(self.sensory(x_BNC, context_BMC, mask=mask, cache=inner))
        if self.relational is not None:
            store = None if cache is None else cache.relational
            parts.append(self.relational(x_BNC, symbols, context_BMC, mask=mask, cache=store))
        return torch.cat(parts, -1)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: Tensor | Mask | None = None) -> Tensor:
        """The heads' weights alpha, the sensory heads first, on given values."""
        branches = [branch for branch in (self.sensory, self.relational) if branch is not None]
        split = values_BHME.split([branch.num_heads for branch in branches], 1)
        return torch.cat([branch.mix(x_BNC, v, mask=mask) for branch, v in zip(branches, split, strict=True)], 1)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DualCache:
        """An empty cache for `forward(x, cache=cache)`."""
        return DualCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, relational_heads={self.relational_heads}, causal={self.causal}"

    def _symbols(self, tokens: Tensor, start: int, mask: Tensor | Mask | None, cache: DualCache | None) -> Tensor:
        if self.retriever is None:
            raise ValueError("this layer has no symbols of its own: give forward(symbols=...)")
        if mask is not None and isinstance(self.retriever, RelationalSymbolicAttention) and not self.retriever.causal:
            raise ValueError("relational symbols that look to the right take no mask: neighbours would be padding")
        return retrieve(self.retriever, tokens, start, cache)


def retrieve(retriever: nn.Module, x_BNC: Tensor, start: int, cache: DualCache | None) -> Tensor:
    """Symbols of new tokens; `cache` hands on the tokens that the next ones look back at."""
    past = None if cache is None else cache.tail_BWC
    reach = getattr(retriever, "past_tokens", 0)
    if cache is not None and reach:
        known = x_BNC.detach() if past is None else torch.cat([past, x_BNC.detach()], 1)
        cache.tail_BWC = known[:, -reach:].clone()
    return retriever(x_BNC, start=start, past_BWC=past)


class _FeedForward(nn.Module):
    """out(act(inner x)), or out(silu(inner x) * factor x)."""

    def __init__(self, dim: int, hidden: int | None, activation: str, dropout: float) -> None:
        super().__init__()
        gated = activation == "swiglu"
        if not gated and activation not in ACTIVATIONS:
            raise ValueError(f"activation must be swiglu, {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = hidden or (8 * dim // 3 if gated else 4 * dim)
        self.inner, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.factor = nn.Linear(dim, hidden) if gated else None
        self.activation, self.dropout = "silu" if gated else activation, nn.Dropout(dropout)

    def forward(self, x_BNC: Tensor) -> Tensor:
        h = ACTIVATIONS[self.activation](self.inner(x_BNC))
        h = h if self.factor is None else h * self.factor(x_BNC)
        return self.dropout(self.out(h))


class DualAttentionBlock(nn.Module):
    """x + attention(norm1(x), s), x + mlp(norm2(x)); with `norm_first=False` norm1(x + ..), norm2(x + ..).

    Args:
        hidden, activation: of the feed-forward layer; "swiglu" or a name of `ACTIVATIONS`.
        **attention: `DualAttention`'s; its symbols come from outside.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        norm_first: bool = True,
        dropout: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = DualAttention(dim, num_heads, causal, symbols=None, dropout=dropout, **attention)
        self.mlp = _FeedForward(dim, hidden, activation, dropout)

    def forward(
        self, x_BNC: Tensor, symbols: Tensor | None, *, mask: Tensor | Mask | None = None, cache: Any = None
    ) -> Tensor:
        if self.norm_first:
            x_BNC = x_BNC + self.attention(self.norm1(x_BNC), symbols=symbols, mask=mask, cache=cache)
            return x_BNC + self.mlp(self.norm2(x_BNC))
        x_BNC = self.norm1(x_BNC + self.attention(x_BNC, symbols=symbols, mask=mask, cache=cache))
        return self.norm2(x_BNC + self.mlp(x_BNC))


class DualAttentionLM(nn.Module):
    """The paper's causal language model: in each layer symbols = retriever(x), x = block(x, symbols).

    Args:
        vocab, dim, num_layers, num_heads, relational_heads: sizes; `num_heads` counts both kinds.
        symbols, symbol_options: the retriever, as in `DualAttention`.
        shared_symbols: one retriever for all layers (the default), or one for each.
        max_length: learned positions for so many tokens where not `rope`.
        **block: `DualAttentionBlock`'s.

    Raises:
        ValueError: if an argument is wrong.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        relational_heads: int,
        *,
        symbols: str = "symbolic",
        symbol_options: dict[str, Any] | None = None,
        shared_symbols: bool = True,
        rope: bool = True,
        max_length: int = 2048,
        activation: str = "swiglu",
        dropout: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        if symbols not in RETRIEVERS:
            raise ValueError(f"symbols must be one of {', '.join(RETRIEVERS)}, got {symbols!r}")
        self.token_embedding = nn.Embedding(vocab, dim)
        self.position_embedding = None if rope else nn.Embedding(max_length, dim)
        self.dropout = nn.Dropout(dropout)
        options = {**({"causal": True} if symbols == "relational" else {}), **(symbol_options or {})}
        if symbols == "relational" and not options["causal"]:
            raise ValueError("a causal model needs symbols that look to the left, got causal=False")
        count = 0 if not relational_heads else 1 if shared_symbols else num_layers
        made = [RETRIEVERS[symbols](dim, **options) for _ in range(count)]
        self.retrievers = nn.ModuleList(made[layer % count] for layer in range(num_layers if count else 0))
        self.blocks = nn.ModuleList(
            DualAttentionBlock(
                dim,
                num_heads,
                True,
                relational_heads=relational_heads,
                rope=rope,
                activation=activation,
                dropout=dropout,
                **block,
            )
            for _ in range(num_layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self._initialise(num_layers)

    def forward(self, ids_BN: Tensor, caches: Sequence[DualCache] | None = None) -> Tensor:
        """Logits (B, N, V); with `caches` of `new_caches`, `ids_BN` continue what they have seen."""
        start = caches[0].length if caches else 0
        x_BNC = self.token_embedding(ids_BN)
        if self.position_embedding is not None:
            x_BNC = x_BNC + self.position_embedding.weight[start : start + ids_BN.shape[1]]
        x_BNC = self.dropout(x_BNC)
        for layer, block in enumerate(self.blocks):
            cache = caches[layer] if caches else None
            symbols = retrieve(self.retrievers[layer], x_BNC, start, cache) if self.retrievers else None
            x_BNC = block(x_BNC, symbols, cache=cache)
        return self.head(self.norm(x_BNC))

    def new_caches(self) -> list[DualCache]:
        """An empty cache for each layer."""
        return [DualCache() for _ in self.blocks]

    def _initialise(self, num_layers: int) -> None:
        last = 0.02 / math.sqrt(2 * num_layers)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, RelationalAttention):
                nn.init.normal_(module.relation_weights, std=0.02)
            if isinstance(module, SensoryAttention):
                nn.init.normal_(module.out_proj.weight, std=last)
            if isinstance(module, _FeedForward):
                nn.init.normal_(module.out.weight, std=last)


# the authors' names


_NAMES = {
    "layers.token_embedder": "token_embedding",
    "layers.symbol_retrievers": "retrievers",
    "layers.blocks": "blocks",
    "layers.norm": "norm",
    "layers.final_out": "head",
    "dual_attn": "attention",
    "self_attention": "sensory",
    "relational_attention": "relational",
    "ff_block.linear1": "mlp.inner",
    "ff_block.linear2": "mlp.out",
    "ff_block.linear3": "mlp.factor",
    "wq_attn": "q_proj",
    "wk_attn": "k_proj",
    "wq_rel": "q_rel_proj",
    "wk_rel": "k_rel_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "out_proj",
    "wr": "relation_weights",
    "model_dim_proj": "in_proj",
    "rel_pos_enc.rel_pos_embeddings": "table",
}


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        dotted = f".{key}."
        for theirs, ours in _NAMES.items():
            dotted = dotted.replace(f".{theirs}.", f".{ours}.")
        renamed[dotted[1:-1]] = tensor
    return renamed


def _known(args: dict[str, Any], *names: str) -> None:
    unknown = sorted(set(args) - set(names))
    if unknown:
        raise ValueError(f"this port knows the arguments {', '.join(names)}, got {', '.join(unknown)}")


_BRANCH = ("n_kv_heads", "add_bias_out", "key_dim")
_RELATIONAL = (*_BRANCH, "n_relations", "rel_proj_dim", "rel_activation", "symmetric_rels")


def _relational_arguments(args: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_relations": args.get("n_relations"),
        "relation_dim": args.get("rel_proj_dim"),
        "relation_activation": args.get("rel_activation") or "identity",
        "symmetric": bool(args.get("symmetric_rels", False)),
        "key_dim": args.get("key_dim"),
    }


def _build_relational(args: dict[str, Any]) -> nn.Module:
    _known(args, "d_model", "n_heads", "total_n_heads", "dropout", "use_relative_positional_symbols", *_RELATIONAL)
    dim, heads = int(args["d_model"]), int(args["n_heads"])
    return RelationalAttention(
        dim,
        heads,
        num_kv_heads=args.get("n_kv_heads"),
        head_dim=dim // int(args.get("total_n_heads") or heads),
        proj_bias=bool(args.get("add_bias_out", False)),
        dropout=float(args.get("dropout") or 0.0),
        **_relational_arguments(args),
    )


def _pairs(symbols: Tensor, x: Tensor, args: dict[str, Any]) -> Tensor:
    """The authors give symbols of pairs as (N, N, C)."""
    relative = (args.get("ra_kwargs") or args).get("use_relative_positional_symbols", False)
    return symbols[None] if relative and symbols.ndim == 3 else symbols


def _looked_inside(module: RelationalAttention, x: Tensor, causal: bool, rope: bool) -> Tensor:
    module.causal, module.rope = causal, rope
    return module.mix(x, torch.eye(x.shape[1]).to(x).expand(x.shape[0], module.num_heads, -1, -1))


def _run_relational(module: RelationalAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x, symbols = inputs["x"], _pairs(inputs["symbols"], inputs["x"], args)
    outputs = {"relations": module.relations(x)}
    for suffix, causal in (("", False), ("_causal_rope", True)):
        outputs[f"attn{suffix}"] = _looked_inside(module, x, causal, causal)
        outputs[f"y{suffix}"] = module(x, symbols)
    return outputs


def _build_dual(args: dict[str, Any]) -> nn.Module:
    names = ("d_model", "n_heads_sa", "n_heads_ra", "dropout", "sa_kwargs", "ra_kwargs", "share_attn_params")
    _known(args, *names)
    return DualAttention(
        int(args["d_model"]),
        int(args["n_heads_sa"]) + int(args["n_heads_ra"]),
        True,
        symbols=None,
        dropout=float(args.get("dropout") or 0.0),
        **_dual_arguments(args),
    )


def _dual_arguments(args: dict[str, Any]) -> dict[str, Any]:
    sensory, relational = args.get("sa_kwargs") or {}, args.get("ra_kwargs") or {}
    _known(sensory, "n_kv_heads", "add_bias_out")
    _known(relational, "use_relative_positional_symbols", *_RELATIONAL)
    if bool(sensory.get("add_bias_out")) != bool(relational.get("add_bias_out")):
        raise ValueError("this port has the output bias in both branches or in none")
    return {
        "relational_heads": int(args["n_heads_ra"]),
        "num_kv_heads": (sensory.get("n_kv_heads"), relational.get("n_kv_heads")),
        "proj_bias": bool(relational.get("add_bias_out", False)),
        "share_attention": bool(args.get("share_attn_params", False)),
        **_relational_arguments(relational),
    }


def _run_dual(module: DualAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x = inputs["x"]
    outputs = {"y": module(x, symbols=_pairs(inputs["symbols"], x, args))}
    if module.relational is not None:
        outputs["attn_ra"] = _looked_inside(module.relational, x, True, True)
        outputs["relations"] = module.relational.relations(x)
    return outputs


def _retriever_arguments(args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of a retriever, from the authors' names of its arguments."""
    if "max_rel_pos" in args:
        _known(args, "symbol_dim", "max_rel_pos")
        return "relative", {"max_distance": int(args["max_rel_pos"])}
    if "max_length" in args:
        _known(args, "symbol_dim", "max_length")
        return "positional", {"max_length": int(args["max_length"])}
    if "nbhd_delta" in args:
        names = ("d_model", "rel_n_heads", "symbolic_attn_n_heads", "n_symbols", "nbhd_delta", "causal_nbhd")
        _known(args, *names, "include_self", "dropout")
        return "relational", {
            "relation_heads": int(args["rel_n_heads"]),
            "num_heads": int(args["symbolic_attn_n_heads"]),
            "num_symbols": int(args["n_symbols"]),
            "distance": int(args["nbhd_delta"]),
            "causal": bool(args.get("causal_nbhd", True)),
            "include_self": bool(args.get("include_self", False)),
        }
    _known(args, "d_model", "n_heads", "n_symbols", "dropout")
    return "symbolic", {"num_heads": int(args["n_heads"]), "num_symbols": int(args["n_symbols"])}


def _build_retriever(args: dict[str, Any]) -> nn.Module:
    kind, options = _retriever_arguments(args)
    return RETRIEVERS[kind](int(args["d_model"] if "d_model" in args else args["symbol_dim"]), **options)


def _build_lm(args: dict[str, Any]) -> nn.Module:
    _known(
        args,
        *("vocab_size", "d_model", "n_layers", "n_heads_sa", "n_heads_ra", "dff", "dropout_rate", "activation"),
        *("norm_first", "max_block_size", "symbol_retrieval", "symbol_retrieval_kwargs", "pos_enc_type"),
        *("sa_kwargs", "ra_kwargs", "share_attn_params"),
    )
    kind, options = _retriever_arguments(args.get("symbol_retrieval_kwargs") or {})
    return DualAttentionLM(
        int(args["vocab_size"]),
        int(args["d_model"]),
        int(args["n_layers"]),
        int(args["n_heads_sa"]) + int(args["n_heads_ra"]),
        symbols=kind,
        symbol_options=options,
        rope=str(args.get("pos_enc_type")) == "RoPE",
        max_length=int(args["max_block_size"]),
        hidden=args.get("dff"),
        activation=str(args.get("activation", "swiglu")),
        norm_first=bool(args.get("norm_first", True)),
        dropout=float(args.get("dropout_rate") or 0.0),
        **_dual_arguments(args),
    )


def _run_lm(module: DualAttentionLM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    logits = module(inputs["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten())
    return {"logits": logits, "loss": loss.reshape(1)}


def patterns(batch: int, objects_OC: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Triples of random objects (B, 3, C), and which of ABC, AAB, ABA, ABB, AAA they are, (B,)."""
    shapes = torch.tensor([[0, 1, 2], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]])
    labels = torch.randint(5, (batch,), generator=generator)
    drawn = torch.rand(batch, len(objects_OC), generator=generator).argsort(-1)[:, :3]
    return objects_OC[drawn.gather(1, shapes[labels])], labels


class _Classifier(nn.Module):
    """Vectors -> one block -> mean -> five logits."""

    def __init__(self, width: int, dim: int, hidden: int, relational_heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.position = nn.Parameter(0.1 * torch.randn(3, dim))
        self.symbols = PositionalSymbols(dim, 3) if relational_heads else None
        options: dict[str, Any] = {"symmetric": True} if relational_heads else {}
        self.block = DualAttentionBlock(dim, 4, relational_heads=relational_heads, hidden=hidden, rope=False, **options)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 5))

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BNC = self.embed(x_BNC) + self.position
        x_BNC = self.block(x_BNC, None if self.symbols is None else self.symbols(x_BNC))
        return self.head(x_BNC.mean(1))


def _claim(lab: Lab) -> ClaimResult:
    """The pattern of a triple of objects never seen, by the number of examples, at equal parameters; three seeds."""
    # the standard model's hidden width makes up for the further parameters of relational heads
    models = {"transformer": (130, 0), "dual_attention": (128, 2)}
    sizes, seeds = lab.size((250, 500, 1000), (16,)), lab.size(3, 1)
    accuracies: dict[tuple[str, int], list[float]] = {(name, size): [] for size in sizes for name in models}
    measured: dict[str, float] = {}
    for seed in lab.progress(range(seeds), "seeds"):
        generator = torch.Generator().manual_seed(lab.seed * 1000 + seed)
        objects = 4 * F.normalize(torch.randn(96, 16, generator=generator), dim=-1)
        held_out, kind = patterns(lab.size(1000, 16), objects[64:], generator)
        for size in sizes:
            examples, labels = patterns(size, objects[:64], generator)
            for name, (hidden, relational_heads) in models.items():
                with lab.seeded():
                    torch.manual_seed(lab.seed * 1000 + seed)
                    model = _Classifier(16, 64, hidden, relational_heads)
                draw = torch.Generator().manual_seed(seed)

                def batches(
                    examples: Tensor = examples, labels: Tensor = labels, draw: torch.Generator = draw
                ) -> Iterator[tuple[Tensor, Tensor]]:
                    while True:
                        chosen = torch.randint(len(labels), (64,), generator=draw)
                        yield examples[chosen], labels[chosen]

                lab.train(model, batches(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), 400, lr=2e-3, description=name)
                with torch.no_grad():
                    right = model.eval()(held_out).argmax(-1) == kind
                accuracies[name, size].append(right.float().mean().item())
                measured[f"{name}_parameters"] = float(sum(p.numel() for p in model.parameters()))
    means = {key: sum(values) / len(values) for key, values in accuracies.items()}
    measured |= {f"{name}_unseen_accuracy_from_{size}_examples": mean for (name, size), mean in means.items()}
    ahead = [means["dual_attention", size] - means["transformer", size] for size in sizes]
    return ClaimResult(measured, holds=min(ahead) > 0.03)


register(
    "relational",
    kind="sequence",
    summary="Dual attention: sensory heads beside relational heads that send comparisons tagged by symbols.",
    supports=("causal", "bidirectional", "cross", "padding", "decoding", "grouped-heads"),
    taxonomy={
        "sequences": "self",
        "levels": "single",
        "positions": "soft",
        "representations": "multi-representational",
    },
    efficiency="dense",
    complexity="time O(N M (D + R P + H R)) a relational head, memory O(N + M), cache of a relational head 3 M D",
    invariants=(
        "no relational heads: multi-head attention, exactly",
        "W_r = 0 with positional symbols: attention whose values are symbols",
        "W_v = 0: the output depends on inner products only",
        "the streamed form equals the definition, forward and backward, for every kind of symbols",
        "relations are symmetric where asked for",
        "position-relative symbols as a table equal those of pairs, and commute with shifts",
        "grouped heads with repeated projections equal full heads",
        "decoding equals the parallel form, for every kind of symbols",
    ),
    build=DualAttention,
    example={"dim": 16, "num_heads": 4, "relational_heads": 2, "symbol_options": {"num_heads": 2, "num_symbols": 8}},
    ports=(
        AuthorsPort("relational_attention", build=_build_relational, convert=_convert, run=_run_relational),
        AuthorsPort("dual_attention", build=_build_dual, convert=_convert, run=_run_dual),
        AuthorsPort(
            "symbolic_attention",
            build=_build_retriever,
            convert=_convert,
            run=lambda module, inputs, args: {"symbols": module(inputs["x"])},
        ),
        AuthorsPort(
            "position_relative_symbols",
            build=_build_retriever,
            convert=_convert,
            run=lambda module, inputs, args: {"symbols": module.pairs(inputs["x"].shape[1])},
        ),
        AuthorsPort(
            "relational_symbolic_attention",
            build=_build_retriever,
            convert=_convert,
            run=lambda module, inputs, args: {"symbols": module(inputs["x"])},
        ),
        AuthorsPort("dat_lm", build=_build_lm, convert=_convert, run=_run_lm),
    ),
    claim=Claim(
        paper="on relational games a DAT reaches a given accuracy with a fraction of the samples of a Transformer of "
        "the same size; the largest gap is on 'match pattern'",
        expected="which pattern (ABC, AAB, ABA, ABB, AAA) three objects never seen form, from 250, 500 and 1000 "
        "examples: one block with two relational heads of four is ahead of four standard heads at equal parameters",
        run=_claim,
    ),
)
