"""A page of pictures: where each gate of the catalogue looks, on the same photographs, after the same training.

An untrained gate shows noise. So the same small CNN is trained with each gate at the same place, from the same weights,
on the same crops in the same order: *which photograph is this crop from?* A square of each crop is covered with pixels
of another photograph in random order, whose grey values mislead; a gate that has learned something has less
there. Then the network sees whole photographs, some with such a square, and `attention_map` shows its gate:

- what it multiplies the map with: its mean over channels as a picture, and one channel where these have pictures of
  their own; its mean over positions as bars;
- where positions attend to one another: how much each is attended to (the mean of |A| over heads and queries,
  relative to an even share), and where the middle of the photograph looks (likewise, of its row of A).

Everything that the page says is computed: `saccade gallery` writes it, `make gallery` the one in docs/.

Shape letters: B batch, P photographs, C channels, H and W height and width, S side of a square picture.
"""

from __future__ import annotations

import base64
import io
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import __version__, catalogue
from saccade.extras import need
from saccade.integrations.insert import insert
from saccade.ops.maps import Mixes, attention_map
from saccade.ops.measure import machine
from saccade.tables import fold, table
from saccade.train import data
from saccade.train.entries import NONE, Entry, parse
from saccade.train.files import write_text
from saccade.train.lab import Lab
from saccade.train.labels import labels

#: names of `saccade.train.data.photographs`
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket")

#: what the pictures of a gate are called, and what their numbers are
MULTIPLIED, ONE_CHANNEL = "what the map is multiplied with", "one channel of it"
ATTENDED, FROM_MIDDLE = "attended to", "seen from the middle"
NUMBERS = {
    MULTIPLIED: "the mean over channels",
    ONE_CHANNEL: "the one that varies most over positions",
    ATTENDED: "|weight| relative to an even share, brightness its square root",
    FROM_MIDDLE: "the weights of the ringed position, likewise",
}


@dataclass(frozen=True)
class Settings:
    """How the gallery is made.

    Attributes:
        steps: of training, for each gate.
        side: S of the photographs, in grey, cut to squares.
        crop: side of the crops to learn from.
        batch: crops a step.
        held_out: crops on which accuracy is measured, drawn like those to learn from.
        photographs: how many of them, from the first on.
        covered: how many of them are shown a second time with a covered square.
        seed: of everything random.

    Raises:
        ValueError: if one is out of range.
    """

    steps: int = 400
    side: int = 192
    crop: int = 64
    batch: int = 32
    held_out: int = 512
    photographs: int = len(PHOTOGRAPHS)
    covered: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 8 <= self.crop <= self.side:
            raise ValueError(f"crop must be between 8 and the photographs' side ({self.side}), got {self.crop}")
        if not 2 <= self.photographs <= len(PHOTOGRAPHS):
            raise ValueError(f"photographs must be between 2 and {len(PHOTOGRAPHS)}, got {self.photographs}")
        if not 0 <= self.covered <= self.photographs:
            raise ValueError(f"covered must be between 0 and {self.photographs}, got {self.covered}")


@dataclass(frozen=True)
class Picture:
    """A photograph as the network sees it: `image_SS` in [0, 1], and `covered`, (top, left, side), or None."""

    name: str
    image_SS: Tensor
    covered: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Exhibit:
    """A gate after training; also the network without one.

    Attributes:
        name: as asked for.
        slug: None without a gate.
        parameters: that it adds.
        accuracy: on fresh crops.
        named: whole photographs, covered ones among them, whose name the network says rightly.
        covered_share: its map on the covered square over its map elsewhere, on fresh crops; None without a map.
        seconds: of training.
        maps: (P, H, W) by what they are.
        channels_PC: the mean over positions, where the gate tells channels apart.
    """

    name: str
    slug: str | None
    parameters: int
    accuracy: float
    named: int
    covered_share: float | None
    seconds: float
    maps: dict[str, Tensor]
    channels_PC: Tensor | None


@dataclass(frozen=True)
class Gallery:
    """Exhibits, the first of them the network without a gate, with all that was common to them."""

    settings: Settings
    pictures: list[Picture]
    exhibits: list[Exhibit]
    parameters: int
    machine: dict[str, Any]
    day: str

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the table."""
        named = f"whole photographs named, of {len(self.pictures)}"
        return ("gate", "parameters added", "accuracy", named, "map on covered / elsewhere", "seconds of training")

    def cells(self, exhibit: Exhibit) -> tuple[str, ...]:
        """A row of the table."""
        share = "" if exhibit.covered_share is None else f"{exhibit.covered_share:.2f}"
        figures = (f"{exhibit.parameters:,}", f"{exhibit.accuracy:.1%}", str(exhibit.named), share)
        return (exhibit.name, *figures, f"{exhibit.seconds:.1f}")

    def table(self) -> str:
        """A line per exhibit."""
        short = labels(exhibit.name for exhibit in self.exhibits)
        rows = [(short.of[exhibit.name], *self.cells(exhibit)[1:]) for exhibit in self.exhibits]
        return "\n".join([table(self.headings, rows), *(line for text in short.caption for line in fold(text))])

    def as_dict(self) -> dict[str, Any]:
        """Figures without pictures, in plain values."""
        drop = ("maps", "channels_PC")
        rows = [{k: v for k, v in vars(exhibit).items() if k not in drop} for exhibit in self.exhibits]
        common = {"settings": asdict(self.settings), "machine": self.machine, "date": self.day}
        return {**common, "parameters": self.parameters, "gates": rows}


def photographs(side: int, count: int = len(PHOTOGRAPHS)) -> dict[str, Tensor]:
    """The first `count` photographs in grey, (side, side) in [0, 1], cut to their middle square.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    found = {}
    for name, (grey,) in zip(PHOTOGRAPHS, data.photographs(*PHOTOGRAPHS[:count], grey=True)):
        H, W = grey.shape
        S = min(H, W)
        square = grey[(H - S) // 2 :, (W - S) // 2 :][:S, :S]
        found[name] = F.interpolate(square[None, None], (side, side), mode="bicubic", antialias=True)[0, 0].clamp(0, 1)
    return found


def crops(photographs_PSS: Tensor, count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Crops (B, 1, side, side), the numbers of their photographs (B,), and what is covered (B, 1, side, side).

    Contrast and brightness vary, there is a little noise, and a square of three to five eighths of the side is
    covered with a piece of another photograph, its pixels in random order.
    """
    P, S = photographs_PSS.shape[:2]

    def cut(which_B: Tensor) -> Tensor:
        corner_B2 = torch.randint(S - side + 1, (count, 2), generator=generator)
        rows, columns = (corner_B2[:, axis, None] + torch.arange(side) for axis in (0, 1))
        return photographs_PSS[which_B[:, None, None], rows[:, :, None], columns[:, None, :]]

    label_B = torch.randint(P, (count,), generator=generator)
    other_B = (label_B + torch.randint(1, P, (count,), generator=generator)) % P
    image_BSS, mess_BSS = cut(label_B), cut(other_B)
    order_BN = torch.rand(count, side * side, generator=generator).argsort(1)
    mess_BSS = mess_BSS.flatten(1).gather(1, order_BN).view_as(mess_BSS)
    length_B = torch.randint(3 * side // 8, 5 * side // 8 + 1, (count,), generator=generator)
    start_B2 = (torch.rand(count, 2, generator=generator) * (side - length_B + 1)[:, None]).long()
    within = [
        (torch.arange(side) >= start_B2[:, axis, None]) & (torch.arange(side) < (start_B2[:, axis] + length_B)[:, None])
        for axis in (0, 1)
    ]
    covered_BSS = within[0][:, :, None] & within[1][:, None, :]
    image_BSS = torch.where(covered_BSS, mess_BSS, image_BSS)
    contrast, brightness, noise = 0.7, 0.15, 0.03
    gain_B11 = contrast + 2 * (1 - contrast) * torch.rand(count, 1, 1, generator=generator)
    shift_B11 = brightness * (2 * torch.rand(count, 1, 1, generator=generator) - 1)
    image_BSS = (image_BSS - 0.5) * gain_B11 + 0.5 + shift_B11
    image_BSS = image_BSS + noise * torch.randn(image_BSS.shape, generator=generator)
    return image_BSS[:, None], label_B, covered_BSS[:, None]


#: the module of the network after which gates stand
PLACE = "body"


def network(classes: int) -> nn.Sequential:
    """The small CNN, (B, 1, H, W) -> (B, classes); gates stand at a quarter of the resolution."""

    def convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*convolution(1, 16, 2)),
            body=nn.Sequential(*convolution(16, 32, 2), *convolution(32, 32, 1)),
            deep=nn.Sequential(*convolution(32, 64, 2)),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
        )
    )


def make(
    gates: Sequence[str] | None = None, settings: Settings | None = None, *, show_progress: bool | None = False
) -> Gallery:
    """Train the network with each gate and look at it.

    Args:
        gates: parts of kind "gate", options as in `cbam:reduction=8`; all of the catalogue where None.
        settings: the defaults where None.
        show_progress: False for none; bars on a terminal and lines elsewhere where None or True.

    Raises:
        ValueError: if a part is no gate.
        ImportError: if scikit-image is not installed.
    """
    settings = settings or Settings()
    wanted = parse(list(gates) if gates else [part.slug for part in catalogue.select(kind="gate")])
    lab = Lab(seed=settings.seed, show_progress=show_progress)
    squares = photographs(settings.side, settings.photographs)
    photographs_PSS = torch.stack(list(squares.values()))
    pictures = _pictures(squares, settings)
    images_P1SS = torch.stack([picture.image_SS for picture in pictures])[:, None]
    names_P = torch.tensor([list(squares).index(picture.name) for picture in pictures])
    fresh = torch.Generator().manual_seed(10**6 + settings.seed)
    test_B1SS, label_B, covered_B1SS = crops(photographs_PSS, settings.held_out, settings.crop, fresh)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = lab.generator()
        while True:
            yield crops(photographs_PSS, settings.batch, settings.crop, generator)[:2]

    with lab.seeded():
        start = network(len(squares))
    built: list[tuple[Entry, nn.Sequential, nn.Module | None]] = []
    for gate in (Entry(NONE, NONE), *wanted):  # all of them before the first is trained: requests fail at once
        model = network(len(squares))
        model.load_state_dict(start.state_dict())
        inserted: nn.Module | None = None
        if gate.slug != NONE:
            with lab.seeded():
                report = insert(model, str(gate.slug), after=PLACE, example=test_B1SS[:1], **gate.options)
            inserted = model.get_submodule(report.places[0].gate)
        built.append((gate, model, inserted))
    exhibits = []
    for gate, model, inserted in built:
        began = time.perf_counter()
        lab.train(model, batches(), _loss, settings.steps, lr=4e-3, description=f"{gate.name:<16}")
        seconds = time.perf_counter() - began
        guess_B, shown = _look(model, inserted, test_B1SS)
        name_P, (maps, channels_PC) = _look(model, inserted, images_P1SS)
        exhibits.append(
            Exhibit(
                name=gate.name,
                slug=None if inserted is None else str(gate.slug),
                parameters=0 if inserted is None else sum(p.numel() for p in inserted.parameters()),
                accuracy=(guess_B == label_B).float().mean().item(),
                named=int((name_P == names_P).sum()),
                covered_share=_covered_share(next(iter(shown[0].values()), None), covered_B1SS),
                seconds=seconds,
                maps=maps,
                channels_PC=channels_PC,
            )
        )
    parameters = sum(p.numel() for p in start.parameters())
    return Gallery(settings, pictures, exhibits, parameters, dict(machine()), date.today().isoformat())


def views(gate: nn.Module, x_BCHW: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a gate shows on a map: pictures (B, H, W) by what they are, and its means over positions, (B, C).

    A picture that is flat everywhere is left out; so are the channels, where all are alike.
    """
    B, C, H, W = x_BCHW.shape
    if isinstance(gate, Mixes):
        pictures: dict[str, list[Tensor]] = {ATTENDED: [], FROM_MIDDLE: []}
        middle = H // 2 * W + W // 2
        for x_1CHW in x_BCHW.split(1):  # a matrix of all pairs of positions: one photograph at a time
            share_NN = attention_map(gate, x_1CHW).abs().mean((0, 1))
            for name, share_N in ((ATTENDED, share_NN.mean(0)), (FROM_MIDDLE, share_NN[middle])):
                pictures[name].append((share_N / share_N.mean()).view(H, W))
        return {name: torch.stack(found) for name, found in pictures.items()}, None
    with torch.no_grad():
        factor_BCHW = attention_map(gate, x_BCHW).expand(B, C, H, W)
        maps_BHW, channels_BC = factor_BCHW.mean(1), factor_BCHW.mean((2, 3))
    flat = not bool((factor_BCHW != factor_BCHW[:, :, :1, :1]).any())
    alike = not bool((factor_BCHW != factor_BCHW[:, :1]).any())
    found = {} if flat else {MULTIPLIED: maps_BHW}
    # a channel gate times a spatial one has one picture, at as many sizes as there are channels
    separable_BCHW = channels_BC[:, :, None, None] * maps_BHW[:, None] / maps_BHW.mean((1, 2))[:, None, None, None]
    if not flat and not torch.allclose(factor_BCHW, separable_BCHW, rtol=1e-3, atol=1e-6):
        found[ONE_CHANNEL] = factor_BCHW[:, int(factor_BCHW.std((2, 3)).mean(0).argmax())]
    return found, None if alike else channels_BC


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _pictures(squares: dict[str, Tensor], settings: Settings) -> list[Picture]:
    """The photographs, then the first of them with a square of the next one's pixels in random order."""
    found = [Picture(name, image_SS) for name, image_SS in squares.items()]
    generator = torch.Generator().manual_seed(settings.seed)
    side = settings.side // 3
    for number, picture in enumerate(found[: settings.covered]):
        top, left = torch.randint(settings.side - side + 1, (2,), generator=generator).tolist()
        other_SS = found[(number + 1) % len(squares)].image_SS
        image_SS = picture.image_SS.clone()
        order = torch.randperm(other_SS.numel(), generator=generator)[: side * side]
        image_SS[top : top + side, left : left + side] = other_SS.flatten()[order].view(side, side)
        found.append(Picture(picture.name, image_SS, (top, left, side)))
    return found


@torch.no_grad()
def _look(
    model: nn.Module, gate: nn.Module | None, images_B1SS: Tensor
) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor | None]]:
    """The network's answers, and `views` of its gate."""
    model.eval()
    seen: list[Tensor] = []
    hook = None if gate is None else gate.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        guess_B = model(images_B1SS).argmax(1)
    finally:
        if hook is not None:
            hook.remove()
    return guess_B, ({}, None) if gate is None else views(gate, seen[0])


def _covered_share(map_BHW: Tensor | None, covered_B1SS: Tensor) -> float | None:
    """The mean of a map where positions are covered whole over its mean where they are not covered at all.

    Position by position over the images, then the mean over positions: that squares lie more often in the middle, and
    that maps differ at their rims, plays no part, and weights that do not depend on the image give 1.
    """
    if map_BHW is None:
        return None
    share_BHW = F.adaptive_avg_pool2d(covered_B1SS.float(), (map_BHW.shape[1], map_BHW.shape[2]))[:, 0]
    counts, means = [], []
    for chosen_BHW in (share_BHW == 1, share_BHW == 0):
        counts.append(chosen_BHW.sum(0))
        means.append((map_BHW * chosen_BHW).sum(0) / counts[-1].clamp(min=1))
    both_HW = (counts[0] > 0) & (counts[1] > 0)
    if not bool(both_HW.any()):
        return None
    return (means[0][both_HW].sum() / means[1][both_HW].sum()).item()


def page_path(path: str | Path) -> Path:
    """The page itself: `gallery.html` where `path` is a folder."""
    path = Path(path)
    return path if path.suffix in (".html", ".htm") else path / "gallery.html"


def write_gallery(gallery: Gallery, path: str | Path) -> Path:
    """Write the page to `page_path(path)`, which is returned, whole or not at all.

    Raises:
        OSError: if it cannot be written.
        ValueError: if matplotlib is not installed.
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

    Raises:
        ValueError: if matplotlib is not installed.
    """
    colours = _colours()
    backgrounds = "".join(
        f".p{number} {{ background-image: url({_data(_png(picture.image_SS, _greys()))}); }}\n"
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
            framed = _framed(number, picture, _data(_png(_stretched(shown_HW), colours)), alt, what == FROM_MIDDLE)
            lines.append(f"<figure>{framed}<figcaption>{spread}</figcaption></figure>")
        lines.append("</div></div>")
    if exhibit.channels_PC is not None:
        lines.append(f"<p>{escape(MULTIPLIED.capitalize())}, channel by channel, the mean over positions</p>")
        lines.append(f'<div class="wide"><div class="row" style="{row}">')
        top = exhibit.channels_PC.max().item()
        for picture, channels_C in zip(gallery.pictures, exhibit.channels_PC, strict=True):
            spread = f"{_number(channels_C.min())} to {_number(channels_C.max())}"
            alt = f"{exhibit.name}, weights of {len(channels_C)} channels on {_alt(picture)}: {spread}"
            lines.append(f"<figure>{_bars(channels_C, top, alt)}<figcaption>{spread}</figcaption></figure>")
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


def _stretched(map_HW: Tensor) -> Tensor:
    """To [0, 1] from the first to the 99th percentile of all but its rim; 0 where it is flat."""
    rim = min(map_HW.shape) // 12  # the gates' convolutions see zeros there
    inner_HW = map_HW[rim : map_HW.shape[0] - rim, rim : map_HW.shape[1] - rim]
    low, high = torch.quantile(inner_HW.flatten(), torch.tensor([0.01, 0.99])).tolist()
    return ((map_HW - low) / max(high - low, 1e-12)).clamp(0, 1)


def _greys() -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in (round(255 * i / 63) for i in range(64))]


def _colours() -> list[tuple[int, int, int]]:
    """64 colours from low to high."""
    scale = need("matplotlib", "drawing").colormaps["inferno"]
    return [tuple(round(255 * part) for part in scale(i / 63)[:3]) for i in range(64)]  # type: ignore[misc]


def _png(values_HW: Tensor, palette: list[tuple[int, int, int]]) -> bytes:
    """Values in [0, 1] as a PNG of few colours."""
    from PIL import Image  # comes with matplotlib

    indices = (values_HW * (len(palette) - 1)).round().to(torch.uint8).contiguous().numpy()
    image = Image.fromarray(indices, mode="P")
    image.putpalette([part for colour in palette for part in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _bars(values_C: Tensor, top: float, alt: str) -> str:
    """A bar a channel, from 0 to `top`."""
    C = len(values_C)
    bars = "".join(
        f'<rect x="{i}" width=".8" y="{1 - h:.3f}" height="{h:.3f}"/>'
        for i, h in enumerate((values_C.clamp(min=0) / max(top, 1e-12)).tolist())
    )
    return (
        f'<svg viewBox="0 0 {C} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(alt, quote=True)}">{bars}</svg>'
    )
