"""The page of an explanation: the parts coloured by each map, and beside it whether the map deserves belief.

Without a script: what a pointer shows of a token, the keyboard's focus shows too, and a screen reader reads.

Shape letters: H, W image, h, w grid of patches.
"""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import __version__
from saccade.explain.faithfulness import BETTER
from saccade.extras import new_figure
from saccade.report.document import document, picture, png
from saccade.train.files import write_text
from saccade.train.plotting import darken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.explain.explanation import Explanation

__all__ = ["page", "write_explanation"]

_STYLE = """
.tokens { line-height: 2.3; margin: .3rem 0 1rem; overflow-wrap: anywhere; }
.token { padding: .15rem .2rem; border-radius: .2rem; white-space: pre-wrap; position: relative; }
.token { background: color-mix(in srgb, var(--tint) calc(var(--much) * 75%), transparent); --tint: #D55E00; }
.token.against { --tint: #0072B2; }
.token:hover, .token:focus-visible { outline: 2px solid currentColor; }
.token:hover::after, .token:focus-visible::after { content: attr(data-says); position: absolute; left: 0; top: 1.9em; }
.token::after { background: var(--ink); color: var(--paper); padding: 0 .4rem; z-index: 1; font-size: .8rem; }
.belief { font-weight: 400; font-size: .9rem; color: var(--muted); }
"""


def write_explanation(
    found: Explanation, path: str | Path, *, model: str, target: str = "", image: Tensor | None = None
) -> Path:
    """Write the page, whole or not at all.

    Args:
        found: what `saccade.explain` gave.
        path: of the HTML file.
        model, target, image: as of `page`.

    Raises:
        OSError: if it cannot be written.
        ImportError: if matplotlib is not installed.
    """
    path = Path(path)
    write_text(path, page(found, model=model, target=target, image=image))
    return path


def page(found: Explanation, *, model: str, target: str = "", image: Tensor | None = None) -> str:
    """The page as HTML.

    Args:
        found: what `saccade.explain` gave.
        model: its name.
        target: the target in words; its number where empty.
        image: (3, H, W) in [0, 1], which the maps of an image are laid over.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if an image was explained and is not given.
    """
    if found.grid is not None and image is None:
        raise ValueError("image must be given: the maps of an image are laid over it")
    best = found.best()
    answer = [f"Explained: {_target(found, target)}."]
    if best is None:
        answer.append("No map here is better than random ones by most measures: believe none of them.")
    else:
        tops = ", ".join(label for label, _ in found.top(best))
        answer.append(f"The map that deserves belief most is {best}; most relevant to it: {tops}.")
    believed = set(found.faithfulness.believed())
    sections = [
        f"<h1>What did {escape(model)} look at?</h1>",
        f'<p class="muted">saccade {escape(__version__)} · {len(found.labels)} parts</p>',
        '<div class="answer">' + "".join(f"<p>{escape(line)}</p>" for line in answer) + "</div>",
        "<h2>Maps</h2>",
        *(_map(found, name, image, name in believed) for name in found.maps),
        "<h2>Do they deserve belief?</h2>",
        _measures(found),
        '<p class="muted">A star marks what none of the random maps reaches. Deletion and insertion are areas under '
        "the curves below; comprehensiveness and sufficiency are falls of the score without the top parts, and with "
        "them alone; sensitivity is the correlation of relevance and fall over random sets of parts.</p>",
        '<div class="pictures">' + _drawn(found.faithfulness.plot, "Curves; random maps are grey") + "</div>",
        "<h2>Do they agree?</h2>",
        _agreement(found),
        "<h2>Head by head</h2>",
        '<div class="pictures">'
        + _drawn(lambda: heads(found), "Attention of what is read to each part; a row a head, layers from the top")
        + "</div>",
    ]
    return document(f"saccade explain: {model}", sections, style=_STYLE)


def heads(found: Explanation) -> Figure:
    """Attention of every head: rows are heads, layers from the top; columns are parts."""
    layers, count, parts = found.heads.shape
    figure = new_figure(min(14.0, 3 + 0.25 * parts), min(20.0, 1.4 + 0.16 * layers * count))
    axes = figure.subplots()
    axes.imshow(found.heads.flatten(0, 1).sqrt(), aspect="auto", cmap="magma", interpolation="nearest")
    axes.set_yticks([count * i + (count - 1) / 2 for i in range(layers)], [f"layer {i}" for i in range(layers)])
    for i in range(1, layers):
        axes.axhline(count * i - 0.5, color="white", linewidth=0.8)
    if parts <= 64 and found.grid is None:
        axes.set_xticks(range(parts), found.labels, rotation=90, fontsize=8)
    return figure


def _target(found: Explanation, words: str) -> str:
    if found.target is None:
        return "the embedding, by its likeness to that of the whole input"
    row, column = found.target
    where = "" if row is None else f" at position {row}"
    return f"{words or f'logit {column}'}{where}, probability {found.probability:.3f}"


def _map(found: Explanation, name: str, image: Tensor | None, believed: bool) -> str:
    belief = "deserves belief here" if believed else "no better than chance by most measures"
    head = f'<h3>{escape(name)} <span class="belief">{belief}</span></h3>'
    relevance = found.maps[name]
    if image is not None and found.grid is not None:
        caption = f"{name}: bright where it is relevant"
        return (
            head + '<div class="pictures">' + picture(_overlay(image, relevance.view(found.grid)), caption) + "</div>"
        )
    most = float(relevance.abs().max()) or 1.0
    tokens = "".join(
        f'<span class="token{" against" * (value < 0)}" tabindex="0" style="--much:{abs(value) / most:.3f}" '
        f'data-says="{value:.4f}" aria-label="{escape(_shown(label), quote=True)}, relevance {value:.4f}">'
        f"{escape(_shown(label))}</span>"
        for label, value in zip(found.labels, relevance.tolist(), strict=True)
    )
    return f'{head}<p class="tokens">{tokens}</p>'


def _shown(label: str) -> str:
    """A tokenizer's token as it reads."""
    return label.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").removeprefix("##")


def _measures(found: Explanation) -> str:
    def row(name: str, measures: dict[str, float], stars: dict[str, bool]) -> str:
        cells = "".join(f"<td>{measures[k]:.3f}{' *' * stars.get(k, False)}</td>" for k in BETTER)
        return f"<tr><td>{escape(name)}</td>{cells}</tr>"

    known = found.faithfulness
    head = "".join(f'<th scope="col">{name} {"↑" if sign > 0 else "↓"}</th>' for name, sign in BETTER.items())
    rows = [row(name, each.figures(), known.beyond_chance(name)) for name, each in known.maps.items()]
    rows.append(row("random", known.chance(), {}))
    return _table(f'<th scope="col">map</th>{head}', rows)


def _agreement(found: Explanation) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.maps)
    rows = [
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{value:.2f}</td>" for value in row.tolist()) + "</tr>"
        for name, row in zip(found.maps, found.agreement, strict=True)
    ]
    return _table(f'<th scope="col">rank correlation</th>{head}', rows)


def _table(head: str, rows: list[str]) -> str:
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _overlay(image_3HW: Tensor, relevance_hw: Tensor) -> bytes:
    """The image, dark where nothing is relevant."""
    from PIL import Image  # comes with matplotlib

    low, high = relevance_hw.min(), relevance_hw.max()
    share = ((relevance_hw - low) / (high - low).clamp(min=1e-12))[None, None]
    share_HW = F.interpolate(share, size=tuple(image_3HW.shape[1:]), mode="bilinear", align_corners=False)[0, 0]
    shown = image_3HW.clamp(0, 1) * (0.15 + 0.85 * share_HW)
    buffer = io.BytesIO()
    Image.fromarray((255 * shown).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _drawn(make: Any, caption: str) -> str:
    """A figure on light and on dark paper."""
    figure = make()
    light = png(figure, colors=256)
    return picture(light, caption, png(darken(figure), colors=256), whole=True)
