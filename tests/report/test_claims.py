"""The page of claims: written from the records, kept in order, read back; the one in docs/ is whole and not stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade import catalogue
from saccade.ops.measure import machine
from saccade.report import claims
from saccade.train.claims import Outcome, run_claim
from saccade.train.lab import Lab


def outcome(slug: str, holds: bool) -> Outcome:
    return Outcome(slug, "A title", "it is fast", "2 x", {"speedup": 2.5}, holds, "a note", 3.0, False, 7)


def test_records_are_written_and_read_back(tmp_path: Path) -> None:
    assert claims.read(tmp_path) == {}
    records = {
        slug: claims.record(outcome(slug, slug == "moba"), "2026-01-02", machine()) for slug in ("moba", "softmax")
    }
    page = claims.write(tmp_path, records).read_text()
    assert claims.read(tmp_path) == records
    assert list(claims.read(tmp_path)) == [p.slug for p in catalogue.parts() if p.slug in records]
    assert "1 of 2 show" in page and "| speedup | 2.5 |" in page and "2026-01-02, seed 7" in page
    assert "busy" not in page
    records["moba"]["waited"] = 0.4
    assert page.count("\n") == claims.page(list(records.values())).count("\n")
    assert "The machine was busy: others had the processor up to 40%" in claims.page(list(records.values()))
    (tmp_path / "claims.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        claims.read(tmp_path)


def test_a_claim_that_ran_makes_a_record(tmp_path: Path) -> None:
    ran = run_claim("softmax", Lab(smoke=True, seed=3))
    claims.write(tmp_path, {"softmax": claims.record(ran, "2026-01-02", machine())})
    assert claims.read(tmp_path)["softmax"]["seed"] == 3


def test_second_lines_stand_below_the_claim_of_their_part(tmp_path: Path) -> None:
    own = claims.record(outcome("moba", False), "2026-01-02", machine())
    lines = [own | {"model": "smollm2-135m", "context": 2048, "holds": True}, own | {"scale": 10}, own]
    page = claims.write(tmp_path, {claims.line(each): each for each in lines}).read_text()
    kept = claims.read(tmp_path)
    assert list(kept) == ["moba", "moba on smollm2-135m, 2048 tokens", "moba with 10 times the steps"]
    assert kept["moba"] == own and "0 of 1 show." in page
    assert "of those that do not: 0 of 1 show." in page and "On a real model" in page
    assert page.index("## moba") < page.index("### On smollm2-135m") < page.index("### With 10 times the steps")
    assert "**does not show with 10 times the steps**" in page and page.count("The paper says") == 1
