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
