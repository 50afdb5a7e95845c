"""Write what comes from the catalogue: README.md, docs/sizes.md, docs/claims.md; `--check` says what is stale."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from saccade import catalogue
from saccade.report import claims, sizes

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
BEGIN, END = "<!-- parts: written by tools/readme.py -->", "<!-- end of parts -->"


def table() -> str:
    """The parts that are ready, then each family's count."""
    shows = {slug: record["holds"] for slug, record in claims.read(DOCS).items()}
    rows = ["| part | what it is | paper | supports | proved by |", "|---|---|---|---|---|"]
    for part in catalogue.parts():
        ports = len(catalogue.part(part.slug).ports)
        proof = [f"{ports} authors' recording{'s' if ports > 1 else ''}"] if ports else []
        proof.append(f"{len(part.invariants)} invariants")
        if shows.get(part.slug):
            proof.append("claim")
        link = f"[{part.arxiv}](https://arxiv.org/abs/{part.arxiv})"
        supports = ", ".join(part.supports) or part.kind
        rows.append(f"| `{part.slug}` | {part.summary} | {link} | {supports} | {', '.join(proof)} |")
    papers = catalogue.papers()
    ready = Counter(paper.family for paper in papers if paper.state == "ready")
    total = Counter(paper.family for paper in papers)
    rows += ["", "| family | ready | planned |", "|---|---|---|"]
    rows += [f"| {family} | {ready[family]} | {count - ready[family]} |" for family, count in sorted(total.items())]
    rows.append(f"| **all** | **{sum(ready.values())}** | **{len(papers) - sum(ready.values())}** |")
    return "\n".join(rows)


def written(text: str) -> str:
    """The README with the table of now."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is stale")
    check = parser.parse_args().check
    pages = {README: written(README.read_text(encoding="utf-8")), DOCS / "sizes.md": sizes.page()}
    if records := claims.read(DOCS):
        pages[DOCS / claims.PAGE] = claims.page(list(records.values()))
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.name} is stale: run `make readme`", file=sys.stderr)
        else:
            path.write_text(pages[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
