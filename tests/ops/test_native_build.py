"""How the C code is compiled, and what happens where it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saccade
from saccade.ops import folder, masks
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
    monkeypatch.setattr(build, "_outcome", (None, "turned off"))
    for x, y in zip(ours, calls()):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="turned off"):
        build.library()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the compiled code, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "saccade" / "native"


def test_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    fresh = build._load_or_refuse
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
    with pytest.warns(UserWarning, match="computes in torch: the C compiler failed: no such flag"):
        code, why = fresh()
    assert code is None and "no such flag" in str(why)
    # nothing is left behind
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("mask", [masks.causal(), masks.window(9), masks.neighborhood((32, 32), 3)])
def test_planning_compiles_nothing(mask: masks.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_outcome", None)
    monkeypatch.setattr(build, "_loaded", lambda: pytest.fail("compiled"))
    x = torch.randn(1, 4, 1024, 32)
    saccade.plan(x, x, x, mask=mask)


@pytest.fixture
def kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiled library where this test's cache is; the compiler only copies it."""
    run, compiled = build._run, build.library()._name

    def copy(*command: str) -> str:
        if command[-1] == "-lm":
            shutil.copyfile(compiled, command[-2])
        return run(command[0], "--version")

    monkeypatch.setattr(build, "_run", copy)
    return build.compile_source()


@needs_code
def test_is_compiled_once_into_a_folder_of_its_own(kept: Path) -> None:
    before = kept.stat().st_mtime_ns
    assert build.compile_source() == kept and kept.stat().st_mtime_ns == before
    assert list(kept.parent.iterdir()) == [kept]
    modes = [path.stat().st_mode & 0o777 for path in (kept, kept.parent, kept.parent.parent)]
    assert modes == [0o700] * 3


@needs_code
@pytest.mark.parametrize("damage", ["truncated", "emptied", "zeroed", "changed", "a folder", "a pipe"])
def test_a_damaged_library_is_compiled_again(damage: str, kept: Path) -> None:
    whole = kept.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "emptied": b"",
        "zeroed": whole[:4096] + bytes(len(whole) - 4096),
        "changed": whole[:-1] + bytes([whole[-1] ^ 1]),
    }
    kept.unlink()
    if damage in damaged:
        kept.write_bytes(damaged[damage])
    elif damage == "a folder":
        kept.with_name(f"{kept.stem[:33]}x.so").mkdir()
    else:
        os.mkfifo(kept)
    assert build.compile_source() == kept and kept.read_bytes() == whole
    assert build._load_or_refuse()[1] is None


@needs_code
def test_a_library_without_our_functions_is_refused_in_one_line(kept: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    subprocess.run([build._compiler(), "-shared", "-x", "c", os.devnull, "-o", str(other)], check=True)
    data = other.read_bytes()
    kept.unlink()
    planted = kept.with_name(f"{kept.stem[:32]}-{build._digest(data)}.so")
    planted.write_bytes(data)
    planted.chmod(0o700)
    with pytest.warns(UserWarning, match=r"computes in torch: .* has no saccade_lanes; delete it"):
        code, reason = build._load_or_refuse()
    assert code is None and reason is not None


def as_another(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """What lies at `path` belongs to somebody else."""
    lstat = Path.lstat

    def fake(self: Path) -> os.stat_result:
        info = lstat(self)
        return os.stat_result((*info[:4], 4321, *info[5:])) if self == path else info

    monkeypatch.setattr(Path, "lstat", fake)


needs_owners = pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")


@needs_code
@needs_owners
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nothing_is_loaded_from_where_another_could_write_it(
    place: int, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = [kept.parent, *kept.parent.parents][place]
    with monkeypatch.context() as patch:
        as_another(patch, folder)
        with pytest.warns(UserWarning, match=f"{folder} belongs to another user"):
            assert build._load_or_refuse()[0] is None
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match=f"others can write to {folder}"):
        assert build._load_or_refuse()[0] is None
    # as /tmp: others can make files, and not touch ours
    folder.chmod(0o1777)
    if place == 0:
        with pytest.warns(UserWarning, match=f"others can write to {folder}"):
            assert build._load_or_refuse()[0] is None
    else:
        assert build._load_or_refuse()[1] is None
    folder.chmod(0o750)
    assert build._load_or_refuse()[1] is None


@needs_code
@needs_owners
def test_a_library_that_another_could_write_is_replaced(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.chmod(0o766)
    assert build.compile_source() == kept and kept.stat().st_mode & 0o777 == 0o700
    before = kept.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        as_another(patch, kept)
        assert build.compile_source() == kept
    assert kept.stat().st_mtime_ns > before


@needs_code
@needs_owners
def test_links_on_the_way_are_followed_with_care(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, real = tmp_path / "link", tmp_path / "real"
    real.mkdir(mode=0o700)
    link.symlink_to("real")
    monkeypatch.setenv("XDG_CACHE_HOME", str(link))
    path = build.compile_source()
    assert path.resolve().is_relative_to(real) and build._load_or_refuse()[1] is None
    with monkeypatch.context() as patch:
        as_another(patch, link)
        with pytest.raises(OSError, match=f"{link} belongs to another user"):
            build.compile_source()
    real.chmod(0o777)
    with pytest.raises(OSError, match=f"others can write to {real}"):
        build.compile_source()


@needs_code
@needs_owners
def test_a_group_of_the_user_alone_may_write(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.parent.parent.chmod(0o770)
    for alone in (True, False):
        monkeypatch.setattr(folder, "_is_own_group", lambda number, alone=alone: alone)
        if alone:
            assert build.compile_source() == kept
        else:
            with pytest.raises(OSError, match="others can write"):
                build.compile_source()


def test_a_relative_cache_folder_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder.cache_folder() == tmp_path / "home" / ".cache" / "saccade"
    monkeypatch.setenv("HOME", "home")
    with pytest.raises(OSError, match="must be an absolute path, got 'home'"):
        folder.cache_folder()


def test_types_of_arguments_are_those_of_the_source() -> None:
    for name, letters in build._SIGNATURES.items():
        macro = re.sub("saccade_grid8?", "grid", name).upper()  # GRID_TASKS is compiled twice, under two names
        found = [
            re.search(rf"int {name}\((.*?)\)|void {name}\((.*?)\)", text.replace(f"{macro}(", f"{name}("), re.S)
            for text in ((build.FOLDER / source).read_text() for source in build.SOURCES)
        ]
        match = next(m for m in found if m)
        arguments = [a.split() for a in (match[1] or match[2]).split(",")]
        kinds = "".join("p" if "*" in " ".join(a) else a[0][0] for a in arguments if a != ["void"])
        assert kinds == letters, name
