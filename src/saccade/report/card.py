"""The card of a part: what it is, what proves it, what it costs here."""

from __future__ import annotations

from typing import Any

import torch

from saccade import catalogue
from saccade.tables import facts


def card(slug: str, *, measure: bool) -> dict[str, Any]:
    """Everything known of a part; of a planned one, what the paper's list knows.

    Raises:
        ValueError: if the name is unknown.
    """
    paper = catalogue.paper(slug)
    found: dict[str, Any] = {"id": slug, "title": paper.title, "arXiv": paper.arxiv, "family": paper.family}
    found["state"] = paper.state
    if paper.room is None:
        return found
    part = catalogue.part(slug)
    found |= {
        "kind": part.kind,
        "summary": part.summary,
        "room": paper.room,
        "supports": list(part.supports),
        "taxonomy": dict(part.taxonomy),
        "efficiency": part.efficiency,
        "complexity": part.complexity,
        "note": part.note,
        "equal to the authors' code": [
            f"{port.module} (to {port.tolerance:g}{': ' + port.reason if port.reason else ''})" for port in part.ports
        ],
        "invariants": list(part.invariants),
    }
    if part.claim:
        found["claim"] = {"the paper says": part.claim.paper, "expected here": part.claim.expected}
    if measure:
        found["cost here"] = _cost(part)
    return {key: value for key, value in found.items() if value not in ("", [], {})}


def _cost(part: catalogue.Part) -> list[str]:
    """A few lines: layers of 256 channels for sequence mechanisms, 64 x 56 x 56 for gates, else the tiny example."""
    from saccade.bench import parts
    from saccade.ops.measure import cost

    if part.kind == "sequence":
        return [
            f"{row.length} tokens of 256 channels: {row.forward * 1e3:.1f} ms forward, {row.backward * 1e3:.1f} ms "
            f"backward, {row.memory / 2**20:.1f} MiB, {row.speedup:.2f} x softmax's speed"
            for row in parts.measure([part.slug], lengths=(256, 1024), dim=256)
            if row.slug == part.slug
        ]
    if part.kind == "gate":
        module, inputs, size = catalogue.create(part.slug, channels=64), (torch.randn(1, 64, 56, 56),), "64 x 56 x 56"
    elif part.inputs is not None:
        module = catalogue.create(part.slug, **part.example)
        inputs, size = part.inputs(module, 64), f"its example ({dict(part.example)}) at size 64"
    else:
        return []
    forward, both, memory = cost(module, inputs)
    return [
        f"{size}: {forward * 1e3:.1f} ms forward, {(both - forward) * 1e3:.1f} ms backward, {memory / 2**20:.1f} MiB"
    ]


def card_text(found: dict[str, Any], width: int | None = None) -> str:
    """The card as text: names on the left, what they hold beside them, or below them where lines are short."""
    pairs: list[tuple[str, str | list[str]]] = []
    for name, held in found.items():
        if isinstance(held, dict):
            held = [f"{key}: {value}" for key, value in held.items()]
        pairs.append((name, held if isinstance(held, list) else str(held)))
    return "\n".join(facts(pairs, width))
