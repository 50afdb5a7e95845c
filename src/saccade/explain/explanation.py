"""`saccade.explain`: maps of what a model looked at for one output, and whether to believe them.

Shape letters: B batch, N tokens, M parts (tokens of a text, patches of an image).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.explain import maps
from saccade.explain.faithfulness import Faithfulness, agreement, faithfulness
from saccade.explain.recording import AttentionRecord, Recording, recorded
from saccade.explain.subjects import Image, Subject, Target, subject
from saccade.extras import new_figure
from saccade.layers.watching import evaluating
from saccade.layers.wrapping import Report, changing
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METHODS", "Explanation", "explain"]


@dataclass
class Explanation:
    """What an input's parts had to do with an output.

    Attributes:
        labels: of the parts.
        grid: rows and columns of an image's patches; None of a text.
        target: (row, column) of the logit; None where the embedding is explained.
        maps: relevance (M,) by method.
        faithfulness: of each map, beside random ones.
        agreement: rank correlation of each two maps.
        heads: (layers, H, M), the attention of what the output is read from to each part, head by head.
    """

    labels: list[str]
    grid: tuple[int, int] | None
    target: tuple[int | None, int] | None
    maps: dict[str, Tensor]
    faithfulness: Faithfulness
    agreement: Tensor
    heads: Tensor

    @property
    def probability(self) -> float:
        """Of the target; of an embedding 1, its likeness to itself."""
        return self.faithfulness.whole

    def best(self) -> str | None:
        """The map that deserves belief most, None if none is better than chance."""
        believed = self.faithfulness.believed()
        return believed[0] if believed else None

    def top(self, name: str, count: int = 5) -> list[tuple[str, float]]:
        """The most relevant parts of a map and their relevance.

        Args:
            name: of the map.
            count: how many.
        """
        relevance = self.maps[name]
        chosen = relevance.topk(min(count, len(relevance))).indices.tolist()
        return [(self.labels[i], float(relevance[i])) for i in chosen]

    def table(self) -> str:
        """Each map's top parts, and the measures of its faithfulness."""
        believed = set(self.faithfulness.believed())
        rows = [
            (name, "yes" if name in believed else "no", ", ".join(label for label, _ in self.top(name)))
            for name in self.maps
        ]
        return table(("map", "believe it", "most relevant"), rows) + "\n" + self.faithfulness.table()

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """The maps below each other: of a text a bar for each token, of an image its grid.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        count = len(self.maps)
        if self.grid is not None:
            figure = new_figure(2.4 * count, 2.6)
            axes = figure.subplots(1, count, squeeze=False)
            for axis, (name, relevance) in zip(axes[0], self.maps.items(), strict=True):
                axis.imshow(relevance.view(self.grid), cmap="magma")
                axis.set_title(name, fontsize=9)
                axis.set_axis_off()
            return figure
        width = max(6.0, 0.3 * len(self.labels))
        figure = new_figure(width, 1.2 * count + 1)
        axes = figure.subplots(count, 1, squeeze=False, sharex=True)
        for axis, (name, relevance) in zip(axes[:, 0], self.maps.items(), strict=True):
            axis.bar(range(len(relevance)), relevance)
            axis.set_ylabel(name, rotation=0, ha="right", fontsize=9)
        axes[-1, 0].set_xticks(range(len(self.labels)), self.labels, rotation=90)
        return figure


#: a map (M,) of a subject from its recording, after a backward pass; `x` holds the gradients of the inputs
Method = Callable[[Subject, Recording, Mapping[str, Tensor]], Tensor]


def _from_attention(function: Callable[..., Tensor]) -> Method:
    def method(subject: Subject, recording: Recording, x: Mapping[str, Tensor]) -> Tensor:
        return subject.on_parts(subject.of_rows(function(recording.layers)))

    return method


def _flow(subject: Subject, recording: Recording, x: Mapping[str, Tensor]) -> Tensor:
    return subject.on_parts(maps.flow(recording.layers, -1 if subject.rows is None else subject.rows)[0])


def _input_gradient(subject: Subject, recording: Recording, x: Mapping[str, Tensor]) -> Tensor:
    """|x . dL/dx|, of a token's embedding or of a patch's pixels."""
    return x["input x gradient"].abs()


def _occlusion(subject: Subject, recording: Recording, x: Mapping[str, Tensor]) -> Tensor:
    """f(all) - f(all but one)."""
    kept = ~torch.eye(subject.parts, dtype=torch.bool)
    whole = subject.score(torch.ones(1, subject.parts, dtype=torch.bool))
    return whole - torch.cat([subject.score(part) for part in kept.split(32)])


#: by name
METHODS: dict[str, Method] = {
    "raw": _from_attention(maps.raw),
    "rollout": _from_attention(maps.rollout),
    "flow": _flow,
    "gradient x attention": _from_attention(maps.gradient_attention),
    "input x gradient": _input_gradient,
    "occlusion": _occlusion,
}
#: those that take a model's call, or a maximum flow, for each part
_SLOW = ("flow", "occlusion")
#: with more parts than these the slow ones are left out, unless they are asked for
_FEW = 64


def explain(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | str,
    target: Target = None,
    *,
    tokenizer: Any = None,
    methods: Sequence[str] | None = None,
    random: int = 5,
    subsets: int = 64,
    seed: int = 0,
) -> Explanation:
    """What the parts of an input have to do with what a model says of it, by several methods, each measured.

    The model is as it was afterwards.

    Args:
        model: of transformers: a decoder or an encoder of text, or a vision transformer, with or without a head.
        inputs: of one example, by the names of the model's arguments; or a text, with `tokenizer`.
        target: the class, or the token, or (position, token) that is explained; None for what the model finds
            likeliest.
        tokenizer: makes tokens of a text, and names them.
        methods: of `METHODS`; where None all, without flow and occlusion of more than 64 parts.
        random, subsets, seed: as of `faithfulness`.

    Returns:
        maps, how faithful each is, and how far they agree.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if a method is unknown, or model, inputs and target do not fit.
    """
    if strange := set(methods or ()) - set(METHODS):
        raise ValueError(f"methods must be of {', '.join(METHODS)}, got {', '.join(sorted(strange))}")
    if isinstance(inputs, str):
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: explain(model, text, tokenizer=...)")
        inputs = dict(tokenizer(inputs, return_tensors="pt"))
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model: it has no config")
    with evaluating(model):
        seen = subject(model, inputs, target, tokenizer)
        chosen = methods or [name for name in METHODS if name not in _SLOW or seen.parts <= _FEW]
        recording, gradients = _run(seen)
        found = {name: METHODS[name](seen, recording, gradients).detach().float().cpu() for name in chosen}
        heads = torch.stack([_heads(seen, record) for record in recording.layers]).float().cpu()
        measured = faithfulness(seen.score, found, random=random, subsets=subsets, seed=seed)
    grid = seen.grid if isinstance(seen, Image) else None
    return Explanation(seen.labels, grid, seen.target, found, measured, agreement(found), heads)


def _heads(seen: Subject, record: AttentionRecord) -> Tensor:
    """A layer's attention from what is read to the parts, (H, M)."""
    weights = record.weights(rows=None if seen.rows is None else [seen.rows])[0].mean(1).detach()
    return torch.stack([seen.on_parts(weight) for weight in weights])


def _run(seen: Subject) -> tuple[Recording, dict[str, Tensor]]:
    """One pass forward and one backward, without gradients in the model's parameters."""
    model, held = seen.model, []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    inputs = dict(seen.inputs)
    with changing(model, Report("explained")) as changes:
        if isinstance(seen, Image):
            inputs[seen.main] = inputs[seen.main].detach().clone().requires_grad_()
        else:
            changes.after(model.get_input_embeddings(), keep)  # type: ignore[operator]
        for parameter in model.parameters():
            if parameter.requires_grad:
                changes.finally_(parameter.requires_grad_)
                parameter.requires_grad_(False)
        with torch.enable_grad(), recorded(model) as recording:
            seen.scalar(model(**inputs)).backward()
    if isinstance(seen, Image):
        pixels = inputs[seen.main]
        assert pixels.grad is not None
        of_pixels = (pixels.detach() * pixels.grad).sum(1, keepdim=True)
        height, width = (n * p for n, p in zip(seen.grid, seen.patch, strict=True))
        of_patch = nn.functional.avg_pool2d(of_pixels[..., :height, :width], seen.patch, divisor_override=1)
        return recording, {"input x gradient": of_patch.flatten()}
    (embeds,) = held
    assert embeds.grad is not None
    return recording, {"input x gradient": (embeds.detach() * embeds.grad).sum(-1)[0]}
