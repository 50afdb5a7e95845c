"""What several floors' tests share."""

from __future__ import annotations

from typing import Any

import pytest

from saccade import catalogue
from saccade.catalogue import registry
from saccade.catalogue.cards import Paper


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Papers of nobody that have no room yet, a row of papers.json for each kind of part; the catalogue knows them."""
    rows: list[dict[str, Any]] = [
        {"number": 900 + i, "slug": f"nobodys-{kind}", "title": f"Nobody's {kind}", "family": "mixed", "arxiv": "0"}
        for i, kind in enumerate(catalogue.KINDS)
    ]
    known = registry._all()
    more = {row["slug"]: Paper(**row, state="planned", room=None) for row in rows}
    monkeypatch.setattr(registry, "_all", lambda: {**known, **more})
    return rows
