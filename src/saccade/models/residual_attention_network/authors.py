"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Names
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


def _module_names(depth: int) -> Names:
    """Of an attention module with `depth` poolings, but for its first norm, which belongs to the layer before it."""
    units = {"trunk/res1": "before.0", "trunk/res2": "trunk.0", "trunk/res3": "trunk.1"}
    norms = {"trunk/res1": "trunk.0.norm", "trunk/res2": "trunk.1.norm", "mask/up_sample/interp_1": "mask.norm1",
             "mask/linear_1": "mask.norm2", "fusion": "after.0.norm"}  # fmt: skip
    for n in range(depth):
        down = f"mask/down_sample/res{n + 1}"
        units[f"{down}_1"] = f"mask.down.{n}.0"
        norms[f"mask/down_sample/pool{n + 1}_3x3_s2"] = f"mask.down.{n}.0.norm"
        if n == depth - 1:
            units[f"{down}_2"], norms[f"{down}_1"] = f"mask.down.{n}.1", f"mask.down.{n}.1.norm"
        else:
            units[f"mask/skip/res{n + 1}"], norms[f"{down}_1"] = f"mask.skip.{n}", f"mask.skip.{n}.norm"
            units[f"mask/up_sample/res{n + 1}_1"] = f"mask.up.{n}.0"
            norms[f"mask/up_sample{n + 1}"] = f"mask.up.{n}.0.norm"
    table = _BRANCH.within("branch1/", "after.0.")
    for theirs, ours in units.items():
        table |= _BRANCH.within(f"{theirs}/branch1/", f"{ours}.")
    table |= {f"{theirs}/bn.{{leaf}}": f"{ours}.{{leaf}}" for theirs, ours in norms.items()}
    table |= {f"mask/linear_{i}.{{leaf}}": f"mask.conv{i}.{{leaf}}" for i in (1, 2)}
    return Names(table)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a module, with the norm of whatever layer is before it."""
    depth = max([int(m[1]) for name in state if (m := re.match(r"mask/down_sample/res(\d+)_", name))], default=0)
    if not depth:
        raise ValueError("no layer mask/down_sample/res1_1: this is none of the modules A, B, C")
    return Names({**_module_names(depth).table, "{before}/bn.{leaf}": "before.0.norm.{leaf}"})(state)


def _convert_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    modules = [0, 0, 0]
    for name in state:
        if m := re.match(r"Attention([ABC])_(\d+)/", name):
            modules["ABC".index(m[1])] = max(modules["ABC".index(m[1])], int(m[2]))
    norms = {"conv1": "stem_norm", "pool1_3x3_s2": "stages.0.0.norm", "post_res_4_1": "stages.3.1.0.norm",
             "post_res_4_2": "stages.3.1.1.norm", "post_res_4_3": "norm"}  # fmt: skip
    units = {"post_res_4_1": "stages.3.0", "post_res_4_2": "stages.3.1.0", "post_res_4_3": "stages.3.1.1"}
    table: dict[str, Any] = {"conv1.{leaf}": "stem.{leaf}", "classifier.{leaf}": "head.{leaf}"}
    for i, (letter, count) in enumerate(zip("ABC", modules)):
        units[f"pre_res_{i + 1}"] = f"stages.{i}.0"
        # before each module, and before the next stage
        layers = [f"pre_res_{i + 1}", *(f"Attention{letter}_{k}" for k in range(1, count + 1))]
        for k, layer in enumerate(layers):
            norms[layer] = f"stages.{i}.{k + 1}.before.0.norm" if k < count else f"stages.{i + 1}.0.norm"
        table |= _module_names(_DEPTHS[letter]).within(f"Attention{letter}_{{m}}/", f"stages.{i}.{{m}}.")
    for theirs, ours in units.items():
        table |= _BRANCH.within(f"{theirs}/branch1/", f"{ours}.")
        table[f"{theirs}/branch2/conv1_1x1.{{leaf}}"] = f"{ours}.shortcut.{{leaf}}"
    table |= {f"{theirs}/bn.{{leaf}}": f"{ours}.{{leaf}}" for theirs, ours in norms.items()}
    return Names(table)(state)


def _build_network(args: dict[str, Any]) -> ResidualAttentionNetwork:
    name, divisor = args.get("network", "Attention-56"), args.get("channels_divided_by", 1)
    modules = {"Attention-56": (1, 1, 1), "Attention-92": (1, 2, 3)}
    if name not in modules:
        raise ValueError(f"network must be one of {', '.join(modules)}, got {name!r}")
    network = ResidualAttentionNetwork(
        args.get("modules", modules[name]),
        [width // divisor for width in (256, 512, 1024, 2048)],
        args.get("downs", tuple(_DEPTHS.values())),
        stem_width=64 // divisor,
        num_classes=args.get("num_classes", 1000),
    )
    _set_eps(network, args)
    return network


def _run_network(
    module: ResidualAttentionNetwork, inputs: dict[str, Tensor], args: dict[str, Any]
) -> dict[str, Tensor]:
    out = module(inputs["x"])
    assert out.logits is not None
    return {"logits": out.logits, "probabilities": out.logits.softmax(-1), "post_res_4_3": out.features[-1]}


def _set_eps(module: nn.Module, args: dict[str, Any]) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = args.get("bn_eps", 1e-5)


def _build(args: dict[str, Any]) -> AttentionModule:
    letter = re.match(r"Attention([ABC])", args["module"])
    if letter is None:
        raise ValueError(f"module must be AttentionA, AttentionB or AttentionC with a number, got {args['module']!r}")
    module = AttentionModule(args["channels"], _DEPTHS[letter[1]])
    _set_eps(module, args)
    return module


def _run(module: AttentionModule, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    trunk_BCHW, mask_BCHW = module.branches(inputs["x"])
    assert mask_BCHW is not None
    return {"mask": mask_BCHW, "trunk": trunk_BCHW, "y": module.after(module.attend(trunk_BCHW, mask_BCHW))}


PORTS = (
    AuthorsPort("network", build=_build_network, convert=_convert_network, run=_run_network),
    *(AuthorsPort(f"attention_{letter}", build=_build, convert=_convert, run=_run) for letter in ("a", "b", "c")),
)
