"""Settings of single layers as a file: `Advice.save` writes it, `saccade.switch(model, settings=path)` applies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Settings", "read_settings"]


class Settings(NamedTuple):
    """What a settings file holds, in the words of `switch`."""

    slug: str
    options: dict[str, Any]
    dense_layers: list[int | str]
    layer_options: dict[int | str, dict[str, Any]]


def read_settings(path: str | Path, layers: int) -> Settings:
    """The mechanism, the options, the layers that stay dense and those with options of their own.

    Args:
        path: what `Advice.save` wrote.
        layers: attention layers of the model that it is read for.

    Raises:
        ValueError: if it holds something else, or names layers of a model with another number of them.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        own: dict[int | str, dict[str, Any]] = {
            place: dict(options) for place, options in found.get("layer_options", {}).items()
        }
        settings = Settings(str(found["mechanism"]), dict(found["options"]), list(found.get("dense_layers", ())), own)
        count = int(found.get("layers", layers))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} holds no settings: `advice.save(path)` writes them") from None
    if count != layers and (own or any(isinstance(place, str) for place in settings.dense_layers)):
        raise ValueError(f"{path} has settings for each of {count} attention layers, and this model has {layers}")
    return settings
