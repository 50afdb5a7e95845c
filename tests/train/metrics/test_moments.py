"""Measures of moments: by hand, and against scikit-learn."""

from __future__ import annotations

import pytest
import torch

from saccade.train.metrics.moments import (
    THRESHOLDS,
    event_f1,
    highlight_scores,
    moment_scores,
    segment_f1,
    spans_of,
)


def test_moments_by_hand() -> None:
    truth = [torch.tensor([[0.0, 0.5], [0.6, 1.0]])]
    # wrong, then the first with IoU 0.8, then the first again, then the second with IoU 0.5
    spans = torch.tensor([[0.5, 0.6], [0.0, 0.4], [0.0, 0.5], [0.6, 0.8]])
    said = [(spans, torch.tensor([0.9, 0.8, 0.7, 0.6]))]
    scores = moment_scores(said, truth)
    assert scores["map50"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert scores["map75"] == pytest.approx(1 / 2 / 2)
    above = sum(t > 0.8 + 1e-6 for t in THRESHOLDS)  # there the third is the first that is right
    within = len(THRESHOLDS) - above - 1
    assert scores["map"] == pytest.approx((0.5 + within * 0.25 + above / 3 / 2) / 10)
    assert scores["r1_50"] == scores["miou"] == 0.0
    assert moment_scores([(truth[0], torch.ones(2))], truth) == {
        "map": 1.0, "map50": 1.0, "map75": 1.0, "r1_50": 1.0, "r1_70": 1.0, "miou": 1.0
    }  # fmt: skip
    nothing = moment_scores([(torch.zeros(0, 2), torch.zeros(0))], truth)
    assert set(nothing.values()) == {0.0}
    mixed = moment_scores([*said, (truth[0], torch.ones(2))], truth * 2)
    assert mixed["r1_70"] == 0.5 and mixed["map50"] == pytest.approx(0.75)


def test_highlights_by_hand() -> None:
    curves = [torch.tensor([0.9, 0.1, 0.5]), torch.tensor([0.2, 0.8])]
    answers = [torch.tensor([True, False, True]), torch.tensor([True, False])]
    assert highlight_scores(curves, answers) == pytest.approx({"hit1": 0.5, "highlight_map": 0.75})


def test_f1_by_steps_and_by_events() -> None:
    truth = torch.zeros(3, 8, 2, dtype=torch.bool)
    truth[0, 2:6, 0] = truth[1, 0:2, 1] = True
    said = truth.clone()
    said[0, 4:6, 0] = False  # half of the event: IoU 0.5
    said[1, 6, 0] = True  # one too many
    assert segment_f1(said, truth) == pytest.approx((4 / 6 + 4 / 5 + 1) / 3)
    assert event_f1(said, truth) == pytest.approx((1 + 2 / 3 + 1) / 3)
    said[0, 3, 0] = False  # IoU 0.25
    assert event_f1(said, truth) == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert spans_of(truth[0, :, 0]).tolist() == [[0.25, 0.75]] and spans_of(truth[0, :, 1]).shape == (0, 2)


def test_bad_arguments() -> None:
    said = [(torch.rand(2, 2), torch.rand(2))]
    with pytest.raises(ValueError, match="of the same questions, one at least, got 1, 0"):
        moment_scores(said, [])
    with pytest.raises(ValueError, match="must have a true moment"):
        moment_scores(said, [torch.zeros(0, 2)])
    with pytest.raises(ValueError, match="same questions and steps"):
        highlight_scores([torch.rand(3)], [torch.ones(2, dtype=torch.bool)])
    with pytest.raises(ValueError, match="a step that answers"):
        highlight_scores([torch.rand(3)], [torch.zeros(3, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"must be bool \(streams, steps, classes\)"):
        segment_f1(torch.rand(2, 3, 1), torch.ones(2, 3, 1, dtype=torch.bool))
