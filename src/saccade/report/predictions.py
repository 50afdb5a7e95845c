"""A complete network run on files: built by name, its answer, and what is written of it."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor

from saccade import catalogue
from saccade.models.complete import Complete
from saccade.models.images import read_image
from saccade.tables import table
from saccade.train.entries import Entry, parse
from saccade.train.files import make_folder, write_bytes

#: what a picture may be written as, and what the tensors are
PICTURES, TENSORS = (".png", ".jpg", ".jpeg", ".webp"), ".safetensors"
_BOX = r"\s*\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?){3}\s*"


def build(model: str, size: str | None = None, weights: str | Path | None = None, seed: int = 0) -> Complete:
    """A network, ready to be run.

    Args:
        model: a part of kind "model", with options after a colon: `resnest:depths=101,stem_width=64`.
        size: a published size by the paper's name.
        weights: a file of the authors or of this library; drawn at the seed where None.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the part runs on no files, there is no such size, or the weights do not fit.
    """
    wanted, made = _wanted(model)
    slug = str(wanted.slug)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = catalogue.create(slug, **wanted.options) if size is None else made.from_config(size, **wanted.options)
    assert isinstance(network, Complete)
    return (network if weights is None else network.load(weights)).eval()


def calls(model: str, files: Sequence[Path]) -> list[list[Path]]:
    """The files of each call: one, as many as a network takes together, or all.

    Raises:
        ValueError: if the part runs on no files, or these do not come out even.
    """
    made = _wanted(model)[1]
    if made.together:
        return [list(files)]
    views = made.views
    if len(files) % len(views):
        slug = model.partition(":")[0].strip()
        raise ValueError(f"{slug!r} takes {len(views)} files together ({', '.join(views)}), got {len(files)}")
    return [list(files[i : i + len(views)]) for i in range(0, len(files), len(views))]


def boxes_of(network: Complete, call: Sequence[Path], boxes: Sequence[str]) -> dict[str, Any]:
    """What `predict` takes beside a file: the boxes of the people in it, where it takes them and there are some.

    Args:
        network: as `build` gives it.
        call: the files of one call.
        boxes: each "x0,y0,x1,y1", in pixels.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the network takes none, there are several files, or a box is not four numbers within the image.
    """
    if not boxes:
        return {}
    if "bboxes" not in inspect.signature(network.predict).parameters:
        raise ValueError(f"--box is for networks that are told where people are; {type(network).__name__} is not")
    if len(call) != 1:
        raise ValueError(f"--box is for one image, got {len(call)}")
    height, width = read_image(call[0]).shape[-2:]
    shares = []
    for box in boxes:
        numbers = [float(number) for number in box.split(",")] if re.fullmatch(_BOX, box) else []
        x0, y0, x1, y1 = numbers or (0.0,) * 4
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"--box must be x0,y0,x1,y1 in pixels of an image of {width} x {height}, got {box!r}")
        shares.append([x0 / width, y0 / height, x1 / width, y1 / height])
    return {"bboxes": [shares]}


def _wanted(model: str) -> tuple[Entry, type[Complete]]:
    (wanted,) = parse([model])
    made = None if wanted.slug is None else catalogue.part(str(wanted.slug)).build
    if not _runs_on_files(made):
        raise ValueError(f"{str(wanted.slug)!r} does not run on files; {', '.join(runnable())} do")
    return wanted, made


def runnable() -> list[str]:
    """The parts that run on files."""
    parts = [catalogue.part(part.slug) for part in catalogue.parts() if part.kind.published]
    return [part.slug for part in parts if _runs_on_files(part.build)]


def _runs_on_files(build: Any) -> TypeGuard[type[Complete]]:
    return isinstance(build, type) and issubclass(build, Complete) and build.runs_alone


def read_names(path: str | Path) -> list[str]:
    """A name a line.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error


def places(files: Sequence[Path], model: str, out: Path | None) -> list[Path]:
    """Where the picture of each file goes: `out` itself where it has a suffix of a picture, of tensors, or of the
    network's own documents, else in that folder, under the file's name and the model's.

    Raises:
        ValueError: if several files would go into one, or the suffix is unknown.
    """
    wanted, made = _wanted(model)
    if out is not None and out.suffix:
        known = (*PICTURES, TENSORS, *made.documents)
        if out.suffix.lower() not in known:
            raise ValueError(f"out must end in {', '.join(known)}, or be a folder, got {out}")
        if len(files) > 1:
            raise ValueError(f"out must be a folder where there are several files, got {out}")
        return [out]
    folder, taken = Path("runs") if out is None else out, dict[Path, int]()
    found = []
    for file in files:
        place = folder / f"{file.stem}-{wanted.slug}.png"
        taken[place] = taken.get(place, 0) + 1
        found.append(place if taken[place] == 1 else place.with_stem(f"{place.stem}-{taken[place]}"))
    return found


def write(
    model: Complete, output: Any, path: Path, names: Sequence[str] | None = None, files: Sequence[Path] = ()
) -> None:
    """The picture of an output, or its tensors or documents where the path says so. A file is written whole or not at
    all.

    Args:
        model: whose output it is.
        output: of one call.
        path: where it goes.
        names: of the classes.
        files: that were read.

    Raises:
        OSError: if it cannot be written.
        ValueError: if the output cannot be written so.
    """
    make_folder(path.parent)
    if path.suffix.lower() == TENSORS:
        write_bytes(path, save(tensors(output)))
        return
    if path.name.lower().endswith(model.documents):  # before pictures: one may be called .16.png
        for place, content in model.document(output, path, files).items():
            write_bytes(place, content)
        return
    buffer = io.BytesIO()
    drawn = model.picture(output, names)
    drawn.save(buffer, format={".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"))
    write_bytes(path, buffer.getvalue())


def tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name; those in a list by name and number."""
    found: dict[str, Tensor] = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.contiguous().cpu()
        elif isinstance(value, (list, tuple)):
            found |= {f"{field.name}.{i}": each.contiguous().cpu() for i, each in enumerate(value)}
    return found


def told(said: dict[str, Any], file: str) -> str:
    """An answer as a table, under the file's name."""
    rows = [(name, f"{value:.1%}" if isinstance(value, float) else str(value)) for name, value in said.items()]
    return table(("what", "share" if any(isinstance(v, float) for v in said.values()) else "is"), rows, title=file)
