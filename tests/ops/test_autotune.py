"""Tile sizes measured on this machine: the search, the file, what the backends get of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from saccade.ops import autotune as tuning
from saccade.ops import tiles
from saccade.ops.backends import stream
from saccade.ops.backends.stream.forecast import tile_budget


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "_found", None)
    yield tiles.cache_path()


def fake_times(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    def seconds(name: str, *_: Any) -> float:
        return 1.0 + abs((tiles.tuned(name) or {})["tile_bytes"] - best)

    monkeypatch.setattr(tuning, "_seconds", seconds)


def test_nothing_is_tuned_unless_called(cache: Path) -> None:
    assert tiles.tuned("stream") is None
    q = torch.randn(1, 1, 20, 4)
    saccade.attend(q, q, q, backend="stream")
    assert not cache.exists()


def test_keeps_the_fastest_for_later_processes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = stream.CANDIDATES["tile_bytes"][2]
    fake_times(monkeypatch, best)
    lines: list[str] = []
    found = saccade.autotune(backends=["stream"], progress=lines.append)
    assert found == {"stream": {"tile_bytes": best}} == json.loads(cache.read_text())
    assert len(lines) == len(stream.CANDIDATES["tile_bytes"])
    assert tiles.tuned("stream") == {"tile_bytes": best}
    monkeypatch.setattr(tiles, "_found", None)  # as in a new process
    assert tiles.tuned("stream") == {"tile_bytes": best}
    assert tiles.tuned("stream", "cuda") is None and tiles.tuned("blocksparse") is None
    assert os.listdir(cache.parent) == [cache.name]


def test_other_entries_survive(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('{"blocksparse": {"piece_bytes": 7}}')
    fake_times(monkeypatch, 2**20)
    saccade.autotune(backends=["stream"])
    assert tiles.tuned("blocksparse") == {"piece_bytes": 7}
    assert tiles.tuned("stream") == {"tile_bytes": 2**20}


def test_measures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CANDIDATES", {"tile_bytes": [2**16, 2**20]})
    found = saccade.autotune(shapes=[(1, 1, 64, 4)], repeats=1, backends=["stream"])
    assert found["stream"]["tile_bytes"] in (2**16, 2**20)
    assert (
        tile_budget(saccade.ops.planning.Problem(1, 1, 1, 8, 8, 4, 4, torch.float32, torch.device("cpu"), False))
        == found["stream"]["tile_bytes"]
    )


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"stream": 3}', '{"stream": {"tile_bytes": -1}}', '{"stream": {"tile_bytes": "x"}}']
)
def test_a_damaged_file_is_ignored_with_a_warning(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.warns(UserWarning, match="damaged and ignored"):
        assert tiles.tuned("stream") is None
    assert tiles.tuned("stream") is None  # one warning is enough


def test_an_unreadable_file_is_ignored_with_a_warning(cache: Path) -> None:
    cache.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tiles.tuned("stream") is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_a_file_that_others_can_write_is_ignored_with_a_warning(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('{"stream": {"tile_bytes": 7}}')
    cache.chmod(0o666)
    with pytest.warns(UserWarning, match="others can write to"):
        assert tiles.tuned("stream") is None
    cache.parent.chmod(0o777)
    with pytest.raises(OSError, match=f"others can write to {cache.parent}"):
        tiles._write(cache, {})


def test_without_a_home_nothing_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "nowhere")
    assert tiles.tuned("stream") is None


def test_a_failing_write_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('{"stream": {"tile_bytes": 5}}')
    fake_times(monkeypatch, 2**20)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        saccade.autotune(backends=["stream"])
    assert os.listdir(cache.parent) == [cache.name] and json.loads(cache.read_text()) == {"stream": {"tile_bytes": 5}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"shapes": []}, "at least one shape"),
        ({"shapes": [(1, 2, 3)]}, "four positive integers"),
        ({"shapes": [(1, 2, 0, 4)]}, "four positive integers"),
        ({"backends": ["sdpa"]}, "backends must be of stream, blocksparse, got 'sdpa'"),
    ],
)
def test_refuses_what_cannot_be_measured(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saccade.autotune(**arguments)
