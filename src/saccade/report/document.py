"""What pages have in common: they open offline, in light or dark, on a phone, and carry their pictures themselves."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STYLE", "document", "picture", "png", "scrolling_table", "token_text"]

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2430; }
:root { --line: #d8dce2; --soft: #f5f7f9; --muted: #5b6675; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181f; --line: #343c48; --soft: #1e242d; --ink: #dfe5ee; --muted: #9aa6b6; }
}
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; margin: 0; }
body { color: var(--ink); background: var(--paper); }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.muted { color: var(--muted); font-size: .9rem; }
.answer { background: var(--soft); border-left: 4px solid #0072B2; padding: .8rem 1.1rem; margin: 1.4rem 0; }
.answer p { margin: .25rem 0; }
.wide { overflow-x: auto; }
table { font-size: .92rem; border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid var(--ink); }
tbody tr.best { background: var(--soft); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " ▴"; } th[aria-sort=descending] button::after { content: " ▾"; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure.whole { grid-column: 1 / -1; }
figcaption { color: var(--muted); font-size: .88rem; } img { max-width: 100%; height: auto; }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


def document(title: str, sections: Sequence[str], script: str = "", style: str = "") -> str:
    """A whole page.

    Args:
        title: of the window.
        sections: HTML, below each other.
        script: JavaScript, without which the page says the same.
        style: CSS beside the usual one.
    """
    run = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{''.join(sections)}</main>{run}</body></html>\n"
    )


def png(figure: Figure, colors: int | None = None) -> bytes:
    """The figure as PNG, of so many colours: lines and letters are as clear with 256, in a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    if colors is not None:
        from PIL import Image  # comes with matplotlib

        drawn = Image.open(buffer).convert("RGB").quantize(colors, method=Image.Quantize.MAXCOVERAGE)
        buffer = io.BytesIO()
        drawn.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def picture(drawn: bytes, caption: str, dark: bytes | None = None, whole: bool = False) -> str:
    """A figure that carries its picture in itself.

    Args:
        drawn: a PNG file.
        caption: in words, for those too who do not see it.
        dark: the same for readers who like dark pages.
        whole: it takes the whole width.
    """
    image = f'<img src="{_data(drawn)}" alt="{escape(caption, quote=True)}">'
    if dark is not None:
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        image = f"<picture>{source}{image}</picture>"
    start = '<figure class="whole">' if whole else "<figure>"
    return f"{start}{image}<figcaption>{escape(caption)}</figcaption></figure>"


def scrolling_table(head: str, rows: Sequence[str], name: str) -> str:
    """A table that scrolls where it is wide, by the keyboard too.

    Args:
        head: HTML of the heading's cells.
        rows: HTML of the other rows.
        name: of the table, for those who do not see it.
    """
    start = f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name, quote=True)}">'
    return f"{start}<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def token_text(label: str) -> str:
    """A tokenizer's token as it reads.

    Args:
        label: as the tokenizer has it.
    """
    return label.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").removeprefix("##")


def _data(drawn: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(drawn).decode()}"
