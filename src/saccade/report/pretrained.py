"""A pretrained model by folder or name, for the commands: what is wrong with it is said in one line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.models.images import MEAN, STD, to_picture
from saccade.train import models

__all__ = ["Loaded", "config_of", "hub_answers", "is_local", "is_path", "load", "target_of", "tokenizer_of", "words_of"]

#: seconds that a hub of models may take to answer at all, before only its cache on this machine is looked at
PATIENCE = 2.0


def is_local(name: str) -> bool:
    """Whether a model is looked for on this machine alone."""
    return Path(name).exists() or is_path(name) or not hub_answers()


@dataclass
class Loaded:
    """A model with what makes inputs of texts or images.

    Attributes:
        model: of transformers, in evaluation.
        tokenizer: of texts, or None.
        image_size: of images, (H, W), or None.
        mean, std: of their channels.
        processor: of images with texts, or None.
        texts: that an image was compared with.
    """

    model: Any
    tokenizer: Any = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    processor: Any = None
    texts: Sequence[str] = ()

    def pixels(self, image_3HW: Tensor) -> tuple[Tensor, Tensor]:
        """An image in [0, 1] at the model's size, and as the model takes it, (1, 3, H, W) both.

        Raises:
            ValueError: if the model takes no images.
        """
        if self.image_size is None:
            raise ValueError(f"{type(self.model).__name__} takes no images: give it a text")
        sized = F.interpolate(image_3HW[None], self.image_size, mode="bilinear", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return sized, (sized - mean) / std

    def both(self, image_3HW: Tensor, texts: Sequence[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """An image in [0, 1] with texts: as the model sees it, (3, H, W) each, and the model's inputs.

        A model that compares takes any number of texts; one that reads takes one, and the image is put before it.

        Raises:
            ValueError: if the model reads, and there is not one text.
        """
        compares = hasattr(self.model, "logit_scale")
        if not compares and len(texts) != 1:
            raise ValueError(f"{type(self.model).__name__} takes one text with an image, got {len(texts)}")
        self.texts = texts if compares else ()
        said = list(texts) if compares else [_prompt(self.processor, texts[0])]
        inputs = dict(self.processor(text=said, images=[to_picture(image_3HW)], padding=compares, return_tensors="pt"))
        pixels = inputs["pixel_values"]
        if pixels.ndim < 4:  # patches already: they cover the image
            return [image_3HW], inputs
        made = self.processor.image_processor
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (made.image_mean, made.image_std))
        return [(each * std + mean).clamp(0, 1) for each in pixels.flatten(0, -4)], inputs


def _prompt(processor: Any, text: str) -> str:
    """What one says to a model that reads images, with an image before the text."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    return f"{processor.image_token}\n{text}"


def load(name: str, *, image: bool, text: bool = False, fresh: bool = False) -> Loaded:
    """A model to look into: one of `saccade.train.models`, or transformers' by folder or name.

    Args:
        name: as the command takes it.
        image: whether an image is to be seen, else a text is to be read.
        text: whether texts are to be read with the image.
        fresh: a model for the caller alone, who will change it.

    Raises:
        OSError: if there is none, or it cannot be read.
        ValueError: if it takes no such input.
        ImportError: if transformers, or the package of a named model, is not installed.
    """
    named = models.named(name)
    if named is not None:
        found = models.load(named, fresh=fresh)
        model, tokenizer = found if isinstance(found, tuple) else (found, None)
        if not hasattr(model, "config") or image != (tokenizer is None) or (image and text):
            kind = "images" if tokenizer is None else "texts"
            raise ValueError(f"{name!r} is looked into on {kind} of its own kind alone, or not at all")
        return Loaded(model, tokenizer) if tokenizer is not None else Loaded(model, None, (224, 224), MEAN, STD)
    local = is_local(name)
    config = config_of(name, local)
    transformers = need("transformers", "explain a model")
    known = [made for each in config.architectures or () if (made := getattr(transformers, each, None)) is not None]
    model = (known or [transformers.AutoModel])[0].from_pretrained(name, config=config, local_files_only=local).eval()
    if not image:
        return Loaded(model, tokenizer_of(name, local))
    if text:
        processor = _processor_of(name, local)
        return Loaded(model, processor.tokenizer, processor=processor)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError):
        raise ValueError(f"{name} has no image processor: it takes no images") from None
    size = getattr(config, "image_size", 224)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return Loaded(model, None, sides, tuple(processor.image_mean), tuple(processor.image_std))


def _processor_of(name: str, local: bool) -> Any:
    """The model's processor of images and texts; transformers has many errors for there being none."""
    try:
        found = need("transformers").AutoProcessor.from_pretrained(name, local_files_only=local)
    except Exception as error:
        raise ValueError(f"{name} has no processor of images with texts that can be read: {error}") from error
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        raise ValueError(f"{name} has no processor of images with texts: give it an image or a text alone")
    return found


def target_of(loaded: Loaded, words: str) -> int:
    """A class, a token, or one of the texts that an image is compared with, by its number or its name.

    Args:
        loaded: the model.
        words: what the command was given.

    Raises:
        ValueError: if there is none of that name.
    """
    if words in loaded.texts:
        return list(loaded.texts).index(words)
    if words.strip().isdecimal():
        return int(words)
    if loaded.texts:
        raise ValueError(f"there is no text {words!r}; there are {', '.join(map(repr, loaded.texts))}")
    if loaded.tokenizer is not None and not _classes(loaded):
        ids = loaded.tokenizer(words, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{words!r} must be one token of the model, it is {len(ids)}")
        return int(ids[0])
    found = [number for number, name in _classes(loaded).items() if name == words]
    if not found:
        known = ", ".join(list(_classes(loaded).values())[:8])
        raise ValueError(f"there is no class {words!r}; there are {known or 'none with a name'}")
    return found[0]


def words_of(loaded: Loaded, target: tuple[int | None, int] | None) -> str:
    """What a target is called; "" where it has no name.

    Args:
        loaded: the model.
        target: (row, column) of the logit.
    """
    if target is None:
        return ""
    row, column = target
    if loaded.texts:
        return f"likeness to {loaded.texts[column]!r}"
    if row is not None and loaded.tokenizer is not None:
        return repr(loaded.tokenizer.decode([column]))
    return _classes(loaded).get(column, "")


def _classes(loaded: Loaded) -> dict[int, str]:
    """The names of the classes of a classifier."""
    if not hasattr(loaded.model, "num_labels") or "Classification" not in type(loaded.model).__name__:
        return {}
    return {int(number): str(name) for number, name in (loaded.model.config.id2label or {}).items()}


def is_path(name: str) -> bool:
    """Whether it can only be meant as a folder; models have one slash in their names at most."""
    return Path(name).is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1


def hub_answers() -> bool:
    """Whether the hub that transformers fetches from can be reached, asked once: transformers would ask for half a
    minute, for each file.
    """
    hub = need("huggingface_hub", "advise on a model by name")
    heard = []

    def ask() -> None:
        # any answer will do, and any failure is none: the errors are those of whichever client the hub's package has
        with suppress(Exception):
            heard.append(hub.get_session().head(hub.constants.ENDPOINT, timeout=PATIENCE))

    asking = Thread(target=ask, daemon=True)  # for looking a name up, no client has a limit
    asking.start()
    asking.join(PATIENCE)
    return bool(heard)


def config_of(name: str, local: bool) -> Any:
    """The model's configuration; a folder that is not there, or holds no model, is said to be so."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no transformers model in {name}: it has no config.json")
    if folder.is_file():
        raise NotADirectoryError(f"{name} is a file; a transformers model is a folder")
    if not folder.is_dir() and is_path(name):
        raise FileNotFoundError(f"no folder at {name}")
    try:
        return need("transformers").AutoConfig.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ValueError(f"{name} cannot be read as a transformers model: {error}") from error
        why = "was fetched before; the network gives no answer" if local else "could be fetched"
        raise FileNotFoundError(f"no folder at {name}, and no model of that name {why}") from error


def tokenizer_of(name: str, local: bool) -> Any:
    """The model's tokenizer; transformers has many errors for there being none."""
    try:
        return need("transformers").AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:
        raise ValueError(
            f"{name} has no tokenizer that can be read, and the sample text needs one; "
            "saccade.advise(model, inputs=...) in Python takes any inputs"
        ) from error
