"""The task, its error, and what is read off it: of one call, of many heads, and of the layers of a trained model.

Shape letters: B batch, D width of points, N points, Q queries, H heads, R rank, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from saccade.explain.attention_rank.attention import RankAttention, farthest, nearest
from saccade.explain.attention_rank.features import random_features
from saccade.extras import new_figure
from saccade.layers.pretrained import read_softmax
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Wanted = Literal["nearest", "farthest"]
_TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"nearest": nearest, "farthest": farthest}


def points(
    batch: int,
    dim: int,
    count: int,
    *,
    law: Literal["uniform", "orthonormal", "doubled"] = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points of length 1, (B, D, N).

    Args:
        batch, dim, count: B, D and N.
        law: "uniform" on the sphere; columns of a random rotation; or half of them uniform, the others their opposites.
        generator: of the points.

    Raises:
        ValueError: if there is no such law, more orthonormal points than coordinates, or an odd number of doubled ones.
    """
    drawn = partial(torch.randn, generator=generator)
    if law == "uniform":
        return F.normalize(drawn(batch, dim, count), dim=1)
    if law == "doubled" and count % 2 == 0:
        half = F.normalize(drawn(batch, dim, count // 2), dim=1)
        return torch.cat([half, -half], 2)
    if law == "orthonormal" and count <= dim:
        return torch.linalg.qr(drawn(batch, dim, count))[0]
    raise ValueError(
        "law must be 'uniform', 'orthonormal' (no more points than coordinates) or 'doubled' (an even number of "
        f"points), got {law!r} of {count} points of {dim} coordinates"
    )


@dataclass
class Probed:
    """What attention said of queries, beside what is right.

    Attributes:
        output: (B, D, Q).
        target: likewise.
        error: squared distance of both, (B, Q): 1 for attention that says 0.
    """

    output: Tensor
    target: Tensor
    error: Tensor

    def best_scale(self) -> Tensor:
        """The number by which all outputs must be multiplied to come nearest to the targets."""
        return (self.output * self.target).sum() / self.output.square().sum().clamp(min=1e-12)

    def mean_error(self, *, scaled: bool = False) -> Tensor:
        """The mean squared distance, which is trained on.

        Args:
            scaled: of outputs times `best_scale`.
        """
        if not scaled:
            return self.error.mean()
        return (self.best_scale() * self.output - self.target).square().sum(1).mean()

    def table(self) -> str:
        """Errors as they are, with the best scale, and how far the output's direction is right."""
        rows = [
            ("mean squared distance", f"{float(self.mean_error()):.4f}"),
            ("the same of the best scaled output", f"{float(self.mean_error(scaled=True)):.4f}"),
            (
                "cosine of output and target",
                f"{float(F.cosine_similarity(self.output, self.target, dim=1).mean()):.4f}",
            ),
        ]
        return table(("figure", "value"), rows)

    def plot(self) -> Figure:
        """The errors of all queries, the least first.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(5, 3.2)
        axis = figure.subplots()
        axis.plot(self.error.detach().float().flatten().sort().values)
        axis.axhline(1.0, color="0.7", linewidth=1)
        axis.set(xlabel="queries, the best first", ylabel="squared distance to the target", ylim=(0, None))
        return figure


def probe(model: nn.Module, x_BDN: Tensor, y_BDQ: Tensor | None = None, target: Wanted = "nearest") -> Probed:
    """What a model says on the task.

    Args:
        model: of (points, queries), or of points alone where there are no queries.
        x_BDN: points.
        y_BDQ: queries; None for those of self-attention, which are the points.
        target: "nearest", or "farthest", the one of self-attention.

    Raises:
        ValueError: if there is no such target.
    """
    if target not in _TARGETS:
        raise ValueError(f"target must be 'nearest' or 'farthest', got {target!r}")
    out_BDQ = model(x_BDN) if y_BDQ is None else model(x_BDN, y_BDQ)
    wanted_BDQ = _TARGETS[target](x_BDN, x_BDN if y_BDQ is None else y_BDQ)
    return Probed(out_BDQ, wanted_BDQ, (out_BDQ - wanted_BDQ).square().sum(1))


class RankProbe(nn.Module):
    """`RankAttention` on the task: how near attention of R and H comes.

    Args:
        dim, rank, num_heads, hard: as of `RankAttention`.
        target: as of `probe`.

    Raises:
        ValueError: if a number is not positive or there is no such target.
    """

    def __init__(
        self,
        dim: int,
        rank: int | None = None,
        num_heads: int = 1,
        *,
        hard: bool = False,
        target: Wanted = "nearest",
    ) -> None:
        super().__init__()
        if target not in _TARGETS:
            raise ValueError(f"target must be 'nearest' or 'farthest', got {target!r}")
        self.layer, self.target = RankAttention(dim, rank, num_heads, hard=hard), target

    def forward(self, x_BDN: Tensor, y_BDQ: Tensor) -> Probed:
        """Arguments, errors: as of `RankAttention`."""
        return probe(self.layer, x_BDN, y_BDQ, self.target)


def training(parameters: Iterable[nn.Parameter], epochs: int = 1000, *, lr: float = 0.01) -> tuple[AdamW, LambdaLR]:
    """The paper's optimiser, and its schedule by epochs (of 100 batches of 256): a twentieth to warm up, cosine to 0.

    Args:
        parameters: to be trained.
        epochs: of the schedule.
        lr: the highest learning rate.
    """
    optimizer = AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, epochs // 20)

    def factor(epoch: int) -> float:
        if epoch < warm:
            return (epoch + 1) / warm
        return (1 + math.cos(math.pi * (epoch - warm) / max(1, epochs - warm))) / 2

    return optimizer, LambdaLR(optimizer, factor)


@dataclass
class ErrorCurves:
    """Errors by number of heads, a curve for each width or rank.

    Attributes:
        heads: H.
        errors: by the name of the curve.
    """

    heads: list[int]
    errors: dict[str, list[float]]

    def table(self) -> str:
        """A line a curve, a column for each number of heads."""
        rows = [(name, *(f"{value:.3f}" for value in values)) for name, values in self.errors.items()]
        return table(("heads", *map(str, self.heads)), rows)

    def plot(self) -> Figure:
        """Both axes logarithmic.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(5, 3.4)
        axis = figure.subplots()
        for name, values in self.errors.items():
            axis.loglog(self.heads, values, marker=".", label=name)
        axis.set(xlabel="heads", ylabel="squared distance to the target")
        axis.legend()
        return figure


def feature_curves(
    dims: Sequence[int], heads: Sequence[int], *, terms: int = 30, draws: int = 3, seed: int = 0
) -> ErrorCurves:
    """The exact error of `random_features` on two uniform points, in the mean over draws.

    Args:
        dims: D, a curve each.
        heads: H.
        terms: of the series.
        draws: of the directions.
        seed: of the first.
    """
    generator = torch.Generator().manual_seed(seed)

    def mean(dim: int, count: int) -> float:
        return sum(random_features(dim, count, terms=terms, generator=generator)[1] for _ in range(draws)) / draws

    return ErrorCurves(list(heads), {f"d = {dim}": [mean(dim, count) for count in heads] for dim in dims})


def measured_curves(
    make: Callable[[int, int], nn.Module],
    ranks: Sequence[int],
    heads: Sequence[int],
    *,
    dim: int,
    count: int,
    queries: int = 1,
    batch: int = 4096,
    scaled: bool = True,
    seed: int = 0,
) -> ErrorCurves:
    """The error of attention of any rank and number of heads on uniform points and queries.

    Args:
        make: (rank, heads) -> attention, such as `random_subspaces` of a width.
        ranks: a curve each.
        heads: H.
        dim, count: D and N.
        queries: Q.
        batch: sets of points.
        scaled: of outputs times the best number.
        seed: of the points.
    """
    generator = torch.Generator().manual_seed(seed)
    x_BDN, y_BDQ = (points(batch, dim, number, generator=generator) for number in (count, queries))

    @torch.no_grad()
    def error(rank: int, number: int) -> float:
        return float(probe(make(rank, number), x_BDN, y_BDQ).mean_error(scaled=scaled))

    return ErrorCurves(list(heads), {f"r = {rank}": [error(rank, number) for number in heads] for rank in ranks})


@dataclass
class HeadRanks:
    """How many directions the heads of a layer compare.

    Attributes:
        singular: singular values of each head's query-key matrix, (H, R), the largest first.
        dim: the most that a rank could be, the width of what is compared.
    """

    singular: Tensor
    dim: int

    def effective(self) -> Tensor:
        """exp of the entropy of the singular values' shares (Roy and Vetterli, EUSIPCO 2007), (H,)."""
        share_HR = self.singular / self.singular.sum(-1, keepdim=True).clamp(min=torch.finfo(self.singular.dtype).tiny)
        return torch.special.entr(share_HR).sum(-1).exp()

    def table(self) -> str:
        """A line a head."""
        _, R = self.singular.shape
        rows = [
            (str(h), f"{R} of {self.dim}", f"{float(rank):.1f}", f"{float(largest):.3g}")
            for h, (rank, largest) in enumerate(zip(self.effective(), self.singular[:, 0], strict=True))
        ]
        return table(("head", "rank", "effective rank", "largest singular value"), rows)

    def plot(self) -> Figure:
        """Singular values, a line a head.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(5, 3.2)
        axis = figure.subplots()
        for values in self.singular:
            axis.semilogy(range(1, len(values) + 1), values.clamp(min=1e-12))
        axis.set(xlabel="direction", ylabel="singular value of the query-key matrix")
        return figure


@torch.no_grad()
def head_ranks(layer: nn.Module) -> HeadRanks:
    """The query-key matrices W_q^T W_k of a layer's heads; rotary positions and biases are left out.

    Args:
        layer: `RankAttention`, or a softmax attention of torch, transformers or this library.

    Raises:
        ValueError: if queries and keys of the layer are not found.
    """
    if isinstance(layer, RankAttention):
        q_HRC, k_HRC = layer.query.double(), layer.key.double()
    else:
        found = read_softmax(layer)
        q_HRC, k_HRC = (weight.double().unflatten(0, (-1, found.head_dim)) for weight, _ in (found.q, found.k))
        k_HRC = k_HRC.repeat_interleave(found.num_heads // found.num_kv_heads, 0)
    # the factors' triangles have the same singular values as W_q^T W_k, which is C x C
    triangles = [torch.linalg.qr(weight.mT, mode="r")[1] for weight in (q_HRC, k_HRC)]
    return HeadRanks(torch.linalg.svdvals(triangles[0] @ triangles[1].mT).float(), q_HRC.shape[-1])
