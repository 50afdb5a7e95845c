"""Progress: lines where the output is no terminal, one display at a time, nothing where nothing is asked for."""

from __future__ import annotations

import sys
import time

import pytest

from saccade.train import progress
from saccade.train.progress import bar, showing, track


def test_a_line_comes_by_and_by_even_within_one_long_call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with showing(), bar("training", 8) as update:
        update(3, "loss 2.5")
        with showing(), bar("inside", None) as inner:  # goes to the display that is open
            inner(words="first")
            time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    assert all(line.startswith("saccade, 0 s: training 3 of 8, loss 2.5; inside 1, first") for line in lines)
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "no line after the end"


def test_nothing_is_shown_where_nothing_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with showing(False):
        assert [item for item in track("ab", "letters") if time.sleep(0.03) is None] == ["a", "b"]
    with bar("no display", 3) as update:
        update()
        time.sleep(0.03)
    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with showing(), bar("training [moba]", 3) as update:
        update(2, "loss [1]")
        time.sleep(0.2)
    assert "training [moba]" in capsys.readouterr().err
