"""The page of real models: each section from its files, and said to be missing where they are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saccade.integrations.advise import Advice, Trial
from saccade.ops.measure import machine
from saccade.report import claims, real_models
from saccade.report.advice import read_advice, write_advice
from saccade.train.arena import ArenaResult, Row
from saccade.train.claims import Outcome

DOCS = Path(__file__).parents[2] / "docs"


def trial(slug: str, speedup: float, perplexity: float, **options: object) -> Trial:
    return Trial(slug, options, 1 / speedup, speedup, 0.2, 0.5, 0.3, perplexity=perplexity)


def test_what_is_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    assert real_models.page(tmp_path).count("Not measured yet: `") == 4


def test_the_frontier_of_every_mechanism(tmp_path: Path) -> None:
    trials = [
        trial("spargeattn", 1.6, 10.05, top_k=0.25),
        trial("spargeattn", 1.3, 10.01, top_k=0.5),
        trial("spargeattn", 1.2, 10.5, top_k=0.7),
        trial("moba", 1.5, 16.0, top_k=8),
    ]
    advice = Advice("smollm2-135m", 8192, 0.01, 12.0, trials, {"mra": "causal"}, perplexity=10.0, quality="perplexity")
    write_advice(advice, tmp_path / "real-models" / "smollm2-8192")
    page = real_models.page(tmp_path)
    assert "### smollm2-135m, 8192 tokens" in page and "12,000 ms, perplexity 10.000" in page
    assert "| **spargeattn:top_k=0.25** | 1.60 x | +0.50% |" in page
    assert "| **spargeattn:top_k=0.5** | 1.30 x | +0.10% |" in page
    assert "| moba:top_k=8 | 1.50 x | +60.00% |" in page and "top_k=0.7" not in page
    assert "![frontier](real-models/smollm2-8192/advice.png)" in page
    assert "within 1.0% of loss: spargeattn:top_k=0.25, 1.60 x as fast" in page and "not here: mra (causal)" in page
    assert "[settings](real-models/smollm2-8192/settings.json)" in page
    assert page.count("Not measured yet") == 3


def test_the_arena_the_conversions_and_the_claims(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"length": 2048, "new": 64, "texts": 1, "each": 1, "depths": [0.5]}
    asked = {"task": "compress", "budget": "standard", "model": {"name": "smollm2"}, "settings": sizes, "date": "today"}
    figures = {"passkey": 1.0, "multi_key": 0.5, "later": 0.0, "decode_rate": 20.0, "first": 3.0}
    rows = [Row("full", None, 2**21, 2**21, 3.0, **figures), Row("a-vl", 0.5, 2**20, 2**20, 3.25, **figures)]
    result = ArenaResult(asked, machine(), rows)
    (tmp_path / "real-models" / "compress").mkdir(parents=True)
    result.save(tmp_path / "real-models" / "compress")
    states = {"before": 9.0, "dropped": 90.0, "started": 50.0, "imitated": 12.0, "after": 10.0}
    cost = {"seconds": 0.05, "cache_bytes": 3e6, "prefill": 1.0}
    row = {
        **states,
        "regained": 0.9,
        "seconds": 600.0,
        "decoding": [cost, cost],
        "machine": "a machine",
        "date": "today",
    }
    (tmp_path / "real-models" / "convert.json").write_text(json.dumps({"layers": {"order": []}, "slay": row}))
    ran = Outcome("moba", "A title", "fast", "faster", {"dense_ms": 1.0}, False, "none is", 3.0, False, 0)
    on = {"model": "smollm2-135m", "context": 2048}
    lines = [claims.record(ran, "today", machine()), claims.record(ran, "today", machine()) | on]
    claims.write(tmp_path, {claims.line(each): each for each in lines})
    page = real_models.page(tmp_path)
    assert "### compress" in page and "| a-vl | 0.5 | 1.00 | 3.250 | 100% | 50% | 0% | 20.0 | 3.000 |" in page
    assert "- At 0.5 of the tokens a-vl costs least perplexity (+8.3%)" in page
    assert "| `slay` | 9.00 | 90.00 | 50.00 | 12.00 | 10.00 | 90% | 50 to 50 | 3.0 to 3.0 | 10.0 |" in page
    assert "### smollm2-135m, 2048 tokens" in page and "| `moba` | no | none is |" in page
    assert page.count("Not measured yet") == 1


def test_what_is_kept_can_be_read() -> None:
    for path in (DOCS / real_models.FOLDER).glob("*/advice.json"):
        assert read_advice(path).trials
