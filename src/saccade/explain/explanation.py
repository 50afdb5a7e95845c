"""`saccade.explain`: maps of what a model looked at for one output, and whether to believe them.

Shape letters: B batch, N tokens, M parts (tokens of a text, patches of an image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade.explain.faithfulness import Faithfulness, agreement, faithfulness
from saccade.explain.linearised import TokenSum
from saccade.explain.methods import METHODS, chosen, heads
from saccade.explain.pairs import Pair
from saccade.explain.parts import Parts
from saccade.explain.prompts import Prompt
from saccade.explain.sanity import Sanity, sanity
from saccade.explain.subjects import Image, Segment, Subject, Target, Text
from saccade.extras import new_figure
from saccade.layers.watching import evaluating
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.explain.sparse_attention_decomposition import CausalCheck, Circuit

__all__ = ["METHODS", "Explanation", "explain", "subject"]


@dataclass
class Explanation:
    """What an input's parts had to do with an output.

    Attributes:
        labels: of the parts.
        segments: which of them belong together: the tokens of a text, the patches of an image.
        target: (row, column) of the logit; None where the embedding is explained.
        probability: of the target, or what `score_is` says.
        score_is: what faithfulness measures: the target's probability, an embedding's likeness to itself, or the
            likeness of image and text.
        maps: relevance (M,) by method.
        faithfulness: of each map, beside random ones; None where it was not asked for.
        sanity: what becomes of each map as the model's weights are randomised; None where it was not asked for.
        agreement: rank correlation of each two maps.
        heads: (layers, H, parts) a tower: the attention of what the output is read from to each part, head by head.
        remark: why there are no maps of attention, where there are none; else empty.
        sum: that of the map tensorlens, which adds up to the logit; None where there is no such map.
        circuit: the heads that speak for the target, and who wrote what they read; None where it was not asked for.
        causal: what becomes of the target when the circuit's edges are cut, beside random ones; None likewise, or
            where it has none.
    """

    labels: list[str]
    segments: list[Segment]
    target: tuple[int | None, int] | None
    probability: float
    score_is: str
    maps: dict[str, Tensor]
    faithfulness: Faithfulness | None
    sanity: Sanity | None
    agreement: Tensor
    heads: list[Tensor]
    remark: str = ""
    sum: TokenSum | None = None
    circuit: Circuit | None = None
    causal: CausalCheck | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the patches, where one image is all that there is; None else."""
        return self.segments[0].grid if len(self.segments) == 1 else None

    def believed(self) -> list[str]:
        """The maps that are better than random ones by most measures, the best first; none if nothing was measured.

        One that stays as it is when all weights are random is not among them.
        """
        found = [] if self.faithfulness is None else self.faithfulness.believed()
        return [name for name in found if self.depends_on_weights(name)]

    def depends_on_weights(self, name: str) -> bool:
        """Whether a map is another one when the model's weights are random; true if that was not asked of it.

        Args:
            name: of the map.
        """
        return self.sanity is None or name not in self.sanity.agreement or self.sanity.passed(name)

    def best(self) -> str | None:
        """The map that deserves belief most, None if none is better than chance, or it was not measured."""
        believed = self.believed()
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
        believed = set(self.believed())
        rows = [
            (name, *self._belief(name in believed), ", ".join(label for label, _ in self.top(name)))
            for name in self.maps
        ]
        head = ("map", *(() if self.faithfulness is None else ("believe it",)), "most relevant")
        held = (self.faithfulness, self.sanity, self.circuit, self.causal)
        more = [each.table() for each in held if each is not None]
        said = [] if self.sum is None else [f"tensorlens: {self.sum}"]
        return "\n".join([table(head, rows), *more, *said, *([self.remark] if self.remark else [])])

    def _belief(self, believed: bool) -> tuple[str, ...]:
        return () if self.faithfulness is None else ("yes" if believed else "no",)

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


def explain(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | Tensor | str,
    target: Target = None,
    *,
    tokenizer: Any = None,
    methods: Sequence[str] | None = None,
    faithful: bool = True,
    circuit: bool = False,
    random: int = 5,
    subsets: int = 64,
    stages: int = 3,
    seed: int = 0,
) -> Explanation:
    """What the parts of an input have to do with what a model says of it, by several methods, each measured.

    The model is as it was afterwards.

    Args:
        model: of transformers: a decoder or an encoder of text, a vision transformer, with or without a head; one that
            compares an image with texts, as CLIP; a decoder that reads images too, as LLaVA and Qwen2-VL. Or a part of
            the catalogue, or any network of such parts.
        inputs: of one example, by the names of the model's arguments; or a text, with `tokenizer`; of parts a tensor.
        target: the class, or the token, or (position, token), or the number of the text that is explained; None for
            what the model finds likeliest.
        tokenizer: makes tokens of a text, and names them.
        methods: of `METHODS`; where None all, without flow and occlusion of more than 64 parts.
        faithful: measure the maps, which takes some hundred calls of the model; without, they say nothing of belief.
        circuit: trace the circuit of a text's target, and cut it; see
            `saccade.explain.sparse_attention_decomposition`.
        random, subsets, seed: as of `faithfulness`.
        stages: in how many stages the weights are randomised, to see which maps change with them (not the slow maps);
            0 for not at all, as without `faithful`.

    Returns:
        maps, how faithful each is, and how far they agree.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if a method is unknown, or model, inputs and target do not fit.
    """
    if isinstance(inputs, str):
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: explain(model, text, tokenizer=...)")
        inputs = dict(tokenizer(inputs, return_tensors="pt"))
    with evaluating(model):
        seen = subject(model, inputs, target, tokenizer)
        run = seen.run()
        names = chosen(seen, methods)
        found = {name: METHODS[name](seen, run).detach().float().cpu() for name in names}
        measured = faithfulness(seen.score, found, random=random, subsets=subsets, seed=seed) if faithful else None
        checked = _sanity(seen, names, tokenizer, stages, seed) if faithful and stages else None
        traced, causal = _circuit(seen, tokenizer, seed) if circuit else (None, None)
        return Explanation(
            labels=seen.labels,
            segments=seen.segments,
            target=seen.target,
            probability=seen.whole,
            score_is=seen.score_is,
            maps=found,
            faithfulness=measured,
            sanity=checked,
            agreement=agreement(found),
            heads=heads(run),
            remark=seen.remark,
            sum=seen.attribution if "tensorlens" in found else None,
            circuit=traced,
            causal=causal,
        )


def _circuit(seen: Subject, tokenizer: Any, seed: int) -> tuple[Circuit, CausalCheck | None]:
    """
    Raises:
        ValueError: if no token of a text is explained.
    """
    from saccade.explain.sparse_attention_decomposition import causal_check, circuit

    row, token = seen.target or (None, -1)
    if not isinstance(seen, Text) or isinstance(seen, Prompt) or row is None:
        raise ValueError("a circuit is traced of a token that a language model says of a text")
    found = circuit(seen.model, seen.inputs, (row, token), tokenizer=tokenizer)
    return found, causal_check(seen.model, seen.inputs, found, seed=seed) if found.edges else None


def _sanity(seen: Subject, names: Sequence[str], tokenizer: Any, stages: int, seed: int) -> Sanity | None:
    """Of the maps that take no call for each part; None where there are none of these."""
    quick = [name for name in names if not METHODS[name].slow]

    def again() -> dict[str, Tensor]:
        # what is explained stays; an embedding's likeness is to the randomised model's own
        now = subject(seen.model, seen.given, seen.asked, tokenizer)
        run = now.run()
        return {name: METHODS[name](now, run).detach().float().cpu() for name in quick}

    return sanity(seen.model, again, stages=stages, seed=seed) if quick else None


def subject(
    model: nn.Module, inputs: Mapping[str, Tensor] | Tensor, target: Target = None, tokenizer: Any = None
) -> Subject:
    """The input of a model, cut into parts.

    Args:
        model: of transformers.
        inputs: of one example: `input_ids` or `pixel_values` or both, and what else the model takes. A model that
            compares an image with texts, as CLIP, takes one image and any number of texts. Of anything else that is
            made of the catalogue's parts, the tensor that it is called with; see `saccade.explain.parts.Parts`.
        target: see `Subject`.
        tokenizer: names the tokens of a text.

    Raises:
        ValueError: if it is not one example, or as `Subject` says.
    """
    if isinstance(inputs, Tensor):
        return Parts(model, inputs, target, tokenizer)
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model, it has no config: give it a tensor")
    text, image = (name in inputs for name in ("input_ids", "pixel_values"))
    if not text and not image:
        raise ValueError(f"inputs must hold input_ids or pixel_values, or both, got {', '.join(inputs) or 'none'}")
    if text and image and hasattr(model, "logit_scale"):
        return Pair(model, inputs, target, tokenizer)
    main = "input_ids" if text else "pixel_values"
    if len(inputs[main]) != 1:
        raise ValueError(f"inputs must be one example, got {len(inputs[main])}")
    if not text:
        return Image(model, inputs, target)
    return (Prompt if image else Text)(model, inputs, target, tokenizer)
