"""Tables cut nothing, whatever the width, and fold into paragraphs where they must."""

from __future__ import annotations

import re

import pytest

from saccade.tables import UNLIMITED, facts, fold, table, terminal_width

NAMES = ("moba:block_size=16,top_k=2", "moba:block_size=16,top_k=4", "日本語の名前")
COLUMNS = ("mechanism", "bits per byte ↓", "train tokens/s", "what it is")
ROWS = [(name, f"{i}.123", "1,234,567", "blocks of keys, by their mean key") for i, name in enumerate(NAMES)]


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 100, UNLIMITED])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    text = table(COLUMNS, ROWS, title="a title", left=1, width=width)
    squeezed = re.sub(r"[\s-]+", "", text)
    for row in ROWS:
        for cell in row:
            assert re.sub(r"[\s-]+", "", cell) in squeezed or all(word in text for word in cell.split())
    assert "…" not in text


def test_lines_fit_wherever_the_words_do() -> None:
    for width in range(40, 110, 7):
        assert max(map(len, table(COLUMNS, ROWS, width=width).splitlines())) <= width


def test_a_narrow_table_is_a_paragraph_a_row() -> None:
    wide, narrow = table(COLUMNS, ROWS, width=120), table(COLUMNS, ROWS, width=40)
    assert len(wide.splitlines()) == 2 + len(ROWS)
    assert narrow.split("\n\n")[1].splitlines()[0] == NAMES[1] and len(narrow.split("\n\n")) == len(ROWS)


def test_figures_stand_below_one_another() -> None:
    lines = table(("part", "ms"), [("a", "1"), ("bcd", "100")], width=80).splitlines()
    assert lines == ["part   ms", "----  ---", "a       1", "bcd   100"]


def test_facts_stand_beside_their_names_or_below_them() -> None:
    pairs = [("state", "ready"), ("nothing", ""), ("proved by", ["a recording of the authors' code", "a claim"])]
    assert facts(pairs, 80)[0] == "state      ready" and not any("nothing" in line for line in facts(pairs, 80))
    assert facts(pairs, 20)[:2] == ["state", "  ready"]
    assert fold("a b c", 3) == ["a b", "c"]


def test_the_width_is_columns_else_the_terminals_else_unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "33")
    assert terminal_width() == 33
    for wrong in ("", "0", "-4", "wide"):
        monkeypatch.setenv("COLUMNS", wrong)
        assert terminal_width() == UNLIMITED  # the tests' output is no terminal
