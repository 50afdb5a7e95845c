"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments, of_function
from saccade.models.ufc.layer import UFCLayer
from saccade.models.ufc.network import UFC
from saccade.models.ufc.volumes import correlation, flow_of, resize, soft_positions, transposed


def _volume(theirs: str, ours: str) -> dict[str, str]:
    """Of an encoder of volumes."""
    return {
        f"{theirs}.conv4d.{{k}}.0.query_conv.{{leaf}}": f"{ours}.{{k}}.0.source.{{leaf}}",
        f"{theirs}.conv4d.{{k}}.0.supp_conv.{{leaf}}": f"{ours}.{{k}}.0.target.{{leaf}}",
        f"{theirs}.conv4d.{{k}}.1.{{leaf}}": f"{ours}.{{k}}.1.{{leaf}}",
    }


def _layer(prefix: str = "") -> dict[str, str]:
    names = {f"{prefix}pos_embed": f"{prefix}position"}
    for same in ("q_proj", "k_proj", "v_proj", "v_cross", "norm1", "norm2", "norm_cross1", "norm_cross2"):
        names[f"{prefix}{same}.{{leaf}}"] = f"{prefix}{same}.{{leaf}}"
    for mlp in ("mlp", "mlp_cross"):
        for theirs, ours in (("0", "fc1"), ("1.dwconv", "conv"), ("3", "fc2")):
            names[f"{prefix}{mlp}.{theirs}.{{leaf}}"] = f"{prefix}{mlp}.{ours}.{{leaf}}"
    for theirs, ours in (
        ("v_proj_corr", "v_cost"),
        ("mlp_corr", "mlp_cost"),
        ("mlp_refine_corr", "refine1"),
        ("mlp_refine_corr2", "refine2"),
        ("feat_to_corr1", "from_features1"),
        ("feat_to_corr2", "from_features2"),
    ):
        names |= _volume(prefix + theirs, prefix + ours)
    return names


_LAYER = Names(_layer())
_NETWORK = Names(
    {
        "proj_feat.{i}.0.{leaf}": "projects.{i}.0.{leaf}",
        **_volume("embedding.{i}", "embeds.{i}"),
        **_layer("layers.{i}.{j}."),
    }
)
#: what nothing reads behind the last layer, though released files hold it
_UNREAD = ("mlp_refine_corr2", "feat_to_corr2")


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = {tuple(map(int, name.split(".")[1:3])) for name in state if name.startswith("layers.")}
    last = "layers.{}.{}.".format(*max(layers, default=(0, 0)))
    return _NETWORK(
        {name: t for name, t in state.items() if not name.startswith(tuple(last + part for part in _UNREAD))}
    )


def _build_layer(args: dict[str, Any]) -> nn.Module:
    lifted = args["feat_to_corr_kwargs"]
    if args["feat_dim"] != args["d_model"]:
        raise ValueError(f"feat_dim and d_model must be the same, got {args['feat_dim']} and {args['d_model']}")
    size = tuple(args["feat_size"])
    stride = size[0] // args["corr_size"]
    if set(lifted["stride"][0]) != {stride} or len(set(lifted["kernel_size"][0])) != 1 or lifted["group"] != [1]:
        raise ValueError(f"feat_to_corr_kwargs must have the stride {stride}, one kernel size and one group")
    cost = (args["corr_size"], args["corr_size"])
    return UFCLayer(
        args["d_model"], args["nhead"], cost, (size[0], size[1]), expand=args.get("expand_ratio", 4.0),
        kernel_size=lifted["kernel_size"][0][0],
    )  # fmt: skip


def _run_layer(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    assert isinstance(module, UFCLayer)
    cost, source, target = (inputs[name] for name in ("corr", "src_feat", "trg_feat"))
    whole = module(cost, source, target)
    own = module.integrate(cost, source)
    crossed = module.cross(cost, source, target)
    return {
        **dict(zip(("corr", "src", "trg"), whole, strict=True)),
        **dict(zip(("self_corr", "self_feat"), own, strict=True)),
        **dict(zip(("cross_src", "cross_trg"), crossed, strict=True)),
    }


def _run_network(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """Both images follow each other in the authors' batches."""
    assert isinstance(module, UFC)
    maps = [inputs[f"feat{level}"] for level in range(len(module.sides))]
    found = module([x[0::2] for x in maps], [x[1::2] for x in maps])
    # what the authors call "target to source" are the positions in the second image of those of the first
    positions = [soft_positions(cost, args["beta"]) for cost in (transposed(found.cost[:, None])[:, 0], found.cost)]
    flow, flip = (flow_of(x, found.cost.shape[1:3]) for x in positions)
    return {
        **{f"feat{level}": torch.stack(pair, 1).flatten(0, 1) for level, pair in enumerate(found.features)},
        "flow": flow,
        "flow_flip": flip,
        "mapping_t_to_s": positions[0],
        "mapping_s_to_t": positions[1],
        "cost": found.cost.diagonal(dim1=1, dim2=2).movedim(-1, 1),
    }


def _run_readout(module: Any, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    side = args["size"]
    volume = correlation(*(inputs[name].mT.unflatten(2, (side, side)) for name in ("src", "trg")))
    larger = resize(volume, (args["upsampled"], args["upsampled"]))
    positions = soft_positions(transposed(larger)[:, 0], args["beta"])
    flow = flow_of(positions, larger.shape[2:4])
    return {"correlation": volume, "upsampled": larger, "mapping": positions, "flow": flow}


PORTS = (
    AuthorsPort("integrative_layer", build=_build_layer, convert=_LAYER, run=_run_layer),
    AuthorsPort(
        "network",
        build=Arguments(
            UFC,
            {
                "in_channels": "in_channels",
                "feat_dim": "dim",
                "nhead": "num_heads",
                "sides": "sides",
                "corr_size": "cost_side",
                "layer_nums": "layers",
                "expand_ratio": "expand",
                "kernel": "kernels",
            },
        ),
        convert=_convert,
        run=_run_network,
    ),
    of_function("flow_readout", _run_readout),
)
