"""Empty rooms: they run where they are laid, and their tests ask for what the paper must give."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import saccade
from saccade import catalogue
from saccade.catalogue.layout import lay_out
from saccade.cli import main

KINDS = tuple(catalogue.KINDS)

#: each room's part is called as its kind says; the model under a wrapper is as before, findings can be seen
CALLS = """
called = {}
for kind, slug in chosen.items():
    part = catalogue.part(slug)
    module = catalogue.create(slug, **part.example)
    inputs = part.kind.inputs(part, module, 9)
    called[kind] = module, inputs, part.kind.run(module, inputs)
    assert not part.kind.complaint(*called[kind][1:]), slug
tokens, indices, weights = called["compressor"][2]
assert tokens.shape[:2] == indices.shape == weights.shape == (2, 4)
wrapper, (model, x), y = called["wrapper"]
before = model(x)
with wrapper(model):
    assert torch.equal(model(x), y) and not torch.equal(y, before)
assert torch.equal(model(x), before)
findings = called["analysis"][2]
assert len(findings.table().splitlines()) == 2 + 4 and findings.plot().axes
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "src" / "saccade").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    return tmp_path


def test_a_room_of_every_kind_can_be_laid_out(checkout: Path, planned: list[dict[str, object]]) -> None:
    for kind, paper in zip(KINDS, planned):
        for path in lay_out(str(paper["slug"]), kind, checkout):
            text = path.read_text(encoding="utf-8")
            compile(text, path.name, "exec")
            assert max(map(len, text.splitlines())) <= 120 and "$" not in text
            imports = re.findall(r"^from saccade.*", text, re.MULTILINE)
            assert imports == sorted(imports)


def test_rooms_run_from_the_start_and_their_tests_name_what_is_missing(
    tmp_path: Path, planned: list[dict[str, object]]
) -> None:
    package = Path(saccade.__file__).parent
    shutil.copytree(package, tmp_path / "src" / "saccade", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    known = tmp_path / "src" / "saccade" / "catalogue" / "papers.json"
    known.write_text(json.dumps([*json.loads(known.read_text("utf-8")), *planned]), "utf-8")
    chosen = {kind: str(paper["slug"]) for kind, paper in zip(KINDS, planned)}
    tests = [str(lay_out(slug, kind, tmp_path)[-1]) for kind, slug in chosen.items()]
    code = f"import torch\nfrom saccade import catalogue\nchosen = {chosen}\n{CALLS}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert re.search(rf"\b{len(KINDS)} failed, {len(KINDS)} passed", done.stdout), done.stdout
    assert done.stdout.count("FAILED") == done.stdout.count("::test_the_card_is_written")
    assert "['summary', 'complexity', 'invariants', 'efficiency']" in done.stdout


def test_the_command_names_the_files_and_the_next_step(
    checkout: Path, capsys: pytest.CaptureFixture[str], planned: list[dict[str, object]]
) -> None:
    slug = str(planned[0]["slug"])
    with pytest.raises(SystemExit) as exit_:
        main(["new", slug, "--kind", "gate", "--root", str(checkout)])
    out = capsys.readouterr().out
    assert not exit_.value.code and f"test_parts.py -k {slug}" in out
    assert all(Path(line).is_file() for line in out.splitlines()[:-1])


def test_refusals(checkout: Path, tmp_path: Path, planned: list[dict[str, object]]) -> None:
    slug = str(planned[0]["slug"])
    for arguments, message in (
        (("moba", "sequence", checkout), "has its room already"),
        (("no-such-paper", "gate", checkout), "no part is called"),
        ((slug, "engine", checkout), "kind must be one of sequence"),
        ((slug, "gate", tmp_path / "nowhere"), "in a source checkout"),
    ):
        with pytest.raises(ValueError, match=message):
            lay_out(*arguments)
    lay_out(slug, "gate", checkout)
    with pytest.raises(ValueError, match="is there already"):
        lay_out(slug, "gate", checkout)
