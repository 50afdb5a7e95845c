"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.names import Place
from saccade.catalogue.ports import Arguments, calls
from saccade.models.residual_attention_network.network import AttentionModule, ResidualAttentionNetwork

_BRANCH = Names({
    "conv1_1x1.{leaf}": "conv1.{leaf}",
    "conv1_1x1/bn.{leaf}": "norm1.{leaf}",
    "conv2_3x3.{leaf}": "conv2.{leaf}",
    "conv2_3x3/bn.{leaf}": "norm2.{leaf}",
    "conv3_1x1.{leaf}": "conv3.{leaf}",
})  # fmt: skip

#: D of the authors' modules
_DEPTHS = {"A": 3, "B": 2, "C": 1}


def _named(units: dict[str, str], norms: dict[str, str]) -> dict[str, Place]:
    """The table of units and of the norms between them, theirs -> ours."""
    table: dict[str, Place] = {f"{theirs}/bn.{{leaf}}": f"{ours}.{{leaf}}" for theirs, ours in norms.items()}
    for theirs, ours in units.items():
        table |= _BRANCH.within(f"{theirs}branch1/", f"{ours}.")
    return table


def _module(depth: int) -> Names:
    """Of an attention module with `depth` poolings, but for its first norm, which belongs to the layer before it."""
    last, above = depth - 1, range(depth - 1)
    units = {
        "trunk/res1/": "before.0",
        "trunk/res2/": "trunk.0",
        "trunk/res3/": "trunk.1",
        **{f"mask/down_sample/res{n + 1}_1/": f"mask.down.{n}.0" for n in range(depth)},
        f"mask/down_sample/res{depth}_2/": f"mask.down.{last}.1",
        **{f"mask/skip/res{n + 1}/": f"mask.skip.{n}" for n in above},
        **{f"mask/up_sample/res{n + 1}_1/": f"mask.up.{n}.0" for n in above},
        "": "after.0",
    }
    # a norm there is called after the layer before it, and here it is the first of the unit that follows
    norms = {
        "trunk/res1": "trunk.0.norm",
        "trunk/res2": "trunk.1.norm",
        **{f"mask/down_sample/pool{n + 1}_3x3_s2": f"mask.down.{n}.0.norm" for n in range(depth)},
        **{f"mask/down_sample/res{n + 1}_1": f"mask.skip.{n}.norm" for n in above},
        f"mask/down_sample/res{depth}_1": f"mask.down.{last}.1.norm",
        **{f"mask/up_sample{n + 1}": f"mask.up.{n}.0.norm" for n in above},
        "mask/up_sample/interp_1": "mask.norm1",
        "mask/linear_1": "mask.norm2",
        "fusion": "after.0.norm",
    }
    return Names({**_named(units, norms), **{f"mask/linear_{i}.{{leaf}}": f"mask.conv{i}.{{leaf}}" for i in (1, 2)}})


_MODULES = {letter: _module(depth) for letter, depth in _DEPTHS.items()}


def _convert_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # the norm after a stage's last layer is the next stage's here, and only the file tells which layer is the last
    counts = dict.fromkeys(_DEPTHS, 0)
    for name in state:
        if m := re.match(r"Attention([ABC])_(\d+)/", name):
            counts[m[1]] = max(counts[m[1]], int(m[2]))
    units = {"post_res_4_1/": "stages.3.0", "post_res_4_2/": "stages.3.1.0", "post_res_4_3/": "stages.3.1.1"}
    norms = {
        "conv1": "stem_norm",
        "pool1_3x3_s2": "stages.0.0.norm",
        "post_res_4_1": "stages.3.1.0.norm",
        "post_res_4_2": "stages.3.1.1.norm",
        "post_res_4_3": "norm",
    }
    table: dict[str, Place] = {"conv1.{leaf}": "stem.{leaf}", "classifier.{leaf}": "head.{leaf}"}
    for i, (letter, count) in enumerate(counts.items()):
        units[f"pre_res_{i + 1}/"] = f"stages.{i}.0"
        layers = [f"pre_res_{i + 1}", *(f"Attention{letter}_{k}" for k in range(1, count + 1))]
        norms |= {layer: f"stages.{i}.{k}.before.0.norm" for k, layer in enumerate(layers[:-1], 1)}
        norms[layers[-1]] = f"stages.{i + 1}.0.norm"
        table |= _MODULES[letter].within(f"Attention{letter}_{{m}}/", f"stages.{i}.{{m}}.")
    shortcuts = {f"{theirs}branch2/conv1_1x1.{{leaf}}": f"{ours}.shortcut.{{leaf}}" for theirs, ours in units.items()}
    return Names({**table, **shortcuts, **_named(units, norms)})(state)


def _with_eps(build: Arguments) -> Callable[[dict[str, Any]], nn.Module]:
    # no argument of ours: every norm of theirs has an epsilon in its definition
    def built(args: dict[str, Any]) -> nn.Module:
        module = build(args)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = args.get("bn_eps", 1e-5)
        return module

    return built


_BUILD_NETWORK = Arguments(
    ResidualAttentionNetwork,
    {
        "network": ("modules", {"Attention-56": (1, 1, 1), "Attention-92": (1, 2, 3)}),
        "modules": "modules",
        "downs": "depths",
        "num_classes": "num_classes",
    },
    defaults={"network": "Attention-56", "downs": tuple(_DEPTHS.values()), "channels_divided_by": 1},
    derived={
        "channels": lambda args: [width // args["channels_divided_by"] for width in (256, 512, 1024, 2048)],
        "stem_width": lambda args: 64 // args["channels_divided_by"],
    },
)


_RUN_NETWORK = calls(
    "x",
    gives={
        "logits": "logits",
        "probabilities": lambda out: out.logits.softmax(-1),
        "post_res_4_3": lambda out: out.features[-1],
    },
)


def _run(module: AttentionModule, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    trunk_BCHW, mask_BCHW = module.branches(inputs["x"])
    assert mask_BCHW is not None
    return {"mask": mask_BCHW, "trunk": trunk_BCHW, "y": module.after(module.attend(trunk_BCHW, mask_BCHW))}


def _module_port(letter: str) -> AuthorsPort:
    build = Arguments(AttentionModule, {"channels": "channels"}, depth=_DEPTHS[letter])
    # the norm of whatever layer is before the module
    names = Names({**_MODULES[letter].table, "{before}/bn.{leaf}": "before.0.norm.{leaf}"})
    return AuthorsPort(f"attention_{letter.lower()}", build=_with_eps(build), convert=names, run=_run)


PORTS = (
    AuthorsPort("network", build=_with_eps(_BUILD_NETWORK), convert=_convert_network, run=_RUN_NETWORK),
    *map(_module_port, _DEPTHS),
)
