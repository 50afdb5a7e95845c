"""Write what comes from the catalogue and the source into README.md and docs/; `--check` says what is stale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from saccade.report import architecture, claims, parts, real_models, sizes

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"


def written(path: Path, what: str, now: str) -> str:
    """A page with `now` between its marks for `what`."""
    begin, end = f"<!-- {what}: written by tools/readme.py -->", f"<!-- end of {what} -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    return f"{before}{begin}\n{now}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the table is stale")
    check = parser.parse_args().check
    house = DOCS / "architecture.md"
    pages = {
        README: written(README, "families", parts.families()),
        DOCS / "parts.md": parts.page(DOCS),
        house: written(house, "floors", architecture.drawing()),
        DOCS / "sizes.md": sizes.page(),
        DOCS / real_models.PAGE: real_models.page(DOCS),
    }
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
