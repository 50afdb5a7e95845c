"""What is not of transformers: a part of the catalogue, or any network that is made of such parts.

A part that can apply its weights to given values (`mix`) has an effective attention, whatever its algorithm: dense,
sparse, linear, recurrent, windowed (`saccade.attention_map`). So every map that is made of attention is made of it: raw
is the last part's, rollout and flow those of all parts one after another. Where the weights are not shares they have a
sign, and rollout and flow take their size. Gradients of the weights follow where every part is a `QKVAttention`, which
tells the values that it sums, and sums nothing else; where not, `remark` says which and why. A gate on a feature map
shows itself.

Shape letters: B batch, N tokens or positions, M parts, S sets of parts, C channels, H heads or height, W width, V classes.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saccade.explain.effective import MixRecord, effective
from saccade.explain.patches import places
from saccade.explain.subjects import Run, Segment, Subject, Target, Tower, names_of, read_from
from saccade.layers.wrapping import Report, changing, frozen
from saccade.ops.maps import Gates, Mixes, attention_map

__all__ = ["MixRecord", "Parts"]


class Parts(Subject):
    """Tokens (1, N, C) or (1, N) of numbers, or positions of a map (1, C, H, W), of anybody's network.

    A token or position that is taken away has the mean of all; of numbers, their embeddings'.

    Args:
        model: gives a tensor, or something with `logits`.
        x: of one example; what the model is called with.
        target: of numbers as of a language model or a classifier; else, where the model gives a vector a token or
            position, the number of that whose vector is explained (None for the mean of all), and where it gives one
            vector alone, the class (None for the vector itself).
        tokenizer: names numbers.

    Attributes:
        x: the input.

    Raises:
        ValueError: if it is not one example of such, there is no such target, or nothing in the model can be looked at.
    """

    def __init__(self, model: nn.Module, x: Tensor, target: Target = None, tokenizer: Any = None) -> None:
        if len(x) != 1 or x.ndim not in ((3, 4) if x.is_floating_point() else (2,)):
            raise ValueError(
                f"x must be one example, (1, N, C), (1, C, H, W), or (1, N) of numbers, got {tuple(x.shape)}"
            )
        self.model, self.x, self.given = model, x, x
        self.numbers = not x.is_floating_point()
        if x.ndim == 4:
            grid = x.shape[2], x.shape[3]
            self.labels, self.segments = places(grid), [Segment("map", 0, grid[0] * grid[1], grid)]
        else:
            self.labels = names_of(x[0].tolist() if self.numbers else range(x.shape[1]), tokenizer)
            self.segments = [Segment("text", 0, x.shape[1])]
        # a gate is of a map; what recurrent layers call so is a projection
        self.mixers, self.gates = outermost(model, Mixes), outermost(model, Gates) if x.ndim == 4 else {}
        self.gives = frozenset({"attention"} if self.mixers else {"gates"} if self.gates else ())
        if not self.gives:
            raise ValueError(
                f"{type(model).__name__} has no part with mix(x, values) or gate(x) that could be looked at"
            )
        self.target = self.embedding = self.rows = None
        with torch.no_grad():
            out = as_rows(model(x))
        if self.numbers or (out.ndim == 2 and target is not None):
            self.rows = self.read(out, target)
        else:
            if isinstance(target, tuple) or (target is not None and not 0 <= target < out.shape[1]):
                raise ValueError(f"target must be an output below {out.shape[1]}, got {target}")
            self.rows = target
            self.embedding, self.score_is = self.embedded(out, None), "likeness to itself"
        self.whole = float(self.scored(out, None))

    @property
    def asked(self) -> Target:
        return self.rows if self.target is None else super().asked

    def last(self) -> int:
        return self.x.shape[1] - 1

    def head(self) -> int | None:
        return None

    def embedded(self, said: Any, kept_SM: Tensor | None) -> Tensor:
        out = as_rows(said)
        if out.ndim == 2:
            return out
        return out.mean(1) if self.rows is None else out[:, self.rows]

    def scalar(self, said: Any) -> Tensor:
        if self.target is None:
            return super().scalar(said)
        row, column = self.target
        return as_rows(said)[0, column] if row is None else as_rows(said)[0, row, column]

    @torch.no_grad()
    def score(self, kept_SM: Tensor) -> Tensor:
        with self._changed(lambda whole: with_tokens(whole, kept_SM)):
            x = self.x.expand(len(kept_SM), *self.x.shape[1:]) if self.numbers else with_tokens(self.x, kept_SM)
            return self.scored(self.model(x), kept_SM)

    def scored(self, said: Any, kept_SM: Tensor | None) -> Tensor:
        if self.target is None:
            return super().scored(said, kept_SM)
        row, column = self.target
        logits = as_rows(said)
        return (logits if row is None else logits[:, row]).float().softmax(-1)[:, column]

    @contextmanager
    def _changed(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Of numbers, what the embedding gives is changed."""
        with changing(self.model, Report("explained")) as changes:
            if self.numbers:
                embedding = next((each for each in self.model.modules() if isinstance(each, nn.Embedding)), None)
                if embedding is None:
                    raise ValueError(f"{type(self.model).__name__} takes numbers, and has no embedding of them")
                changes.after(embedding, lambda module, args, kwargs, out: change(out))
            yield

    def run(self) -> Run:
        held: list[Tensor] = []
        gates: list[Tensor] = []

        def leaf(whole: Tensor) -> Tensor:
            held.append(whole.detach().clone().requires_grad_())
            return held[-1]

        def passed(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            gates.append(attention_map(module, *args, **kwargs))

        with changing(self.model, Report("explained")) as changes, self._changed(leaf):
            for gate in () if self.mixers else self.gates.values():
                changes.after(gate, passed)
            frozen(self.model, changes)
            with torch.enable_grad(), effective(self.model, self.mixers) as records:
                self.scalar(self.model(self.x if self.numbers else leaf(self.x))).backward()
        (whole,) = held
        if whole.grad is None:
            raise ValueError(f"what {type(self.model).__name__} says has no gradient by its input")
        product = (whole.detach() * whole.grad)[0]
        gradient = product.sum(0).flatten() if self.x.ndim == 4 else product.sum(-1)
        towers = self._tower(records) if self.mixers else []
        self._weights_gradients(towers)
        return Run(towers, gradient, gates)

    def _weights_gradients(self, towers: Sequence[Tower]) -> None:
        """Whether they can be had, of all parts, is seen on one row of each."""
        try:
            for tower in towers:
                for record in tower.records:
                    record.gradients(heads=[0], rows=[0])
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            self.gives -= {"gradients of attention"}
            self.remark = f"no gradients of attention: {' '.join(str(error).split())}"
        else:
            self.gives |= {"gradients of attention"} if towers else set()

    def _tower(self, records: Sequence[MixRecord]) -> list[Tower]:
        """The parts that attend among the input's tokens; others, as of coarser maps, are left out.

        Raises:
            ValueError: if there are none.
        """
        fit = [record for record in records if record.shape[2:] == (self.parts, self.parts)]
        if not fit:
            raise ValueError(f"no part of {type(self.model).__name__} attends among the {self.parts} of its input")
        return [Tower(fit, read_from(self.parts, self.rows), torch.arange(self.parts))]


def outermost(model: nn.Module, form: Any) -> dict[str, Any]:
    """The modules of a form that are in no other of it, by their paths."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, form) and not any(name.startswith(f"{each}.") or not each for each in found):
            found[name] = module
    return {name or type(model).__name__: module for name, module in found.items()}


def as_rows(said: Any) -> Tensor:
    """What a network says, as (B, V), or (B, N, C) of its tokens or positions.

    Raises:
        ValueError: if it is no tensor of these.
    """
    out = getattr(said, "logits", said)
    out = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(out, Tensor) or out.ndim not in (2, 3, 4):
        raise ValueError(f"the model must give a tensor (B, V), (B, N, C) or (B, C, H, W), got {type(out).__name__}")
    return out.flatten(2).mT if out.ndim == 4 else out


def with_tokens(x: Tensor, kept_SM: Tensor) -> Tensor:
    """Some of the tokens (1, N, C) or positions (1, C, H, W) alone, the mean of all in the others' place."""
    axes = (1,) if x.ndim == 3 else (2, 3)
    mean = x.mean(axes, keepdim=True)
    kept = kept_SM[..., None] if x.ndim == 3 else kept_SM.view(-1, 1, *x.shape[2:])
    return mean + (x - mean) * kept.to(x)
