"""Every python block of README.md runs when it is pasted alone, and those of a page in docs/ one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in path.read_text(encoding="utf-8")
]


def blocks(page: str) -> list[tuple[int, str]]:
    """(line number, code) of each python block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (text[: found.start(1)].count("\n"), found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


ALONE = [pytest.param(line, code, id=f"line {line}") for line, code in blocks("README.md")]


@pytest.mark.parametrize(("line", "code"), ALONE)
def test_a_block_of_the_readme_runs_alone(
    line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n" * line + code, str(ROOT / "README.md"), "exec"), {"__name__": "README.md"})


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    with torch.random.fork_rng(devices=[]):
        for line, code in blocks(page):
            # blank lines before it make a traceback name the line of the page
            exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)


def test_there_is_something_to_run() -> None:
    assert {"README.md", "docs/transformers.md"} <= set(PAGES) and all(blocks(page) for page in PAGES)
