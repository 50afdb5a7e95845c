"""The page: a table, and a section of pictures for each gate.

Shape letters: P photographs, C channels, H and W height and width, S side of a square picture.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from saccade import __version__, catalogue
from saccade.report.gallery.drawing import _greys, bars_of, colours_of_maps, data_url, png_of, stretched
from saccade.report.gallery.exhibits import ATTENDED, FROM_MIDDLE, MULTIPLIED, NUMBERS, Exhibit, Gallery, Picture
from saccade.train.files import write_text


def page_path(path: str | Path) -> Path:
    """The page itself: `gallery.html` where `path` is a folder.

    Args:
        path: of a page (.html, .htm), or a folder.
    """
    path = Path(path)
    return path if path.suffix in (".html", ".htm") else path / "gallery.html"


def write_gallery(gallery: Gallery, path: str | Path) -> Path:
    """Write the page to `page_path(path)`, which is returned, whole or not at all.

    Args:
        gallery: of `make`.
        path: the page, or the folder that it goes to.

    Raises:
        OSError: if it cannot be written.
        ImportError: if matplotlib is not installed.
    """
    path = page_path(path)
    write_text(path, page(gallery))
    return path


_STYLE = """
:root { color-scheme: light dark; --line: #d8dce2; --soft: #f5f7f9; --ink: #1c2430; --muted: #5b6675; --paper: #fff;
  --bar: #0072B2; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --line: #39414d; --soft: #1d232c; --ink: #e6eaf0; --muted: #a3adba;
  --paper: #12161c; --bar: #56B4E9; --link: #7fc4f5; } }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink);
  background: var(--paper); margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .2rem; }
a { color: var(--link); } .muted { color: var(--muted); font-size: .9rem; } p { margin: .4rem 0; }
.note { background: var(--soft); border-left: 4px solid var(--bar); padding: .6rem 1.1rem; margin: 1.2rem 0; }
.wide { overflow-x: auto; }
table { font-size: .92rem; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); }
.row { display: grid; gap: .5rem; margin: .5rem 0 .2rem; min-width: 720px; }
figure { margin: 0; } figcaption { color: var(--muted); font-size: .78rem; line-height: 1.3; }
.picture { position: relative; aspect-ratio: 1; background-size: cover; overflow: hidden; border-radius: 3px;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.picture img { position: absolute; inset: 0; width: 100%; height: 100%; opacity: .68; }
.picture:hover img { opacity: 0; }
.picture i { position: absolute; left: 50%; top: 50%; width: 8px; height: 8px; margin: -6px; border: 2px solid #fff;
  outline: 1px solid #000; border-radius: 50%; }
.picture b { position: absolute; box-sizing: border-box; border: 1.5px dashed #fff; outline: 1px dashed #000; }
.scale { height: .7rem; width: 14rem; display: inline-block; vertical-align: middle; border-radius: 3px;
  print-color-adjust: exact; }
svg { display: block; width: 100%; height: 2.6rem; background: var(--soft); border-radius: 3px; }
svg rect { fill: var(--bar); }
"""


def page(gallery: Gallery) -> str:
    """The page as HTML; it carries its pictures in itself and needs no script.

    Args:
        gallery: of `make`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    colours = colours_of_maps()
    backgrounds = "".join(
        f".p{number} {{ background-image: url({data_url(png_of(picture.image_SS, _greys()))}); }}\n"
        for number, picture in enumerate(gallery.pictures)
    )
    stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours[::9])
    row = f"grid-template-columns: repeat({len(gallery.pictures)}, 1fr)"
    sections = [
        "<h1>Where each gate looks</h1>",
        f'<p class="muted">saccade {escape(__version__)}, written by <code>saccade gallery</code>; '
        "nothing here is typed by hand.</p>",
        _note(gallery),
        _table(gallery),
        '<h2>The photographs</h2><p class="muted">In grey, as the network sees them; dashed: the covered square.</p>',
        f'<div class="wide"><div class="row" style="{row}">',
        *(
            f"<figure>{_framed(number, picture, '', _alt(picture))}<figcaption>{escape(_caption(picture))}"
            "</figcaption></figure>"
            for number, picture in enumerate(gallery.pictures)
        ),
        "</div></div>",
        f'<p class="muted">Low <span class="scale" style="background: linear-gradient(90deg, {stops})"></span> high, '
        "from the first to the 99th percentile of each picture, its rim left out (maps are padded there): see "
        "the lowest and highest value below a picture before you read much into it. Under the pointer the photograph "
        "shows alone.</p>",
        *(_exhibit(exhibit, gallery, row, colours) for exhibit in gallery.exhibits if exhibit.slug is not None),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>saccade: where each gate looks</title><style>{_STYLE}{backgrounds}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _note(gallery: Gallery) -> str:
    size, found = gallery.settings, gallery.machine
    names = ", ".join(dict.fromkeys(picture.name for picture in gallery.pictures))
    place = found["accelerator"] or f"{found['processor']}, {found['threads']} of {found['cores']} cores"
    sentences = (
        f"A small CNN ({gallery.parameters:,} parameters) learns from which of {size.photographs} photographs of "
        f"scikit-image ({names}) a grey crop of {size.crop} x {size.crop} pixels comes. A square of three to five "
        "eighths of the crop's side is covered with pixels of another photograph in random order; contrast and "
        "brightness vary.",
        "Each gate stands at the same place (after its third convolution, at a quarter of the resolution), put "
        "there by <code>saccade.insert</code> with its default arguments but for those in its name. The network starts "
        f"from the same weights and sees the same {size.steps} batches of {size.batch} crops, seed {size.seed}. "
        f"Accuracy is that on {size.held_out} fresh crops of the same photographs. One seed has no spread: small "
        "differences mean nothing.",
        "The pictures are <code>saccade.attention_map</code> of the trained gate on whole photographs of "
        f"{size.side} x {size.side} pixels, larger than the crops.",
        f"{gallery.day}, {escape(str(place))}, torch {escape(str(found['torch']))}.",
    )
    return '<div class="note">' + "".join(f"<p>{sentence}</p>" for sentence in sentences) + "</div>"


def _table(gallery: Gallery) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in gallery.headings)
    rows = [gallery.cells(exhibit) for exhibit in gallery.exhibits]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="muted">Map on covered / elsewhere: the mean of the first picture at positions that are wholly '
        "covered, over that at the same positions where they are not, on the fresh crops. Below 1 the gate looks away "
        "from the covered square, at 1 it takes no notice; empty: it has no picture.</p>"
    )


def _exhibit(exhibit: Exhibit, gallery: Gallery, row: str, colours: list[tuple[int, int, int]]) -> str:
    part = catalogue.part(str(exhibit.slug))
    lines = [
        f"<h2>{escape(exhibit.name)}</h2>",
        f'<p class="muted">{escape(part.summary)} {escape(part.title)}, '
        f'<a href="https://arxiv.org/abs/{escape(part.arxiv, quote=True)}">arXiv {escape(part.arxiv)}</a>.</p>',
    ]
    for what, maps_PHW in exhibit.maps.items():
        lines.append(f"<p>{escape(what.capitalize())}, {escape(NUMBERS[what])}</p>")
        if bool((maps_PHW == maps_PHW[:1]).all()):
            lines.append('<p class="muted">The same on every photograph: these weights do not depend on the input.</p>')
        lines.append(f'<div class="wide"><div class="row" style="{row}">')
        for number, (picture, map_HW) in enumerate(zip(gallery.pictures, maps_PHW, strict=True)):
            spread = f"{_number(map_HW.min())} to {_number(map_HW.max())}"
            alt = f"{exhibit.name}, {what}, on {_alt(picture)}: {spread}, highest {_where(map_HW)}"
            shown_HW = map_HW.sqrt() if what in (ATTENDED, FROM_MIDDLE) else map_HW
            framed = _framed(number, picture, data_url(png_of(stretched(shown_HW), colours)), alt, what == FROM_MIDDLE)
            lines.append(f"<figure>{framed}<figcaption>{spread}</figcaption></figure>")
        lines.append("</div></div>")
    if exhibit.channels_PC is not None:
        lines.append(f"<p>{escape(MULTIPLIED.capitalize())}, channel by channel, the mean over positions</p>")
        lines.append(f'<div class="wide"><div class="row" style="{row}">')
        top = exhibit.channels_PC.max().item()
        for picture, channels_C in zip(gallery.pictures, exhibit.channels_PC, strict=True):
            spread = f"{_number(channels_C.min())} to {_number(channels_C.max())}"
            alt = f"{exhibit.name}, weights of {len(channels_C)} channels on {_alt(picture)}: {spread}"
            lines.append(f"<figure>{bars_of(channels_C, top, alt)}<figcaption>{spread}</figcaption></figure>")
        lines.append("</div></div>")
    return "".join(lines)


def _caption(picture: Picture) -> str:
    return picture.name if picture.covered is None else f"{picture.name}, covered"


def _alt(picture: Picture) -> str:
    return picture.name if picture.covered is None else f"{picture.name} with a covered square"


def _framed(number: int, picture: Picture, source: str, alt: str, middle: bool = False) -> str:
    """A photograph, over it the picture `source` if there is one, the covered square and the ring in the middle."""
    text = escape(alt, quote=True)
    inside = f'<img src="{source}" alt="{text}">' if source else ""
    if picture.covered is not None:
        S = picture.image_SS.shape[0]
        top, left, side = (f"{100 * length / S:.2f}%" for length in picture.covered)
        inside += f'<b style="top: {top}; left: {left}; width: {side}; height: {side}"></b>'
    inside += "<i></i>" if middle else ""
    label = "" if source else f' role="img" aria-label="{text}"'
    return f'<div class="picture p{number}"{label}>{inside}</div>'


def _number(value: Tensor) -> str:
    """Three decimals, none of a hundred and more."""
    return f"{value.item():,.0f}" if abs(value.item()) >= 100 else f"{value.item():.3f}"


def _where(map_HW: Tensor) -> str:
    """In words, the ninth of a map with the largest mean."""
    number = int(F.adaptive_avg_pool2d(map_HW[None], 3).argmax())
    row, column = ("at the top", "in the middle", "at the bottom")[number // 3], ("left", "", "right")[number % 3]
    return f"{row} {column}".strip()
