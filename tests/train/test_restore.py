"""Haze by its physical model, and the task of giving photographs back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import saccade
from saccade import catalogue
from saccade.train.data import depths, hazy, recoloured
from saccade.train.entries import Entry
from saccade.train.tasks import taking
from saccade.train.tasks.restore import JUDGE, LEARN, Restore, coarse
from saccade.train.tasks.settings import Settings

pytest.importorskip("skimage")
pytest.importorskip("torchmetrics")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def task() -> Restore:
    return Restore(Settings(length=256, batch=4, steps=2, evaluation_size=8), torch.device("cpu"))


@dataclass
class Given:
    image: Tensor


class Same(nn.Module):
    def forward(self, pixel_values: Tensor) -> Given:
        return Given(pixel_values)


def test_depths_are_smooth_and_reach_from_0_to_1() -> None:
    depth = depths(3, 21, 34, generator())
    assert depth.shape == (3, 1, 21, 34)
    assert torch.equal(depth.amin((1, 2, 3)), torch.zeros(3)) and torch.equal(depth.amax((1, 2, 3)), torch.ones(3))
    assert depth.diff(dim=2).abs().max() < 0.3 and not torch.equal(depth[0], depth[1])
    assert depths(1, 1, 1, generator()).isfinite().all()


def test_haze_is_its_model() -> None:
    clear = torch.rand(4, 3, 16, 20, generator=generator(1))
    image, t, light = hazy(clear, generator())
    torch.testing.assert_close((image - light * (1 - t)) / t, clear)
    assert 0 < t.min() < t.max() <= 1 and light.shape == (4, 3, 1, 1) and image.min() >= 0 and image.max() <= 1
    # the least scattering leaves exp(-least) of the farthest point at least, the most exp(-most)
    farthest = t.amin((1, 2, 3))
    assert (farthest <= torch.tensor(-0.6).exp() + 1e-6).all() and (farthest >= torch.tensor(-1.8).exp() - 1e-6).all()
    assert torch.equal(hazy(clear, generator(), beta=(0, 0)).image, clear)
    assert torch.equal(hazy(clear, generator()).image, image)
    grey = hazy(clear, generator(), tint=0).airlight
    assert torch.equal(grey, grey[:, :1].expand_as(grey)) and not torch.equal(light, light[:, :1].expand_as(light))


def test_colours_are_exchanged_and_lightness_changed() -> None:
    images = torch.rand(16, 3, 4, 5, generator=generator(1))
    out = recoloured(images, generator())
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= 1
    gammas, orders = [], set()
    for before, after in zip(images, out):
        gamma = (after.log().sum() / before.log().sum()).item()
        order = [int((before[:, None] ** gamma - after[None]).abs().sum((2, 3))[:, c].argmin()) for c in range(3)]
        torch.testing.assert_close(before[order] ** gamma, after, rtol=1e-4, atol=1e-4)
        gammas.append(gamma)
        orders.add(tuple(order))
    assert 0.5 <= min(gammas) < 0.8 and 1.2 < max(gammas) <= 2 and len(orders) > 3


def test_coarse_images_have_no_fine_detail() -> None:
    flat, stripes = torch.full((1, 3, 12, 12), 0.4), torch.zeros(1, 3, 12, 12)
    stripes[..., ::2] = 1
    torch.testing.assert_close(coarse(flat), flat)
    assert (coarse(stripes)[..., 3:-3] - 0.5).abs().max() < 0.2


def test_every_other_image_is_in_haze_and_truth_is_a_photograph(task: Restore) -> None:
    damaged, clear = task.batch(0, 3)
    assert damaged.shape == clear.shape == (4, 3, 16, 16)
    torch.testing.assert_close(damaged[1::2], coarse(clear[1::2]))
    assert (damaged[::2] - clear[::2]).abs().mean() > 0.02
    assert all(map(torch.equal, task.batch(0, 3), (damaged, clear)))
    assert not torch.equal(task.batch(0, 4)[1], clear) and not torch.equal(task.batch(1, 3)[1], clear)
    assert not set(LEARN) & set(JUDGE)


def test_figures(task: Restore) -> None:
    figures = task.figures(Same())
    assert figures["psnr"] == figures["psnr_input"] == pytest.approx(task.quality(Same()))
    assert figures["psnr"] == pytest.approx((figures["psnr_haze"] + figures["psnr_resolution"]) / 2)
    damaged, clear = task.test
    wanted = (-10 * (damaged - clear).square().mean((1, 2, 3)).log10()).mean()
    assert figures["psnr"] == pytest.approx(float(wanted), rel=1e-5)


def test_what_is_close_to_the_truth_has_high_figures(task: Restore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "call", lambda model, batch: Given(batch[-1] + 0.01 * batch[-1].sub(0.5).sign().neg()))
    figures = task.figures(Same())
    assert figures["psnr"] == pytest.approx(40, abs=1e-3) and task.figures(Same())["psnr_input"] < 30
    blurred = figures["ssim"]
    monkeypatch.setattr(task, "call", lambda model, batch: Given(batch[-1]))
    assert blurred < task.figures(Same())["ssim"] == pytest.approx(1)


def test_networks_that_restore_take_part(task: Restore) -> None:
    takers = [part.slug for part in catalogue.parts() if Restore.takes(part)]
    assert {"han", "mcaf-net"} <= set(takers)
    assert Restore in taking(catalogue.part("han")) and Restore not in taking(catalogue.part("twins"))
    sizes = []
    for slug in takers:
        model = task.model(Entry(slug, slug), 0)
        sizes.append(sum(p.numel() for p in model.parameters()))
        task.loss(model, task.batch(0, 0)).backward()
        pictures = task.pictures(model)
        assert {tuple(row.shape) for row in pictures.values()} == {(4, 16, 16, 3)}
    assert max(sizes) < 3 * min(sizes)


def test_a_comparison_keeps_psnr_and_ssim(tmp_path: object) -> None:
    result = saccade.compare(
        ["han"], task="restore", budget="quick", steps=2, length=256, batch=2, lengths=(), evaluation_size=4,
        evaluations=1, out=tmp_path,
    )  # fmt: skip
    (record,) = result.mechanisms
    assert {"ssim", "psnr_haze", "psnr_input"} <= set(record.runs[0].metrics) and "output" in record.maps
    assert record.runs[0].metrics["psnr"] == record.quality


def test_refusals() -> None:
    with pytest.raises(ValueError, match="square of a multiple of 4"):
        Restore(Settings(length=200), torch.device("cpu"))
    with pytest.raises(ValueError, match="square of a multiple of 4"):
        Restore(Settings(length=225), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"images must be \(batch, 3"):
        hazy(torch.rand(1, 1, 4, 4), generator())
    with pytest.raises(ValueError, match="least, most"):
        hazy(torch.rand(1, 3, 4, 4), generator(), beta=(2, 1))
