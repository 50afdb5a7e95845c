"""How NeRF-Det's modules and parameters map to ours; there is no code of NeRF-DetS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, of_function
from saccade.models.nerf_dets.field import GeometryMLP, render
from saccade.models.nerf_dets.neck import Neck3d
from saccade.models.nerf_dets.sampling import (
    along_rays_mean_and_spread,
    lift,
    mean_and_spread,
    read,
    voxel_points,
)
from saccade.ops.rays import projection

_FIELD = Names(
    {
        "mlp.base.hidden_layers.{i}.{leaf}": "layers.{i}.{leaf}",
        "mlp.sigma_layer.output_layer.{leaf}": "density.{leaf}",
        "mlp.bottleneck_layer.output_layer.{leaf}": "bottleneck.{leaf}",
        "mlp.rgb_layer.hidden_layers.{i}.{leaf}": "colour_layers.{i}.{leaf}",
        "mlp.rgb_layer.output_layer.{leaf}": "colour.{leaf}",
        "posi_encoder.scales": None,
        "view_encoder.scales": None,
    }
)
_NECK = Names(
    {
        "down_layer_{l}.{j}.downsample.{i}.{leaf}": "down.{l}.{j}.shortcut.{i}.{leaf}",
        "down_layer_{l}.{j}.{name}.{leaf}": "down.{l}.{j}.{name}.{leaf}",
        "up_block_{l}.{i}.{leaf}": lambda t: f"up.{int(t['l']) - 1}.{t['i']}.{t['leaf']}",
        "out_block_{l}.{i}.{leaf}": "out.{l}.{i}.{leaf}",
    }
)


def _backprojection(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    size, edges = tuple(args["n_voxels"]), torch.tensor(args["voxel_size"])
    points = voxel_points(size, edges, inputs["origin"][None])
    maps, cameras = inputs["features"][None], inputs["projection"][None]
    found = lift(maps, cameras, points.flatten(1, 3))
    near = lift(maps, cameras, points.flatten(1, 3), inputs["depth"][None], args["voxel_size"][-1])
    mean, spread = mean_and_spread(found.features, found.seen)
    return {
        "points": points[0].permute(3, 0, 1, 2),
        "volume": found.features[0].mT.unflatten(2, size),
        "valid": found.seen[0, :, None].unflatten(2, size).float(),
        "depth_valid": near.seen[0, :, None].unflatten(2, size).float(),
        "mean": mean[0].T.unflatten(1, size),
        "exp_neg_var": spread[0].T.unflatten(1, size),
    }


def _projector(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    camera, points = inputs["cameras"], inputs["xyz"]
    K, E = (camera[..., a:b].unflatten(-1, (4, 4)) for a, b in ((2, 18), (18, 34)))
    cameras = projection(K[..., :3, :3], E[..., :3, :])
    images = inputs["images"].permute(0, 1, 4, 2, 3)
    size, shape = (images.shape[3], images.shape[4]), points.shape[:2]
    colours, features = (
        read(maps, cameras, points.flatten(0, 1)[None], size) for maps in (images, inputs["featmaps"][None])
    )
    both = torch.cat([colours.features, features.features], -1)
    mean, spread = along_rays_mean_and_spread(both, features.seen)
    return {
        "pixel_locations": features.pixels[0].unflatten(1, shape),
        "in_front": (features.depths[0] > 0).unflatten(1, shape).float(),
        "rgb_feat": both[0].transpose(0, 1).unflatten(0, shape),
        "mask": features.seen[0].T[..., None].unflatten(0, shape).float(),
        "mean": mean[0][:, None].unflatten(0, shape),
        "exp_neg_var": spread[0][:, None].unflatten(0, shape),
    }


def _field(module: GeometryMLP, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    points, features = inputs["points"], inputs["features"]
    directions = inputs["view_dirs"][:, None].expand(*points.shape)
    colour, density = module(points, directions, features)
    return {"rgb": colour, "sigma": density, "density_query": module.densities(module.hidden(points, features))}


def _render(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    raw = inputs["raw"]
    seen = render(raw[..., :3], raw[..., 3], inputs["z_vals"], inputs["mask"])
    return {
        "rgb": seen.colour,
        "depth": seen.depth,
        "weights": seen.weights,
        "ray_mask": seen.counted.float(),
        "alpha": seen.alpha,
        "transmittance": seen.transmittance,
    }


def _neck(module: Neck3d, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    return {f"scale{level}": x for level, x in enumerate(module(inputs["volume"]))}


PORTS = (
    of_function("nerfdet_backprojection", run=_backprojection),
    of_function("nerfdet_projector", run=_projector),
    AuthorsPort(
        "nerfdet_nerf_mlp",
        build=Arguments(
            GeometryMLP,
            {
                "feature_dim": "feature_channels",
                "net_depth": "depth",
                "net_width": "width",
                "skip_layer": "skip",
                "net_depth_condition": "colour_depth",
                "net_width_condition": "colour_width",
            },
        ),
        convert=_FIELD,
        run=_field,
    ),
    of_function("nerfdet_render", run=_render),
    AuthorsPort(
        "nerfdet_neck3d",
        build=Arguments(
            Neck3d, {"in_channels": "in_channels", "n_blocks": ("blocks", tuple), "out_channels": "out_channels"}
        ),
        convert=_NECK,
        run=_neck,
    ),
)
