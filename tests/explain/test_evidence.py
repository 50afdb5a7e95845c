"""Maps against what is known to decide: figures by hand, ties, the random floor, a model that is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade import tables
from saccade.explain.evidence import FLOOR, find, judge


def test_figures_by_hand() -> None:
    evidence = torch.tensor([True, False, True, False, False])
    assert find(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), evidence) == {"auc": 1.0, "precision": 1.0, "rank": 1.5}
    assert find(torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0]), evidence) == {"auc": 0.0, "precision": 0.0, "rank": 4.5}
    # of six pairs (5 and 2 against 1, 4, 3) four are right
    found = find(torch.tensor([5.0, 1.0, 2.0, 4.0, 3.0]), evidence)
    assert found == {"auc": pytest.approx(4 / 6), "precision": 0.5, "rank": 2.5}


def test_equal_parts_count_as_in_a_random_order() -> None:
    evidence = torch.tensor([True, False, True, False, False])
    assert find(torch.zeros(5), evidence) == {"auc": 0.5, "precision": pytest.approx(0.4), "rank": 3.0}
    # the first is sure, the other place goes to one of four
    found = find(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), evidence)
    assert found == {"auc": pytest.approx((3 + 1.5) / 6), "precision": pytest.approx((1 + 1 / 4) / 2), "rank": 2.25}


def test_a_random_map_is_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = torch.rand(400, 20, generator=generator).argsort(1) < 3
    floor = judge({"mine": evidence.float()}, evidence).measures[FLOOR]
    assert floor["auc"] == pytest.approx(0.5, abs=0.03)
    assert floor["precision"] == pytest.approx(3 / 20, abs=0.03) and floor["rank"] == pytest.approx(21 / 2, abs=0.6)


def test_the_evidence_itself_is_the_best_and_most_faithful_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "terminal_width", lambda: 200)
    generator = torch.Generator().manual_seed(1)
    evidence = torch.rand(4, 16, generator=generator).argsort(1) < 3

    def score(b: int, kept_SM: Tensor) -> Tensor:
        return 0.1 + 0.3 * (kept_SM & evidence[b]).sum(1)

    maps = {"true": evidence.float(), "noise": torch.rand(4, 16, generator=generator), "false": -evidence.float()}
    judgement = judge(maps, evidence, score)
    assert list(judgement.measures) == ["true", "noise", "false", FLOOR]
    assert judgement.best() == judgement.best("deletion") == judgement.best("rank") == "true"
    true, false = judgement.measures["true"], judgement.measures["false"]
    assert true["believed"] == 1.0 and false["believed"] == 0.0 and "believed" not in judgement.measures[FLOOR]
    assert true["sensitivity"] == pytest.approx(1.0) and false["sensitivity"] == pytest.approx(-1.0)
    assert judgement.rows()["true: auc"] == 1.0 and len(judgement.table().splitlines()) == 6
    again = judge(maps, evidence, score)
    assert again == judgement
    assert set(judge(maps, evidence).measures["true"]) == {"auc", "precision", "rank"}


def test_a_picture() -> None:
    pytest.importorskip("matplotlib")
    evidence = torch.eye(4, dtype=torch.bool)
    figure = judge({"mine": evidence.float(), "other": torch.rand(4, 4)}, evidence).plot()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["mine", "other"]


def test_refusals() -> None:
    evidence = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"one figure for each part, got \(3,\) and \(2,\)"):
        find(torch.zeros(3), evidence)
    for wrong in (torch.ones(2), torch.zeros(2)):
        with pytest.raises(ValueError, match="some parts and not all"):
            find(torch.zeros(2), wrong)
    with pytest.raises(ValueError, match="there must be maps"):
        judge({}, evidence[None])
    with pytest.raises(ValueError, match="none called 'random'"):
        judge({FLOOR: torch.zeros(1, 2)}, evidence[None])
