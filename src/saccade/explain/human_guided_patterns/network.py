"""The paper's small models, in whose heads patterns stand from the start, and its two tasks.

Shape letters: B batch, L tokens, C channels, H heads, S sentences of a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.human_guided_patterns.attention import PatternAttention, padding_bias
from saccade.explain.human_guided_patterns.patterns import POSITIONAL, Predicate, assigned, by_head
from saccade.layers.bert import BertEmbeddings
from saccade.layers.mlp import MLP
from saccade.layers.objective import Objective


class PatternBlock(nn.Module):
    """BERT's block around `PatternAttention`, (B, L, C) to the same.

    Args:
        dim: C.
        num_heads: H.
        hidden: inner width of the MLP, 4 C where None.
        drop: dropout of what each branch gives, and of the weights.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int | None = None, drop: float = 0.1) -> None:
        super().__init__()
        self.attention, self.out_proj = PatternAttention(dim, num_heads, drop), nn.Linear(dim, dim)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim, 1e-12), nn.LayerNorm(dim, 1e-12)
        self.mlp, self.drop = MLP(dim, hidden), nn.Dropout(drop)

    def forward(
        self,
        x_BLC: Tensor,
        pattern_BHLL: Tensor | None = None,
        *,
        fixed: Sequence[int] = (),
        bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x_BLC: tokens.
            pattern_BHLL, fixed, bias: of `pattern_attend`.

        Raises:
            ValueError: if the shapes do not fit.
        """
        attended = self.attention(x_BLC, pattern_BHLL, fixed=fixed, bias=bias).out
        x_BLC = self.attention_norm(x_BLC + self.drop(self.out_proj(attended)))
        return self.mlp_norm(x_BLC + self.drop(self.mlp(x_BLC)))


class PatternEncoder(nn.Module):
    """Word ids (B, L) -> states (B, L, C), with the same patterns in the heads of every block.

    Args:
        vocabulary: words.
        patterns: by name, in the order of the heads; None for a plain encoder.
        per_pattern: heads of each.
        fixed: names of those whose heads attend evenly and learn no queries and keys.
        dim: C.
        depth: blocks.
        num_heads: H.
        hidden: of the MLPs.
        positions: the longest text.
        drop: dropout.

    Raises:
        ValueError: if the patterns need more heads than there are.
    """

    def __init__(
        self,
        vocabulary: int,
        patterns: Mapping[str, Predicate] | None = None,
        *,
        per_pattern: int = 1,
        fixed: Sequence[str] = POSITIONAL,
        dim: int = 768,
        depth: int = 6,
        num_heads: int = 12,
        hidden: int | None = None,
        positions: int = 512,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.patterns = dict(patterns or {})
        self.heads = assigned(self.patterns, num_heads, per_pattern)
        self.fixed = [h for h, name in self.heads.items() if name in fixed]
        self.num_heads = num_heads
        self.embeddings = BertEmbeddings(vocabulary, dim, positions=positions, types=0, drop=drop)
        self.blocks = nn.ModuleList(PatternBlock(dim, num_heads, hidden, drop) for _ in range(depth))

    def forward(self, ids_BL: Tensor, real_BL: Tensor | None = None) -> Tensor:
        """
        Args:
            ids_BL: words.
            real_BL: bool, False is padding, which nobody attends to; all are real where None.

        Raises:
            ValueError: if the text is longer than there are positions.
        """
        x_BLC = self.embeddings(ids_BL)
        pattern_BHLL = by_head(ids_BL, self.patterns, self.heads, self.num_heads) if self.heads else None
        bias = None if real_BL is None else padding_bias(real_BL)
        if real_BL is not None and pattern_BHLL is not None:
            pattern_BHLL = pattern_BHLL | ~real_BL[:, None, None]  # the bias hides padding, and MASKED would not
        for block in self.blocks:
            x_BLC = block(x_BLC, pattern_BHLL, fixed=self.fixed, bias=bias)
        return x_BLC

    def extend(self, positions: int) -> None:
        """Longer texts: the table of positions goes on with its last row.

        Args:
            positions: the longest text.
        """
        table = self.embeddings.positions
        last = table.weight.data[-1:].expand(max(0, positions - table.num_embeddings), -1)
        self.embeddings.positions = nn.Embedding.from_pretrained(torch.cat([table.weight.data, last]), freeze=False)


class SentenceScorer(nn.Module):
    """Extractive summarisation: whether a sentence belongs into the summary, by the state of its first token.

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Logits of every token (B, L), of which those of start tokens count."""
        return self.linear(x_BLC)[..., 0]

    def loss(self, logits_BL: Tensor, starts_BL: Tensor, oracle_BL: Tensor) -> Objective:
        """Binary cross entropy, averaged over sentences.

        Args:
            logits_BL: of tokens.
            starts_BL: bool, the first tokens of sentences.
            oracle_BL: 1 at those that belong into the summary.
        """
        loss = F.binary_cross_entropy_with_logits(logits_BL[starts_BL], oracle_BL[starts_BL].to(logits_BL.dtype))
        return Objective(loss, {"sentences": loss})


class BoundaryClassifier(nn.Module):
    """Topic segmentation: whether a new topic begins at the separator, by the state of the class token.

    Args:
        dim: C.
        hidden: inner width.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(dim, hidden), nn.Linear(hidden, 1)
        for layer in (self.hidden, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Logits (B,)."""
        return self.out(self.hidden(x_BLC[:, 0]).relu())[..., 0]

    def loss(self, logits_B: Tensor, boundary_B: Tensor) -> Objective:
        """Binary cross entropy.

        Args:
            logits_B: of texts.
            boundary_B: 1 where a topic begins.
        """
        loss = F.binary_cross_entropy_with_logits(logits_B, boundary_B.to(logits_B.dtype))
        return Objective(loss, {"boundaries": loss})


def chosen(scores: Sequence[float], sentences: Sequence[Sequence[str]], count: int = 3, *, ngram: int = 3) -> list[int]:
    """The sentences of a summary: the best ones, without those that share three words in a row with one before.

    Args:
        scores: of the sentences.
        sentences: their words.
        count: how many at most.
        ngram: how many words in a row; 0 takes the best whatever they share.

    >>> chosen([0.9, 0.8, 0.1], ["a b c d".split(), "x b c d".split(), "e f".split()], 2)
    [0, 2]
    """
    kept: list[int] = []
    seen: set[tuple[str, ...]] = set()
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        words = sentences[i]
        runs = {tuple(words[j : j + ngram]) for j in range(len(words) - ngram + 1)} if ngram else set()
        if len(kept) < count and not runs & seen:
            kept.append(i)
            seen |= runs
    return sorted(kept)


def window_error(truth: Sequence[int], found: Sequence[int], window: int | None = None) -> float:
    """P_k: how often two places at a distance are wrongly said to be of one segment, or of two (Beeferman 1999).

    Args:
        truth, found: 1 where a sentence begins a new segment.
        window: k; half of the mean length of a true segment where None.

    Raises:
        ValueError: if they differ in length, or are not longer than k.

    >>> window_error([1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], 2)
    0.5
    """
    if window is None:
        window = max(1, round(len(truth) / max(1, sum(truth[1:]) + 1) / 2))
    if len(truth) != len(found) or len(truth) <= window:
        raise ValueError(
            f"truth and found must be equally long, and longer than {window}, got {len(truth)}, {len(found)}"
        )
    pairs = range(len(truth) - window)
    wrong = [any(truth[i + 1 : i + window + 1]) != any(found[i + 1 : i + window + 1]) for i in pairs]
    return sum(wrong) / len(wrong)
