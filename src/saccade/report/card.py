"""The card of a part: what it is, what proves it, what it costs here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saccade import catalogue
from saccade.catalogue.options import REQUIRED, Option
from saccade.integrations.mechanisms import MECHANISMS
from saccade.tables import facts
from saccade.train.tasks import taking

if TYPE_CHECKING:
    from saccade.bench.parts import Row
    from saccade.ops.measure import Cost


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
        "call": f"{part.kind.call} -> {part.kind.output}",
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
    found["to copy"] = to_copy(part)
    if part.build is not None:
        found["options"] = [_option(name, option) for name, option in catalogue.options(slug).items()]
    found["published sizes"] = [
        size.name
        + (f": {size.parameters:.4g} M parameters" if size.parameters else "")
        + (f", {size.flops:g} G multiply-adds at {_shapes(size)}" if size.flops else "")
        for size in part.published
    ]
    if part.claim:
        found["claim"] = {"the paper says": part.claim.paper, "expected here": part.claim.expected}
    if measure:
        found["cost here"] = _cost(part)
    return {key: value for key, value in found.items() if value not in ("", [], {})}


def to_copy(part: catalogue.Part) -> list[str]:
    """Lines that build the part in Python and try it on the command line."""
    lines = []
    if part.build is not None:
        needed = [name for name, option in catalogue.options(part.slug).items() if option.default is REQUIRED]
        usual = {name: part.kind.usual.get(name, part.example.get(name)) for name in needed}
        told = "".join(f", {name}={value!r}" for name, value in usual.items())
        lines.append(f'part = saccade.create("{part.slug}"{told})')
    if part.published and hasattr(part.build, "from_config"):
        of, name = str(catalogue.paper(part.slug).room), getattr(part.build, "__name__", "")
        lines.append(f'from {of} import {name}; model = {name}.from_config("{part.published[0].name}")')
    if hasattr(part.build, "predict"):
        lines.append(f"$ saccade run {part.slug} photo.jpg --weights FILE")
    if part.slug in MECHANISMS and part.slug != "softmax":
        lines.append(f'with saccade.switch(model, "{part.slug}"): ...')
    lines += [f"$ {command.format(slug=part.slug)}" for command in part.kind.commands]
    for task in taking(part)[:1]:
        compared = " ".join(dict.fromkeys(filter(None, (part.kind.baseline, part.slug))))
        lines.append(f"$ saccade compare {compared} --task {task.name}")
    return [*lines, f"$ saccade claim {part.slug}"]


def _shapes(size: catalogue.Published) -> str:
    """The sizes of its inputs, without batch and channels."""
    return " and ".join(" x ".join(map(str, shape[2:])) for shape in size.inputs.values())


def _option(name: str, option: Option) -> str:
    default = "must be given" if option.default is REQUIRED else f"{option.default!r} by default"
    return f"{name}: {option.words}, {default}"


def _cost(part: catalogue.Part) -> list[str]:
    """A few lines: beside its kind's baseline at two lengths, or of what the kind gives for a trial."""
    from saccade.bench import parts
    from saccade.ops.measure import cost

    if part.kind.baseline is not None:
        return [
            f"{row.length} tokens of 256 channels: {row.forward * 1e3:.1f} ms forward, {_backward(row)}, "
            f"{row.memory / 2**20:.1f} MiB, {row.speedup:.2f} x {part.kind.baseline}'s speed"
            for row in parts.measure([part.slug], lengths=(256, 1024), dim=256)
            if row.slug == part.slug
        ]
    trial = part.kind.trial(part)
    if trial is None:
        return []
    module = catalogue.create(part.slug, **trial.arguments)
    found = cost(module, trial.inputs(module))
    return [f"{trial.size}: {found.forward * 1e3:.1f} ms forward, {_backward(found)}, {found.memory / 2**20:.1f} MiB"]


def _backward(found: Row | Cost) -> str:
    """The time of the backward pass in words."""
    return "backward not measurable" if found.backward is None else f"{found.backward * 1e3:.1f} ms backward"


def card_text(found: dict[str, Any], width: int | None = None) -> str:
    """The card as text: names on the left, what they hold beside them, or below them where lines are short."""
    pairs: list[tuple[str, str | list[str]]] = []
    for name, held in found.items():
        if isinstance(held, dict):
            held = [f"{key}: {value}" for key, value in held.items()]
        pairs.append((name, held if isinstance(held, list) else str(held)))
    return "\n".join(facts(pairs, width))
