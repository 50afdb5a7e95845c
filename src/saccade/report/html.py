"""One self-contained page of a comparison: opens offline, in light or dark, and carries its pictures in itself.

The only script sorts the table by the column whose heading is pressed; without it all else is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade import __version__, catalogue
from saccade.report.document import document, picture, png
from saccade.train.entries import NONE
from saccade.train.files import folder_name, write_bytes
from saccade.train.labels import IN_PLOTS, labels
from saccade.train.plotting import PANELS, attention_maps, darken, is_wide, panel

if TYPE_CHECKING:
    from saccade.train.records import MechanismRecord
    from saccade.train.result import CompareResult

#: sorts by what begins a cell as a number; what begins with none goes last
SORT = """
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentNode, column = [...head.parentNode.children].indexOf(head);
  const body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && column === 0);
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => { const text = row.cells[column].textContent;
    return column === 0 ? text : parseFloat(text.replaceAll(",", "")); };
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (column === 0) return up ? x.localeCompare(y) : y.localeCompare(x);
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
    return up ? x - y : y - x;
  });
  body.append(...rows);
}));
"""


def write_report(result: CompareResult, folder: str | Path) -> Path:
    """Write `report.html`, and its pictures as PNG files beside it; returns the page's path.

    Files are written whole or not at all.

    Raises:
        OSError: if the folder cannot be written.
        ImportError: if matplotlib is not installed.
    """
    folder = Path(folder)
    pictures, dark = panels(result)
    maps = {}
    for record in result.mechanisms:
        figure = attention_maps(record)
        if figure is not None:
            maps[record.name] = png(figure)
    for name, drawn in pictures.items():
        write_bytes(folder / f"{name}.png", drawn)
    for name, drawn in maps.items():
        write_bytes(folder / f"maps-{folder_name(name)}.png", drawn)
    path = folder / "report.html"
    write_bytes(path, page(result, pictures, maps, dark).encode("utf-8", "backslashreplace"))
    return path


def panels(result: CompareResult) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The panels as PNG by name, on light and on dark paper.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    light, dark = {}, {}
    for name in PANELS:
        figure = panel(result, name)
        light[name] = png(figure, colors=256)
        dark[name] = png(darken(figure), colors=256)
    return light, dark


def page(
    result: CompareResult, pictures: dict[str, bytes], maps: dict[str, bytes], dark: Mapping[str, bytes] | None = None
) -> str:
    """The page as HTML. `dark`: the pictures for readers who like dark pages."""
    dark = dark or {}
    machine = result.machine
    sections = [
        f"<h1>Which attention? {escape(result.title)}</h1>",
        f'<p class="muted">saccade {escape(__version__)} · {escape(machine_line(machine))}</p>',
        '<div class="answer">' + "".join(f"<p>{escape(line)}</p>" for line in result.answer()) + "</div>",
        "<h2>All figures</h2>",
        _table(result),
        _details(result),
        *(f'<p class="muted">{escape(line)}</p>' for line in _caption(result)),
        _notes(result),
        "<h2>Pictures</h2>",
        '<div class="pictures">'
        + "".join(
            picture(drawn, (PANELS[name].__doc__ or name).splitlines()[0], dark.get(name), whole=is_wide(result))
            for name, drawn in pictures.items()
        )
        + "</div>",
    ]
    if maps:
        along = "image by image" if _shows_images(result) else "by layer and head"
        sections += [
            f"<h2>{'What they make of images' if _shows_images(result) else 'Where they attend'}</h2>",
            f'<p class="muted">{_maps_caption(result)}</p>',
            *(f"<h3>{escape(name)}</h3>{picture(drawn, f'{name} {along}')}" for name, drawn in maps.items()),
        ]
    sections += [
        "<h2>What was compared</h2>",
        _mechanisms(result),
        "<h2>Settings</h2>",
        settings_of(result.config, result.machine),
    ]
    return document(f"saccade compare: {result.title}", sections, SORT)


def _shows_images(result: CompareResult) -> bool:
    """Pictures of what networks make of images stand in the place of attention maps."""
    return any(array.ndim == 4 for record in result.mechanisms for array in record.maps.values())


def _maps_caption(result: CompareResult) -> str:
    """What the maps show: weights between tokens have heads before rows and columns, a gate's map has none."""
    if _shows_images(result):
        return "On the first held-out images, after training."
    axes = {array.ndim for record in result.mechanisms for array in record.maps.values()}
    said = {
        3: "Effective weights: rows are queries, columns keys.",
        2: "What a gate multiplies the map with at each position of the image: the mean over channels.",
    }
    told = " ".join(text for number, text in said.items() if number in axes)
    return f"On one held-out sample. {told} Brightness is the square root of the size."


def _caption(result: CompareResult) -> list[str]:
    """What the labels of the table and of the plots leave out, a line each."""
    names = [record.name for record in result.mechanisms]
    return list(dict.fromkeys([*labels(names).caption, *labels(names, IN_PLOTS).caption]))


def _table(result: CompareResult) -> str:
    short = labels(record.name for record in result.mechanisms).of
    rows = [(short[record.name], *result.cells(record)) for record in result.ranked]
    return sortable(("mechanism", *result.headings()), rows, best=0)


def _details(result: CompareResult) -> str:
    """The second table, where there is one."""
    details = result.details()
    if details is None:
        return ""
    headings, rows = details
    short = labels(record.name for record in result.mechanisms).of
    lines = [[short[name], *cells] for name, *cells in rows]
    return sortable(headings, lines)


def sortable(headings: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """A table whose headings sort it.

    Args:
        headings, rows: what stands in it.
        best: the row that stands out.
    """
    head = "".join(f'<th scope="col"><button>{escape(heading)}</button></th>' for heading in headings)
    body = "".join(
        f"<tr{' class=best' if number == best else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _notes(result: CompareResult) -> str:
    notes = [f"{name}: {note}" for name, note in result.notes()]
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _mechanisms(result: CompareResult) -> str:
    return "<ul>" + "".join(f"<li>{escape(_description(record))}</li>" for record in result.mechanisms) + "</ul>"


def _description(record: MechanismRecord) -> str:
    options = ", ".join(f"{name}={value}" for name, value in record.options.items())
    text = f"{record.name}" + (f" ({options})" if options else "")
    if record.slug is None:
        return f"{text}: the caller's own"
    if record.slug == NONE:
        return f"{text}: the same model without a part"
    part = catalogue.part(record.slug)
    return f"{text}: {part.summary} {part.title}, arXiv {part.arxiv}. {part.complexity}."


def settings_of(config: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """What was asked, and where it ran, a line each.

    Args:
        config, machine: of a result.
    """
    rows = "\n".join(f"{name}: {value}" for name, value in {**config, **machine}.items())
    return f"<pre>{escape(rows)}</pre>"


def machine_line(machine: Mapping[str, object]) -> str:
    """Where it ran, in a line.

    Args:
        machine: of a result.
    """
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value not in ("", None))
