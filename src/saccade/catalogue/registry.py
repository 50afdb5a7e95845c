"""Finding papers, rooms and parts."""

from __future__ import annotations

import ast
import importlib
import json
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.catalogue import kinds
from saccade.catalogue import options as _options
from saccade.catalogue.cards import AXES, CAPABILITIES, AuthorsPort, Paper, Part, Summary

if TYPE_CHECKING:
    from torch import nn

_PACKAGE = Path(__file__).parent.parent
#: the floors on which rooms stand
_FLOORS = ("attention", "vision", "fusion", "compress", "adapt", "models", "explain")
#: what every comparison is measured against; not one of the 119
_BASELINES = (
    {
        "number": 0,
        "slug": "softmax",
        "title": "Attention Is All You Need",
        "family": "baseline",
        "arxiv": "1706.03762",
    },
)

_registered: dict[str, Part] = {}


@lru_cache(maxsize=1)
def _all() -> dict[str, Paper]:
    rows = [*_BASELINES, *json.loads((_PACKAGE / "catalogue" / "papers.json").read_text(encoding="utf-8"))]
    found = {}
    for row in rows:
        path = _room_path(row["slug"])
        room = None if path is None else ".".join(("saccade", *path.relative_to(_PACKAGE).with_suffix("").parts))
        found[row["slug"]] = Paper(**row, state="ready" if room else "planned", room=room)
    return found


def _room_path(slug: str) -> Path | None:
    name = slug.replace("-", "_")
    for floor in _FLOORS:
        if (_PACKAGE / floor / f"{name}.py").is_file():
            return _PACKAGE / floor / f"{name}.py"
        if (_PACKAGE / floor / name / "__init__.py").is_file():
            return _PACKAGE / floor / name
    return None


def papers() -> list[Paper]:
    """The 119 papers, by number."""
    return [paper for paper in _all().values() if paper.number]


def paper(slug: str) -> Paper:
    """One paper (or the baseline `softmax`).

    Args:
        slug: of the paper.

    Raises:
        ValueError: if there is none of that name; the nearest names are in the message.
    """
    try:
        return _all()[slug]
    except (KeyError, TypeError):
        near = _options.nearest(str(slug), _all())
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `saccade list` names all"
        raise ValueError(f"no part is called {slug!r}{hint}") from None


def parts() -> list[Summary]:
    """What each existing room says of itself, read without importing it."""
    return [_summary(entry) for entry in _all().values() if entry.room]


def select(
    *,
    family: str | None = None,
    kind: str | None = None,
    supports: str | None = None,
    **taxonomy: str,
) -> list[Summary]:
    """The parts of a family, kind, capability or place in the taxonomy.

    Args:
        family: of the paper's list.
        kind: of `KINDS`.
        supports: a capability, of `CAPABILITIES`.
        **taxonomy: a value of one or more of `AXES`.

    Raises:
        ValueError: if a name is unknown.

    >>> from saccade import catalogue
    >>> [part.slug for part in catalogue.select(kind="sequence", family="baseline")]
    ['softmax']
    """
    if kind is not None:
        kind = kinds.named(kind)
    if supports is not None and supports not in CAPABILITIES:
        raise ValueError(f"supports must be one of {', '.join(CAPABILITIES)}, got {supports!r}")
    for axis, value in taxonomy.items():
        if value not in AXES.get(axis, ()):
            raise ValueError(f"{axis}={value!r} is not in the taxonomy {AXES}")
    return [
        part
        for part in parts()
        if (family is None or part.family == family)
        and (kind is None or part.kind == kind)
        and (supports is None or supports in part.supports)
        and all(part.taxonomy.get(axis) == value for axis, value in taxonomy.items())
    ]


@cache
def _summary(entry: Paper) -> Summary:
    path = _room_path(entry.slug)
    assert path is not None
    source = path / "__init__.py" if path.is_dir() else path
    literals: dict[str, Any] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_register(node.value, entry.slug):
            for keyword in node.value.keywords:
                if keyword.arg in Summary.__dataclass_fields__:
                    literals[keyword.arg] = ast.literal_eval(keyword.value)
    if "kind" not in literals:
        raise RuntimeError(f"{source} has no register({entry.slug!r}, kind=..., ...) at its bottom")
    return Summary(entry.slug, entry.title, entry.arxiv, entry.family, **literals)


def _is_register(call: ast.Call, slug: str) -> bool:
    return (
        isinstance(call.func, ast.Name)
        and call.func.id == "register"
        and bool(call.args)
        and isinstance(call.args[0], ast.Constant)
        and call.args[0].value == slug
    )


def register(slug: str, **fields: Any) -> Part:
    """Enter a part; stands at the bottom of its room. Fields are those of `Part`, less what the paper's list knows.

    The fields of `Summary` (kind, summary, supports, taxonomy ...) must be literals.

    Args:
        slug: of the paper.
        **fields: of `Part`, `kind` and `summary` among them.

    Raises:
        ValueError: if the paper, the kind, a capability or a place in the taxonomy is unknown.
    """
    entry = paper(slug)
    for capability in fields.get("supports", ()):
        if capability not in CAPABILITIES:
            raise ValueError(f"supports must be among {', '.join(CAPABILITIES)}, got {capability!r}")
    for axis, value in fields.get("taxonomy", {}).items():
        if value not in AXES.get(axis, ()):
            raise ValueError(f"taxonomy {axis}={value!r} is not in {AXES}")
    part = Part(slug, entry.title, entry.arxiv, entry.family, **fields, room=entry.room or "")
    _registered[slug] = part
    return part


def part(slug: str) -> Part:
    """The full registration of a part; imports its room.

    Args:
        slug: of the part.

    Raises:
        ValueError: if the name is unknown, or the paper has no room yet.
    """
    entry = paper(slug)
    if entry.room is None:
        raise ValueError(f"{slug!r} ({entry.title}) is planned and not built yet; `saccade list` shows what is ready")
    if slug not in _registered:
        importlib.import_module(entry.room)
    return _registered[slug]


def options(slug: str) -> dict[str, _options.Option]:
    """What `create` takes for a part: name -> (type, default), those included that its base classes take.

    Args:
        slug: of the part.

    Raises:
        ValueError: if the name is unknown, or there is nothing to build.

    >>> from saccade import catalogue
    >>> catalogue.options("moba")["top_k"]
    Option(type=<class 'int'>, default=3)
    """
    entry = part(slug)
    if entry.build is None:
        raise ValueError(f"{slug!r} is a function, not a module: import it from {paper(slug).room}")
    return _options.read(entry.build, entry.passes)


def check_options(slug: str, **arguments: Any) -> None:
    """Refuse what `create` would refuse for its name or type, without building.

    Args:
        slug: of the part.
        **arguments: of its constructor; some may be missing.

    Raises:
        ValueError: as `create`.
    """
    _options.check(slug, options(slug), arguments, complete=False)


def create(slug: str, **arguments: Any) -> nn.Module:
    """Build a part.

    Args:
        slug: of the part; `saccade.catalogue.parts()` has them all.
        **arguments: of its constructor; `saccade.catalogue.options(slug)` names them.

    Raises:
        ValueError: if the name or an option is unknown (the nearest are in the message) or an argument is wrong.

    >>> import saccade
    >>> saccade.create("moba", dim=32, num_heads=4).num_heads
    4
    """
    _options.check(slug, options(slug), arguments)
    build = part(slug).build
    assert build is not None
    try:
        return build(**arguments)
    except TypeError as error:
        raise ValueError(f"{slug}: {error}") from error


def port(slug: str, module: str) -> AuthorsPort:
    """The authors' port of one module.

    Args:
        slug: of the part.
        module: the recording's name, `AuthorsPort.module`.

    Raises:
        ValueError: if the part has no port of that name.
    """
    ports = {entry.module: entry for entry in part(slug).ports}
    if module not in ports:
        raise ValueError(f"{slug!r} has ports for {', '.join(ports) or 'nothing'}, not for {module!r}")
    return ports[module]
