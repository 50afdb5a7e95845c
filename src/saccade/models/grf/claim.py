"""The paper's claim at laptop size: two balls, of which one may hide the other from a view."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.layers.positions import frequencies
from saccade.models.grf.fusion import AttSets
from saccade.models.grf.network import GRF
from saccade.models.radiance import radiance_loss
from saccade.ops.rays import camera_rays, centres

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_SIDE, _VIEWS, _DISTANCE = 32, 3, 4.0


class Balls(NamedTuple):
    """Scenes: what the network is given, the colours that are to be seen, and which views do not show what is there.

    Attributes:
        given: the arguments of the network's call.
        colour: (B, R, 3).
        surface: (B, R, 3), what each ray meets, in the world.
        hidden: (B, R, V), where another ball stands between a view and the surface; False where a ray meets nothing.
    """

    given: tuple[Tensor, ...]
    colour: Tensor
    surface: Tensor
    hidden: Tensor


def balls(lab: Lab, count: int, rays: int, generator: torch.Generator) -> Balls:
    """`count` scenes of two balls, three views of each, and `rays` rays of a fourth, half of them on the balls."""
    scenes = [_scene(lab, rays, generator) for _ in range(count)]
    return Balls(
        tuple(torch.stack(each) for each in zip(*(scene.given for scene in scenes))),
        *(torch.stack(each) for each in zip(*(scene[1:] for scene in scenes))),
    )


def some_of(pool: Balls, count: int, rays: int, generator: torch.Generator) -> Balls:
    """`count` of the scenes, each with `rays` of its rays."""
    scene_B = torch.randint(len(pool.colour), (count,), generator=generator)
    ray_BR = torch.randint(pool.colour.shape[1], (count, rays), generator=generator)
    *views, pixels = (x[scene_B] for x in pool.given)
    of_rays = (x.take_along_dim(ray_BR[..., None], 1) for x in (pixels, *(x[scene_B] for x in pool[1:])))
    pixels, *rest = of_rays
    return Balls((*views, pixels), *rest)


def _scene(lab: Lab, rays: int, generator: torch.Generator) -> Balls:
    solids = lab.data.solids
    place = 2 * math.pi * torch.rand(1, generator=generator)
    centre = torch.cat([place.cos(), place.sin(), 0.6 * torch.rand(1, generator=generator) - 0.3]) * 0.7
    meets = solids.balls(torch.stack([centre, -centre]), 0.4 + 0.15 * torch.rand(2, generator=generator))
    colours = 0.2 + 0.8 * torch.rand(2, 3, generator=generator)
    K, E = solids.cameras_around(_VIEWS + 1, _DISTANCE, (_SIDE, _SIDE), generator)
    images, depths, _ = solids.views_of(meets, colours, K, E, (_SIDE, _SIDE))
    met = depths[-1].flatten().isfinite()
    chance = torch.where(met, 0.5 / met.sum().clamp(min=1), 0.5 / (~met).sum().clamp(min=1))
    chosen = chance.multinomial(rays, generator=generator)
    pixels = torch.stack([chosen % _SIDE, chosen // _SIDE], -1).float()
    origin, direction = camera_rays(pixels, K[-1:], E[-1:])
    depth = depths[-1].flatten()[chosen]
    surface = (origin + torch.where(depth.isfinite(), depth, 0.0)[:, None] * direction)[0]
    eyes = centres(E[:-1])
    sight = surface[:, None] - eyes
    hidden = (solids.first(meets, eyes.expand_as(sight), sight)[0] < 0.98) & depth.isfinite()[:, None]
    given = images[:-1], E[:-1], K[:-1], E[-1], K[-1], pixels
    return Balls(given, images[-1].flatten(1).T[chosen], surface, hidden)


def _error(found: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    return (found - truth).square().mean(-1)[where].mean()


def _psnr(error: Tensor) -> float:
    return (-10 * error.clamp(min=1e-10).log10()).item()


def _claim(lab: Lab) -> ClaimResult:
    """AttSets beside mean pooling: the colours of rays whose surface is hidden from a view, and that view's weight."""
    judge = balls(lab, lab.size(24, 1), lab.size(128, 16), lab.held_out())
    pool = balls(lab, lab.size(96, 2), lab.size(256, 16), lab.generator())
    # what is hidden in front lies on the other ball or behind the own one
    some = judge.hidden.any(-1) & ~judge.hidden.all(-1)
    clear = ~judge.hidden.any(-1) & (judge.surface.norm(dim=-1) < 2)

    def loss(model: nn.Module, batch: Balls) -> Tensor:
        return radiance_loss(model(*batch.given), batch.colour)

    def measure(trial: Trial) -> dict[str, float]:
        assert isinstance(trial.model, GRF)
        colour = trial.model(*judge.given).colour
        found = {
            "psnr": _psnr(_error(colour, judge.colour, torch.ones_like(some))),
            "hidden": _psnr(_error(colour, judge.colour, some)),
            "clear": _psnr(_error(colour, judge.colour, clear)),
        }
        return found | ({"ratio": _ratio(trial.model, judge, some)} if trial.form == "attsets" else {})

    sizes: dict[str, Any] = {
        "samples": lab.size(16, 4), "fine_samples": 0, "near": 2.5, "far": 5.5, "width": 48, "depth": 4,
        "bottleneck": 24, "encoder_width": lab.size(8, 2), "global_kernel": 1, "render_pose": False,
        "point_frequencies": 4, "direction_frequencies": 2, "hidden": 48, "fused": 48, "scale_pixels": True,
    }  # fmt: skip
    trials = lab.forms(
        {name: partial(GRF, name, **sizes) for name in ("attsets", "mean")},
        lambda generator: some_of(pool, lab.size(3, 1), lab.size(32, 8), generator),
        measure,
        250, loss=loss, lr=4e-3, seeds=2,
    )  # fmt: skip
    measured = {
        **trials.means("{form}_psnr_db", "psnr"),
        **trials.means("{form}_psnr_where_a_view_is_hidden_db", "hidden"),
        **trials.means("{form}_psnr_where_none_is_db", "clear"),
        **trials.spreads("{form}_psnr_spread_db", "psnr"),
        **trials.means("weight_of_hidden_views_over_others_ratio", "ratio"),
    }
    gain = measured["attsets_psnr_where_a_view_is_hidden_db"] - measured["mean_psnr_where_a_view_is_hidden_db"]
    elsewhere = measured["attsets_psnr_where_none_is_db"] - measured["mean_psnr_where_none_is_db"]
    return ClaimResult(
        {**measured, "gain_where_hidden_db": gain, "gain_where_none_is_hidden_db": elsewhere},
        holds=gain > 0 and measured["weight_of_hidden_views_over_others_ratio"] < 1,
        note="AttSets has more parameters than the mean: its gain where no view is hidden is told beside it",
    )


def _ratio(model: GRF, judge: Balls, some: Tensor) -> float:
    """The mean weight of views that do not show the surface over that of views that do, where there are both."""
    assert isinstance(model.fusion, AttSets)
    images, extrinsics, intrinsics, target, _, _ = judge.given
    views = model.encode(images, extrinsics, intrinsics, target)
    local, _ = model.gather(views, judge.surface)
    points = frequencies(judge.surface, model.point_frequencies)[:, :, None].expand(-1, -1, local.shape[2], -1)
    weight_BRV = model.fusion.weights(model.fusion.values(local, points)).mean(-1)
    hidden = weight_BRV[judge.hidden & some[..., None]].mean()
    return (hidden / weight_BRV[~judge.hidden & some[..., None]].mean()).nan_to_num(1.0).item()


CLAIM = Claim(
    paper="attention over views lets a point follow the views that show it, where others are occluded",
    expected="AttSets beats mean pooling on surfaces that a view does not show, and gives that view less weight",
    run=_claim,
)
