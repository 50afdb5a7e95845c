"""How the authors' modules and parameters map to ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attention.neural_attention.layer import NeuralAttention
from saccade.catalogue import AuthorsPort, Names
from saccade.catalogue.ports import Arguments


def _head_dim(args: dict[str, Any]) -> int:
    return int(args.get("dim_head") or args["dim"] // args["heads"])


#: NeuralAttention(dim, heads=8, dim_head=None, causal=..., projection_dim=dim_head // 32)
def _build(causal: bool) -> Arguments:
    return Arguments(
        NeuralAttention,
        {"dim": "dim", "heads": "num_heads", "causal": "causal"},
        defaults={"heads": 8, "causal": causal},
        derived={
            "head_dim": _head_dim,
            "projection_dim": lambda args: int(args.get("projection_dim") or _head_dim(args) // 32),
        },
        rope=False,
    )


_NAMES = Names({
    "to_qkv.weight": "qkv",
    "W_out.weight": "out_proj.weight",
    "q_proj.{leaf}": "network.query_down.{leaf}",
    "k_proj.{leaf}": "network.key_down.{leaf}",
    "linear1.{leaf}": "network.first.{leaf}",
    "linear2.{leaf}": "network.second.{leaf}",
    "linear3.weight": "network.third.weight",
    "linear3.bias": None,  # shifts all scores of a row alike
})  # fmt: skip


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`to_qkv` is laid out (D, 3, H), heads fastest."""
    ours = _NAMES(state)
    weight, head_dim = ours.pop("qkv"), state["q_proj.weight"].shape[1]
    parts = weight.view(head_dim, 3, -1, weight.shape[1]).permute(1, 2, 0, 3).flatten(1, 2)
    return ours | {f"{name}_proj.weight": part.contiguous() for name, part in zip("qkv", parts, strict=True)}


def _run(module: NeuralAttention, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' mask is True (1) where hidden, (N, N) or with a batch axis; their causal module ignores it."""
    outputs = {"y": module(inputs["x"])}
    if "mask" in inputs:
        allowed = ~inputs["mask"].bool()
        while allowed.ndim < 4:
            allowed = allowed[None] if allowed.ndim == 2 else allowed[:, None]
        outputs["y_masked"] = outputs["y"] if module.causal else module(inputs["x"], mask=allowed)
    return outputs


PORTS = tuple(
    AuthorsPort(
        f"neural_attention_{name}",
        build=_build(causal),
        convert=_convert,
        run=_run,
    )
    for name, causal in (("causal", True), ("full", False))
)
