"""What is explained: a model, one input of it, cut into parts, and the scalar that it says.

A `Text`'s parts are tokens; one that is taken away is hidden from everybody's attention. An `Image`'s parts are
patches; one that is taken away has the picture's mean colour. Of a model that classifies, the scalar is the target's
logit, and the score its probability; of a language model, those of a token at a position; of a model that embeds, the
likeness to the embedding of the whole input, both times.

Shape letters: B batch, N tokens, M parts, S sets of parts, C channels, V classes or tokens of the vocabulary, h and w a
grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Image", "Subject", "Text", "subject"]

#: what is said of a target: a class, or a token and, where it is not the last one, the position that says it
Target = int | tuple[int, int] | None


class Subject:
    """One input of a model.

    Args:
        model: of transformers, with one tower, in evaluation.
        inputs: of one example, by the names of the model's arguments.
        target: what is explained: a class; of a language model a token, or (position, token); None for what the model
            itself finds likeliest.

    Attributes:
        labels: of the parts.
        target: (row of the logits or None, column), or None where an embedding is explained.
        rows: the output tokens that the scalar is read from; None for the mean of all.

    Raises:
        ValueError: if the model says neither logits nor hidden states, or there is no such target.
    """

    labels: list[str]
    main: str
    rows: int | None

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], target: Target = None) -> None:
        self.model, self.inputs = model, dict(inputs)
        with torch.no_grad():
            said = model(**self.inputs)
        logits = getattr(said, "logits", None)
        self.target: tuple[int | None, int] | None = None
        self.embedding: Tensor | None = None
        self.rows = None if logits is None else self.read(logits, target)
        if logits is None:
            if target is not None:
                raise ValueError(f"{type(model).__name__} has no logits: its embedding is explained, without a target")
            self.embedding = self.embedded(said, None)

    @property
    def parts(self) -> int:
        """M."""
        return len(self.labels)

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
        said = self.model(**self.without(kept_SM))
        if self.target is None:
            assert self.embedding is not None
            return F.cosine_similarity(self.embedded(said, kept_SM), self.embedding)
        row, column = self.target
        logits = said.logits if row is None else said.logits[:, row]
        return logits.float().softmax(-1)[:, column]

    def of_rows(self, relevance_BNM: Tensor) -> Tensor:
        """A map's relevance to what the scalar is read from, (M,) of all tokens."""
        return relevance_BNM[0].mean(0) if self.rows is None else relevance_BNM[0, self.rows]

    def on_parts(self, relevance_N: Tensor) -> Tensor:
        """Relevance of tokens as that of parts (M,)."""
        return relevance_N

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
        inputs = {name: value[:, real[0]] if value.shape[:2] == ids.shape else value for name, value in inputs.items()}
        self.inputs = dict(inputs)
        tokens = self.inputs[self.main][0].tolist()
        self.labels = [str(i) for i in tokens] if tokenizer is None else tokenizer.convert_ids_to_tokens(tokens)
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
        patch = getattr(model.config, "patch_size", None)
        if patch is None:
            raise ValueError(f"{type(model).__name__} has no patch_size: its image cannot be cut into its tokens")
        self.patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        height, width = inputs[self.main].shape[-2:]
        self.grid = height // self.patch[0], width // self.patch[1]
        self.labels = [f"{row}, {column}" for row in range(self.grid[0]) for column in range(self.grid[1])]
        super().__init__(model, inputs, target)

    def last(self) -> int:
        raise ValueError("a model of images that says logits for each token is not explained: give it a classifier")

    def without(self, kept_SM: Tensor) -> dict[str, Tensor]:
        image = self.inputs[self.main]
        shown_S1hw = kept_SM.view(-1, 1, *self.grid).to(image)
        shown = shown_S1hw.repeat_interleave(self.patch[0], 2).repeat_interleave(self.patch[1], 3)
        shown = F.pad(shown, (0, image.shape[3] - shown.shape[3], 0, image.shape[2] - shown.shape[2]), value=1.0)
        mean = image.mean((2, 3), keepdim=True)
        wide = {name: value.expand(len(kept_SM), *value.shape[1:]) for name, value in self.inputs.items()}
        return wide | {self.main: mean + (image - mean) * shown}

    def on_parts(self, relevance_N: Tensor) -> Tensor:
        """Without the tokens before the patches: the class token and registers."""
        if len(relevance_N) < self.parts:
            raise ValueError(f"there are {self.parts} patches and {len(relevance_N)} tokens: they do not correspond")
        return relevance_N[len(relevance_N) - self.parts :]


def subject(model: nn.Module, inputs: Mapping[str, Tensor], target: Target = None, tokenizer: Any = None) -> Subject:
    """The input of a model, cut into parts.

    Args:
        model: of transformers.
        inputs: of one example: `input_ids` or `pixel_values`, and what else the model takes.
        target: see `Subject`.
        tokenizer: names the tokens of a text.

    Raises:
        ValueError: if it is not one example of one of both, or as `Subject` says.
    """
    given = [name for name in ("input_ids", "pixel_values") if name in inputs]
    if len(given) != 1:
        raise ValueError(f"inputs must hold input_ids or pixel_values, one of both, got {', '.join(inputs) or 'none'}")
    if len(inputs[given[0]]) != 1:
        raise ValueError(f"inputs must be one example, got {len(inputs[given[0]])}")
    if given == ["input_ids"]:
        return Text(model, inputs, target, tokenizer)
    return Image(model, inputs, target)
