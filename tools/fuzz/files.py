"""Cases of files and words from outside: each is read, or refused by ValueError or OSError in words, and soon."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import time
from pathlib import Path
from random import Random

import torch
from cases import Wrong
from safetensors.torch import save

from saccade import catalogue, load_authors
from saccade.cli.masks import parse_mask
from saccade.train.entries import parse
from saccade.train.files import read_tensors

__all__ = ["run"]

#: seconds that the reading of a small file may take on a busy machine
PATIENCE = 20.0


def run(rng: Random) -> str:
    """One case; its description, or Wrong."""
    kind = rng.choice(sorted(_KINDS))
    start = time.monotonic()
    text = f"{kind}: {_KINDS[kind](rng)}"
    if time.monotonic() - start > PATIENCE:
        raise Wrong(f"{text}\ntook {time.monotonic() - start:.0f} s")
    return text


def _in_words(text: str, call: object, *arguments: object) -> str:
    try:
        call(*arguments)  # type: ignore[operator]
    except (ValueError, OSError) as error:
        if not str(error):
            raise Wrong(f"{text}\nrefused without a word") from error
        return f"{text}: {error}"
    return f"{text}: read"


def _words(rng: Random, letters: str, most: int) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, most)))


def _mask(rng: Random) -> str:
    pieces = [
        "causal()",
        "window(3)",
        "window(1.5)",
        "prefix(-1)",
        "prefix(4)",
        "neighborhood(8, 3)",
        "(",
        ")",
        "&",
        "|",
    ]
    pieces += [
        "~",
        "causal",
        "__import__('os')",
        "1",
        ",",
        "x.y",
        "window(left=2)",
        "~" * rng.randint(1, 3000),
        "\0",
        "[]",
    ]
    text = " ".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))
    return _in_words(text[:200], parse_mask, text)


def _mechanism(rng: Random) -> str:
    slug = rng.choice([part.slug for part in catalogue.parts()] + ["mobba", "", "x y", "softmax"])
    keys = ["block_size", "top_k", "rope", "causal", "dim", "no_such", "", "window", "num_heads", "scale"]
    values = ["1", "-1", "0", "x", "true", "False", "1e400", "nan", "[1]", "None", "", "9" * 400, "a=b", "3.5"]
    options = ",".join(f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.randint(0, 3)))
    text = f"{slug}:{options}" if rng.random() < 0.8 else f"{slug}{_words(rng, ':,= ab1', 8)}"
    return _in_words(text, parse, [text])


def _state(rng: Random) -> dict[str, object]:
    names = ["weight", "module.weight", "module.bias", "a.b.c", "", "layers.0.x", "state_dict", "model"]
    state: dict[str, object] = {}
    for _ in range(rng.randint(0, 5)):
        shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 3))]
        value: object = torch.zeros(shape)
        if rng.random() < 0.3:
            value = rng.choice(
                [1, "x", None, [torch.zeros(2)], {"y": torch.zeros(1)}, torch.zeros(2).to_sparse(), -1.5]
            )
        state[rng.choice(names)] = value
    if rng.random() < 0.2:
        state["state_dict"] = state
    if rng.random() < 0.2:
        return {rng.choice(["state_dict", "model", "module", "net"]): state}
    return state


class _Ran:
    """What a pickle must never get to do."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_tell, ())


def _tell() -> None:
    raise Wrong("a checkpoint's code was run")


def _checkpoint(rng: Random) -> str:
    state = _state(rng)
    buffer = io.BytesIO()
    flat = {name: value for name, value in state.items() if type(value) is torch.Tensor and not value.is_sparse}
    kind = rng.choice(("torch", "old torch", "safetensors", "header", "pickle", "noise"))
    if kind in ("torch", "old torch"):
        torch.save(state, buffer, _use_new_zipfile_serialization=kind == "torch")
        content = buffer.getvalue()
    elif kind == "safetensors":
        content = save(flat)
    elif kind == "header":
        header = json.dumps(
            {
                "w": {
                    "dtype": rng.choice(["F32", "X9", 3]),
                    "shape": rng.choice([[2], [-1], [10**12, 10**12], "x"]),
                    "data_offsets": rng.choice([[0, 8], [8, 0], [0, 10**15], [0]]),
                }
            }
        ).encode()
        content = struct.pack("<Q", rng.choice([len(header), 10**15, 0])) + header + b"\0" * 8
    elif kind == "pickle":
        content = pickle.dumps(rng.choice([_Ran(), {"w": _Ran()}, [1], "x", None, {"state_dict": 3}]))
    else:
        content = bytes(rng.getrandbits(8) for _ in range(rng.randint(0, 300)))
    for _ in range(rng.choice((0, 0, 0, 1, 4))):  # damaged on the way
        if not content:
            break
        place = rng.randrange(len(content))
        content = rng.choice(
            (content[:place], content[:place] + bytes([rng.getrandbits(8)]) + content[place + 1 :], content + b"\0" * 7)
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"it{rng.choice(('.safetensors', '.pth', '.pt', '.bin', ''))}"
        path.write_bytes(content)
        slug, module = rng.choice((("cbam", "cbam"), ("triplet", None), ("dat", None), ("softmax", None)))
        text = _in_words(
            f"{kind} of {len(content)} bytes as {path.suffix} for {slug}", load_authors, slug, path, module
        )
        if path.suffix == ".safetensors":
            _in_words("as a run's checkpoint", read_tensors, path)
    return text


_KINDS = {"mask": _mask, "mechanism": _mechanism, "checkpoint": _checkpoint}
