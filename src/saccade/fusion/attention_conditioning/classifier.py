"""The authors' classifier of texts around the pooling, and the table of what lexicons know of words.

Shape letters: B batch, L tokens, E width of embeddings, F features of a word, V words, K classes, D width of
a hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.fusion.attention_conditioning.pooling import ConditionedPooling


class Classified(NamedTuple):
    """What is said of texts.

    Attributes:
        logits: (B, K).
        features: r, what they are in one vector.
        weights: of tokens, (B, L).
    """

    logits: Tensor
    features: Tensor
    weights: Tensor


class ConditionedClassifier(nn.Module):
    """Embedding -> LSTM, forward -> `ConditionedPooling` -> linear.

    Args:
        vocabulary: V.
        num_classes: K.
        features: F.
        conditioning, attention_layers, attention_dropout: of the pooling.
        embedding_dim: E.
        hidden: width of the LSTM.
        layers: of the LSTM; 0 pools embeddings.
        dropout: between its layers.
        concat_embeddings: features stand beside embeddings too.
        concat_hidden: features stand beside hidden states, before the conditioning.
        noise, embedding_dropout: of embeddings, in training: standard deviation and rate.
        frozen: embeddings are not trained.

    Raises:
        ValueError: as the pooling.
    """

    def __init__(
        self,
        vocabulary: int,
        num_classes: int,
        features: int,
        conditioning: str | None = "gate",
        *,
        embedding_dim: int = 300,
        hidden: int = 500,
        layers: int = 1,
        dropout: float = 0.3,
        attention_layers: int = 1,
        attention_dropout: float = 0.1,
        concat_embeddings: bool = False,
        concat_hidden: bool = False,
        noise: float = 0.1,
        embedding_dropout: float = 0.2,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if min(vocabulary, num_classes, embedding_dim, hidden, layers + 1) < 1:
            raise ValueError(
                "vocabulary, num_classes, embedding_dim and hidden must be positive, layers not negative, got "
                f"{vocabulary}, {num_classes}, {embedding_dim}, {hidden} and {layers}"
            )
        self.concat_embeddings, self.concat_hidden, self.noise = concat_embeddings, concat_hidden, noise
        self.embed = nn.Embedding(vocabulary, embedding_dim)
        self.embed.weight.requires_grad_(not frozen)
        self.drop = nn.Dropout(embedding_dropout)
        width = embedding_dim + features * concat_embeddings
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, dropout=between) if layers else None
        dim = (hidden if layers else width) + features * concat_hidden
        self.pooling = ConditionedPooling(
            dim, features, conditioning, layers=attention_layers, dropout=attention_dropout
        )  # fmt: skip
        self.head = nn.Linear(dim, num_classes)

    def forward(self, ids_BL: Tensor, c_BLF: Tensor, lengths_B: Tensor | None = None) -> Classified:
        """
        Args:
            ids_BL: words.
            c_BLF: what is known of them.
            lengths_B: how many of each row are words; all where None.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if ids_BL.ndim != 2 or c_BLF.shape[:2] != ids_BL.shape:
            given = f"{tuple(ids_BL.shape)} and {tuple(c_BLF.shape)}"
            raise ValueError(f"words must be (batch, tokens), and features those of each, got {given}")
        x_BLE = self.embed(ids_BL)
        if self.training and self.noise > 0:
            x_BLE = x_BLE + self.noise * torch.randn_like(x_BLE)
        x_BLE = self.drop(x_BLE)
        if self.concat_embeddings:
            x_BLE = torch.cat([x_BLE, c_BLF], -1)
        h_BLD = x_BLE if self.lstm is None else self.lstm(x_BLE)[0]
        if self.concat_hidden:
            h_BLD = torch.cat([h_BLD, c_BLF], -1)
        real_BL = None
        if lengths_B is not None:
            real_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
        pooled = self.pooling(h_BLD, c_BLF, masks=(real_BL, None))
        return Classified(self.head(pooled.features), pooled.features, pooled.weights)


class FeatureTable(nn.Module):
    """What lexicons know of words, beside each other; ids (B, L) -> (B, L, F). Nothing is learned.

    Args:
        words: of the vocabulary, by their ids.
        *lexicons: of a word its numbers, as many in every row of a lexicon.

    Raises:
        ValueError: if there is no lexicon, or its rows have different lengths.
    """

    table_VF: Tensor

    def __init__(self, words: Sequence[str], *lexicons: Mapping[str, Sequence[float]]) -> None:
        super().__init__()
        if not lexicons or not all(lexicons):
            raise ValueError("lexicons must be some, and none of them empty")
        parts = []
        for number, lexicon in enumerate(lexicons):
            widths = {len(row) for row in lexicon.values()}
            if len(widths) > 1:
                raise ValueError(f"lexicon {number} must have rows of one length, got {sorted(widths)}")
            nothing = [0.0] * widths.pop()
            parts.append(torch.tensor([list(lexicon.get(word, nothing)) for word in words]))
        self.register_buffer("table_VF", torch.cat(parts, 1), persistent=False)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.table_VF[ids_BL]
