"""How the C code is compiled, and what happens where it cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saccade
from saccade.ops import masks
from saccade.ops.backends.blocksparse import blocksparse_attend
from saccade.ops.native import build
from saccade.ops.routed import routed_attend

needs_code = pytest.mark.skipif(
    build.refusal(torch.device("cpu"), torch.float32) is not None, reason="no native code here"
)


@needs_code
def test_torch_runs_where_there_is_no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 2, 96, 16), torch.randn(1, 1, 96, 16), torch.randn(1, 1, 96, 16)
    chosen = torch.zeros(1, 2, 96, 1, dtype=torch.long)
    grid = masks.neighborhood((8, 12), 3)

    def calls() -> list[Tensor]:
        return [
            blocksparse_attend(q, k, v, masks.causal(), block_size=32),
            saccade.attend(q, k, v, mask=grid, backend="blocksparse"),
            saccade.attend(q, k, v, mask=masks.window(20), backend="blocksparse"),
            routed_attend(q, k, v, chosen, 32, own=False)[0],
        ]

    ours = calls()
    monkeypatch.setattr(build, "_loaded", lambda: (None, "turned off"))
    for x, y in zip(ours, calls()):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="turned off"):
        build.library()


def test_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh = build._load_or_refuse
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SACCADE_NATIVE", "0")
    assert fresh() == (None, "turned off by SACCADE_NATIVE=0")
    monkeypatch.delenv("SACCADE_NATIVE")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in str(fresh()[1])
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ntest "$1" = --version || { echo no such flag >&2; exit 1; }\n')
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    code, why = fresh()
    assert code is None and "no such flag" in str(why)
    # nothing is left behind
    assert list((tmp_path / "saccade" / "native").iterdir()) == []


@needs_code
def test_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.compile_source()
    before = path.stat().st_mtime_ns
    assert build.compile_source() == path and path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_types_of_arguments_are_those_of_the_source() -> None:
    for name, letters in build._SIGNATURES.items():
        found = [
            re.search(rf"int {name}\((.*?)\)|void {name}\((.*?)\)", text.replace("GRID(", f"{name}("), re.S)
            for text in ((build.FOLDER / source).read_text() for source in build.SOURCES)
        ]
        match = next(m for m in found if m)
        arguments = [a.split() for a in (match[1] or match[2]).split(",")]
        kinds = "".join("p" if "*" in " ".join(a) else a[0][0] for a in arguments if a != ["void"])
        assert kinds == letters, name
