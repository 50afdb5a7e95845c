"""Tokens of a table, the block in which they ask the words, and the head behind it.

Shape letters: B batch, L words, F variables, M tokens of the table, N queries, C channels, H heads, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.layers.bert import BertBlock, CrossAttention
from saccade.layers.mlp import MLP
from saccade.ops.export import output

TOKENS, QUERIES = ("single", "per_variable", "chunks"), ("tabular", "text", "both")


@output
@dataclass
class Preference:
    """What is said of a review.

    Attributes:
        prediction: (B, O), the rating, or logits of the stars.
        features: (B, C), or (B, 2 C) where both sides ask: what the head reads.
    """

    prediction: Tensor
    features: Tensor


class TableTokens(nn.Module):
    """Standardised variables (B, F) to tokens (B, M, C). A value that is missing is NaN: it counts as 0, and is told.

        "single"        one token, an MLP of all variables
        "per_variable"  t_f = x_f w_f + b_f, and one more vector where x_f is missing
        "chunks"        an MLP of all variables, cut into M tokens

    Args:
        variables: F.
        dim: C.
        form: which.
        hidden: inner width of the MLP.
        chunks: M of "chunks".
        drop: dropout in the MLP.

    Raises:
        ValueError: if the form is not offered, or a number is not positive.
    """

    def __init__(
        self, variables: int, dim: int, form: str = "single", *, hidden: int = 64, chunks: int = 4, drop: float = 0.1
    ) -> None:
        super().__init__()
        if form not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {form!r}")
        if min(variables, dim, hidden, chunks) < 1:
            raise ValueError(
                f"variables, dim, hidden and chunks must be positive, got {variables}, {dim}, {hidden} and {chunks}"
            )
        self.variables, self.form = variables, form
        self.count = {"single": 1, "per_variable": variables, "chunks": chunks}[form]
        if form == "per_variable":
            self.weight, self.bias, self.missing = (nn.Parameter(torch.zeros(variables, dim)) for _ in range(3))
            nn.init.normal_(self.weight, std=dim**-0.5)
        else:
            self.mlp = nn.Sequential(
                nn.Linear(2 * variables, hidden), nn.ReLU(), nn.Dropout(drop), nn.Linear(hidden, self.count * dim)
            )

    def forward(self, table_BF: Tensor) -> Tensor:
        if table_BF.ndim != 2 or table_BF.shape[1] != self.variables:
            raise ValueError(f"table must be (batch, {self.variables}), got {tuple(table_BF.shape)}")
        missing_BF = table_BF.isnan()
        x_BF = table_BF.masked_fill(missing_BF, 0.0)
        told_BF = missing_BF.to(x_BF.dtype)
        if self.form == "per_variable":
            return x_BF[..., None] * self.weight + self.bias + told_BF[..., None] * self.missing
        return self.mlp(torch.cat([x_BF, told_BF], 1)).unflatten(1, (self.count, -1))


class SourceTargetBlock(nn.Module):
    """Y = LN(x + Z), Y = LN(Y + FFN(Y)), Z the attention of x to what is read.

    Args:
        dim: C.
        num_heads: H.
        hidden: inner width of the FFN, 4 C where None.
        drop: dropout of branches and weights.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int | None = None, *, drop: float = 0.1) -> None:
        super().__init__()
        self.attention = CrossAttention(dim, num_heads, dim, attn_drop=drop, qkv_bias=True, proj_bias=True)
        self.norm, self.mlp, self.mlp_norm = nn.LayerNorm(dim), MLP(dim, hidden), nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x_BNC: Tensor, read_BMC: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C); `mask` (B, M) is True for what may be read, and who may read nothing reads zeros."""
        x_BNC = self.norm(x_BNC + self.drop(self._read(x_BNC, read_BMC, mask)))
        return self.mlp_norm(x_BNC + self.drop(self.mlp(x_BNC)))

    def _read(self, x_BNC: Tensor, read_BMC: Tensor, mask: Tensor | None) -> Tensor:
        z_BNC = self.attention(x_BNC, read_BMC, mask=mask)
        if mask is None:
            return z_BNC
        return z_BNC * mask.any(1)[:, None, None]  # the output projection's bias too

    def weights(self, x_BNC: Tensor, read_BMC: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention's weights (B, H, N, M); arguments as for the call."""
        each_MM = torch.eye(read_BMC.shape[1], dtype=x_BNC.dtype, device=x_BNC.device)
        values_BHMM = each_MM.expand(len(x_BNC), self.attention.num_heads, -1, -1)
        return self.attention.mix(x_BNC, values_BHMM, context=read_BMC, mask=mask)


class ConsumerFusion(nn.Module):
    """Words (B, L, C) and variables (B, F) to a rating.

    Args:
        dim: C.
        variables: F.
        num_heads: H.
        hidden: inner width of the FFN, 4 C where None.
        depth: blocks, one after the other.
        tokens: of the table, see `TableTokens`.
        table_hidden: inner width of its MLP.
        chunks: M of "chunks".
        query: which side asks: "tabular", "text", or "both", whose means stand side by side.
        early_concat: the table's tokens stand behind the words in a self-attention first.
        outputs: O, 1 for a rating, 5 for logits of stars.
        head_hidden: inner width of the head.
        drop: dropout everywhere.
        force: allow "text" to ask a single token, where no word is weighed.

    Raises:
        ValueError: if a form is not offered, a number is out of range, or words ask a single token.
    """

    def __init__(
        self,
        dim: int = 768,
        variables: int = 16,
        *,
        num_heads: int = 12,
        hidden: int | None = None,
        depth: int = 1,
        tokens: str = "single",
        table_hidden: int = 64,
        chunks: int = 4,
        query: str = "tabular",
        early_concat: bool = False,
        outputs: int = 1,
        head_hidden: int = 64,
        drop: float = 0.1,
        force: bool = False,
    ) -> None:
        super().__init__()
        if query not in QUERIES:
            raise ValueError(f"query must be one of {', '.join(QUERIES)}, got {query!r}")
        if min(depth, outputs, head_hidden) < 1:
            raise ValueError(f"depth, outputs and head_hidden must be positive, got {depth}, {outputs}, {head_hidden}")
        self.dim, self.query = dim, query
        self.table = TableTokens(variables, dim, tokens, hidden=table_hidden, chunks=chunks, drop=drop)
        if query != "tabular" and self.table.count < 2 and not force:
            raise ValueError(
                f"query {query!r} needs at least two tokens of the table: with one, every weight is 1 and no word is "
                "weighed; give tokens='per_variable' or 'chunks', query='tabular', or force=True"
            )
        self.joint = BertBlock(dim, num_heads, hidden, drop=drop, attn_drop=drop) if early_concat else None
        asked = {"tabular": (True,), "text": (False,), "both": (True, False)}[query]
        self.by_table, self.by_text = (
            nn.ModuleList(SourceTargetBlock(dim, num_heads, hidden, drop=drop) for _ in range(depth * (side in asked)))
            for side in (True, False)
        )
        self.head = nn.Sequential(
            nn.Linear(dim * len(asked), head_hidden), nn.ReLU(), nn.Dropout(drop), nn.Linear(head_hidden, outputs)
        )

    def forward(self, text: Tensor, table: Tensor, *, mask: Tensor | None = None) -> Preference:
        """
        Args:
            text: (B, L, C), the last hidden states of a text encoder.
            table: (B, F), standardised; NaN where a value is missing.
            mask: bool (B, L), False is padding; a text without a word is missing.

        Raises:
            ValueError: if shapes do not fit.
        """
        text_BLC, tokens_BMC, mask = self._ready(text, table, mask)
        features = []
        if self.query != "text":
            y_BMC = tokens_BMC
            for block in self.by_table:
                y_BMC = block(y_BMC, text_BLC, mask)
            features.append(y_BMC.mean(1))
        if self.query != "tabular":
            y_BLC = text_BLC
            for block in self.by_text:
                y_BLC = block(y_BLC, tokens_BMC)
            features.append(masked_mean(y_BLC, mask))
        features_BC = torch.cat(features, 1)
        return Preference(self.head(features_BC), features_BC)

    def weights(self, text: Tensor, table: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """How much each word counts for each token of the table, (B, H, M, L), in the first block.

        Args:
            text, table, mask: as for the call.

        Raises:
            ValueError: if shapes do not fit, or the table does not ask.
        """
        if self.query == "text":
            raise ValueError("weights of words are there where the table asks: query 'tabular' or 'both'")
        text_BLC, tokens_BMC, mask = self._ready(text, table, mask)
        block = self.by_table[0]
        assert isinstance(block, SourceTargetBlock)
        return block.weights(tokens_BMC, text_BLC, mask)

    def _ready(self, text: Tensor, table: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Words, tokens of the table, and the words' mask."""
        check_text(text, self.dim, mask)
        if len(text) != len(table):
            raise ValueError(f"text and table must be of as many rows, got {len(text)} and {len(table)}")
        tokens_BMC = self.table(table)
        if self.joint is None:
            return text, tokens_BMC, mask
        L, M = text.shape[1], tokens_BMC.shape[1]
        seen = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), M)], 1)
        both = self.joint(torch.cat([text, tokens_BMC], 1), mask=seen)
        return both[:, :L], both[:, L:], mask


def masked_mean(x_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
    """(B, C), over what is not padding; zeros where all is.

    Args:
        x_BLC: words.
        mask_BL: bool, False is padding.
    """
    if mask_BL is None:
        return x_BLC.mean(1)
    return (x_BLC * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)


def check_text(text_BLC: Tensor, dim: int, mask_BL: Tensor | None) -> None:
    """
    Raises:
        ValueError: if it is no (B, L, C) with a word at least, or the mask is not of its words.
    """
    if text_BLC.ndim != 3 or text_BLC.shape[2] != dim or not text_BLC.shape[1]:
        raise ValueError(f"text must be (batch, at least one word, {dim}), got {tuple(text_BLC.shape)}")
    if mask_BL is not None and (mask_BL.dtype != torch.bool or mask_BL.shape != text_BLC.shape[:2]):
        raise ValueError(f"mask must be bool {tuple(text_BLC.shape[:2])}, got {tuple(mask_BL.shape)} {mask_BL.dtype}")
