"""The task of fusing: its views, what it measures, what it shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saccade import catalogue
from saccade.ops.structure import ssim
from saccade.train.entries import Entry
from saccade.train.metrics.fusion import METRICS
from saccade.train.tasks import TASKS, Fuse, taking
from saccade.train.tasks.fuse import JUDGE, LEARN
from saccade.train.views import LOST, registered_views

FSAT = Entry("fsatfusion", "fsatfusion", {"grid": (14, 14)})


def views(count: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    clear = torch.nn.functional.interpolate(torch.rand(count, 1, 24, 24), 48, mode="bilinear")
    return clear, *registered_views(clear, torch.Generator().manual_seed(1))


def task(**sizes: int) -> Fuse:
    settings = replace(Fuse.budgets["quick"], batch=3, evaluation_size=3, **sizes)
    return Fuse(settings, torch.device("cpu"))


def test_each_view_lost_what_it_says() -> None:
    clear, infrared, visible, scene = views()
    for x in (infrared, visible, scene):
        assert x.shape == clear.shape and x.min() >= 0 and x.max() <= 1
    for row in range(6):
        a, b, truth, photograph = infrared[row], visible[row], scene[row], clear[row]
        if LOST[row % 3] == "focus":  # each place is sharp in one of the two, and neither view is sharp everywhere
            assert torch.equal(truth, photograph)
            near = torch.minimum((a - truth).abs(), (b - truth).abs())
            assert near.mean() < 0.3 * (a - truth).abs().mean() and near.mean() < 0.3 * (b - truth).abs().mean()
        elif LOST[row % 3] == "exposure":  # the shadows are black in the one, the lights white in the other
            assert torch.equal(truth, photograph)
            assert (a[truth < 0.3] == 0).all() and (b[truth > 0.7] == 1).all()
            assert ((a > 0) | (b < 1)).all()  # what both lost, neither could give back
        else:  # what is warm is bright in the one; the other has no trace of it
            torch.testing.assert_close(b, 0.8 * photograph)
            warm = a > 0.8
            assert 10 < warm.sum() < warm.numel() / 2 and (truth[warm] > b[warm]).all()
    assert not torch.equal(infrared[0], infrared[3])


def test_views_depend_on_the_generator_alone() -> None:
    for again, first in zip(views(), views()):
        assert torch.equal(again, first)


def test_photographs_are_apart_and_batches_their_own() -> None:
    assert not set(LEARN) & set(JUDGE)
    one = task()
    first, again, next_ = one.batch(0, 0), one.batch(0, 0), one.batch(0, 1)
    assert [x.shape for x in first] == [(3, 1, 48, 48)] * 3
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], next_[0])
    assert len(next(one.held_out())[0]) == 3


def test_who_takes_part() -> None:
    assert TASKS["fuse"] is Fuse
    for slug in ("amfusionnet", "fsatfusion"):
        assert taking(catalogue.part(slug)) == [Fuse]
    with pytest.raises(ValueError, match="does not support the task fuse"):
        Fuse.check(Entry("han", "han"))


def test_it_is_learned_and_measured() -> None:
    one = task()
    model = one.model(FSAT, 0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = one.quality(model)
    for step in range(12):
        model.train()
        optimiser.zero_grad()
        one.loss(model, one.batch(0, step)).backward()
        optimiser.step()
    assert one.quality(model) > before
    figures = one.figures(model)
    assert set(figures) == set(METRICS)
    infrared, visible, scene = next(one.held_out())
    assert one.chance() == pytest.approx(ssim((infrared + visible) / 2, scene).mean().item(), rel=1e-5)
    # a network that gives the scene itself: nothing is better
    perfect = one.measured(lambda *pair: scene, ("Qabf", "AG"))
    mean = one.measured(lambda a, b: (a + b) / 2, ("Qabf", "AG"))
    assert perfect["Qabf"] > mean["Qabf"] and perfect["AG"] > mean["AG"]


def test_what_is_shown() -> None:
    one = task()
    shown = one.pictures(one.model(FSAT, 0))
    assert list(shown) == ["infrared", "visible", "scene", "fused", "error x 4"]
    assert {tuple(x.shape) for x in shown.values()} == {(3, 48, 48, 3)}
    assert [x.shape[2:] for x in one.part_inputs(100)] == [(10, 10)] * 2


def test_sizes() -> None:
    for length in (40 * 40, 2305):
        with pytest.raises(ValueError, match=r"square of at least 41 pixels for fuse \(1681\)"):
            task(length=length)
