"""A circuit on a page: layers upwards, tokens to the right, who wrote where and who read it; and what cutting it does.

Nothing here needs a script: what a pointer shows of a node or an edge, the tables and a screen reader say.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from saccade.explain.sparse_attention_decomposition import node_of
from saccade.report.document import scrolling_table, token_text

if TYPE_CHECKING:
    from saccade.explain.sparse_attention_decomposition import CausalCheck, Circuit

__all__ = ["STYLE", "drawing", "sections"]

#: CSS of `sections`
STYLE = """
.circuit { display: block; } .circuit text { fill: var(--ink); font: 11px system-ui, sans-serif; text-anchor: middle; }
.circuit rect { fill: var(--soft); stroke: var(--line); } .circuit .seed rect { stroke: #0072B2; stroke-width: 2; }
.circuit path { fill: none; stroke-opacity: .6; } .circuit .destination { stroke: #0072B2; }
.circuit .source { stroke: #D55E00; stroke-dasharray: 6 2; } .circuit path:hover { stroke-opacity: 1; }
.circuit g:focus-visible rect { stroke: var(--ink); stroke-width: 3; } .circuit g { outline: none; }
"""
#: edges that are drawn, pixels of a node's place, of half a layer, and around all
_EDGES, _WIDE, _HIGH, _AROUND = 60, 58, 17, 40


def sections(found: Circuit, causal: CausalCheck | None) -> list[str]:
    """A heading, the drawing, its tables, and what cutting says.

    Args:
        found: of `saccade.explain(..., circuit=True)`.
        causal: of it.
    """
    head = ["<h2>Who wrote what was read?</h2>"]
    if not found.edges:
        return [*head, f"<p>{escape(found.table())}.</p>"]
    shown = found.strongest(_EDGES)
    drawn = "all" if len(shown) == len(found.edges) else f"the {len(shown)} strongest of {len(found.edges)}"
    firings = [
        (f"{f.layer}.{f.head}", _token(found, f.destination), _token(found, f.source), str(found.count(f)))
        for f in found.firings
    ]
    edges = [
        (str(e.writer), f"{e.firing.layer}.{e.firing.head}", e.side, _token(found, e.token), f"{e.weight:.2f}")
        for e in found.strongest(12)
    ]
    said = [
        *head,
        "<p>Heads that pay half of a token's attention to one other token, back from those that speak for the target, "
        f"and who wrote to the few directions by which they choose it: {drawn} edges. What is written to the token "
        "that attends is blue, to the token that is attended to is orange and dashed.</p>",
        f'<div class="wide" tabindex="0" role="region" aria-label="circuit, drawn">{drawing(found)}</div>',
        _table(("head", "attends from", "to", "by directions"), firings, "attention of the circuit"),
        _table(("writer", "read by", "as its", "at", "contribution"), edges, "strongest edges of the circuit"),
    ]
    if causal is None:
        return said
    cuts = [("nothing", f"{causal.before:.2f}", ""), ("the circuit", f"{causal.cut:.2f}", f"{causal.fall:.2f}")]
    cuts += [(name, f"{causal.before - fall:.2f}", f"{fall:.2f}") for name, fall in causal.falls().items()]
    return [
        *said,
        "<h3>Does it matter?</h3>",
        _table((f"cut, of {causal.edges} edges", "lead of the target", "falls by"), cuts, "what cutting edges does"),
        '<p class="muted">The lead is the difference of the logits of the target and of what it is held against. Cut '
        "are the signals of the circuit's edges, those of as many other writers to the same heads, as many other "
        "directions, and as many edges elsewhere.</p>",
    ]


def drawing(found: Circuit) -> str:
    """The strongest edges and their nodes as SVG, in the page's colours.

    Args:
        found: the circuit.
    """
    edges = found.strongest(_EDGES)
    places = found.places(edges)
    columns = found.columns(places)
    top = max(y for _, y in places.values())
    width = round(max(x for x, _ in places.values()) * _WIDE + 2 * _AROUND)
    bottom = round(2 * (top + 1) * _HIGH + 2 * _AROUND)

    def at(place: tuple[float, float]) -> tuple[float, float]:
        return place[0] * _WIDE + _AROUND, 2 * (top - place[1]) * _HIGH + _AROUND

    most = max(edge.weight for edge in edges)
    lines, boxes = [], []
    for edge in edges:
        (x0, y0), (x1, y1) = at(places[edge.writer, edge.token]), at(places[node_of(edge.firing)])
        words = f"{edge.writer} to {edge.firing.layer}.{edge.firing.head}, {edge.side}: {edge.weight:.2f}"
        middle = (y0 + y1) / 2
        lines.append(
            f'<path class="{edge.side}" stroke-width="{0.6 + 3.4 * edge.weight / most:.1f}" '
            f'd="M{x0:.0f} {y0:.0f}C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}">'
            f"<title>{escape(words)}</title></path>"
        )
    seeds = {node_of(firing) for firing in found.seeds}
    for node, place in places.items():
        (x, y), words = at(place), f"{node[0]} at {_token(found, node[1])}"
        boxes.append(
            f'<g tabindex="0" role="img" aria-label="{escape(words, quote=True)}"{" class=seed" * (node in seeds)}>'
            f"<title>{escape(words)}</title>"
            f'<rect x="{x - 25:.0f}" y="{y - 9:.0f}" width="50" height="18" rx="4"/>'
            f'<text x="{x:.0f}" y="{y + 4:.0f}">{escape(str(node[0]))}</text></g>'
        )
    feet = [
        f'<text x="{x * _WIDE + _AROUND:.0f}" y="{bottom - 14}">{escape(token_text(found.labels[token]))}</text>'
        for token, x in columns.items()
    ]
    return (
        f'<svg class="circuit" role="group" aria-label="circuit" width="{width}" height="{bottom}" '
        f'viewBox="0 0 {width} {bottom}">{"".join(lines + boxes + feet)}</svg>'
    )


def _token(found: Circuit, position: int) -> str:
    return f"{position} {token_text(found.labels[position]).strip()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    cells = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return scrolling_table(cells, lines, caption)
