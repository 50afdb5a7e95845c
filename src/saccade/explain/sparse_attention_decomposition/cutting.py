"""What a circuit is worth: its edges cut, one signal each, and others instead.

    local:   delta / scale off what one head reads at the token, as its query, key and value
    global:  delta off the stream, for all who read it later;         delta = P [o; 0],   P = sum_S u_k u_k^T, or of v_k

Shape letters: E = D + 1 width of a token and the 1 behind it, D width, R width of queries, H heads, K key heads, N
tokens, B batch, V width of values, or words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.explain.recording import recorded
from saccade.explain.sparse_attention_decomposition.circuit import Circuit
from saccade.explain.sparse_attention_decomposition.decomposition import Edge, Firing, projected, terms, used
from saccade.explain.sparse_attention_decomposition.stream import Stream, Writer
from saccade.extras import new_figure
from saccade.layers.watching import evaluating
from saccade.layers.wrapping import Report, changing
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: used directions -> those that are cut
Choice = Callable[[Tensor], Tensor]


@torch.no_grad()
def deltas(stream: Stream, edges: Sequence[Edge], *, theta: float = 1.0, choice: Choice | None = None) -> list[Tensor]:
    """What each edge carries, (D,).

    Args:
        stream: of the call.
        edges: of its circuit.
        theta: as of `circuit`.
        choice: other directions (bool, R) in place of the used ones.
    """
    forms: dict[Firing, tuple[Tensor, Tensor, Tensor]] = {}
    found = []
    for edge in edges:
        layer, (_, head, *pair) = stream.layers[edge.firing.layer], edge.firing
        if edge.firing not in forms:
            destination, source = (torch.tensor([place], device=layer.x_NE.device) for place in pair)
            u, sigma, v = layer.form(head, destination, source)
            term_R = terms((u, sigma, v), layer.x_NE[destination], layer.x_NE[source])[0]
            carried = used(term_R, theta)
            forms[edge.firing] = u[0], v[0], carried if choice is None else choice(carried)
        u, v, chosen = forms[edge.firing]
        written_D = stream.written(edge.writer, edge.token)
        found.append(projected(u if edge.side == "destination" else v, chosen, written_D, one=0.0))
    return found


@contextmanager
def cut(
    model: nn.Module,
    stream: Stream,
    edges: Sequence[Edge],
    *,
    where: str = "local",
    factor: float = 1.0,
    theta: float = 1.0,
    choice: Choice | None = None,
) -> Iterator[Report]:
    """A model without what these edges carry; afterwards it is as it was.

    Args:
        model: the one that was read, to be called with the same inputs.
        stream: of that call.
        edges: of its circuit.
        where: "local", for the head of the edge alone, or "global", for all who read the stream.
        factor: how much of it is taken away; -1 doubles it.
        theta, choice: as of `deltas`.

    Raises:
        ValueError: if `where` is neither.
    """
    if where not in ("local", "global"):
        raise ValueError(f"where must be 'local' or 'global', got {where!r}")
    found = [factor * each for each in deltas(stream, edges, theta=theta, choice=choice)]
    if where == "local":
        with recorded(model, layers=[], change=_local(stream, edges, found)), changing(model, Report("cut")) as changes:
            yield changes.report
        return
    modules = dict(model.named_modules())
    with changing(model, Report("cut")) as changes:
        for writer in dict.fromkeys(edge.writer for edge in edges):
            off = torch.zeros_like(stream.tokens_ND)
            for edge, delta_D in zip(edges, found, strict=True):
                if edge.writer == writer:
                    off[edge.token] += delta_D
            name = stream.layers[max(writer.layer, 0)].name
            if writer.kind in ("head", "bias"):
                changes.after(modules[name], _after(off))
            elif writer.kind == "mlp":
                changes.after(modules[name.rsplit(".", 1)[0]], _after(off))
            else:
                changes.before(modules[name.rsplit(".", 1)[0]], _before(off))
        yield changes.report


def _local(stream: Stream, edges: Sequence[Edge], found: Sequence[Tensor]) -> Any:
    """Changes of queries, keys and values by what heads do not read any more."""
    off: dict[tuple[int, int, int], Tensor] = {}
    for edge, delta_D in zip(edges, found, strict=True):
        place = edge.firing.layer, edge.firing.head, edge.token
        off[place] = off.get(place, 0) + delta_D / stream.layers[edge.firing.layer].scale_N[edge.token]

    def change(number: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mine = {place[1:]: delta_D for place, delta_D in off.items() if place[0] == number}
        if not mine:
            return query, key, value
        layer, H = stream.layers[number], query.shape[1]
        query = query.clone()
        # a key head serves several heads: each has its own from here on
        key, value = (each.repeat_interleave(H // each.shape[1], 1) for each in (key, value))
        for (head, token), delta_D in mine.items():
            k = layer.key_head(head)
            lost = [delta_D @ weight[:-1] for weight in (layer.query_HER[head], layer.key_KER[k], layer.value_KEV[k])]
            if layer.turn_NRR is not None:
                lost[:2] = [layer.turn_NRR[token] @ each for each in lost[:2]]
            for whole, each in zip((query, key, value), lost, strict=True):
                whole[:, head, token] -= each.to(whole.dtype)
        return query, key, value

    return change


def _after(off_ND: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        whole = whole - off_ND.to(whole)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return hook


def _before(off_ND: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] - off_ND.to(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] - off_ND.to(kwargs["hidden_states"])}

    return hook


@dataclass
class CausalCheck:
    """The difference of two logits, with edges cut.

    Attributes:
        edges: how many.
        before: nothing cut.
        cut: the circuit's edges.
        others: as many at random, or as there are, by kind, a number for each draw: "other writers" to the same heads
            and tokens; "other directions" of the same heads and writers; "elsewhere", edges found alike outside of the
            circuit.
    """

    edges: int
    before: float
    cut: float
    others: dict[str, list[float]]

    @property
    def fall(self) -> float:
        """By which the circuit's edges lower it."""
        return self.before - self.cut

    def falls(self) -> dict[str, float]:
        """By which others lower it, in the mean."""
        return {name: self.before - sum(each) / len(each) for name, each in self.others.items() if each}

    def table(self) -> str:
        """A line a cut."""
        rows = [("nothing", f"{self.before:.2f}", "", ""), ("the circuit", f"{self.cut:.2f}", f"{self.fall:.2f}", "")]
        for name, fall in self.falls().items():
            each = self.others[name]
            spread = f"{min(each):.2f} to {max(each):.2f}"
            rows.append((name, f"{self.before - fall:.2f}", f"{fall:.2f}", spread))
        return table((f"cut, of {self.edges} edges", "difference of logits", "fall", "least and most"), rows)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """A point a draw.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(6, 2.6)
        axis = figure.subplots()
        names = ["the circuit", *self.others]
        for row, values in enumerate([[self.cut], *self.others.values()]):
            axis.plot(values, [row] * len(values), "o", color="#D55E00" if row == 0 else "#888888")
        axis.axvline(self.before, color="#0072B2", label="nothing cut")
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="difference of logits")
        axis.legend()
        return figure


@torch.no_grad()
def causal_check(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    found: Circuit,
    *,
    where: str = "local",
    draws: int = 5,
    seed: int = 0,
) -> CausalCheck:
    """Cut a circuit's edges, and as many random ones.

    Args:
        model, inputs: of which the circuit is.
        found: of `circuit`.
        where: as of `cut`.
        draws: of each kind of random edges.
        seed: of them.

    Raises:
        ValueError: if the circuit has no edges.
    """
    if not found.edges:
        raise ValueError("the circuit has no edges to cut")
    generator = torch.Generator().manual_seed(seed)
    row, token, against = found.target

    def lead() -> float:
        logits_V = model(**inputs).logits[0, row]
        return float(logits_V[token] - logits_V[against])

    def without(edges: Sequence[Edge], choice: Choice | None = None) -> float:
        with cut(model, found.stream, edges, where=where, theta=found.theta, choice=choice):
            return lead()

    with evaluating(model):
        before, after = lead(), without(found.edges)
        others: dict[str, list[float]] = {"other writers": [], "other directions": [], "elsewhere": []}
        for _ in range(draws):
            others["other writers"].append(without(_other_writers(found, generator)))
            others["other directions"].append(without(found.edges, lambda carried: _other(carried, generator)))
            if elsewhere := _elsewhere(found, generator):
                others["elsewhere"].append(without(elsewhere))
    return CausalCheck(len(found.edges), before, after, {name: each for name, each in others.items() if each})


def _other(carried_R: Tensor, generator: torch.Generator) -> Tensor:
    """As many directions of the others, or all of them where there are fewer."""
    order = torch.rand(carried_R.shape, generator=generator).to(carried_R.device).masked_fill(carried_R, 2.0).argsort()
    chosen = torch.zeros_like(carried_R)
    chosen[order[: int(carried_R.sum())]] = True
    return chosen & ~carried_R


def _pick(items: Sequence[Any], generator: torch.Generator) -> Any:
    return items[int(torch.randint(len(items), (1,), generator=generator))]


def _other_writers(found: Circuit, generator: torch.Generator) -> list[Edge]:
    """For each edge another writer that is not named, to the same token of the same firing, where there is one."""
    taken = {edge[:3] for edge in found.edges}
    edges = list[Edge]()
    for edge in found.edges:
        free: list[Writer] = [
            writer
            for writer in found.stream.writers(edge.firing.layer)
            if writer.kind in found.kinds and (writer, edge.firing, edge.side) not in taken
        ]
        if free:
            edges.append(edge._replace(writer=_pick(free, generator)))
            taken.add(edges[-1][:3])
    return edges


def _elsewhere(found: Circuit, generator: torch.Generator) -> list[Edge]:
    """As many edges of firings that are not in the circuit, or all of them where there are fewer."""
    inside = set(found.firings)
    outside = [firing for layer in found.decomposed.values() for firing in layer.firings if firing not in inside]
    edges = list[Edge]()
    for k in torch.randperm(len(outside), generator=generator).tolist():
        edges += found.decomposed[outside[k].layer].edges(outside[k], found.share, found.kinds)
        if len(edges) >= len(found.edges):
            break
    return edges[: len(found.edges)]
