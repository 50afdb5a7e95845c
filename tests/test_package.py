"""The package as a user meets it: quick to import, one wheel, typed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import saccade

ROOT = Path(__file__).parent.parent


def python(code: str, executable: str = sys.executable, **environment: str) -> str:
    done = subprocess.run(
        [executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    out = python(
        "import time, torch, sys; before = set(sys.modules); start = time.perf_counter(); import saccade;"
        "print(time.perf_counter() - start);"
        "heavy = {'transformers', 'matplotlib', 'sklearn', 'skimage', 'typer', 'rich', 'diffusers'};"
        "print(sorted(heavy & (set(sys.modules) - before)), [m for m in sys.modules if m.startswith('saccade.')])"
    )
    seconds, modules = out.strip().split("\n")
    assert float(seconds) < 0.05  # the bound that the design promises; a lazy package takes about 2 ms
    assert modules == "[] []"


def test_every_promised_name_loads() -> None:
    for name in saccade.__all__:
        assert getattr(saccade, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        saccade.nonsense  # noqa: B018


def test_the_wheel_alone_works_in_an_empty_environment(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        check=True,
    )
    (wheel,), (sdist,) = list(tmp_path.glob("*.whl")), list(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as packed:
        packed_files = {name.partition("/")[2] for name in packed.getnames()}
    needed = {"Makefile", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.*"))}
    assert needed <= packed_files  # the Makefile's commands run from it
    names = zipfile.ZipFile(wheel).namelist()
    assert {"saccade/py.typed", "saccade/catalogue/papers.json"} <= set(names)
    assert all(name.startswith(("saccade/", "saccade-")) for name in names)

    # an empty environment with nothing but the wheel; torch and the other dependencies come by path, since
    # installing them again would take minutes
    venv.create(tmp_path / "empty", with_pip=False)
    site = next((tmp_path / "empty").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    import torch

    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parent.parent))
    out = python(
        "import torch, saccade; print(saccade.__file__);"
        "x = torch.randn(1, 8, 32); print(saccade.create('moba', dim=32, num_heads=4)(x).shape)",
        str(tmp_path / "empty" / "bin" / "python"),
        PYTHONPATH="",
    )
    assert str(tmp_path) in out and "[1, 8, 32]" in out
