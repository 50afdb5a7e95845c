"""Inference networks: scores of where attention should have looked, by networks that see the answer.

Shape letters: B batch, T steps of the target, S places of the memory, E width of embeddings, R width of what is
compared, D width of a place, H width of a query, A width of an answer, U inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

READERS = ("bigbrnn", "brnn", "rnn", "embedding")


class InferenceNetwork(nn.Module):
    """q(z_t | x, y): s = (W w_t) . u_s, of words that are read in both directions, the one to be said among them.

    Args:
        dim: E, of both sides' embeddings.
        hidden: width of the readers, of each direction with "bigbrnn", of both together with "brnn".
        reader: of `READERS`; "embedding" compares the embeddings themselves.

    Raises:
        ValueError: if a number is out of range, or there is no such reader.
    """

    def __init__(self, dim: int, hidden: int = 512, *, reader: str = "bigbrnn") -> None:
        super().__init__()
        if reader not in READERS:
            raise ValueError(f"reader must be one of {', '.join(READERS)}, got {reader!r}")
        if min(dim, hidden) < 1 or (reader == "brnn" and hidden % 2):
            raise ValueError(f"dim and hidden must be positive, hidden even for 'brnn', got {dim} and {hidden}")
        both, each = reader in ("brnn", "bigbrnn"), hidden // 2 if reader == "brnn" else hidden
        self.source, self.target = (
            None if reader == "embedding" else nn.LSTM(dim, each, batch_first=True, bidirectional=both)
            for _ in range(2)
        )
        width = dim if reader == "embedding" else each * (1 + both)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        source_BSE: Tensor,
        target_BTE: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores (B, T, S).

        Args:
            source_BSE, target_BTE: embeddings, gradients flow into them.
            source_lengths, target_lengths: (B,), how many of each row are words; all where None.
        """
        u_BSR, w_BTR = source_BSE, target_BTE
        if self.source is not None and self.target is not None:
            u_BSR, w_BTR = read(self.source, u_BSR, source_lengths), read(self.target, w_BTR, target_lengths)
        return self.proj(w_BTR) @ u_BSR.mT


class AnswerPosterior(nn.Module):
    """q(z | x, y) of one answer: s_i = u . tanh(U_1 (x_i * ReLU(V_1 h_y)) + U_2 (h * ReLU(V_2 h_y))).

    Args:
        dim: H, of the question.
        memory_dim: D, of an image's regions.
        answers: how many there are.
        answer_dim: A, of their embeddings.
        hidden: U.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, dim: int, memory_dim: int, answers: int, *, answer_dim: int = 300, hidden: int = 512) -> None:
        super().__init__()
        if min(dim, memory_dim, answers, answer_dim, hidden) < 1:
            raise ValueError("dim, memory_dim, answers, answer_dim and hidden must be positive")
        self.embed = nn.Embedding(answers, answer_dim)
        self.of_place, self.of_query = nn.Linear(answer_dim, memory_dim), nn.Linear(answer_dim, dim)
        self.memory_proj, self.query_proj = nn.Linear(memory_dim, hidden), nn.Linear(dim, hidden)
        self.energy = nn.Linear(hidden, 1)

    def forward(self, h_BTH: Tensor, x_BSD: Tensor, y_BT: Tensor) -> Tensor:
        """Scores (B, T, S) of questions, regions and answers."""
        y_BTA = self.embed(y_BT)
        x_BTSD = x_BSD[:, None] * F.relu(self.of_place(y_BTA))[:, :, None]
        query_BTU = self.query_proj(h_BTH * F.relu(self.of_query(y_BTA)))
        return self.energy((self.memory_proj(x_BTSD) + query_BTU[:, :, None]).tanh())[..., 0]


def read(reader: nn.LSTM, x_BSE: Tensor, lengths_B: Tensor | None) -> Tensor:
    """What an LSTM says of words, (B, S, R); backwards it begins with the last word, not with padding.

    Args:
        reader: batch first.
        x_BSE: embeddings.
        lengths_B: how many of each row are words; all where None.
    """
    if lengths_B is None:
        return reader(x_BSE)[0]
    packed = pack_padded_sequence(x_BSE, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(reader(packed)[0], batch_first=True, total_length=x_BSE.shape[1])[0]


def real(lengths_B: Tensor | None, x_BS: Tensor) -> Tensor | None:
    """The mask (B, S) of lengths; None where there are none."""
    return None if lengths_B is None else torch.arange(x_BS.shape[1], device=x_BS.device) < lengths_B[:, None]
