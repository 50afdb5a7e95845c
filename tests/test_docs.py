"""Every python block of every page in docs/ runs, one page after the other in a namespace of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8"))


def blocks(page: str) -> list[tuple[int, str]]:
    """(line number, code) of each python block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        (text[: found.start(1)].count("\n"), found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "transformers.md":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    with torch.random.fork_rng(devices=[]):
        for line, code in blocks(page):
            # blank lines before it make a traceback name the line of the page
            exec(compile("\n" * line + code, str(DOCS / page), "exec"), namespace)


def test_there_is_something_to_run() -> None:
    assert "transformers.md" in PAGES and all(blocks(page) for page in PAGES)
