"""What is explained: a model, one input of it, cut into parts, and the scalar that it says.

A `Text`'s parts are tokens; one that is taken away is hidden from everybody's attention. An `Image`'s parts are
patches; one that is taken away has the picture's mean colour. Of a model that classifies, the scalar is the target's
logit, and the score its probability; of a language model, those of a token at a position; of a model that embeds, the
likeness to the embedding of the whole input, both times.

Shape letters: B batch, N tokens, M parts, S sets of parts, C channels, V classes or tokens of the vocabulary, h and w a
grid of patches; H heads and D head dim of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.linearised import TokenSum, attribution, stacked
from saccade.explain.patches import after_the_first, cut, of_patches, places, with_patches
from saccade.explain.recording import Attends, AttentionRecord, recorded
from saccade.layers.wrapping import Changes, Report, changing, frozen

__all__ = ["Image", "Run", "Segment", "Subject", "Text", "Tower"]

#: what is said of a target: a class, or a token and, where it is not the last one, the position that says it
Target = int | tuple[int, int] | None


@dataclass(frozen=True)
class Segment:
    """Parts that belong together.

    Attributes:
        kind: "text", "image" or "map".
        parts: their numbers, from `start` to before `stop`.
        grid: rows and columns of an image's or a map's; None of a text.
    """

    kind: str
    start: int
    stop: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tower:
    """Layers that attend among the same tokens.

    Attributes:
        records: of their attention, in order.
        reads: (1, N), by what weights the scalar reads the output tokens.
        tokens: the numbers of the tokens that are parts, in the order of these.
    """

    records: Sequence[Attends]
    reads: Tensor
    tokens: Tensor

    def on_parts(self, relevance: Tensor) -> Tensor:
        """Relevance (..., N) of tokens as that of parts."""
        return relevance[..., self.tokens]


@dataclass(frozen=True)
class Run:
    """What one pass forward and one backward left.

    Attributes:
        towers: the towers' attention; their parts, one after another, are those of the subject.
        gradient: (M,), input times gradient of the scalar, summed over each part.
        gates: of feature maps, in order, what each was multiplied with.
    """

    towers: Sequence[Tower]
    gradient: Tensor
    gates: Sequence[Tensor] = ()


class Subject:
    """One input of a model.

    Args:
        model: of transformers, with one tower, in evaluation.
        inputs: of one example, by the names of the model's arguments.
        target: what is explained: a class; of a language model a token, or (position, token); None for what the model
            itself finds likeliest.

    Attributes:
        given: what it was made of, without padding.
        labels: of the parts.
        segments: which of them belong together.
        score_is: what `score` says, in words.
        whole: the score of all parts.
        gives: what its `run` has beside gradients of inputs: "attention", "gradients of attention", "gates",
            "one stack of blocks".
        remark: why it has no attention, where a run showed so; else empty.
        target: (row of the logits or None, column), or None where an embedding is explained.
        rows: the output tokens that the scalar is read from; None for the mean of all.

    Raises:
        ValueError: if the model says neither logits nor hidden states, or there is no such target.
    """

    given: Any
    labels: list[str]
    segments: list[Segment]
    gives: frozenset[str] = frozenset({"attention", "gradients of attention"})
    remark: str = ""
    score_is: str = "probability"
    whole: float
    main: str
    rows: int | None

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], target: Target = None) -> None:
        self.model, self.inputs, self.given = model, dict(inputs), inputs
        with torch.no_grad():
            said = model(**self.inputs)
        logits = getattr(said, "logits", None)
        self.target: tuple[int | None, int] | None = None
        self.embedding: Tensor | None = None
        self.rows = None if logits is None else self.read(logits, target)
        if logits is None:
            if target is not None:
                raise ValueError(f"{type(model).__name__} has no logits: its embedding is explained, without a target")
            self.embedding, self.score_is = self.embedded(said, None), "likeness to itself"
        self.whole = float(self.scored(said, None))

    @property
    def parts(self) -> int:
        """M."""
        return len(self.labels)

    @property
    def asked(self) -> Target:
        """The target, as one asks for it."""
        if self.target is None:
            return None
        row, column = self.target
        return column if row is None else (row, column)

    def read(self, logits: Tensor, target: Target) -> int | None:
        """Choose the target, and say from which output token it is read."""
        if logits.ndim == 3:
            row, column = target if isinstance(target, tuple) else (self.last(), target)
            if not -logits.shape[1] <= row < logits.shape[1]:
                raise ValueError(f"position must be below {logits.shape[1]}, got {row}")
            row %= logits.shape[1]
            self.target = (row, self._column(logits[0, row], column))
            return row
        if isinstance(target, tuple):
            raise ValueError(f"target must be a class of {logits.shape[-1]}, got {target}")
        self.target = (None, self._column(logits[0], target))
        return self.head()

    def last(self) -> int:
        """The position whose token is explained where none is given."""
        raise NotImplementedError

    def head(self) -> int | None:
        """The output token that a classifier reads; None for the mean of all."""
        return self.last() if getattr(self.model.config, "is_decoder", False) else 0

    def without(self, kept_SM: Tensor) -> dict[str, Tensor]:
        """The inputs with some parts alone, (S, ...)."""
        raise NotImplementedError

    def embedded(self, said: Any, kept_SM: Tensor | None) -> Tensor:
        """Hidden states averaged over the tokens that are there, (S, C)."""
        hidden = getattr(said, "last_hidden_state", None)
        if hidden is None:
            raise ValueError(f"{type(self.model).__name__} says neither logits nor hidden states")
        return hidden.mean(1)

    def scalar(self, said: Any) -> Tensor:
        """What is called backward: the target's logit, or the likeness to itself."""
        if self.target is None:
            assert self.embedding is not None
            return self.embedded(said, None)[0] @ F.normalize(self.embedding[0], dim=0)
        row, column = self.target
        return said.logits[0, column] if row is None else said.logits[0, row, column]

    @torch.no_grad()
    def score(self, kept_SM: Tensor) -> Tensor:
        """The target's probability, or the cosine to the whole input's embedding, with the kept parts alone, (S,)."""
        return self.scored(self.model(**self.without(kept_SM)), kept_SM)

    def scored(self, said: Any, kept_SM: Tensor | None) -> Tensor:
        """The score of what the model said with some parts, or with all where None, (S,)."""
        if self.target is None:
            assert self.embedding is not None
            return F.cosine_similarity(self.embedded(said, kept_SM), self.embedding)
        row, column = self.target
        logits = said.logits if row is None else said.logits[:, row]
        return logits.float().softmax(-1)[:, column]

    @cached_property
    def attribution(self) -> TokenSum:
        """The scalar as a sum over the tokens of the one stack of blocks."""
        return attribution(self.model, self.inputs, self.scalar)

    def run(self) -> Run:
        """One pass forward and one backward, without gradients in the model's parameters; recorded, where it can be."""
        if self.gives:
            try:
                with recorded(self.model) as recording:
                    gradient = self._backward()
                if stacked(self.model):
                    self.gives |= {"one stack of blocks"}
                return Run(self.towers(recording.layers), gradient)
            except ValueError as error:  # the model itself was called before, and said nothing
                self.gives, self.remark = frozenset(), str(error)
        return Run([], self._backward())

    def _backward(self) -> Tensor:
        """`Run.gradient`, of one call."""
        with changing(self.model, Report("explained")) as changes, torch.enable_grad():
            inputs, gradient = self.watched(changes)
            frozen(self.model, changes)
            self.scalar(self.model(**inputs)).backward()
            return gradient().detach()

    def watched(self, changes: Changes[Report]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        """Inputs whose gradients are kept; and what gives, after the backward pass, `Run.gradient`."""
        raise NotImplementedError

    def towers(self, records: Sequence[AttentionRecord]) -> list[Tower]:
        """What was recorded, tower by tower."""
        N = records[0].q_BHND.shape[2] if records else 0
        return [Tower(records, read_from(N, self.rows), self.tokens(N))]

    def tokens(self, count: int) -> Tensor:
        """Which of so many tokens are parts."""
        return torch.arange(count)

    def _column(self, logits_V: Tensor, column: int | None) -> int:
        if column is None:
            return int(logits_V.argmax())
        if not 0 <= column < len(logits_V):
            raise ValueError(f"target must be between 0 and {len(logits_V) - 1}, got {column}")
        return column


class Text(Subject):
    """Tokens of a text; see `Subject`.

    Args:
        tokenizer: names the tokens; numbers where None.
    """

    main = "input_ids"

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], target: Target = None, tokenizer: Any = None
    ) -> None:
        ids = inputs[self.main]
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        # padding is no part: what is left of it says the same
        inputs = {name: value[:, real[0]] if value.shape == ids.shape else value for name, value in inputs.items()}
        self.inputs = dict(inputs)
        tokens = self.inputs[self.main][0].tolist()
        self.labels = names_of(tokens, tokenizer)
        self.segments = [Segment("text", 0, len(tokens))]
        super().__init__(model, inputs, target)

    def last(self) -> int:
        mask = getattr(self.model.config, "mask_token_id", None)
        ids = self.inputs[self.main][0]
        return int((ids == mask).int().argmax()) if mask is not None and (ids == mask).any() else len(ids) - 1

    def without(self, kept_SM: Tensor) -> dict[str, Tensor]:
        kept_SM = kept_SM.clone()
        kept_SM[:, 0 if self.rows is None else self.rows] = True  # what the output is read from stays
        wide = {name: value.expand(len(kept_SM), *value.shape[1:]) for name, value in self.inputs.items()}
        return wide | {"attention_mask": kept_SM.to(self.inputs[self.main])}

    def watched(self, changes: Changes[Report]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        embedded = Embedded(changes, self.model)
        return self.inputs, embedded.gradient

    def embedded(self, said: Any, kept_SM: Tensor | None) -> Tensor:
        whole = super().embedded(said, kept_SM)
        if kept_SM is None:
            return whole
        share_SN1 = kept_SM.to(whole)[..., None]
        return (said.last_hidden_state * share_SN1).sum(1) / share_SN1.sum(1).clamp(min=1)


class Image(Subject):
    """Patches of an image; see `Subject`."""

    main = "pixel_values"

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], target: Target = None) -> None:
        self.patch, self.grid = cut(model, model.config, inputs[self.main])
        self.labels = places(self.grid)
        self.segments = [Segment("image", 0, len(self.labels), self.grid)]
        super().__init__(model, inputs, target)

    def last(self) -> int:
        raise ValueError("a model of images that says logits for each token is not explained: give it a classifier")

    def without(self, kept_SM: Tensor) -> dict[str, Tensor]:
        wide = {name: value.expand(len(kept_SM), *value.shape[1:]) for name, value in self.inputs.items()}
        return wide | {self.main: with_patches(self.inputs[self.main], kept_SM, self.patch, self.grid)}

    def watched(self, changes: Changes[Report]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        pixels = self.inputs[self.main].detach().clone().requires_grad_()

        def gradient() -> Tensor:
            assert pixels.grad is not None
            return of_patches(pixels.detach() * pixels.grad, self.patch, self.grid)

        return self.inputs | {self.main: pixels}, gradient

    def tokens(self, count: int) -> Tensor:
        """Without those before the patches: the class token and registers."""
        return after_the_first(count, self.parts)


def read_from(count: int, row: int | None) -> Tensor:
    """Weights (1, N) that read one of so many tokens, or the mean of all where None."""
    reads_1N = torch.full((1, count), 1 / max(count, 1))
    if row is not None:
        reads_1N.zero_()[0, row] = 1
    return reads_1N


def names_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The tokens of a text, by the tokenizer or by number."""
    return [str(i) for i in ids] if tokenizer is None else tokenizer.convert_ids_to_tokens(list(ids))


class Embedded:
    """What an embedding gave, held apart from its weights, and the gradient that reached it.

    Args:
        changes: of the model.
        model: as whose, by `get_input_embeddings`; modules that share its weights, as towers' do, count too.
    """

    def __init__(self, changes: Changes[Report], model: Any) -> None:
        self.held: list[Tensor] = []
        weight = model.get_input_embeddings().weight
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.weight is weight:
                changes.after(module, self._keep)

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        self.held.append(output.detach().requires_grad_())
        return self.held[-1]

    def gradient(self) -> Tensor:
        """x . dL/dx of each token, (N,)."""
        (embeds,) = self.held
        assert embeds.grad is not None
        return (embeds.detach() * embeds.grad).sum(-1)[0]
