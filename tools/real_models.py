"""What stands beside real pretrained models: figures and pictures for docs/real-models.md.

    python tools/real_models.py [SECTION ...] [--quick]

Sections whose packages are not installed are left out and say so; `saccade.train.models` names the packages. Figures
are kept in docs/real-models.json, so that a run of one section leaves the others as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import real_attention
import real_language
import real_vision

from saccade.bench import records
from saccade.train.files import write_text
from saccade.train.lab import Lab

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

DOCS = Path(__file__).parent.parent / "docs"


def saved(pictures: Mapping[str, Picture], page: Path) -> list[str]:
    """Write pictures into the folder beside a page that has its name; the lines by which the page shows them."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png", optimize=True)
    return [f"![{name}]({folder.name}/{name}.png)" for name in pictures]


def text(kept: records.Kept) -> str:
    """The page of the kept figures."""
    lines = [
        "# Beside real pretrained models",
        "",
        "Made by `python tools/real_models.py`; do not edit. The models are those of `saccade.train.models`; what of",
        "ours stands beside them was trained here for minutes, from nothing; what is found in them is found untrained.",
        "",
    ]
    for name, row in kept.items():
        section = SECTIONS[name]
        lines += [f"## {(section.__doc__ or '').splitlines()[0].rstrip('.')}", ""]
        lines += [f"{row['machine']}, {row['date']}.", ""]
        lines += [*row.get("pictures", ()), ""] if row.get("pictures") else []
        lines += [f"{CAPTIONS[name]}", ""] if name in CAPTIONS else []
        figures = flat(row)
        lines += [*records.table(["figure", "value"], figures), ""] if figures else []
        for title, (columns, *rows) in row.get("tables", {}).items():
            lines += [f"{title}:", "", *records.table(columns, rows), ""]
    return "\n".join(lines)


#: what the pictures of a section show, from left to right
CAPTIONS = {
    "uplift": "Photograph; features of a 16 x 16 grid (three principal components of the truth); bilinear to 32 x 32; "
    "one step of UPLiFT; three steps; the ViT's own features at 32 x 32.",
    "fusion": "Thermal, visible (laid over it), fused, the mean of both.",
    "saliency": "Photograph, the real network's heat map, ours; two photographs a row.",
    "gaze": "Scenes, each with where its first person is said to look.",
    "conditions": "An image that was not learned from and the four nearest to it by shape; the same by colour.",
    "maps": "Photograph, the real network's heat map, ours; two photographs a row.",
    "limits": "Grey lines are heads, coloured ones their means. Cumulative distance of the rest from the top 5 tokens; "
    "each head's distance against its bound; the share of the top N that can be told apart; how far weights move with "
    "their logits.",
}


def flat(row: dict[str, Any], before: str = "") -> list[list[str]]:
    """Figures of a section, a line each."""
    lines = []
    for name, value in row.items():
        if name == "tables":
            continue
        if isinstance(value, dict):
            lines += flat(value, f"{before}{name} ")
        elif name not in ("machine", "date", "pictures"):
            values = value if isinstance(value, list) else [value]
            lines.append([before + name, ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)])
    return lines


SECTIONS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "gates": real_vision.gates,
    "uplift": real_vision.uplift,
    "saliency": real_vision.saliency,
    "fusion": real_vision.fusion,
    "gaze": real_vision.gaze,
    "conditions": real_vision.conditions,
    "maps": real_vision.maps,
    "patterns": real_language.patterns,
    "limits": real_attention.limits,
    "circuits": real_attention.circuits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="a step or two of training; what comes out means nothing")
    parser.add_argument("--json", type=Path, default=DOCS / "real-models.json", help="where figures are kept")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there is {', '.join(SECTIONS)}")
    kept = records.known(options.json)
    for name in options.sections or SECTIONS:
        try:
            row = SECTIONS[name](Lab(seed=0, smoke=options.quick))
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        kept[name] = records.stamp() | row | {"pictures": saved(row.get("pictures", {}), options.json)}
        kept = {each: kept[each] for each in SECTIONS if each in kept}
        records.keep(options.json, kept)
        print(name, *(": ".join(line) for line in flat(kept[name])), sep="\n  ", flush=True)
        for title, lines in kept[name].get("tables", {}).items():
            print(f"  {title}", *("    " + " | ".join(line) for line in lines), sep="\n", flush=True)
    write_text(options.json.with_suffix(".md"), text(kept))


if __name__ == "__main__":
    main()
