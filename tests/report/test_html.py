from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saccade.report.html import page, write_report
from saccade.train.plotting import PANELS
from saccade.train.result import CompareResult, MechanismRecord, Metric, SeedRecord
from saccade.train.scaling import ScalingPoint, fits

#: just enough of a page for the script: two columns, four rows
_PAGE = """
const cells = [["b", "3.5 ± 0.1"], ["a", "-"], ["c", "1,200"], ["d", "20.0%"]];
const rows = cells.map((texts) => ({ cells: texts.map((textContent) => ({ textContent })) }));
const body = { rows, append(...sorted) { this.rows = sorted; } };
const heads = [0, 1].map(() => ({ attributes: {}, closest: () => ({ tBodies: [body] }),
  getAttribute(name) { return this.attributes[name]; }, hasAttribute(name) { return name in this.attributes; },
  setAttribute(name, value) { this.attributes[name] = value; },
  removeAttribute(name) { delete this.attributes[name]; } }));
const line = { children: heads };
for (const head of heads) head.parentNode = line;
const buttons = heads.map((parentNode) => ({ parentNode, addEventListener(_, run) { this.press = run; } }));
const document = { querySelectorAll: () => buttons };
"""
_PRESS = """
for (const number of [1, 1, 0]) {
  buttons[number].press();
  console.log(body.rows.map((row) => row.cells[0].textContent).join(" "));
}
"""


def result(folder: Path) -> CompareResult:
    points = [ScalingPoint(n, 1e-6 * n**1.5, 3e-6 * n**1.5, 100 * n) for n in (128, 256, 512)]
    curve = [{"step": s, "tokens": 9 * s, "seconds": s, "loss": 5 / s, "lr": 1e-3, "quality": 5 / s} for s in (1, 2, 4)]
    run = SeedRecord(0, 1.25, {"tokens_per_second": 1e4}, curve, "softmax/seed-0")
    first = MechanismRecord("softmax", "softmax", runs=[run], scaling=points, fits=fits(points))
    first.maps = {"layer 0": np.tril(np.full((2, 6, 6), 0.2, dtype=np.float32))}
    second = MechanismRecord("<script>mine</script>", None, runs=[run, SeedRecord(1, 1.5)], notes=["has no cache & co"])
    return CompareResult(
        {"task": "text", "budget": "quick", "seeds": [0]},
        {"processor": "test"},
        Metric("bpb", "bits per byte", False),
        [first, second],
        folder,
    )


def test_the_page_is_whole_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    path = write_report(result(tmp_path), tmp_path)
    text = path.read_text()
    assert (
        text.count("<script") == 1
        and "<script>mine" not in text
        and "&lt;script&gt;mine" in text
        and "has no cache &amp; co" in text
    )
    assert not re.search(r'(?:src|href)="(?!data:)', text), "the page must open offline"
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {
        "learning-curves.png",
        "quality-speed.png",
        "time-length.png",
        "memory-length.png",
        "maps-softmax.png",
    }
    assert text.count("<img ") == len(pictures)
    assert {file.name for file in tmp_path.iterdir()} == pictures | {"report.html"}


def test_the_model_without_a_part_is_described(tmp_path: Path) -> None:
    compared = result(tmp_path)
    compared.mechanisms.append(MechanismRecord("none", "none", runs=[SeedRecord(0, 1.0)]))
    assert "none: the same model without a part" in page(compared, {}, {})


def test_mechanisms_may_have_any_name(tmp_path: Path) -> None:
    compared = result(tmp_path)
    first, second = compared.mechanisms
    names = ("a$x^$b", r"a\$b", "$", "{%s}\ttab", "../..", "\udc80")
    compared.mechanisms = [replace(first if name == names[0] else second, name=name) for name in names]
    assert write_report(compared, tmp_path).is_file()
    assert len(list(tmp_path.glob("*.png"))) == 5 and compared.table()


def test_maps_of_gates_are_no_queries_and_keys(tmp_path: Path) -> None:
    compared = result(tmp_path)
    compared.mechanisms[0].maps = {"block 0": np.ones((4, 4), dtype=np.float32)}
    text = page(compared, {}, {"softmax": b"png"})
    assert "queries" not in text and "What a gate multiplies the map with" in text
    compared.mechanisms[0].maps = {"layer 0": np.ones((2, 4, 4), dtype=np.float32)}
    assert "rows are queries" in page(compared, {}, {"softmax": b"png"})


def test_the_page_is_dark_for_who_likes_it_dark_and_its_table_sorts(tmp_path: Path) -> None:
    text = write_report(result(tmp_path), tmp_path).read_text()
    assert text.count('<source media="(prefers-color-scheme: dark)"') == len(PANELS)
    assert "@media (prefers-color-scheme: dark)" in text and text.count("<th scope") == text.count("<button>")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_table_is_sound(tmp_path: Path) -> None:
    script = re.search(r"<script>(.*?)</script>", page(result(tmp_path), {}, {}), re.DOTALL)
    assert script is not None
    (tmp_path / "sort.js").write_text(_PAGE + script.group(1) + _PRESS)
    done = subprocess.run(["node", str(tmp_path / "sort.js")], capture_output=True, text=True)
    assert done.stdout.split("\n")[:3] == ["c d b a", "b d c a", "a b c d"], done.stderr


def test_an_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write"):
        write_report(result(tmp_path), tmp_path / "file" / "run")


def test_a_browser_shows_every_picture_and_reports_no_error(tmp_path: Path, shown: Callable[..., str]) -> None:
    report = write_report(result(tmp_path), tmp_path)
    count = (
        "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length + ' of ' + document.images.length"
    )
    assert shown(report, count) == "5 of 5"
