"""What the relational heads read in place of values: symbols of tokens, of positions, of distances.

Shape letters: B batch, N tokens, M those before them as well, C channels, H heads, D head dim, W neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.ops.attend import attend


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
        dim: C.
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
        dim: C.
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
        s_i = SymbolicAttention(W flatten(c_i) + b),   flattened neighbour by neighbour

    Where `causal`, neighbours go away from the token: (i,) i-1, .., i-Delta; else they ascend: i-Delta, .., i+Delta.

    Args:
        dim: C.
        relation_heads: heads of the comparison.
        num_heads, num_symbols: of the symbolic attention.
        distance: Delta; beyond the ends of the sequence stands its first or last token.
        causal: left neighbours only.
        include_self: the token is its own neighbour, too.
        normalize: False leaves out softmax and scale.

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
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if relation_heads < 1 or dim % relation_heads or distance < 1:
            raise ValueError(
                f"relation_heads must divide dim ({dim}), distance be >= 1, got {relation_heads}, {distance}"
            )
        self.relation_heads, self.distance, self.causal = relation_heads, distance, causal
        self.normalize = normalize
        steps = range(0, -distance - 1, -1) if causal else range(-distance, distance + 1)
        self.steps = [step for step in steps if step or include_self]
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
        scores_BNWH = (query_BNHD[:, :, None] * key_BNWHD).sum(-1)
        if self.normalize:
            scores_BNWH = (scores_BNWH * query_BNHD.shape[-1] ** -0.5).softmax(2)
        return self.symbolic_attention(self.in_proj(scores_BNWH.flatten(2)))


RETRIEVERS: dict[str, type[nn.Module]] = {
    "symbolic": SymbolicAttention,
    "positional": PositionalSymbols,
    "relative": PositionRelativeSymbols,
    "relational": RelationalSymbolicAttention,
}
