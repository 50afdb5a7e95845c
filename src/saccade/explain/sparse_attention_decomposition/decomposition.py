"""A head's score as a sum over singular directions, those that carry it, and who wrote them: of one score, and of all
that a layer's heads pay most of their attention by.

Shape letters: E = D + 1 width of a token and the 1 behind it, D width, R width of queries and keys, L layers, H heads,
N tokens, W writers, F firings; ... any axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.extras import new_figure
from saccade.ops.autocast import off
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.explain.sparse_attention_decomposition.stream import Stream, Writer

#: rows of attention that are looked through at once
_ROWS = 128


def singular(query_ER: Tensor, key_ER: Tensor, turn_RR: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """u (..., E, R), sigma (..., R) and v (..., E, R) of Omega = Q T K^T, in O(E R^2): no E x E matrix is made.

    Args:
        query_ER, key_ER: Q and K, weights with the bias as the last row.
        turn_RR: T, (..., R, R), what rotary positions put between both; none where None.
    """
    basis_q, upper_q = torch.linalg.qr(query_ER)
    basis_k, upper_k = torch.linalg.qr(key_ER)
    core = upper_q @ upper_k.mT if turn_RR is None else upper_q @ turn_RR @ upper_k.mT
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    return basis_q @ u, sigma, basis_k @ vh.mT


def terms(triples: tuple[Tensor, Tensor, Tensor], destination_E: Tensor, source_E: Tensor) -> Tensor:
    """t_k = sigma_k (x~_i . u_k)(x~_j . v_k), (..., R); their sum is the score, before it is scaled.

    Args:
        triples: of `singular`.
        destination_E, source_E: x~_i and x~_j.
    """
    u, sigma, v = triples
    return sigma * (destination_E[..., None, :] @ u)[..., 0, :] * (source_E[..., None, :] @ v)[..., 0, :]


def used(term_R: Tensor, share: float = 1.0) -> Tensor:
    """S, bool (..., R): the largest terms until they exceed `share` of the score; of a negative score the least ones.

    With share 1 they are few, since the rest of the terms sums to at most 0.

    Args:
        term_R: t.
        share: theta.
    """
    score = term_R.sum(-1, keepdim=True)
    side = torch.where(score < 0, -1.0, 1.0).to(term_R.dtype)
    order = (term_R * side).argsort(dim=-1, descending=True, stable=True)
    beyond = (term_R * side).gather(-1, order).cumsum(-1) > share * score.abs()
    before = (beyond.long().cumsum(-1) - beyond.long()) == 0
    return torch.zeros_like(before).scatter(-1, order, before)


def signals(triples: tuple[Tensor, Tensor, Tensor], destination_E: Tensor, used_R: Tensor) -> tuple[Tensor, Tensor]:
    """sum_S eps_k sqrt(sigma_k) u_k and the same of v_k, both (..., E), with eps_k = sign(x~_i . u_k).

    Args:
        triples: of `singular`.
        destination_E: x~_i.
        used_R: S.
    """
    u, sigma, v = triples
    sign_R = (destination_E[..., None, :] @ u)[..., 0, :].sign()
    weight_R1 = (sign_R * sigma.sqrt() * used_R)[..., None]
    return (u @ weight_R1)[..., 0], (v @ weight_R1)[..., 0]


def projected(vector_ER: Tensor, used_R: Tensor, x_D: Tensor, one: float = 1.0) -> Tensor:
    """P [x; one] without its last entry, (..., D), with P = sum_S u_k u_k^T.

    Args:
        vector_ER: u, or v.
        used_R: S.
        x_D: a token, or what was written to it.
        one: what stands behind it: 1 behind a whole token, 0 behind a part of one.
    """
    x_E = F.pad(x_D, (0, 1), value=one)
    along_R = (x_E[..., None, :] @ vector_ER)[..., 0, :] * used_R
    return (vector_ER @ along_R[..., None])[..., :-1, 0]


def largest(contribution_W: Tensor, share: float = 0.7) -> Tensor:
    """Bool (..., W): the largest contributions until they exceed `share` of the sum of all; none that is not positive.

    Args:
        contribution_W: C.
        share: tau.
    """
    ordered, order = contribution_W.sort(dim=-1, descending=True, stable=True)
    beyond = ordered.cumsum(-1) > share * contribution_W.sum(-1, keepdim=True)
    before = (beyond.long().cumsum(-1) - beyond.long()) == 0
    return torch.zeros_like(before).scatter(-1, order, before) & (contribution_W > 0)


@dataclass
class Decomposition:
    """One score, taken apart.

    Attributes:
        terms: t, in the order of falling singular values, (R,).
        sigma: singular values, (R,).
        u, v: of the destination and of the source, (E, R).
        used: S, bool (R,).
        destination, source: C of the heads of the layers below, for both tokens, (L', H).
    """

    terms: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor
    used: Tensor
    destination: Tensor
    source: Tensor

    @property
    def score(self) -> Tensor:
        """x~_i^T Omega x~_j."""
        return self.terms.sum()

    @property
    def omega(self) -> Tensor:
        """Omega, (E, E)."""
        return (self.u * self.sigma) @ self.v.mT

    def order(self) -> Tensor:
        """Terms by what they give to the score, the largest first; of a negative score the least first, (R,)."""
        return (self.terms * (-1 if self.score < 0 else 1)).argsort(descending=True, stable=True)

    def table(self, count: int = 5) -> str:
        """The used directions, and the heads that wrote most to them.

        Args:
            count: how many rows of each.
        """
        chosen = [k for k in self.order().tolist() if self.used[k]]
        share = self.terms / self.score
        rows = [(str(k), f"{float(self.sigma[k]):.3g}", f"{float(share[k]):.1%}") for k in chosen[:count]]
        said = [table(("direction", "singular value", "of the score"), rows)]
        for name, each in (("destination", self.destination), ("source", self.source)):
            best = each.flatten().topk(min(count, each.numel())).indices.tolist()
            heads = [(f"{k // each.shape[1]}.{k % each.shape[1]}", f"{float(each.flatten()[k]):.3g}") for k in best]
            said.append(table((f"wrote to the {name}", "contribution"), heads))
        return f"{len(chosen)} of {len(self.terms)} directions carry the score\n" + "\n".join(said)

    def plot(self) -> Figure:
        """Terms by size with their sum so far, and what each head below wrote to both tokens.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(10, 3.2)
        left, *others = figure.subplots(1, 3)
        order = self.order()
        share_R = (self.terms / self.score).detach().float().cpu()[order]
        left.bar(range(len(order)), share_R, color=["#D55E00" if self.used[k] else "#888888" for k in order.tolist()])
        left.plot(share_R.cumsum(0), color="#0072B2")
        left.set(xlabel="directions by term", ylabel="share of the score")
        for axis, (name, each) in zip(others, (("destination", self.destination), ("source", self.source))):
            bound = max(float(each.abs().amax()), 1e-12) if each.numel() else 1.0
            axis.imshow(each.detach().float().cpu(), cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
            axis.set(title=f"written to the {name}", xlabel="head", ylabel="layer")
        return figure


class SparseAttentionDecomposition(nn.Module):
    """Any head of a decoder whose norms are folded into its weights, decomposed at one pair of tokens.

    Args:
        num_layers, num_heads: L and H.
        dim: D.
        head_dim: R.
        share: theta.
        bias_each: the 1 behind a token is counted for each head, as in the authors' code, not once for the token.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self, num_layers: int, num_heads: int, dim: int, head_dim: int, *, share: float = 1.0, bias_each: bool = False
    ) -> None:
        super().__init__()
        if min(num_layers, num_heads, dim, head_dim) < 1 or share <= 0:
            got = (num_layers, num_heads, dim, head_dim, share)
            raise ValueError(f"sizes and share must be positive, got {got}")
        self.share, self.bias_each = share, bias_each
        shape = num_layers, num_heads, dim, head_dim
        self.query, self.key = (nn.Parameter(torch.randn(shape) * dim**-0.5) for _ in range(2))
        self.query_bias, self.key_bias = (nn.Parameter(torch.zeros(num_layers, num_heads, head_dim)) for _ in range(2))
        self.out = nn.Parameter(torch.randn(num_layers, num_heads, head_dim, dim) * head_dim**-0.5)

    def forward(
        self, x_ND: Tensor, z_LNHR: Tensor, scale_N: Tensor, layer: int, head: int, destination: int, source: int
    ) -> Decomposition:
        """
        Args:
            x_ND: what the layer is given, normalised, without gains.
            z_LNHR: what each head made of its values, in the layers up to this one.
            scale_N: what the layer's norm divides each token by.
            layer, head: of the score.
            destination, source: i, which attends, and j.

        Raises:
            ValueError: if there is no such head or token, or shapes do not fit.
        """
        layers, heads, D, R = self.query.shape
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(f"there are {layers} layers of {heads} heads, got layer {layer}, head {head}")
        if x_ND.ndim != 2 or x_ND.shape[1] != D or scale_N.shape != x_ND.shape[:1]:
            raise ValueError(
                f"x must be (tokens, {D}) and scale (tokens,), got {tuple(x_ND.shape)}, {tuple(scale_N.shape)}"
            )
        if z_LNHR.ndim != 4 or len(z_LNHR) < layer or z_LNHR.shape[1:] != (len(x_ND), heads, R):
            raise ValueError(f"z must be (layers, {len(x_ND)}, {heads}, {R}), got {tuple(z_LNHR.shape)}")
        if not (0 <= destination < len(x_ND) and 0 <= source < len(x_ND)):
            raise ValueError(f"there are {len(x_ND)} tokens, got destination {destination} and source {source}")
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with off(x_ND.device.type):
            q_ER, k_ER = (
                torch.cat([weight[layer, head], bias[layer, head, None]]).to(wide)
                for weight, bias in ((self.query, self.query_bias), (self.key, self.key_bias))
            )
            triples = singular(q_ER, k_ER)
            x_NE = F.pad(x_ND.to(wide), (0, 1), value=1.0)
            term_R = terms(triples, x_NE[destination], x_NE[source])
            used_R = used(term_R, self.share)
            written = [
                self._contributions(signal_E, z_LNHR[:layer, place].to(wide), scale_N[place].to(wide))
                for signal_E, place in zip(
                    signals(triples, x_NE[destination], used_R), (destination, source), strict=True
                )
            ]
        kind = x_ND.dtype
        u, sigma, v = (each.to(kind) for each in triples)
        destination_LH, source_LH = (each.to(kind) for each in written)
        return Decomposition(term_R.to(kind), sigma, u, v, used_R, destination_LH, source_LH)

    def _contributions(self, signal_E: Tensor, z_LHR: Tensor, scale: Tensor) -> Tensor:
        """C of each head below, (L', H)."""
        onto_LHR = self.out[: len(z_LHR)].to(signal_E.dtype) @ signal_E[:-1]
        along_LH = (onto_LHR * z_LHR).sum(-1)
        return (along_LH + signal_E[-1] if self.bias_each else along_LH) / scale


class Firing(NamedTuple):
    """A head that pays most of a token's attention to another.

    Attributes:
        layer, head: which.
        destination, source: i and j.
    """

    layer: int
    head: int
    destination: int
    source: int


class Edge(NamedTuple):
    """Who wrote what a firing reads.

    Attributes:
        writer: who.
        firing: that reads.
        side: "destination" or "source": at which of its tokens.
        weight: C.
    """

    writer: Writer
    firing: Firing
    side: str
    weight: float

    @property
    def token(self) -> int:
        """Where it is written and read."""
        return self.firing.destination if self.side == "destination" else self.firing.source


@dataclass
class Decomposed:
    """All firings of a layer.

    Attributes:
        firings: which.
        score: before it is scaled, (F,).
        count: |S|, (F,).
        contributions: C, by side, (F, W).
        writers: W of them.
    """

    firings: list[Firing]
    score: Tensor
    count: Tensor
    contributions: dict[str, Tensor]
    writers: list[Writer]

    def edges(self, firing: Firing, share: float, kinds: Sequence[str]) -> list[Edge]:
        """The writers that make up most of what a firing reads, on both sides; nobody's at the first token."""
        row = self.firings.index(firing)
        chosen = [k for k, writer in enumerate(self.writers) if writer.kind in kinds]
        found = []
        for side, each in self.contributions.items():
            kept = largest(each[row, chosen], share).tolist()
            found += [Edge(self.writers[k], firing, side, float(each[row, k])) for k, keep in zip(chosen, kept) if keep]
        return found


@torch.no_grad()
def decompose(stream: Stream, number: int, *, threshold: float = 0.5, theta: float = 1.0, sinks: int = 1) -> Decomposed:
    """Every firing of a layer: the directions that carry its score, and what everybody wrote to them.

    Args:
        stream: of `read`.
        number: of the layer.
        threshold, theta, sinks: as of `circuit`.
    """
    layer = stream.layers[number]
    index_F3 = torch.cat([_firing(stream, number, rows, threshold, sinks) for rows in _blocks(len(layer.x_NE))])
    index_F3 = index_F3[index_F3[:, 0].argsort(stable=True)]
    scores, counts, sides = list[Tensor](), list[Tensor](), (list[Tensor](), list[Tensor]())
    for head in index_F3[:, 0].unique().tolist():
        destination, source = index_F3[index_F3[:, 0] == head, 1:].T
        x_FE, triples = layer.x_NE[destination], layer.form(head, destination, source)
        term_FR = terms(triples, x_FE, layer.x_NE[source])
        used_FR = used(term_FR, theta)
        scores.append(term_FR.sum(-1))
        counts.append(used_FR.sum(-1))
        for side, signal_FE in zip(sides, signals(triples, x_FE, used_FR), strict=True):
            side.append(signal_FE)
    writers = stream.writers(number)
    nothing = layer.x_NE.new_zeros(0, layer.x_NE.shape[1])
    contributions = {
        name: stream.contributions(number, torch.cat([nothing, *side]), index_F3[:, place])
        for place, (name, side) in enumerate(zip(("destination", "source"), sides), 1)
    }
    firings = [Firing(number, *each) for each in index_F3.tolist()]
    empty = layer.x_NE.new_zeros(0)
    return Decomposed(firings, torch.cat([empty, *scores]), torch.cat([empty.long(), *counts]), contributions, writers)


def _blocks(rows: int) -> Iterable[range]:
    return (range(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))


def _firing(stream: Stream, number: int, rows: range, threshold: float, sinks: int) -> Tensor:
    """(head, destination, source) of the firings among some rows, (F, 3)."""
    record = stream.layers[number].record
    weights, scores = record.weights(rows=list(rows))[0], record.scores(rows=list(rows))[0]
    fires = (weights >= threshold) & (scores >= 0)
    fires[..., :sinks] = False
    return fires.nonzero() + torch.tensor([0, rows.start, 0], device=fires.device)
