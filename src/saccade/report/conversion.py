"""What `saccade convert` reads and writes: a language model, a text to learn from and be judged on; its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saccade.report import pretrained
from saccade.train import models
from saccade.train.data import read_files, text_bytes
from saccade.train.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

    from saccade.train.conversion import Conversion

#: of a file of one's own, the end on which the model is judged
HELD_OUT = 0.1


def language_model(name: str, data: Sequence[Path], least: int) -> tuple[Any, Tensor, Tensor]:
    """A model by folder or name, and the tokens of a text: to learn from, and to be judged on.

    English of Python's documentation where no file is given; of files, the last tenth is judged on.

    Args:
        name: of `saccade.train.models`, a folder, or a name of transformers.
        data: text files.
        least: tokens that either text must have.

    Raises:
        ValueError: if the model writes no text, or the text is too short.
        OSError: if the model or a file cannot be read.
        ImportError: if transformers, or the package of a named model, is not installed.
    """
    known = models.named(name)
    if known is not None and models.MODELS[known].kind != "decoder":
        raise ValueError(f"{known} is no language model that writes text: its layers are not converted")
    texts = [bytes(text_bytes(split).tolist()) for split in ("train", "held-out")]
    if data:
        text = bytes(read_files(list(data), least=1).tolist())
        cut = round((1 - HELD_OUT) * len(text))
        texts = [text[:cut], text[cut:]]
    loaded = pretrained.load(known or name, image=False, fresh=True)
    tokens = [torch.tensor(loaded.tokenizer(text.decode("utf-8", "replace"))["input_ids"]) for text in texts]
    for words, found in zip(("to learn from", "to be judged on"), tokens, strict=True):
        if len(found) < least:
            raise ValueError(
                f"the text {words} must have at least {least} tokens, got {len(found)}: give longer --data"
            )
    return loaded.model, tokens[0], tokens[1]


def layers_of(text: str) -> list[int | str] | float:
    """The layers that an option names: "half", a share, or numbers and patterns with commas.

    >>> layers_of("half"), layers_of("0.25"), layers_of("0,-1,model.layers.1?.self_attn")
    (0.5, 0.25, [0, -1, 'model.layers.1?.self_attn'])
    """
    if text == "half":
        return 0.5
    if "," not in text and "." in text and text.replace(".", "", 1).isdecimal():
        return float(text)
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    return [int(piece) if piece.lstrip("-").isdecimal() else piece for piece in pieces]


def write_conversion(report: Conversion, folder: Path) -> None:
    """The new layers, and `conversion.json` with what happened."""
    report.save(folder)
    write_text(folder / "conversion.json", json.dumps(report.as_dict(), indent=1) + "\n")
