"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saccade.attention.combiner.layer import Combiner
from saccade.attention.combiner.operator import Variant
from saccade.catalogue import AuthorsPort, Names


class _Authors(nn.Module):
    """The authors' arguments do not say the width: the layer is made when the parameters come."""

    layer: Combiner

    def __init__(self, variant: Variant, args: dict[str, Any]) -> None:
        super().__init__()
        self.variant, self.args = variant, args

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        inner, dim = state["q_proj.weight"].shape
        heads = int(self.args["num_heads"])
        self.layer = Combiner(
            dim,
            heads,
            head_dim=inner // heads,
            variant=self.variant,
            segment=None if self.variant == "logn" else int(self.args["max_seg_len"]),
        )
        return self.layer.load_state_dict(state, strict, assign)

    def forward(self, x_BNC: Tensor, **arguments: Any) -> Tensor:
        return self.layer(x_BNC, **arguments)


_NAMES = Names({
    "query": "q_proj.weight",
    "key": "k_proj.weight",
    "value": "v_proj.weight",
    "row_key": "row_key.weight",
    "out": "out_proj.weight",
    "row_proj": "row_proj.weight",
    "row_norm_scale": "row_norm.weight",
    "row_norm_bias": "row_norm.bias",
})  # fmt: skip


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs are (C, H, D) and (H, D, C)."""
    ours = _NAMES(state)
    for name, tensor in ours.items():
        if "norm" not in name:
            merged = tensor.flatten(0, 1) if name in ("out_proj.weight", "row_proj.weight") else tensor.flatten(1)
            ours[name] = merged.mT.contiguous()
    return ours


def _port(module: str, variant: Variant) -> AuthorsPort:
    return AuthorsPort(
        module=module,
        build=lambda args: _Authors(variant, args),
        convert=_convert,
        run=lambda module, inputs, args: {"out": module(inputs["x"])},
    )


PORTS = (
    _port("combiner_fixed", "fixed"),
    _port("combiner_logn", "logn"),
    _port("combiner_axial_rowmajor", "rowmajor"),
    _port("combiner_axial_mixture", "mixture"),
)
