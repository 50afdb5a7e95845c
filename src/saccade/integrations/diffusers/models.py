"""What is known of diffusers' transformers: where text stands, the grid of the visual tokens, which layers attend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

Side = Literal["first", "last"]

#: where text stands among the tokens of a joint attention; None: not among them
TEXT: dict[str, Side | None] = {
    "WanTransformer3DModel": None,
    "HunyuanVideoTransformer3DModel": "last",
    "FluxTransformer2DModel": "first",
    "CogVideoXTransformer3DModel": "first",
}


def _wan_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    T, H, W = (side // patch for side, patch in zip(call["hidden_states"].shape[2:], model.config.patch_size))
    return T, H, W


def _hunyuan_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    frames, height, width = call["hidden_states"].shape[2:]
    patch = model.config.patch_size
    return frames // model.config.patch_size_t, height // patch, width // patch


def _cogvideox_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    _, frames, _, height, width = call["hidden_states"].shape
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return -(-frames // patch_t), height // patch, width // patch


def _flux_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    rows, columns = (call["img_ids"].reshape(-1, 3).amax(0)[1:].long() + 1).tolist()
    return 1, rows, columns


#: (frames, rows, columns) of the visual tokens, from the model and what it is called with
GRIDS: dict[str, Callable[[Any, Mapping[str, Any]], tuple[int, int, int]]] = {
    "WanTransformer3DModel": _wan_grid,
    "HunyuanVideoTransformer3DModel": _hunyuan_grid,
    "FluxTransformer2DModel": _flux_grid,
    "CogVideoXTransformer3DModel": _cogvideox_grid,
}


def transformers_of(model_or_pipeline: Any) -> dict[str, nn.Module]:
    """The models to switch, by the prefix of their layers' names."""
    if isinstance(model_or_pipeline, nn.Module):
        return {"": model_or_pipeline}
    parts = getattr(model_or_pipeline, "components", None)
    if not isinstance(parts, Mapping):
        raise ValueError(f"{type(model_or_pipeline).__name__} is neither a diffusers model nor a pipeline")
    found = {f"{k}.": v for k, v in parts.items() if k.startswith("transformer") and isinstance(v, nn.Module)}
    if not found:
        raise ValueError(f"{type(model_or_pipeline).__name__} has no transformer among {', '.join(parts)}")
    return found


def attention_layers(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module, int]]:
    """Self-attention modules of the model's blocks, by path: (block, module, number of the block)."""
    found: dict[str, tuple[nn.Module, nn.Module, int]] = {}
    blocks = [
        (f"{name}.{i}", block)
        for name, blocks in model.named_children()
        if isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks)
    ]
    number = 0
    for path, block in blocks:
        inside = {
            name: module
            for name, module in block.named_modules()
            if hasattr(module, "get_processor") and not getattr(module, "is_cross_attention", False)
        }
        found |= {f"{path}.{name}": (block, module, number) for name, module in inside.items()}
        number += bool(inside)
    return found
