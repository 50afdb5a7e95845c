from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saccade.report.html import page, write_report
from saccade.train.result import CompareResult, MechanismRecord, Metric, SeedRecord
from saccade.train.scaling import ScalingPoint, fits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


def test_an_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write"):
        write_report(result(tmp_path), tmp_path / "file" / "run")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_every_picture_and_reports_no_error(tmp_path: Path) -> None:
    report = write_report(result(tmp_path), tmp_path)
    probe = tmp_path / "probe.html"
    count = (
        "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length + ' of ' + document.images.length"
    )
    script = f"<script>addEventListener('load', () => document.title = 'shown ' + ({count}))</script>"
    probe.write_text(report.read_text().replace("</body>", script + "</body>"))
    done = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "shown 5 of 5" in done.stdout
    assert "CONSOLE" not in done.stderr
