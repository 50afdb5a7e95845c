"""The page of all parts: what each is for, its evidence, and how to load its authors' weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from saccade import catalogue
from saccade.catalogue import Summary
from saccade.report import claims

__all__ = ["families", "page"]


def page(docs: Path) -> str:
    """docs/parts.md.

    Args:
        docs: the folder in which the claims' results are.
    """
    shows = {slug: bool(record["holds"]) for slug, record in claims.read(docs).items()}
    ready = catalogue.parts()
    lines = [
        "# All parts",
        "",
        "Written by `make readme` from the catalogue; do not edit. `saccade show NAME` prints a part's card with its",
        "cost on your machine, `saccade claim NAME` measures its paper's claim. *Recordings* are tensors of the",
        "authors' own code with which ours agrees; a claim that does not show at laptop size says so",
        "([claims.md](claims.md)).",
        "",
    ]
    for family in dict.fromkeys(part.family for part in sorted(ready, key=lambda part: part.family)):
        rows = [_row(part, shows) for part in ready if part.family == family]
        lines += [f"## {family}", "", "| part | what it is for | kind | evidence | authors' weights |"]
        lines += ["|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def families() -> str:
    """A row a family: how many parts are ready and planned, and some of them."""
    papers = catalogue.papers()
    total = Counter(paper.family for paper in papers)
    rows = ["| family | ready | planned | for example |", "|---|---:|---:|---|"]
    for family, count in sorted(total.items()):
        ready = [paper.slug for paper in papers if paper.family == family and paper.state == "ready"]
        some = ", ".join(f"`{slug}`" for slug in ready[:4])
        rows.append(f"| {family} | {len(ready)} | {count - len(ready)} | {some} |")
    ready_in_all = sum(paper.state == "ready" for paper in papers)
    return "\n".join([*rows, f"| **all** | **{ready_in_all}** | **{len(papers) - ready_in_all}** | |"])


def _row(part: Summary, shows: Mapping[str, bool]) -> str:
    ports = [port.module for port in catalogue.part(part.slug).ports]
    evidence = [f"{len(ports)} recording{'s' if len(ports) > 1 else ''}"] if ports else []
    evidence.append(f"{len(part.invariants)} invariants")
    claim = {True: "claim shows", False: "**claim does not show**", None: "claim not run"}
    evidence.append(claim[shows.get(part.slug)])
    supports = f" ({', '.join(part.supports)})" if part.supports else ""
    link = f"`{part.slug}`" + (f" [{part.arxiv}](https://arxiv.org/abs/{part.arxiv})" if part.arxiv else "")
    return f"| {link} | {part.summary} | {part.kind}{supports} | {', '.join(evidence)} | {_weights(part.slug, ports)} |"


def _weights(slug: str, ports: list[str]) -> str:
    if not ports:
        return ""
    if len(ports) == 1 or "network" in ports:
        return f'`load_authors("{slug}", file)`'
    return f'`load_authors("{slug}", file, module=...)`: {", ".join(ports)}'
