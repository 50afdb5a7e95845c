"""Sentences as MiniLM reads them: of unit length, like those of their topic, kept in the cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saccade.train import embedded, models
from saccade.train.lab import Lab


def test_vectors_are_made_once_and_topics_hold_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not models.installed("minilm"):
        pytest.skip("minilm is not installed")
    tmp_path.chmod(0o700)
    few = [topic[:8] for topic in embedded.sentences("held-out")[:3]]
    monkeypatch.setattr(embedded, "sentences", lambda split: few)
    monkeypatch.setattr(embedded, "cache_folder", lambda: tmp_path / "saccade")
    found = embedded.sentence_vectors.__wrapped__("held-out")
    assert [tuple(each.shape) for each in found] == [(8, 384)] * 3
    flat = torch.cat(found)
    assert torch.allclose(flat.norm(dim=1), torch.ones(24), atol=1e-5)
    like, own = flat @ flat.T, torch.block_diag(*[torch.ones(8, 8)] * 3).bool()
    assert like[own & ~torch.eye(24, dtype=torch.bool)].mean() > like[~own].mean() + 0.05
    monkeypatch.setattr(embedded, "_read", lambda texts: 1 / 0)
    assert torch.equal(torch.cat(embedded.sentence_vectors.__wrapped__("held-out")), flat)


def test_the_lab_has_them_or_says_that_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(each.shape == (12, 384) for each in Lab(smoke=True).sentences() or [])
    monkeypatch.setattr(models, "installed", lambda name: False)
    assert Lab().sentences() is None
