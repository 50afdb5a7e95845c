"""The page of an explanation: the parts coloured by each map, and beside it whether the map deserves belief.

Without a script: what a pointer shows of a token, the keyboard's focus shows too, and a screen reader reads.

Shape letters: M parts, H, W image, h, w grid of patches.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import __version__
from saccade.explain.faithfulness import BETTER, Faithfulness
from saccade.explain.sanity import SAME, Sanity
from saccade.extras import new_figure
from saccade.report import circuit
from saccade.report.document import document, picture, png, scrolling_table, token_text
from saccade.train.files import write_text
from saccade.train.plotting import darken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.explain.explanation import Explanation

__all__ = ["page", "write_explanation"]

_STYLE = """
.tokens { line-height: 2.3; margin: .3rem 0 1rem; overflow-wrap: anywhere; overflow-x: clip; }
.token { padding: .15rem .2rem; border-radius: .2rem; white-space: pre-wrap; position: relative; }
.token { background: color-mix(in srgb, var(--tint) calc(var(--much) * 75%), transparent); --tint: #D55E00; }
.token.against { --tint: #0072B2; }
.token:hover, .token:focus-visible { outline: 2px solid currentColor; }
.token:hover::after, .token:focus-visible::after { content: attr(data-says); position: absolute; left: 0; top: 1.9em; }
.token::after { background: var(--ink); color: var(--paper); padding: 0 .4rem; z-index: 1; font-size: .8rem; }
.token::after { white-space: nowrap; }
.belief { font-weight: 400; font-size: .9rem; color: var(--muted); }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
nav a { margin-right: .9rem; } a { color: inherit; } .map { max-width: 440px; }
.wide:focus-visible { outline: 2px solid #0072B2; }
"""

#: pictures that maps are laid over: (3, H, W) in [0, 1], one for each image that was explained
Images = Tensor | Sequence[Tensor] | None


def write_explanation(
    found: Explanation, path: str | Path, *, model: str, target: str = "", image: Images = None
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


def page(found: Explanation, *, model: str, target: str = "", image: Images = None) -> str:
    """The page as HTML.

    Args:
        found: what `saccade.explain` gave.
        model: its name.
        target: the target in words; its number where empty.
        image: (3, H, W) in [0, 1], which the maps of an image are laid over; as many as images were explained.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if an image was explained and is not given.
    """
    images = [] if image is None else [image] if isinstance(image, Tensor) else list(image)
    wanted = sum(segment.kind == "image" for segment in found.segments)
    if len(images) != wanted:
        raise ValueError(f"image must be given for each of {wanted}, which the maps are laid over; got {len(images)}")
    best = found.best()
    answer = [f"Explained: {_target(found, target)}."]
    if found.faithfulness is None:
        answer.append("Whether the maps deserve belief was not measured.")
    elif best is None:
        answer.append("No map here is better than random ones by most measures: believe none of them.")
    else:
        tops = ", ".join(label for label, _ in found.top(best))
        answer.append(f"The map that deserves belief most is {best}; most relevant to it: {tops}.")
    if found.remark:
        answer.append(f"There are no maps of attention: {found.remark}.")
    if found.sum is not None:
        answer.append(f"The map tensorlens is a sum: {found.sum}.")
    measured = found.faithfulness
    sections = [
        f"<h1>What did {escape(model)} look at?</h1>",
        f'<p class="muted">saccade {escape(__version__)} · {len(found.labels)} parts</p>',
        '<div class="answer">' + "".join(f"<p>{escape(line)}</p>" for line in answer) + "</div>",
        "<h2>Maps</h2>",
        _links(found),
        *(_map(found, i, images) for i in range(len(found.maps))),
        '<div id="belief"></div>',
        *(() if measured is None else _belief(measured)),
        *(() if found.sanity is None else _sane(found.sanity)),
        "<h2>Do they agree?</h2>",
        _agreement(found),
        *(_heads(found) if found.heads else ()),
        *(() if found.circuit is None else circuit.sections(found.circuit, found.causal)),
    ]
    style = _STYLE if found.circuit is None else _STYLE + circuit.STYLE
    return document(f"saccade explain: {model}", sections, style=style)


def _heads(found: Explanation) -> list[str]:
    """A picture of every head of each tower."""
    towers = [segment.kind for segment in found.segments] if len(found.heads) > 1 else [""]
    shown = [
        _drawn(
            partial(heads, found, i),
            f"{kind and f'{kind}: '}attention of what is read to each part; a row a head, layers from the top",
        )
        for i, kind in enumerate(towers)
    ]
    return ["<h2>Head by head</h2>", '<div class="pictures">', *shown, "</div>"]


def _belief(measured: Faithfulness) -> list[str]:
    """Measures and curves of the maps."""
    return [
        "<h2>Do they deserve belief?</h2>",
        _measures(measured),
        '<p class="muted">A star marks what none of the random maps reaches. Deletion and insertion are areas under '
        "the curves below; comprehensiveness and sufficiency are falls of the score without the top parts, and with "
        "them alone; sensitivity is the correlation of relevance and fall over random sets of parts.</p>",
        '<div class="pictures">' + _drawn(measured.plot, "Curves; random maps are grey") + "</div>",
    ]


def _sane(checked: Sanity) -> list[str]:
    """What became of the maps as the weights were randomised."""
    head = "".join(f'<th scope="col">{escape(stage)}</th>' for stage in checked.stages)
    rows = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{value:.2f}</td>" for value in values.tolist())
        + f"<td>{'yes' if checked.passed(name) else 'no'}</td></tr>"
        for name, values in checked.agreement.items()
    ]
    return [
        "<h2>Do they depend on what was learned?</h2>",
        scrolling_table(
            f'<th scope="col">random weights</th>{head}<th scope="col">depends on them</th>',
            rows,
            "agreement of maps with themselves as weights are randomised",
        ),
        '<p class="muted">Rank correlation of each map with itself, after the weights from the top down to a layer '
        f"were shuffled. One that agrees by {SAME} or more when all are random does not show what was learned.</p>",
        '<div class="pictures">' + _drawn(checked.plot, "Agreement as weights are randomised from the top") + "</div>",
    ]


def heads(found: Explanation, tower: int = 0) -> Figure:
    """Attention of every head of a tower: rows are heads, layers from the top; columns are parts."""
    shown = found.heads[tower]
    layers, count, parts = shown.shape
    first = sum(each.shape[2] for each in found.heads[:tower])
    figure = new_figure(min(14.0, 3 + 0.25 * parts), min(20.0, 1.4 + 0.16 * layers * count))
    axes = figure.subplots()
    axes.imshow(shown.flatten(0, 1).sqrt(), aspect="auto", cmap="magma", interpolation="nearest")
    axes.set_yticks([count * i + (count - 1) / 2 for i in range(layers)], [f"layer {i}" for i in range(layers)])
    for i in range(1, layers):
        axes.axhline(count * i - 0.5, color="white", linewidth=0.8)
    if parts <= 64 and found.grid is None:
        axes.set_xticks(range(parts), found.labels[first : first + parts], rotation=90, fontsize=8)
    return figure


def _target(found: Explanation, words: str) -> str:
    if found.target is None:
        return "the embedding, by its likeness to that of the whole input"
    row, column = found.target
    where = "" if row is None else f" at position {row}"
    return f"{words or f'logit {column}'}{where}, {found.score_is} {found.probability:.3f}"


def _links(found: Explanation) -> str:
    """From the top to each map: many tokens lie between them."""
    links = "".join(f'<a href="#map-{i}">{escape(name)}</a>' for i, name in enumerate(found.maps))
    return f'<nav aria-label="maps">{links}</nav>'


def _map(found: Explanation, number: int, images: Sequence[Tensor]) -> str:
    """One map: text coloured, images under it, each segment where it stands."""
    name = list(found.maps)[number]
    belief = "deserves belief here" if name in found.believed() else "no better than chance by most measures"
    if not found.depends_on_weights(name):
        belief = "stays as it is when all weights are random"
    said = "" if found.faithfulness is None else f' <span class="belief">{belief}</span>'
    after = f"map-{number + 1}" if number + 1 < len(found.maps) else "belief"
    shown = [
        f'<h3 id="map-{number}">{escape(name)}{said}</h3>',
        f'<a class="skip" href="#{after}">skip the parts of {escape(name)}</a>',
    ]
    relevance, left = found.maps[name], iter(images)
    # what has a sign is tinted from nothing, what has none from the least, as pictures are
    signed = bool((relevance < 0).any())
    tint = relevance / relevance.abs().max() if signed else _share(relevance)
    for segment in found.segments:
        values = relevance[segment.start : segment.stop]
        if segment.grid is None:
            labels = found.labels[segment.start : segment.stop]
            shown.append(_tokens(labels, tint[segment.start : segment.stop], values))
            continue
        values_hw = values.view(segment.grid)
        drawn = _overlay(next(left), values_hw) if segment.kind == "image" else _heat(values_hw)
        kind = "map" if segment.kind == "map" else "pictures"
        caption = f"{name}: bright where it is relevant, most at {_places(values_hw)}"
        shown.append(f'<div class="{kind}">{picture(drawn, caption)}</div>')
    return "".join(shown)


def _tokens(labels: Sequence[str], share_M: Tensor, relevance_M: Tensor) -> str:
    spans = "".join(
        f'<span class="token{" against" * (value < 0)}" role="img" tabindex="0" style="--much:{abs(share):.3f}" '
        f'data-says="{value:.4f}" aria-label="{escape(token_text(label), quote=True)}, relevance {value:.4f}">'
        f"{escape(token_text(label))}</span>"
        for label, share, value in zip(labels, share_M.tolist(), relevance_M.tolist(), strict=True)
    )
    return f'<p class="tokens">{spans}</p>'


def _places(relevance_hw: Tensor, count: int = 3) -> str:
    """The most relevant cells in words, for those too who do not see them."""
    wide = relevance_hw.shape[1]
    chosen = relevance_hw.flatten().topk(min(count, relevance_hw.numel())).indices.tolist()
    places = ", ".join(f"row {i // wide + 1} column {i % wide + 1}" for i in chosen)
    return f"{places} of {relevance_hw.shape[0]} x {wide}"


def _measures(known: Faithfulness) -> str:
    def row(name: str, measures: dict[str, float], stars: dict[str, bool]) -> str:
        cells = "".join(f"<td>{measures[k]:.3f}{' *' * stars.get(k, False)}</td>" for k in BETTER)
        return f"<tr><td>{escape(name)}</td>{cells}</tr>"

    head = "".join(f'<th scope="col">{name} {"↑" if sign > 0 else "↓"}</th>' for name, sign in BETTER.items())
    rows = [row(name, each.figures(), known.beyond_chance(name)) for name, each in known.maps.items()]
    rows.append(row("random", known.chance(), {}))
    return scrolling_table(f'<th scope="col">map</th>{head}', rows, "faithfulness of the maps")


def _agreement(found: Explanation) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.maps)
    rows = [
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{value:.2f}</td>" for value in row.tolist()) + "</tr>"
        for name, row in zip(found.maps, found.agreement, strict=True)
    ]
    return scrolling_table(f'<th scope="col">rank correlation</th>{head}', rows, "agreement of the maps")


def _overlay(image_3HW: Tensor, relevance_hw: Tensor) -> bytes:
    """The image, dark where nothing is relevant."""
    share_11hw, size = _share(relevance_hw)[None, None], tuple(image_3HW.shape[1:])
    share_HW = F.interpolate(share_11hw, size=size, mode="bilinear", align_corners=False)[0, 0]
    shown = image_3HW.clamp(0, 1) * (0.15 + 0.85 * share_HW)
    return _png(shown)


def _heat(relevance_hw: Tensor, pixels: int = 440) -> bytes:
    """Relevance alone, from dark to bright."""
    from matplotlib import colormaps

    each = max(1, pixels // max(relevance_hw.shape))
    share_HW = _share(relevance_hw).repeat_interleave(each, 0).repeat_interleave(each, 1)
    return _png(torch.from_numpy(colormaps["magma"](share_HW.numpy())[..., :3]).permute(2, 0, 1))


def _share(relevance: Tensor) -> Tensor:
    low, high = relevance.min(), relevance.max()
    return (relevance - low) / (high - low).clamp(min=1e-12)


def _png(image_3HW: Tensor) -> bytes:
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    Image.fromarray((255 * image_3HW).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _drawn(make: Any, caption: str) -> str:
    """A figure on light and on dark paper."""
    figure = make()
    light = png(figure, colors=256)
    return picture(light, caption, png(darken(figure), colors=256), whole=True)
