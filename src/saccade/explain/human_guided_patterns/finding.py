"""Which heads attend as a pattern says, and which heads matter.

    GR(h, P) = mean over texts of 1/|x| sum_ij A_ij P_ij             the share of a head's attention on the pattern
    I(h) = mean over texts of |sum_ij A_ij dLoss/dA_ij|,  divided by its norm in each layer

Shape letters: B batch, L tokens, H heads, P patterns; of a record N tokens, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.explain.human_guided_patterns.patterns import Predicate, matching, neighbours
from saccade.explain.recording import recorded
from saccade.extras import new_figure
from saccade.layers.watching import evaluating
from saccade.layers.wrapping import Report, changing
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: (what the model said, the batch) -> a loss for each text, (B,)
Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]


@dataclass
class Relevance:
    """How much of each head's attention lies on each pattern.

    Attributes:
        relevance: GR, (layers, H, P).
        density: the share of real pairs that each pattern is about, (P,): GR of even attention, nearly.
        names: of the patterns.
        importance: I, (layers, H); None where no loss was given.
    """

    relevance: Tensor
    density: Tensor
    names: tuple[str, ...]
    importance: Tensor | None = None

    def kept(self, threshold: float | None = None, *, alone: bool = False) -> dict[str, list[tuple[int, int]]]:
        """Of each pattern the (layer, head) that are clearly above the others, the most relevant first.

        A pattern without any is not kept.

        Args:
            threshold: of GR; two standard deviations above the mean of all heads where None.
            alone: a head that is kept for several patterns counts for the one by which it stands out most, in standard
                deviations.
        """
        spread_P = self.relevance.std((0, 1), correction=0)
        out = (self.relevance - self.relevance.mean((0, 1))) / spread_P.clamp(min=1e-12)
        above = out > 2 if threshold is None else self.relevance > threshold
        if alone:
            above = above & (out == out.masked_fill(~above, -torch.inf).amax(-1, keepdim=True))
        found = {}
        for p, name in enumerate(self.names):
            places = [(int(layer), int(head)) for layer, head in above[..., p].nonzero()]
            if places:
                found[name] = sorted(places, key=lambda place: -float(self.relevance[(*place, p)]))
        return found

    def ordered(self) -> list[tuple[int, int]]:
        """The (layer, head) by importance, or by the largest relevance where there is none: what to look at first."""
        worth = self.relevance.amax(-1) if self.importance is None else self.importance
        return [divmod(int(i), worth.shape[1]) for i in worth.flatten().argsort(descending=True)]

    def table(self, count: int = 12) -> str:
        """A line a head, the first of `ordered`; the patterns' densities last.

        Args:
            count: how many heads.
        """
        rows = []
        for layer, head in self.ordered()[:count]:
            weight = "" if self.importance is None else f"{float(self.importance[layer, head]):.3f}"
            rows.append((f"{layer}.{head}", weight, *(f"{float(x):.3f}" for x in self.relevance[layer, head])))
        rows.append(("density", "", *(f"{float(x):.3f}" for x in self.density)))
        return table(("layer.head", "importance", *self.names), rows)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """A grid of layers and heads for each pattern.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(2.6 * len(self.names), 2.8)
        axes = figure.subplots(1, len(self.names), squeeze=False)[0]
        for axis, name, of_heads in zip(axes, self.names, self.relevance.unbind(-1), strict=True):
            axis.imshow(of_heads.detach().float(), vmin=0, vmax=1, cmap="magma")
            axis.set(title=name, xlabel="head", ylabel="layer")
        return figure


class GlobalRelevance(nn.Module):
    """GR of weights (B, H, L, L) over the words (B, L) that they are of.

    Args:
        patterns: by name; where None those that need no special words: matching, previous, next. Rows that may attend
            to all for want of a match would count as relevant: give `matching` with fallback=False.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, patterns: Mapping[str, Predicate] | None = None) -> None:
        super().__init__()
        usual: dict[str, Predicate] = {"matching": partial(matching, fallback=False), **neighbours()}
        self.patterns = usual if patterns is None else dict(patterns)
        if not self.patterns:
            raise ValueError("patterns must be some, got none")

    def forward(self, weights_BHLL: Tensor, ids_BL: Tensor, real_BL: Tensor | None = None) -> Relevance:
        """
        Args:
            weights_BHLL: A of one layer.
            ids_BL: words.
            real_BL: bool, False is padding; rows of it do not count.

        Returns:
            of one layer.

        Raises:
            ValueError: if the shapes do not fit.
        """
        B, L = ids_BL.shape
        if weights_BHLL.ndim != 4 or weights_BHLL.shape[0] != B or weights_BHLL.shape[2:] != (L, L):
            given = f"{tuple(weights_BHLL.shape)} and {tuple(ids_BL.shape)}"
            raise ValueError(f"weights must be (batch, heads, tokens, tokens) and ids (batch, tokens), got {given}")
        real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if real_BL is None else real_BL
        wide = torch.promote_types(weights_BHLL.dtype, torch.float32)
        count_B = real_BL.sum(1).clamp(min=1).to(wide)
        pair_BLL = real_BL[:, :, None] & real_BL[:, None]
        pattern_PBLL = torch.stack([predicate(ids_BL) & pair_BLL for predicate in self.patterns.values()]).to(wide)
        mass_BHP = torch.einsum("bhij,pbij->bhp", weights_BHLL.to(wide), pattern_PBLL) / count_B[:, None, None]
        share_P = (pattern_PBLL.sum((2, 3)) / count_B.square()).mean(1)
        kind = weights_BHLL.dtype
        return Relevance(mass_BHP.mean(0)[None].to(kind), share_P.to(kind), tuple(self.patterns))


def relevance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    patterns: Mapping[str, Predicate],
    *,
    loss: Loss | None = None,
    layers: Sequence[int] | None = None,
) -> Relevance:
    """GR of every head of a transformers encoder over some texts, and how much each head matters for a loss.

    The model is as it was afterwards; parameters get no gradients.

    Args:
        model: an encoder of text, or something around one.
        batches: the model's arguments by name: `input_ids`, and `attention_mask` where there is padding.
        patterns: by name.
        loss: one for each text; without, there is no importance.
        layers: numbers of those that are looked at; all where None.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if there are no batches, or as `recorded`.
    """
    measure, texts = GlobalRelevance(patterns), 0
    mass, share, weight = list[Tensor](), list[Tensor](), list[Tensor]()
    with evaluating(model), changing(model, Report("gradients")) as changes:
        if loss is not None:  # parameters may want no gradients, and shall get none
            changes.after(model.get_input_embeddings(), _leaf)  # type: ignore[operator]
        for batch in batches:
            ids_BL = batch["input_ids"]
            real_BL = batch["attention_mask"].bool() if "attention_mask" in batch else None
            with torch.set_grad_enabled(loss is not None), recorded(model, layers=layers) as recording:
                said = model(**batch)
                if loss is not None:
                    outs = [record.out_BNHE for record in recording.layers]
                    gradients = torch.autograd.grad(loss(said, batch).sum(), outs)
                    for out, gradient in zip(outs, gradients, strict=True):
                        out.grad = gradient
            with torch.no_grad():
                found = [measure(record.weights(), ids_BL, real_BL) for record in recording.layers]
                mass.append(len(ids_BL) * torch.cat([each.relevance for each in found]))
                share.append(len(ids_BL) * found[0].density)
                if loss is not None:
                    effect = [(r.weights() * r.gradients()).sum((2, 3)).abs().sum(0) for r in recording.layers]
                    weight.append(torch.stack(effect))
            texts += len(ids_BL)
    if not texts:
        raise ValueError("batches must be some, got none")
    importance = None
    if weight:
        total = torch.stack(weight).sum(0) / texts
        importance = total / total.norm(dim=1, keepdim=True).clamp(min=1e-12)
    mean, density = (torch.stack(each).sum(0) / texts for each in (mass, share))
    return Relevance(mean, density, tuple(patterns), importance)


def _leaf(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(torch.is_grad_enabled())
