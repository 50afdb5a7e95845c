"""Commands about the parts that there are: `list`, `show`, `new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saccade import catalogue
from saccade.cli.commands.app import AsJson, print_json
from saccade.tables import table


def list_parts(
    family: Annotated[str | None, typer.Option(help="Only this family, or those with this in their name.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: sequence, gate, fusion, model ...")] = None,
    supports: Annotated[str | None, typer.Option(help="Only parts that support this, e.g. decoding.")] = None,
    ready: Annotated[bool, typer.Option("--ready", help="Only what is built.")] = False,
    taxonomy: Annotated[bool, typer.Option("--taxonomy", help="Show each part's place in the surveys.")] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="The survey's classes of efficient attention, with parts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the 119 papers and the parts built from them."""
    if tree:
        from saccade.explain.efficient_attention_survey import CLASSES, place
        from saccade.explain.efficient_attention_survey import tree as draw

        placed = {path: [part.slug for part in found] for path, found in place().items()}
        if as_json:
            print_json([{**vars(entry), "parts": placed[path]} for path, entry in CLASSES.items()])
        else:
            print(draw())
        return
    chosen = {part.slug: part for part in catalogue.select(kind=kind, supports=supports)}
    only_built = ready or kind is not None or supports is not None
    papers = [catalogue.paper("softmax"), *catalogue.papers()]
    families = _families({paper.family for paper in papers}, family)
    rows = [
        (paper, chosen.get(paper.slug))
        for paper in papers
        if paper.family in families and (paper.slug in chosen or not only_built)
    ]
    if as_json:
        print_json(
            [
                {
                    **{name: value for name, value in vars(paper).items() if name != "room"},
                    **(
                        {"kind": part.kind, "supports": list(part.supports), "taxonomy": dict(part.taxonomy)}
                        | {"efficiency": part.efficiency, "complexity": part.complexity, "summary": part.summary}
                        if part
                        else {}
                    ),
                }
                for paper, part in rows
            ]
        )
        return
    more = (*catalogue.AXES, "efficiency") if taxonomy else ("what it is" if only_built else "title",)
    columns, groups = ("id", "state", "arXiv", *more), dict[str, list[list[str]]]()
    for paper, part in rows:
        cells = [paper.slug, paper.state, paper.arxiv]
        if taxonomy:
            cells += [part.taxonomy.get(axis, "") if part else "" for axis in catalogue.AXES]
            cells.append(part.efficiency if part else "")
        else:
            cells.append(part.summary if part and only_built else paper.title)
        groups.setdefault(paper.family, []).append(cells)
    for name, lines in groups.items():
        print(table(columns, lines, title=name.upper(), left=len(columns)), end="\n\n")
    ready_count = sum(paper.state == "ready" for paper, _ in rows)
    print(f"{ready_count} ready, {len(rows) - ready_count} planned")


def show(
    slug: Annotated[str, typer.Argument(help="The part, e.g. moba.")],
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Measure it on this machine.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show a part: its card, its evidence, what it costs on this machine."""
    from saccade.report.card import card, card_text

    found = card(slug, measure=cost)
    if as_json:
        print_json(found)
    else:
        print(card_text(found))


def new(
    slug: Annotated[str, typer.Argument(help="A planned paper's name, as `saccade list` has it.")],
    kind: Annotated[str, typer.Option(help=f"What the room will hold: {', '.join(catalogue.KINDS)}.")],
    root: Annotated[Path | None, typer.Option(help="The source checkout; this package's own by default.")] = None,
) -> None:
    """Lay out an empty room for a paper, with its test: `saccade new loftr --kind model`.

    The room runs from the start, on the plainest thing of its kind; the tests name what the paper must still give.
    """
    from saccade.catalogue.layout import lay_out

    for path in lay_out(slug, kind, root):
        print(path)
    print(f"Next: write the page and the mathematics, then `python -m pytest tests/test_parts.py -k {slug}`.")


def _families(known: set[str], asked: str | None) -> set[str]:
    """The family of that name, else those that have it in their name; all where none is asked for."""
    if asked is None or asked in known:
        return known if asked is None else {asked}
    found = {family for family in known if asked.strip().lower() in family}
    if not asked.strip() or not found:
        raise ValueError(f"family must be one of {'; '.join(sorted(known))}; or a part of one's name, got {asked!r}")
    return found
