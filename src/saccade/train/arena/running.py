"""Caches that hold fewer tokens, compared on a language model as it is: nothing is trained.

A comparison lives in a folder:

    config.json                  what was asked, and every setting that followed
    <cache>/pieces.jsonl         what was measured of it, text by text and prompt by prompt, a line each
    result.json                  the whole, once it is finished

What was measured is never measured again: a comparison that was interrupted goes on at the next text or prompt, and
one that is finished takes further caches and shares.

Shape letters: N tokens of a text.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import saccade
from saccade.extras import need
from saccade.integrations.advise import positions
from saccade.integrations.decoding import can_decode
from saccade.ops.measure import machine
from saccade.train import fingerprints, models
from saccade.train.arena.contestants import FULL, Contestant, parse
from saccade.train.arena.measuring import measure_prompt, measure_text
from saccade.train.arena.result import ArenaResult
from saccade.train.arena.rows import Row, row_of
from saccade.train.arena.sizes import BUDGETS, Sizes, read
from saccade.train.arguments import place_of
from saccade.train.data import english_tokens, retrieval
from saccade.train.files import append_line, folder_name, locked, make_folder, read_json, write_text
from saccade.train.progress import bar, showing
from saccade.train.tasks import fingerprint

__all__ = ["arena"]

#: figures of a piece of one cache at one share, by its name: "text 0", "passkey 0" ...
Pieces = dict[str, dict[str, float]]


def arena(
    caches: Sequence[str] | Mapping[str, Any],
    model: str | tuple[Any, Any] = "smollm2",
    budget: str = "quick",
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> ArenaResult:
    """Compare key-value caches on a language model: which one should I use here, and with how many bytes?

        result = arena(["window", "heavy-hitters:recent=0.25"], "smollm2", out="runs/caches")
        print(result.table())

    Args:
        caches: policies, each with options after a colon; or a mapping from names to such, to
            `saccade.compress.policies.Policy` or to presses in kvpress' sense. The full cache is compared too.
        model: a name of `saccade.train.models` or its beginning, a folder of transformers, or a pair of a causal
            language model of transformers and its tokenizer.
        budget: "quick" (512 tokens), "standard" (2,048) or "long" (8,192), fields of `Sizes` after a colon:
            "long:texts=1,each=0".
        out: run folder; what is there already is not measured again. Where None, nothing is kept.
        data: a text file in place of Python's language reference, for perplexity.
        seed: of the prompts.
        device: "cpu", "cuda"; the accelerator where there is one, when None.
        progress: False for none; see `saccade.train.progress.showing`.
        **settings: any field of `Sizes` (`length`, `shares`, `depths`, ...).

    Raises:
        ValueError: for unknown names, settings out of range, a folder that holds another comparison, a model with
            fewer positions or no cache, or if the full cache cannot run.
        OSError: if a file cannot be read, the folder not written, or another run is in it.
        ImportError: if transformers, or the package of a named model, is not installed.
    """
    contestants = parse(caches)
    budget, given = read(budget)
    sizes = BUDGETS[budget].changed({**given, **settings})
    place = place_of(device)
    name, network, tokenizer = _loaded(model)
    with ExitStack() as stack:
        stack.enter_context(showing(progress))
        network = network.to(place).eval()
        job = _Job(network, tokenizer, sizes, data, seed)
        config = {
            "saccade": saccade.__version__,
            "task": "compress",
            "budget": budget,
            "model": {"name": name, "weights": fingerprints.values(*network.parameters())},
            "settings": asdict(sizes),
            "seed": seed,
            "data": fingerprint(data),
            "device": str(place),
        }
        config = json.loads(json.dumps(config))
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saccade-")))
        else:
            folder = Path(out)
            _check(folder, config)
            make_folder(folder)
            stack.enter_context(locked(folder))
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        failed = job.run(contestants, folder)
        rows = job.rows(folder, [each.name for each in contestants])
        if not any(row.name == FULL for row in rows):
            raise ValueError(failed[FULL])
        config["date"] = date.today().isoformat()
        config["caches"] = [_definition(folder, name) for name in dict.fromkeys(row.name for row in rows)]
        result = ArenaResult(config, machine(place), rows, failed, folder if out is not None else None)
        try:
            result.save(folder)
        except OSError as error:
            result.unkept.append(str(error))
    return result


def _loaded(model: str | tuple[Any, Any]) -> tuple[str, nn.Module, Any]:
    """A model's name, the model and its tokenizer.

    Raises:
        ValueError: if it is no language model.
    """
    if not isinstance(model, str):
        network, tokenizer = model
        if not can_decode(network):
            raise ValueError(f"{type(network).__name__} has no cache: caches are of language models")
        return type(network).__name__, network, tokenizer
    named = models.named(model)
    if named is not None:
        if models.MODELS[named].kind != "decoder":
            raise ValueError(f"{named} is no language model: caches are of those")
        network, tokenizer = models.load(named)
        return f"{named} {models.version(named)}", network, tokenizer
    transformers = need("transformers", "a model's caches")
    if not Path(model).is_dir():
        raise FileNotFoundError(
            f"no folder at {model}, and no model of that name; there are {', '.join(models.MODELS)}"
        )
    network = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    return model, network, transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)


def _check(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that holds something else.

    Raises:
        ValueError: if it does.
    """
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no comparison; choose an empty or a new folder")
        return
    there = read_json(path)
    asked = {**config, "settings": {**config["settings"], "shares": None}}
    held = {**there, "settings": {**there["settings"], "shares": None}} if there.get("task") == "compress" else there
    different = [name for name in asked if held.get(name) != asked[name]]
    if different:
        raise ValueError(f"{folder} holds another comparison (its {', '.join(different)}); choose another folder")


class _Job:
    """The texts and prompts, and what each cache makes of them.

    Raises:
        ValueError: if the model has too few positions, or the tokenizer no tokens for digits.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sizes: Sizes, data: str | Path | None, seed: int) -> None:
        limit = positions(model.config)
        if limit is not None and sizes.length > limit:
            raise ValueError(f"length must be at most the model's positions ({limit}), got {sizes.length}")
        self.model, self.sizes = model, sizes
        texts = english_tokens(tokenizer, sizes.texts * sizes.length, data).split(sizes.length)
        self.pieces = {f"text {i}": partial(measure_text, ids_N=ids_N, new=sizes.new) for i, ids_N in enumerate(texts)}
        for kind, keys, later in (("passkey", 1, False), ("multi-key", sizes.keys, False), ("later", sizes.keys, True)):
            if not sizes.each:
                break
            asked = retrieval(tokenizer, sizes.length, keys=keys, depths=sizes.depths, each=sizes.each, seed=seed)
            for i, prompt in enumerate(asked.prompts):
                self.pieces[f"{kind} {i}"] = partial(measure_prompt, prompt=prompt, later=later)

    def shares(self, contestant: Contestant) -> Sequence[float | None]:
        """At which it is measured."""
        return sorted(self.sizes.shares, reverse=True) if contestant.takes_share else [None]

    def run(self, contestants: Sequence[Contestant], folder: Path) -> dict[str, str]:
        """Measure what is missing, share by share for all; who could not run, and why."""
        files = {each.name: _file(folder, each) for each in contestants}
        known = {name: _read(path) for name, path in files.items()}
        turns = [(each, share) for each in contestants for share in self.shares(each)]
        turns.sort(key=lambda turn: -(turn[1] or 2.0))
        failed: dict[str, str] = {}
        with bar("caches", len(turns) * len(self.pieces)) as update:
            for number, (each, share) in enumerate(turns):
                where = each.name if share is None else f"{each.name} at {share:.4g}"
                said = known[each.name].get(share, {})
                for place, (piece, measured) in enumerate(self.pieces.items()):
                    update(number * len(self.pieces) + place, f"{where}, {piece}")
                    if piece in said:
                        continue
                    try:
                        found = measured(self.model, partial(each.opened, self.model, share))
                    except (ValueError, NotImplementedError) as error:
                        failed[where] = " ".join(str(error).split())
                        break
                    append_line(files[each.name], json.dumps({"share": share, "piece": piece, **found}))
        return failed

    def rows(self, folder: Path, first: Sequence[str]) -> list[Row]:
        """Of all caches of the folder that were measured to the end at these shares.

        Args:
            first: names that come first.
        """
        there = [str(read_json(path)["name"]) for path in sorted(folder.glob("*/cache.json"))]
        found = []
        for name in dict.fromkeys([*first, *there]):
            known = _read(folder / folder_name(name) / "pieces.jsonl")
            for share in (None, *sorted(self.sizes.shares, reverse=True)):
                if self.pieces.keys() <= known.get(share, {}).keys():
                    found.append(row_of(name, share, {piece: known[share][piece] for piece in self.pieces}))
        return found


def _definition(folder: Path, name: str) -> dict[str, Any]:
    """Of a cache of that name; empty where there is none."""
    path = folder / folder_name(name) / "cache.json"
    return read_json(path) if path.is_file() else {}


def _file(folder: Path, contestant: Contestant) -> Path:
    """Where its pieces are, its definition beside them.

    Raises:
        ValueError: if another definition is there.
    """
    own, told = folder / folder_name(contestant.name), json.loads(json.dumps(contestant.as_config(), default=str))
    there = _definition(folder, contestant.name)
    if there and there != told:
        raise ValueError(f"{own} holds what was measured of another cache of that name; choose another folder")
    write_text(own / "cache.json", json.dumps(told, indent=2) + "\n")
    path = own / "pieces.jsonl"
    if path.is_file():  # of a run that was killed while it wrote, the last line has no end
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)
    return path


def _read(path: Path) -> dict[float | None, Pieces]:
    """What was measured of a cache, by share.

    Raises:
        ValueError: if a line is damaged.
    """
    found: dict[float | None, Pieces] = {}
    if not path.is_file():
        return found
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            share, piece = line.pop("share"), line.pop("piece")
            found.setdefault(share, {})[piece] = {name: float(value) for name, value in line.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}); delete it to measure that again") from error
    return found
