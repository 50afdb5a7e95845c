"""The authors' translator around the attention: its state depends on no draw, so that each step has its own place.

Shape letters: B batch, T words of the target, S words of the source, V words that there are, E width of words, C of
what the decoder reads, D of the memory, H of the decoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.adapt.variational_attention.objective import VariationalAttention
from saccade.adapt.variational_attention.posterior import InferenceNetwork, read, real
from saccade.layers.objective import Objective


class State(NamedTuple):
    """What goes from word to word, a row for each sentence.

    Attributes:
        memory: (B, S, D).
        mask: of it, (B, S).
        hidden, cells: of each layer of the decoder, (B, H).
        fed: the soft context of the word before, (B, D).
    """

    memory: Tensor
    mask: Tensor | None
    hidden: tuple[Tensor, ...]
    cells: tuple[Tensor, ...]
    fed: Tensor


class Translator(nn.Module):
    """Words -> BiLSTM -> memory; an LSTM fed with the soft context of the word before -> queries -> the objective.

    Args:
        source_words, target_words: how many there are.
        objective: of `OBJECTIVES`.
        word_dim: E.
        memory_dim: D, half of it a direction.
        dim: H.
        layers: of encoder and decoder.
        posterior_dim, reader: of the inference network, which is there where the objective needs a posterior.
        attention_dim, samples, temperature, kl, baseline, train_baseline, score: see `VariationalAttention`.
        drop: dropout of embeddings, between layers and of what is said.
        start, end, pad: words of the target that open it, end it, and stand for none.
        spread: weights start uniform within it; torch's way where None.

    Raises:
        ValueError: if a number is out of range, or an option is unknown.
    """

    def __init__(
        self,
        source_words: int,
        target_words: int,
        objective: str = "sample",
        *,
        word_dim: int = 512,
        memory_dim: int = 1024,
        dim: int = 768,
        layers: int = 2,
        posterior_dim: int = 512,
        reader: str = "bigbrnn",
        attention_dim: int = 512,
        score: str = "mlp",
        samples: int = 1,
        temperature: float = 0.1,
        kl: float = 1.0,
        baseline: str = "soft",
        train_baseline: bool = False,
        drop: float = 0.3,
        start: int = 2,
        end: int = 3,
        pad: int = 1,
        spread: float | None = 0.1,
    ) -> None:
        super().__init__()
        if min(source_words, word_dim, layers) < 1 or memory_dim < 2 or memory_dim % 2:
            raise ValueError(
                "source_words, word_dim and layers must be positive, memory_dim even, got "
                f"{source_words}, {word_dim}, {layers} and {memory_dim}"
            )
        if not all(0 <= word < target_words for word in (start, end, pad)):
            raise ValueError(f"start, end and pad must be words below {target_words}, got {start}, {end} and {pad}")
        self.start_word, self.end_word, self.pad_word, self.drop = start, end, pad, nn.Dropout(drop)
        self.source_embed, self.target_embed = (
            nn.Embedding(source_words, word_dim),
            nn.Embedding(target_words, word_dim),
        )
        between = drop if layers > 1 else 0.0
        self.encoder = nn.LSTM(
            word_dim, memory_dim // 2, layers, batch_first=True, dropout=between, bidirectional=True
        )  # fmt: skip
        self.open = nn.Linear(memory_dim, 2 * layers * dim)
        self.decoder = nn.ModuleList(nn.LSTMCell(dim if i else word_dim + memory_dim, dim) for i in range(layers))
        self.attention = VariationalAttention(
            dim, memory_dim, target_words, objective, score=score, attention_dim=attention_dim, samples=samples,
            temperature=temperature, kl=kl, baseline=baseline, train_baseline=train_baseline, pad=pad, drop=drop,
        )  # fmt: skip
        asks = self.attention.needs_posterior
        self.posterior = InferenceNetwork(word_dim, posterior_dim, reader=reader) if asks else None
        if spread is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -spread, spread)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Objective:
        """The loss of translations, a sum over words divided by sentences.

        Args:
            source: words (B, S).
            target: words (B, T), the one that opens first and the one that ends last, then padding.
            lengths: (B,), how many of each row of the source are words; all where None.

        Raises:
            ValueError: if they do not fit together.
        """
        if source.ndim != 2 or target.ndim != 2 or len(source) != len(target) or target.shape[1] < 2:
            raise ValueError(
                "source and target must be (batch, words), the target with 2 words at least, got "
                f"{tuple(source.shape)} and {tuple(target.shape)}"
            )
        state, said = self.begin(source, lengths), target[:, 1:]
        words_BTE = self.drop(self.target_embed(target))
        queries = []
        for word_BE in words_BTE[:, :-1].unbind(1):
            h_BH, state = self._step(word_BE, state)
            queries.append(h_BH)
        posterior = None
        if self.posterior is not None:
            real_BT = said.ne(self.pad_word)
            posterior = self.posterior(
                self.drop(self.source_embed(source)), words_BTE[:, 1:], lengths, real_BT.sum(1).clamp(min=1)
            )
        return self.attention(torch.stack(queries, 1), state.memory, said, posterior, mask=state.mask)

    def begin(self, source: Tensor, lengths: Tensor | None = None) -> State:
        """The state before the first word; arguments as in the call."""
        mask = real(lengths, source)
        memory = read(self.encoder, self.drop(self.source_embed(source)), lengths)
        mean_BD = memory.mean(1) if lengths is None else memory.sum(1) / lengths[:, None].to(memory.dtype)
        parts = self.open(mean_BD).tanh().chunk(2 * len(self.decoder), 1)
        depth = len(self.decoder)
        return State(memory, mask, parts[:depth], parts[depth:], torch.zeros_like(mean_BD))

    def advance(self, words: Tensor, state: State, *, top: int | None = None) -> tuple[Tensor, State]:
        """log p (B, V) of the word after `words` (B,), and the state then; what a beam search takes.

        Args:
            words: the words before.
            state: of `begin`, or of the word before.
            top: see `VariationalAttention.predict`.
        """
        h_BH, state = self._step(self.drop(self.target_embed(words)), state)
        logs_BTV = self.attention.predict(h_BH[:, None], state.memory, mask=state.mask, top=top)
        return logs_BTV[:, 0], state

    @torch.no_grad()
    def translate(
        self, source: Tensor, lengths: Tensor | None = None, *, most: int = 100, top: int | None = None
    ) -> Tensor:
        """The likeliest word after the likeliest word, (B, T) with the one that ends and then padding.

        Args:
            source, lengths: as in the call.
            most: words at most.
            top: see `VariationalAttention.predict`.
        """
        state, words_B = self.begin(source, lengths), source.new_full((len(source),), self.start_word)
        ended_B, found = torch.zeros_like(words_B, dtype=torch.bool), []
        for _ in range(most):
            logs_BV, state = self.advance(words_B, state, top=top)
            words_B = torch.where(ended_B, self.pad_word, logs_BV.argmax(1))
            found.append(words_B)
            ended_B = ended_B | (words_B == self.end_word)
            if ended_B.all():
                break
        return torch.stack(found, 1)

    def _step(self, word_BE: Tensor, state: State) -> tuple[Tensor, State]:
        """The query (B, H) and the state; the context that is fed is the prior's mean, whatever the objective draws."""
        x_BC, hidden, cells = torch.cat([word_BE, state.fed], 1), [], []
        for i, (cell, h_BH, c_BH) in enumerate(zip(self.decoder, state.hidden, state.cells, strict=True)):
            h_BH, c_BH = cell(x_BC, (h_BH, c_BH))
            hidden.append(h_BH)
            cells.append(c_BH)
            x_BC = self.drop(h_BH) if i + 1 < len(self.decoder) else h_BH
        p_BTS = self.attention.prior(x_BC[:, None], state.memory, mask=state.mask)
        fed_BD = self.attention.context(state.memory, p_BTS)[:, 0]
        return x_BC, State(state.memory, state.mask, tuple(hidden), tuple(cells), fed_BD)


class Halving:
    """The authors' learning rate: Adam's, halved after an epoch that is no better than all before, from the third on.

    >>> halving = Halving(torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=3e-4, eps=1e-8))
    >>> [halving.step(loss) for loss in (3.0, 3.5, 2.0, 2.5)]
    [0.0003, 0.0003, 0.0003, 0.00015]

    Args:
        optimizer: whose rate it is.
        after: epochs in which nothing is halved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, after: int = 2) -> None:
        self.optimizer, self.after, self.epochs, self.best = optimizer, after, 0, float("inf")

    def step(self, loss: float) -> float:
        """Say how an epoch's validation went; returns the rate of the next."""
        self.epochs += 1
        if loss >= self.best and self.epochs > self.after:
            for group in self.optimizer.param_groups:
                group["lr"] /= 2
        self.best = min(self.best, loss)
        return float(self.optimizer.param_groups[0]["lr"])
