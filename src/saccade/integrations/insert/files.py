"""Transformers models with gates, as folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from saccade.extras import need
from saccade.integrations.insert.insertion import insert
from saccade.integrations.insert.places import NAME
from saccade.integrations.insert.report import Inserted
from saccade.ops.folder import write_text

_RECORD = "saccade_insert.json"


def save(model: nn.Module, folder: str | Path, reports: Sequence[Inserted]) -> None:
    """A transformers model with gates as a folder that `load` reads: the model's own files and what was inserted.

    Args:
        model: a transformers model.
        folder: to be written; made if need be.
        reports: of every `insert` into this model, in order.
    """
    folder = Path(folder)
    model.save_pretrained(folder)  # type: ignore[operator]
    rows = [report.as_dict() for report in reports]
    write_text(folder / _RECORD, json.dumps(rows, indent=2))


def load(folder: str | Path) -> nn.Module:
    """A model that `save` (or `saccade insert --out`) wrote, in evaluation mode.

    Args:
        folder: that `save` wrote.

    Raises:
        OSError: if the folder has no such model.
        ValueError: if its files do not fit together.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    rows = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    gates = {name for name in state if f".{NAME}" in f".{name}"}
    model = pretrained(folder, {name: tensor for name, tensor in state.items() if name not in gates})
    for row in rows:
        channels = {place["path"]: place["channels"] for place in row["places"]}
        options = {"channels": channels, "gentle": row["gentle"], **row["arguments"]}
        insert(model, row["slug"], after=list(channels), **options)
    lacking = [name for name in model.load_state_dict(state, strict=False).missing_keys if f".{NAME}" in f".{name}"]
    if lacking:
        raise ValueError(f"{folder} lacks the gates' weights, such as {lacking[0]!r}")
    return model.eval()


def pretrained(folder: str | Path, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A transformers model from its folder, of the class that its config names.

    Args:
        folder: that `save_pretrained` wrote.
        state: its weights, where they are not to be read from the folder.

    Raises:
        OSError: if there is no model.
        ValueError: if transformers has no such class.
    """
    transformers = need("transformers", "a model from a folder")
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no transformers model in {folder}: it has no config.json")
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or ["AutoModel"]
    loader = getattr(transformers, names[0], None)
    if loader is None:
        raise ValueError(f"transformers has no class {names[0]!r}, which {folder} was saved from")
    if state is None:
        return loader.from_pretrained(folder)
    return loader.from_pretrained(None, config=config, state_dict=dict(state))
