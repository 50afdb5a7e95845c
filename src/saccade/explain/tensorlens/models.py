"""The operator of a transformers model, and what is done with it: relevance, relations, perturbation.

Shape letters: B batch, S sets of parts, L tokens, D width, M parts, V width of what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.explain.linearised import LinearModel
from saccade.explain.tensorlens.relevance import Lens, Operator, relevance
from saccade.extras import new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: shares of the parts that are masked
FRACTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


def tensorlens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    aggregation: str = "input_output",
    direction: Tensor | None = None,
    rows: Sequence[int] | None = None,
    layers: tuple[int, int] = (0, -1),
    gated: str = "gate",
    probes: int | None = None,
    labels: Sequence[str] | None = None,
) -> Lens:
    """What each token before the blocks does to each final hidden state; by `rows` what a logit is made of.

    Args:
        model: of transformers, with one stack of blocks: a decoder, an encoder, a vision transformer.
        inputs: of one example, by the names of the model's arguments.
        aggregation: norm, input, output or input_output.
        direction: w_i (L, D); where None the unembedding of the token that the model finds likeliest at i, where the
            model has an output embedding and its last block is in the map, else y_i.
        rows: i, from the end where negative; all where None.
        layers: the first block of the map, and the last one.
        gated: what is held in a gated layer: gate, up or half.
        probes: of norm: an estimate from so many random directions; exact where None.
        labels: of the tokens.

    Returns:
        Relevance (1, R, L), with what it sums to.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the model is no such model, or an argument does not fit.
    """
    operator = LinearModel(model, inputs, layers=layers, gated=gated)
    y = operator.y_BLV
    if direction is None:
        head = getattr(model, "get_output_embeddings", lambda: None)() if operator.whole else None
        w = y if head is None else head.weight.detach()[head(y).argmax(-1)]
    else:
        w = direction[None].to(y)
    found = relevance(operator, operator.x_BLD, w, aggregation, rows=rows, probes=probes)
    offset, value = ((w * each).sum(-1) for each in (operator.offset_BLV, y))
    if rows is not None:
        offset, value = offset[:, list(rows)], value[:, list(rows)]
    return Lens(y, found, offset, value, aggregation, labels)


def neighbour_bound(operator: Operator, change_BLD: Tensor, true_change: Tensor, *, steps: int = 20) -> Tensor:
    """A bound of |F(X + e) - (T (X + e) + b)|, (): |F(X + e) - F(X)| + |T|_2 |e|.

    It has the true change of the model in it: T alone certifies nothing.

    Args:
        operator: T at X, of one example.
        change_BLD: e.
        true_change: F(X + e) - F(X).
        steps: of the power iteration for |T|_2, which comes from below.
    """
    v = change_BLD[None] / change_BLD.norm()
    for _ in range(steps):
        v = operator.transposed(operator.linear(v))
        v = v / v.norm()
    return true_change.norm() + operator.linear(v).norm() * change_BLD.norm()


@dataclass
class RelationOperator:
    """z = beta W h + b: from a subject's hidden state to what is said last, the mean of several prompts' operators.

    Attributes:
        weight_DD: W, the mean of T[last, :, subject, :].
        bias_D: b, the mean of z - W h.
        beta: what W h is multiplied by.
    """

    weight_DD: Tensor
    bias_D: Tensor
    beta: float = 1.0

    def __call__(self, h_BD: Tensor) -> Tensor:
        """z (B, D).

        Args:
            h_BD: hidden states of subjects, before the first block of the map.
        """
        return self.beta * h_BD @ self.weight_DD.T + self.bias_D

    @classmethod
    def of(
        cls,
        model: nn.Module,
        prompts: Sequence[Mapping[str, Any]],
        subjects: Sequence[int],
        *,
        layers: tuple[int, int] = (0, -1),
        beta: float = 1.0,
        gated: str = "gate",
        chunk: int = 32,
    ) -> RelationOperator:
        """From a few prompts of the relation.

        Args:
            model: of transformers.
            prompts: inputs of the model, one example each.
            subjects: the last token of each prompt's subject.
            layers: the block before which h is read, and that after which z is.
            beta: what W h is multiplied by.
            gated: as of `tensorlens`.
            chunk: vectors at once.

        Raises:
            ValueError: if there are no prompts, or not one subject for each.
        """
        if not prompts or len(prompts) != len(subjects):
            raise ValueError(f"prompts must be one at least, with a subject each, got {len(prompts)}, {len(subjects)}")
        weights, states, said = [], [], []
        for inputs, subject in zip(prompts, subjects, strict=True):
            operator = LinearModel(model, inputs, layers=layers, gated=gated)
            x = operator.x_BLD
            at_L = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[subject]
            units = torch.eye(x.shape[2], dtype=x.dtype, device=x.device).split(chunk)
            columns = [operator.linear((each[:, None] * at_L[:, None])[:, None])[:, 0, -1] for each in units]
            weights.append(torch.cat(columns).T)
            states.append(x[0, subject])
            said.append(operator.y_BLV[0, -1])
        weight_DD = torch.stack(weights).mean(0)
        return cls(weight_DD, (torch.stack(said) - torch.stack(states) @ weight_DD.T).mean(0), beta)


@dataclass
class Perturbation:
    """What is left of a score while the most relevant parts are masked first, and while the least relevant are.

    Attributes:
        fractions: shares that are masked.
        positive: the score by share, the most relevant first: of a good map it falls fast.
        negative: the least relevant first: of a good map it holds.
    """

    fractions: tuple[float, ...]
    positive: Tensor
    negative: Tensor

    @property
    def areas(self) -> tuple[float, float]:
        """The means of both curves by the trapezoid rule, each as a share of the score of the whole."""
        x = torch.tensor(self.fractions)
        first, second = (torch.trapezoid(curve / curve[0], x) / (x[-1] - x[0]) for curve in
                         (self.positive, self.negative))  # fmt: skip
        return float(first), float(second)

    def table(self) -> str:
        """A line a share."""
        lines = [
            (f"{share:.0%}", f"{float(first):.3f}", f"{float(second):.3f}")
            for share, first, second in zip(self.fractions, self.positive, self.negative, strict=True)
        ]
        return table(("masked", "most relevant first", "least relevant first"), lines)

    def plot(self) -> Figure:
        """Both curves.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(4.6, 3.2)
        axis = figure.subplots()
        axis.plot(self.fractions, self.positive, label="most relevant first")
        axis.plot(self.fractions, self.negative, label="least relevant first")
        axis.set_xlabel("share that is masked")
        axis.set_ylabel("score")
        axis.legend()
        return figure


@torch.no_grad()
def perturbation(
    score: Callable[[Tensor], Tensor], relevance_M: Tensor, *, fractions: Sequence[float] = FRACTIONS
) -> Perturbation:
    """The paper's test of a map: mask the top, or the bottom, and look at the score.

    `saccade.explain.faithfulness` measures the same over all shares, beside random maps.

    Args:
        score: what the model says with some of the parts: kept (S, M) -> (S,), as of `faithfulness`.
        relevance_M: of each part.
        fractions: shares that are masked, rising from 0.

    Raises:
        ValueError: if fractions do not rise from 0 to at most 1.
    """
    rising = all(a < b for a, b in zip(fractions, fractions[1:]))
    if len(fractions) < 2 or fractions[0] != 0 or fractions[-1] > 1 or not rising:
        raise ValueError(f"fractions must rise from 0 to at most 1, got {tuple(fractions)}")
    M = len(relevance_M)
    order = relevance_M.argsort(descending=True, stable=True)
    counts = torch.tensor([round(share * M) for share in fractions])
    masked_SM = torch.zeros(2 * len(counts), M, dtype=torch.bool)
    gone = torch.arange(M)[None] < counts[:, None]
    masked_SM[:, order] = torch.cat([gone, gone.flip(1)])
    first, second = score(~masked_SM).detach().float().cpu().chunk(2)
    return Perturbation(tuple(fractions), first, second)
