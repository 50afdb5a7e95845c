"""The authors' names of BEVANet's parts, as the recordings have them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from saccade.catalogue import AuthorsPort
from saccade.models.bevanet.parts import BGAF, CKS, DLKPPM, EVA, SDLSKA, PagFM

#: rewrites of a name, in this order, each at most once
_NAMES = (
    (r"\.(?:pwconv|dwconv)\.(weight|bias)$", r".\1"),  # their convolutions are wrapped
    (r"fc_reduce\.", "reduce."),
    (r"fc_expand_small\.", "expand.0."),
    (r"fc_expand_big_h\.", "expand.1."),
    (r"fc_expand_big_v\.", "expand.2."),
    (r"conv_squeeze\.", "squeeze."),
    (r"FS_kernel\.", "select."),
    (r"DW_conv_h\.", "small_across."),
    (r"DW_conv_v\.", "small_down."),
    (r"DW_conv\.", "small."),
    (r"DW_D_conv_h\.", "across."),
    (r"DW_D_conv_v\.", "down."),
    (r"(^|\.)pwconv\.", r"\1project."),
    (r"proj_1\.", "proj_in."),
    (r"proj_2\.", "proj_out."),
    (r"spatial_gating_unit\.", "gate."),
    (r"^attn\.", "attention."),
    (r"^mlp\.dwconv\.", "mix."),
    (r"^mlp\.", ""),
    (r"^layer_scale_([12])$", r"scale\1"),
    (r"^layer_scale_lska$", "scale"),
    (r"^lska\.", "attention."),
    (r"^bn\.", "norm."),
    (r"^scale0\.(\d)\.", r"reduce.0.\1."),
    (r"^process1\.", "process.0."),
    (r"^process2\.", "process.1."),
    (r"^process_lska\.", "process.2."),
    (r"^process4\.", "process.3."),
    (r"^process5\.", "process.4."),
    (r"^(?:conv_p|f_x)\.", "detail."),
    (r"^(?:conv_i|f_y)\.", "semantic."),
)
#: where the pyramid's pooled scales stand in ours
_SCALES = {"1": 1, "2": 2, "4": 3, "5": 4}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state of any of the recorded parts, with our names."""
    converted = {}
    for name, tensor in state.items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name, count=1)
        # their pooling stands first in a scale, so norm and convolution are one place further on
        name = re.sub(r"^scale([1245])\.(\d)\.", lambda m: f"reduce.{_SCALES[m.group(1)]}.{int(m.group(2)) - 1}.", name)
        converted[name] = tensor
    return converted


def _run(*names: str) -> Any:
    def run(module: nn.Module, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
        return {"y": module(*(inputs[name] for name in names))}

    return run


PORTS = (
    AuthorsPort(
        "sdlska",
        build=lambda args: SDLSKA(args["dim"], args.get("kernel_size", 35)),
        convert=convert,
        run=_run("x"),
    ),
    AuthorsPort("cks", build=lambda args: CKS(args["dim"]), convert=convert, run=_run("small", "big_h", "big_v")),
    AuthorsPort(
        "evan",
        build=lambda args: EVA(args["dim"], args.get("kernel_size", 35), args.get("mlp_expand", 4)),
        convert=convert,
        run=_run("x"),
    ),
    AuthorsPort(
        "dlkppm",
        build=lambda args: DLKPPM(args["inplanes"], args["branch_planes"], args["outplanes"]),
        convert=convert,
        run=_run("x"),
    ),
    AuthorsPort(
        "bgaf",
        build=lambda args: BGAF(args["in_channels"], args.get("out_channels")),
        convert=convert,
        run=_run("p", "i", "d"),
    ),
    AuthorsPort(
        "pagfm",
        build=lambda args: PagFM(args["in_channels"], args["mid_channels"]),
        convert=convert,
        run=_run("x", "y"),
    ),
)
