"""The classifier and its explanations.

Shape letters: B batch, T positions, D width of embeddings, K heads, A width of queries and keys, V width of values, C
classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.extras import new_figure
from saccade.layers.positions import sinusoids
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Explained:
    """What is said of documents, and why, by four kinds of explanation.

    Attributes:
        logits: (B, C).
        attention: alpha of the class token, (B, K, T).
        embedded: e, with positions, (B, T, D).
        gradient: of the target's logit by e, in closed form, (B, T, D).
    """

    logits: Tensor
    attention: Tensor
    embedded: Tensor
    gradient: Tensor

    def maps(self) -> dict[str, Tensor]:
        """By method a number for each position, (B, T)."""
        return {
            "attention mean": self.attention.mean(1),
            "attention max": self.attention.amax(1),
            "gradient mean": self.gradient.mean(-1),
            "gradient l1": self.gradient.abs().sum(-1),
            "gradient l2": self.gradient.norm(dim=-1),
            "gradient x input": (self.gradient * self.embedded).sum(-1),
        }

    def table(self, row: int = 0, count: int = 5) -> str:
        """The positions that each method finds most relevant.

        Args:
            row: of the batch.
            count: how many positions.
        """
        lines = []
        for name, relevance in self.maps().items():
            top = relevance[row].abs().topk(min(count, relevance.shape[1])).indices.tolist()
            lines.append((name, ", ".join(f"{i} ({float(relevance[row, i]):.3g})" for i in top)))
        return table(("method", "most relevant positions"), lines)

    def plot(self, row: int = 0) -> Figure:
        """A panel a method, a bar a position.

        Args:
            row: of the batch.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        maps = self.maps()
        figure = new_figure(8, 1.1 * len(maps) + 0.6)
        for axis, (name, relevance) in zip(figure.subplots(len(maps), 1, sharex=True), maps.items(), strict=True):
            axis.bar(range(relevance.shape[1]), relevance[row].detach())
            axis.set_ylabel(name, rotation=0, ha="right", fontsize=8)
        return figure


class AttentionClassifier(nn.Module):
    """One layer of attention that a class token pays to a document, in K heads with a classifier each.

    Args:
        vocabulary: number of words.
        dim: D.
        head_dim: A.
        value_dim: V.
        num_heads: K.
        num_classes: C.
        max_length: the most positions.
        class_position: where the class token stands.
        scaled: scores are divided by sqrt(A).
        positional: sinusoids are added to embeddings.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int = 128,
        *,
        head_dim: int = 64,
        value_dim: int = 64,
        num_heads: int = 6,
        num_classes: int = 2,
        max_length: int = 256,
        class_position: int = 0,
        scaled: bool = True,
        positional: bool = True,
    ) -> None:
        super().__init__()
        sizes = (vocabulary, dim, head_dim, value_dim, num_heads, num_classes, max_length)
        if min(sizes) < 1 or not 0 <= class_position < max_length:
            raise ValueError(f"sizes must be positive and the class token within max_length, got {sizes}")
        self.num_heads, self.class_position = num_heads, class_position
        self.scale = head_dim**-0.5 if scaled else 1.0
        self.embed = nn.Embedding(vocabulary, dim)
        self.q_proj, self.k_proj = (nn.Linear(dim, num_heads * head_dim, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(dim, num_heads * value_dim, bias=False)
        self.classifier = nn.Parameter(torch.empty(num_heads, num_classes, value_dim))
        for weight in (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.classifier):
            nn.init.uniform_(weight, -0.1, 0.1)
        self.max_length, self.positional = max_length, positional

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """e, with positions, (B, T, D).

        Raises:
            ValueError: if there are more positions than the table has, or the class token's is missing.
        """
        if ids_BT.ndim != 2 or not self.class_position < ids_BT.shape[1] <= self.max_length:
            least, most = self.class_position + 1, self.max_length
            raise ValueError(f"documents must be (batch, {least} to {most} positions), got {tuple(ids_BT.shape)}")
        e_BTD = self.embed(ids_BT)
        if not self.positional:
            return e_BTD
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return e_BTD + sinusoids(positions_T, e_BTD.shape[2]).to(e_BTD.dtype)

    def attend(self, e_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, K, A), weights (B, K, T) and values (B, K, T, V)."""
        q_BKA, k_BKTA, v_BKTV = self._projected(e_BTD)
        return q_BKA, self._weights(q_BKA, k_BKTA), v_BKTV

    def logits(self, e_BTD: Tensor) -> Tensor:
        """f (B, C) of embeddings."""
        _, alpha_BKT, v_BKTV = self.attend(e_BTD)
        return self._classified((alpha_BKT[:, :, None] @ v_BKTV)[:, :, 0])

    def forward(self, ids_BT: Tensor, target: int = 1, *, query_term: bool = True) -> Explained:
        """Logits with all explanations of one class.

        Args:
            ids_BT: documents, the class token in its place.
            target: the class.
            query_term: with what the class token's embedding does through the query.

        Raises:
            ValueError: if documents or class do not fit.
        """
        if not 0 <= target < self.classifier.shape[1]:
            raise ValueError(f"target must be below {self.classifier.shape[1]}, got {target}")
        e_BTD = self.embedded(ids_BT)
        q_BKA, k_BKTA, v_BKTV = self._projected(e_BTD)
        alpha_BKT = self._weights(q_BKA, k_BKTA)
        logits = self._classified((alpha_BKT[:, :, None] @ v_BKTV)[:, :, 0])
        w_KV = self.classifier[:, target]
        worth_BKT = (v_BKTV @ w_KV[:, :, None])[..., 0]
        pull_BKT = self.scale * alpha_BKT * (worth_BKT - (alpha_BKT * worth_BKT).sum(-1, keepdim=True))
        w_q, w_k, w_v = (
            proj.weight.unflatten(0, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        of_values_KD = (w_KV[:, None] @ w_v)[:, 0]
        of_keys_BKD = (q_BKA[:, :, None] @ w_k)[:, :, 0]
        grad_BTD = alpha_BKT.mT @ of_values_KD + pull_BKT.mT @ of_keys_BKD
        if query_term:
            pulled_BKA = (pull_BKT[:, :, None] @ k_BKTA)[:, :, 0]
            through_BD = torch.einsum("bka,kad->bd", pulled_BKA, w_q)
            at_T = torch.arange(e_BTD.shape[1], device=e_BTD.device) == self.class_position
            grad_BTD = grad_BTD + at_T[:, None] * through_BD[:, None]
        return Explained(logits, alpha_BKT, e_BTD, grad_BTD / self.num_heads)

    def lime_limit(self, ids_BT: Tensor, unknown: int, target: int = 1, *, factor: float = 1.5) -> Tensor:
        """What LIME's coefficient of a word sums up over the word's positions, (B, T).

        Args:
            ids_BT: documents.
            unknown: the id that stands for removed words.
            target: the class.
            factor: 3/2 as in the paper; 1 is right where attention is uniform.
        """
        removed = torch.full_like(ids_BT, unknown)
        removed[:, self.class_position] = ids_BT[:, self.class_position]
        w_KV = self.classifier[:, target]

        def worth(ids: Tensor) -> Tensor:
            _, alpha_BKT, v_BKTV = self.attend(self.embedded(ids))
            return (alpha_BKT * (v_BKTV @ w_KV[:, :, None])[..., 0]).mean(1)

        return factor * (worth(ids_BT) - worth(removed))

    def _projected(self, e_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The class token's query (B, K, A), keys (B, K, T, A) and values (B, K, T, V)."""
        q_BKA = self.q_proj(e_BTD[:, self.class_position]).unflatten(-1, (self.num_heads, -1))
        k_BKTA, v_BKTV = (
            proj(e_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for proj in (self.k_proj, self.v_proj)
        )
        return q_BKA, k_BKTA, v_BKTV

    def _weights(self, q_BKA: Tensor, k_BKTA: Tensor) -> Tensor:
        """alpha, (B, K, T)."""
        return ((k_BKTA @ q_BKA[..., None])[..., 0] * self.scale).softmax(-1)

    def _classified(self, f_BKV: Tensor) -> Tensor:
        return torch.einsum("bkv,kcv->bc", f_BKV, self.classifier) / self.num_heads
