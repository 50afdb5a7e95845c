"""From the operator to relevance R (B, R, L) of tokens to tokens, by products alone: T is never made.

| aggregation | R[i, j] | products |
|---|---|---|
| norm | the Frobenius norm of T[i, :, j, :] | w^T T for each row and number, or for `probes` random w a row |
| input | the length of T[i, :, j, :] x_j | T v for each token |
| output | the length of w_i^T T[i, :, j, :] | w^T T for each row |
| input_output | w_i^T T[i, :, j, :] x_j, signed: with w_i^T b_i their sum over j is w_i^T y_i | w^T T for each row |

Memory is O(L^2 + c L D) with c vectors at once.

Shape letters: B batch, R rows that are wanted, S vectors at once, L tokens, D width of tokens, V width of what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from saccade.extras import new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGGREGATIONS = ("norm", "input", "output", "input_output")


class Operator(Protocol):
    """An affine map of tokens: `operator.Step`, and `saccade.explain.linearised.LinearModel`."""

    def linear(self, v_SBLD: Tensor, /) -> Tensor:
        """T v (S, B, L, V)."""

    def transposed(self, w_SBLV: Tensor, /) -> Tensor:
        """w^T T (S, B, L, D)."""


@dataclass
class Lens:
    """What each token has to do with each output token that is wanted.

    Attributes:
        y: Y (B, L, V).
        relevance: R (B, R, L).
        offset: w_i^T b_i (B, R): what no token adds.
        value: w_i^T y_i (B, R).
        aggregation: of `AGGREGATIONS`.
        labels: of the tokens, for table and picture; numbers where None.
    """

    y: Tensor
    relevance: Tensor
    offset: Tensor
    value: Tensor
    aggregation: str = "input_output"
    labels: Sequence[str] | None = None

    @property
    def error(self) -> float:
        """The largest |sum_j R[i, j] + w_i^T b_i - w_i^T y_i|: of the size of rounding.

        Raises:
            ValueError: if the aggregation is none that sums to anything.
        """
        if self.aggregation != "input_output":
            raise ValueError(f"relevance of {self.aggregation!r} sums to nothing; that of 'input_output' does")
        return float((self.relevance.sum(-1) + self.offset - self.value).abs().max())

    def table(self, row: int = -1, count: int = 5) -> str:
        """The tokens that matter most to an output token.

        Args:
            row: of the rows of the first example.
            count: how many tokens.
        """
        relevance = self.relevance[0, row]
        names = self.labels or [str(i) for i in range(len(relevance))]
        top = relevance.abs().topk(min(count, len(relevance))).indices.tolist()
        lines = [(names[i], f"{float(relevance[i]):.4g}") for i in top]
        if self.aggregation == "input_output":
            lines += [("no token", f"{float(self.offset[0, row]):.4g}"), ("sum", f"{float(self.value[0, row]):.4g}")]
        return table(("token", self.aggregation), lines)

    def plot(self) -> Figure:
        """The matrix of the first example, signed values about white.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        relevance = self.relevance[0].detach().float().cpu()
        figure = new_figure(5, 4.4)
        axis = figure.subplots()
        signed = self.aggregation == "input_output"
        most = float(relevance.abs().max()) or 1.0
        image = axis.imshow(relevance, cmap="RdBu_r" if signed else "magma", vmin=-most if signed else 0, vmax=most)
        figure.colorbar(image)
        axis.set_xlabel("input token")
        axis.set_ylabel("output token")
        if self.labels is not None and len(self.labels) <= 40:
            axis.set_xticks(range(len(self.labels)), self.labels, rotation=90, fontsize=7)
        return figure


def relevance(
    operator: Operator,
    x_BLD: Tensor,
    direction_BLV: Tensor,
    aggregation: str = "input_output",
    *,
    rows: Sequence[int] | None = None,
    probes: int | None = None,
    chunk: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    """R (B, R, L), by products.

    Args:
        operator: T.
        x_BLD: X.
        direction_BLV: w_i, of every token; of `norm` and `input` only its width tells.
        aggregation: of `AGGREGATIONS`.
        rows: i, output tokens that are wanted, from the end where negative; all where None.
        probes: of `norm`: the root of the mean of |w^T T|^2 over so many random w, an estimate; exact where None.
        chunk: vectors at once.
        generator: of the probes.

    Raises:
        ValueError: if there is no such aggregation, or shapes do not fit.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    if x_BLD.ndim != 3 or direction_BLV.ndim != 3 or x_BLD.shape[:2] != direction_BLV.shape[:2]:
        got = f"{tuple(x_BLD.shape)} and {tuple(direction_BLV.shape)}"
        raise ValueError(f"tokens and directions must be (batch, tokens, width) of the same tokens, got {got}")
    eye_LL = torch.eye(x_BLD.shape[1], dtype=x_BLD.dtype, device=x_BLD.device)
    at_RL = eye_LL if rows is None else eye_LL[list(rows)]
    if aggregation == "input":
        moved = [operator.linear(at[:, None, :, None] * x_BLD).norm(dim=-1) for at in eye_LL.split(chunk)]
        return torch.einsum("jbl,rl->brj", torch.cat(moved), at_RL)
    if aggregation == "norm":
        return torch.stack([_norms(operator, at, direction_BLV, probes, chunk, generator) for at in at_RL], 1)
    found = []
    for at in at_RL.split(chunk):
        pulled = operator.transposed(at[:, None, :, None] * direction_BLV)
        found.append(pulled.norm(dim=-1) if aggregation == "output" else (pulled * x_BLD).sum(-1))
    return torch.cat(found).transpose(0, 1)


def slices(operator: Operator, row: int, like_BLV: Tensor, *, chunk: int = 16) -> Tensor:
    """T[i, :, :, :] of one output token, (B, V, L, D).

    Args:
        operator: T.
        row: i.
        like_BLV: anything of the shape of Y.
        chunk: vectors at once.
    """
    B, L, V = like_BLV.shape
    at_L = torch.eye(L, dtype=like_BLV.dtype, device=like_BLV.device)[row]
    units = torch.eye(V, dtype=like_BLV.dtype, device=like_BLV.device).split(chunk)
    return torch.cat([operator.transposed(_placed(each, at_L, B)) for each in units]).transpose(0, 1)


def _placed(w_SV: Tensor, at_L: Tensor, B: int) -> Tensor:
    """Vectors at one token, (S, B, L, V)."""
    return (w_SV[:, None, None] * at_L[:, None]).expand(-1, B, -1, -1)


def _norms(
    operator: Operator,
    at_L: Tensor,
    like_BLV: Tensor,
    probes: int | None,
    chunk: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The norms of a row's blocks, (B, L)."""
    B, V = len(like_BLV), like_BLV.shape[-1]
    if probes is None:
        w_SV, share = torch.eye(V, dtype=at_L.dtype, device=at_L.device), 1
    else:
        w_SV, share = torch.randn(probes, V, generator=generator).to(at_L), probes
    squares = [operator.transposed(_placed(w, at_L, B)).square().sum((0, -1)) for w in w_SV.split(chunk)]
    return (torch.stack(squares).sum(0) / share).sqrt()
