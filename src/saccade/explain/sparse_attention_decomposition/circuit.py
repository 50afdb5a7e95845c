"""The circuit of one prompt: attention that is paid, the directions that carry its scores, and who wrote to them.

Shape letters: H heads, E = D + 1 width of a token and the 1 behind it, R width of queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade.explain.sparse_attention_decomposition.decomposition import Decomposed, Edge, Firing, decompose
from saccade.explain.sparse_attention_decomposition.stream import Lead, Stream, Writer, read
from saccade.extras import new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: all kinds of writers but constant ones
KINDS = ("head", "mlp", "tokens", "positions")


@dataclass
class Circuit:
    """Firings and who wrote what they read, back from those that speak for a token.

    Attributes:
        labels: of the tokens.
        target: (row, token, token against it).
        seeds: the firings from which it was traced.
        edges: what was found.
        kinds: of writers that were asked for.
        share: tau.
        theta: the share of a score that its used directions exceed.
        stream: of the call.
        decomposed: all firings, by layer.
    """

    labels: list[str]
    target: tuple[int, int, int]
    seeds: list[Firing]
    edges: list[Edge]
    kinds: tuple[str, ...]
    share: float
    theta: float
    stream: Stream = field(repr=False)
    decomposed: dict[int, Decomposed] = field(repr=False)

    @property
    def firings(self) -> list[Firing]:
        """Those of the circuit, the last layer first."""
        found = dict.fromkeys([*self.seeds, *(edge.firing for edge in self.edges)])
        return sorted(found, key=lambda firing: (-firing.layer, firing.head, firing.destination))

    def count(self, firing: Firing) -> int:
        """How many directions carry its score."""
        layer = self.decomposed[firing.layer]
        return int(layer.count[layer.firings.index(firing)])

    def strongest(self, count: int) -> list[Edge]:
        """The edges with the largest contributions.

        Args:
            count: how many.
        """
        return sorted(self.edges, key=lambda edge: -edge.weight)[:count]

    def places(self, edges: Sequence[Edge] | None = None) -> dict[tuple[Writer, int], tuple[float, float]]:
        """Where each node, who writes to which token, stands in a drawing: (to the right, upwards).

        Tokens are columns as wide as they have nodes beside each other; a layer's MLP stands half a layer above it.

        Args:
            edges: that are drawn; all where None. The seeds are drawn too.
        """
        chosen = self.edges if edges is None else edges
        nodes = dict.fromkeys([node_of(firing) for firing in (*self.seeds, *(edge.firing for edge in chosen))])
        nodes |= dict.fromkeys((edge.writer, edge.token) for edge in chosen)
        cells: dict[tuple[int, float], list[tuple[Writer, int]]] = {}
        for node in sorted(nodes):
            cells.setdefault((node[1], node[0].layer + 0.5 * (node[0].kind == "mlp")), []).append(node)
        widths: dict[int, int] = {}
        for (token, _), here in sorted(cells.items()):
            widths[token] = max(widths.get(token, 0), len(here))
        centres, left = dict[int, float](), 0.0
        for token, width in widths.items():
            centres[token], left = left + (width - 1) / 2, left + width
        return {
            node: (centres[token] + k - (len(here) - 1) / 2, level)
            for (token, level), here in cells.items()
            for k, node in enumerate(here)
        }

    def table(self, count: int = 12) -> str:
        """The firings with their directions, and the strongest edges.

        Args:
            count: how many edges.
        """
        rank = self.stream.layers[0].query_HER.shape[-1] if self.stream.layers else 0
        rows = [
            (f"{f.layer}.{f.head}", self._token(f.destination), self._token(f.source), f"{self.count(f)} of {rank}")
            for f in self.firings
        ]
        edges = [
            (str(e.writer), f"{e.firing.layer}.{e.firing.head}", e.side, self._token(e.token), f"{e.weight:.2f}")
            for e in self.strongest(count)
        ]
        said = [table(("head", "attends from", "to", "by directions"), rows)]
        said.append(table(("writer", "read by", "as its", "at", "contribution"), edges))
        return "\n".join(said) if rows else "no head that speaks for the token pays half of its attention to one token"

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """Layers upwards, tokens to the right: who wrote where, and who read it.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        places = self.places()
        right = max((x for x, _ in places.values()), default=0.0)
        figure = new_figure(max(5.0, 0.45 * right + 2), 7.0)
        axis = figure.subplots()
        bound = max((edge.weight for edge in self.edges), default=1.0)
        for edge in self.edges:
            ends = zip(places[edge.writer, edge.token], places[node_of(edge.firing)], strict=True)
            color = "#0072B2" if edge.side == "destination" else "#D55E00"
            axis.plot(*ends, color=color, linewidth=0.3 + 2.7 * edge.weight / bound, alpha=0.6)
        for (writer, _), (x, y) in places.items():
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#888888", "pad": 0.2}
            axis.text(x, y, str(writer), ha="center", va="center", fontsize=7, bbox=box)
        columns = self.columns(places)
        axis.set_xticks(list(columns.values()), [self.labels[token] for token in columns], rotation=60)
        axis.set(ylabel="layer", xlim=(-0.7, right + 0.7))
        return figure

    def columns(self, places: Mapping[tuple[Writer, int], tuple[float, float]]) -> dict[int, float]:
        """Token -> the middle of its column.

        Args:
            places: of `places`.
        """
        found: dict[int, list[float]] = {}
        for (_, token), (x, _) in places.items():
            found.setdefault(token, []).append(x)
        return {token: (min(each) + max(each)) / 2 for token, each in sorted(found.items())}

    def _token(self, position: int) -> str:
        return f"{position} {self.labels[position]}"


def circuit(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    target: Lead = None,
    *,
    tokenizer: Any = None,
    seeds: int | Sequence[Firing] = 3,
    threshold: float = 0.5,
    theta: float = 1.0,
    share: float = 0.7,
    kinds: Sequence[str] = KINDS,
    sinks: int = 1,
) -> Circuit:
    """Trace who wrote what the heads read that speak for a token.

    Args:
        model: of transformers, for language, with norms before its attention.
        inputs: of one text without padding, by the names of the model's arguments.
        target: (row, token, token against it); without the last, against the likeliest other; None for the likeliest
            token at the last row.
        tokenizer: names the tokens.
        seeds: how many heads to start from, those that fire at the row and whose output raises the difference most, to
            first order; or the firings themselves.
        threshold: the weight at which a head fires.
        theta: share of the score that the used directions exceed.
        share: tau, of contributions.
        kinds: of writers; ("head",) as in the paper.
        sinks: first tokens to which no head fires.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if model and inputs cannot be taken apart, or an argument is none of its values.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    if not (0 < threshold <= 1 and theta > 0 and 0 < share <= 1 and sinks >= 0):
        raise ValueError(
            "threshold and share must be in (0, 1], theta positive, sinks not negative, got "
            f"{threshold}, {share}, {theta}, {sinks}"
        )
    stream = read(model, inputs, target, tokenizer)
    decomposed = {
        number: decompose(stream, number, threshold=threshold, theta=theta, sinks=sinks)
        for number in range(1, len(stream.layers))
    }
    every = [firing for layer in decomposed.values() for firing in layer.firings]
    if isinstance(seeds, int):
        speaking = [firing for firing in every if firing.destination == stream.target[0]]
        effect = {f: float(stream.gradients[f.layer, f.destination, f.head]) for f in speaking}
        seeds = [f for f in sorted(speaking, key=lambda f: -effect[f])[:seeds] if effect[f] > 0]
    elif strange := [firing for firing in seeds if firing not in every]:
        raise ValueError(f"{tuple(strange[0])} does not fire")
    edges = _traced(decomposed, every, seeds, share, kinds, sinks)
    return Circuit(stream.labels, stream.target, list(seeds), edges, tuple(kinds), share, theta, stream, decomposed)


def _traced(
    decomposed: Mapping[int, Decomposed],
    every: Iterable[Firing],
    seeds: Sequence[Firing],
    share: float,
    kinds: Sequence[str],
    sinks: int,
) -> list[Edge]:
    """Back from the seeds; a head that wrote is followed to what it read when it did."""
    at: dict[tuple[int, int, int], list[Firing]] = {}
    for firing in every:
        at.setdefault(firing[:3], []).append(firing)
    waiting, seen, edges = list(seeds), set(seeds), list[Edge]()
    while waiting:
        firing = waiting.pop(0)
        for edge in decomposed[firing.layer].edges(firing, share, kinds):
            edges.append(edge)
            if edge.writer.kind != "head" or edge.token < sinks:
                continue
            for below in at.get((edge.writer.layer, edge.writer.head, edge.token), []):
                if below not in seen:
                    seen.add(below)
                    waiting.append(below)
    return edges


def node_of(firing: Firing) -> tuple[Writer, int]:
    """The head of a firing, and the token to which it writes.

    Args:
        firing: of a circuit.
    """
    return Writer("head", firing.layer, firing.head), firing.destination


@dataclass
class OverPrompts:
    """The circuits of many prompts as one.

    Attributes:
        weights: mean C of an edge (writer, reading head, role of the token) over the prompts in which it occurs.
        prompts: in how many it occurs.
        firings: of each head, in all prompts.
    """

    weights: dict[tuple[Writer, Writer, str], float]
    prompts: dict[tuple[Writer, Writer, str], int]
    firings: dict[Writer, int]

    def table(self, count: int = 20) -> str:
        """The edges that most prompts have.

        Args:
            count: how many.
        """
        order = sorted(self.weights, key=lambda edge: (-self.prompts[edge], -self.weights[edge]))[:count]
        rows = [
            (str(a), str(b), role, str(self.prompts[a, b, role]), f"{self.weights[a, b, role]:.2f}")
            for a, b, role in order
        ]
        return table(("writer", "read by", "at", "prompts", "contribution"), rows, left=3)


def over_prompts(circuits: Sequence[Circuit], roles: Sequence[Mapping[int, str]]) -> OverPrompts:
    """One graph of many prompts; edges at tokens without a role are left out.

    Args:
        circuits: of each prompt.
        roles: of each prompt what its tokens are: position -> name.

    Raises:
        ValueError: if there are not as many of both.
    """
    if len(circuits) != len(roles):
        raise ValueError(f"there must be roles for each circuit, got {len(circuits)} and {len(roles)}")
    found: dict[tuple[Writer, Writer, str], list[float]] = {}
    firings: dict[Writer, int] = {}
    for each, role in zip(circuits, roles, strict=True):
        own: dict[tuple[Writer, Writer, str], list[float]] = {}
        for edge in each.edges:
            if edge.token in role:
                own.setdefault((edge.writer, node_of(edge.firing)[0], role[edge.token]), []).append(edge.weight)
        for key, weights in own.items():
            found.setdefault(key, []).append(sum(weights) / len(weights))
        for firing in each.firings:
            head = node_of(firing)[0]
            firings[head] = firings.get(head, 0) + 1
    means = {key: sum(weights) / len(weights) for key, weights in found.items()}
    return OverPrompts(means, {key: len(weights) for key, weights in found.items()}, firings)
