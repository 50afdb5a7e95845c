"""Faithfulness on scores that are known: additive ones, of which the true map is the best there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.explain.faithfulness import BETTER, agreement, faithfulness, overlap

WORTH = torch.tensor([4.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.5, 0.0, 0.25, 0.25])


def additive(kept_SM: Tensor) -> Tensor:
    return kept_SM.float() @ WORTH


def test_measures_of_an_additive_score_by_hand() -> None:
    found = faithfulness(additive, {"true": WORTH}, random=3)
    assert (found.whole, found.nothing) == (8.0, 0.0)
    measures = found.maps["true"]
    gone = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]) / 8
    torch.testing.assert_close(measures.deletion_curve, gone)
    torch.testing.assert_close(measures.insertion_curve, 1 - gone)
    assert measures.deletion == pytest.approx(float(gone.mean())) and measures.sensitivity == pytest.approx(1.0)
    # the shares are 1, 1, 2 and 5 parts, worth 4, 4, 6 and 7.75
    assert measures.comprehensiveness == pytest.approx(5.4375) and measures.sufficiency == pytest.approx(8 - 5.4375)


def test_the_true_map_is_believed_and_its_opposite_is_not() -> None:
    maps = {"opposite": -WORTH, "true": WORTH, "nearly": WORTH + torch.tensor([0.0, 0.3] * 5)}
    found = faithfulness(additive, maps, random=8)
    assert found.believed()[0] == "true" and "opposite" not in found.believed()
    assert all(found.beyond_chance("true").values()) and not any(found.beyond_chance("opposite").values())
    for name, sign in BETTER.items():
        best = getattr(found.maps["true"], name)
        assert all(sign * best >= sign * each.figures()[name] - 1e-6 for each in found.floor)
    words = found.table()
    assert all(name in words for name in (*maps, "random", "deletion", "*"))


def test_the_same_seed_gives_the_same_and_sets_come_in_batches() -> None:
    sizes = []

    def score(kept_SM: Tensor) -> Tensor:
        sizes.append(len(kept_SM))
        return additive(kept_SM)

    first, second = (faithfulness(score, {"a": WORTH}, batch=7, seed=3) for _ in range(2))
    assert first.table() == second.table() and max(sizes) == 7 and first.maps["a"].counts.tolist() == [*range(11)]
    assert first.table() != faithfulness(score, {"a": WORTH}, seed=4).table()


def test_no_set_is_asked_for_twice() -> None:
    asked = []

    def score(kept_SM: Tensor) -> Tensor:
        asked.extend(tuple(row.tolist()) for row in kept_SM)
        return kept_SM.float() @ WORTH[:4]

    first = faithfulness(score, {"a": WORTH[:4], "b": -WORTH[:4]}, random=8)
    assert len(asked) == len(set(asked)) <= 16
    assert first.maps["a"].insertion == pytest.approx((0 + 4 + 6 + 6 + 6) / 5 / 6)


def test_curves_of_many_parts_have_few_steps() -> None:
    worth = torch.rand(200)
    found = faithfulness(lambda kept: kept.float() @ worth, {"true": worth}, steps=8, random=1).maps["true"]
    assert found.counts.tolist() == [0, 25, 50, 75, 100, 125, 150, 175, 200]
    torch.testing.assert_close(found.deletion_curve[4], worth.sort().values[:100].sum() / worth.sum())


def test_agreement_and_overlap() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = agreement({"a": a, "monotone": a**3, "opposite": -a, "constant": torch.ones(4)})
    torch.testing.assert_close(found[0], torch.tensor([1.0, 1.0, -1.0, 0.0]))
    tied = agreement({"a": a, "tied": torch.tensor([1.0, 1.0, 2.0, 2.0])})
    assert tied[0, 1] == pytest.approx(0.8944, abs=1e-4)  # scipy's spearmanr
    assert overlap(a, -a, 0.25) == 0 and overlap(a, a + 1, 0.5) == 1


def test_curves_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    figure = faithfulness(additive, {"true": WORTH}).plot()
    assert len(figure.axes) == 2


def test_refusals() -> None:
    for maps in ({}, {"a": WORTH, "b": WORTH[:3]}, {"a": WORTH[None]}, {"a": WORTH[:0]}):
        with pytest.raises(ValueError, match="one relevance for each part"):
            faithfulness(additive, maps)
    with pytest.raises(ValueError, match="nothing can be explained"):
        faithfulness(lambda kept: torch.zeros(len(kept)), {"a": WORTH})
    with pytest.raises(ValueError, match="share"):
        faithfulness(additive, {"a": WORTH}, share=1.0)
