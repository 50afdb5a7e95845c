"""An empty room in the one form that all rooms have, with its test: what `saccade new` lays out.

The room runs from the start, on the plainest thing of its kind, so that `saccade.create` and tests/test_parts.py find
it at once; what the paper must give is empty, and the tests name it.
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from textwrap import fill

from saccade.catalogue import kinds
from saccade.catalogue.patterns import PATTERNS
from saccade.catalogue.registry import paper

_PAGE = Template('''\
"""$title

arXiv $arxiv. <The idea in a sentence.>

    <the equation, in the paper's symbols>

| here   | paper | default |
|--------|-------|---------|
| <name> | <symbol> | <value> |

Source of what the paper leaves open: <what was chosen, and why>.
"""

$imports

__all__ = ["$Class"]

register(
    "$slug",
    kind="$kind",
    summary="",
    supports=(),
    taxonomy={},
    efficiency="",
    complexity="",
    invariants=(),
    build=$Class,
    example=$example,
$inputs)
''')

_AUTHORS = Template('''\
"""How the authors' modules map to ours: an `AuthorsPort` for each of their recordings in tests/golden."""

from saccade.catalogue import AuthorsPort

PORTS: tuple[AuthorsPort, ...] = ()
''')

_CLAIM = Template('''\
"""The paper's central claim, at a size of seconds to two minutes, on data that come with the dependencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saccade.catalogue import Claim, ClaimResult

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def claim(lab: Lab) -> ClaimResult:
    """<What is built, trained and compared; what would show the claim.>"""
    raise NotImplementedError("the experiment of $slug")


CLAIM = Claim(paper="", expected="", run=claim)
''')

_TEST = Template('''\
"""What the paper implies, and bad arguments. The rest is tested by being registered: tests/test_parts.py."""

from __future__ import annotations

import pytest

from saccade import catalogue
from saccade.$floor.$name import $Class


def test_the_card_is_written() -> None:
    """Then this test goes, and one for each of the card's invariants stands here, named by what it shows."""
    part = catalogue.part("$slug")
    assert not part.kind.lacking(part)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be"):
        $Class(0)
''')

#: of a floor on which there has been no room
_FLOOR = Template('"""Parts of kind $kinds, a room each."""\n')


def lay_out(slug: str, kind: str, root: str | Path | None = None) -> list[Path]:
    """Write an empty room of a planned paper, and its test; returns the files.

    Args:
        slug: the paper's name in the catalogue.
        kind: what the room will hold, one of `saccade.catalogue.KINDS`.
        root: a source checkout; the one that this package was imported from where None.

    Raises:
        ValueError: if the paper or the kind is unknown, the paper has its room, or `root` is no checkout.
    """
    entry = paper(slug)
    if entry.room is not None:
        raise ValueError(f"{slug!r} has its room already: {entry.room}")
    pattern, name = PATTERNS[kinds.named(kind)], slug.replace("-", "_")
    root = Path(__file__).parents[3] if root is None else Path(root)
    if not (root / "src" / "saccade").is_dir() or not (root / "tests").is_dir():
        raise ValueError(f"rooms are laid out in a source checkout, with src/saccade and tests in it; {root} is none")
    module = "".join(word[:1].upper() + word[1:] for word in slug.split("-"))
    registers = "from saccade.catalogue import register"
    takes = f"from saccade.{pattern.floor}.{name}.{pattern.file} import {module}"
    words = {
        "floor": pattern.floor,
        "file": pattern.file,
        "example": pattern.example,
        "imports": ("import torch\n\n" if pattern.inputs else "") + "\n".join(sorted([registers, takes])),
        "inputs": f"    inputs=lambda module, size: {pattern.inputs},\n" if pattern.inputs else "",
        "kinds": " or ".join(kind for kind, other in PATTERNS.items() if other.floor == pattern.floor),
        "slug": slug,
        "kind": kind,
        "name": name,
        "title": fill(f"{entry.title.rstrip('.')}.", 110),
        "arxiv": entry.arxiv,
        "Class": module,
    }
    floor = root / "src" / "saccade" / pattern.floor
    room = floor / name
    texts = {
        room / "__init__.py": _PAGE,
        room / f"{pattern.file}.py": Template(pattern.text),
        room / "authors.py": _AUTHORS,
        room / "claim.py": _CLAIM,
        root / "tests" / pattern.floor / f"test_{name}.py": _TEST,
    }
    if not (floor / "__init__.py").exists():
        texts = {floor / "__init__.py": _FLOOR, **texts}
    for path in texts:
        if path.exists():
            raise ValueError(f"{path} is there already")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.substitute(words), encoding="utf-8")
    return list(texts)
