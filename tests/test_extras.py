"""A bare install: whatever lacks a package says in one line what installs it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saccade.extras import EXTRAS, need

ROOT = Path(__file__).parent.parent

BARE = """
import os, sys
for package in {packages}:
    sys.modules[package] = None  # as if it were not installed
from saccade.cli import main
import saccade
open("config.json", "w").write("{{}}")
def said(*arguments):
    try:
        main(list(arguments))
    except SystemExit as ended:
        print("ended with", ended.code, file=sys.stderr)
said("insert", ".", "--gate", "cbam", "--after", "x")
said("advise", ".")
said("compare", "softmax", "--task", "digits")
said("claim", "bevanet", "--smoke")
said("claim", "han", "--smoke")
said("gallery", "cbam", "--steps", "1")
try:
    saccade.switch
except ImportError as error:
    print(error, file=sys.stderr)
"""


def test_each_front_door_names_the_extra(tmp_path: Path) -> None:
    code = BARE.format(packages=sorted(EXTRAS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if "ended" not in line]
    wanted = ["transformers", "transformers", "data", "data", "data", "data", "transformers"]
    assert [line.rpartition("pip install ")[2] for line in said] == [f"'saccade[{extra}]'" for extra in wanted], said
    assert done.stderr.count("ended with 2") == 6 and "Traceback" not in done.stderr


def test_the_extras_named_are_those_of_the_package() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in declared for extra in EXTRAS.values())


def test_each_dependency_is_imported_somewhere() -> None:
    """But for those that are commands, or that others import."""
    commands = {"pytest-xdist", "ruff", "mypy", "build", "hatchling"}
    # diffusers loads pipelines, and transformers trains, with the first; torch exports with the second
    asked_for_by_others = {"accelerate", "onnx"}
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("src", "tests", "tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
    )
    pattern = r"""(?:^\s*(?:import|from) |import_module\(|importorskip\(|need\()["']?(\w+)"""
    imported = set(re.findall(pattern, code, re.MULTILINE))
    modules = importlib.metadata.packages_distributions()
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + [one for extra in project["optional-dependencies"].values() for one in extra]
    declared = {re.split(r"[\[<>=; ]", requirement)[0] for requirement in asked} - {"saccade"}
    assert {"torch", "typer", "scikit-learn"} <= declared
    for name in declared - commands - asked_for_by_others:
        own = {module for module, owners in modules.items() if name in {owner.lower() for owner in owners}}
        own = own or {name, name.removesuffix("-core")}  # one that is not installed here
        assert own & imported, f"{name} is declared, but nothing imports it"


def test_a_package_that_lacks_another_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(ImportError, match=r"drawing needs matplotlib: pip install 'saccade\[plots\]'"):
        need("matplotlib.figure", "drawing")
    (tmp_path / "accelerate.py").write_text("import no_such_package_of_its_own")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "accelerate", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_its_own"):
        need("accelerate")
