"""One pass through the network as it is: which maps come out of the places, and what a gate costs on them.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.integrations.insert.maps import map_of
from saccade.integrations.insert.places import Target
from saccade.layers.watching import evaluating


@dataclass(frozen=True)
class DryRun:
    """Shapes of the inputs, multiply-adds, and what came out of each place."""

    inputs: list[tuple[int, ...]]
    flops: int | None
    maps: Mapping[str, Tensor | None]


def dry_run(model: nn.Module, targets: Sequence[Target], example: Any) -> DryRun:
    """One forward pass in evaluation mode, without gradients, that looks at the output of each target."""
    from torch.utils.flop_counter import FlopCounterMode

    arguments, named = _inputs(model, example)
    seen: dict[str, list[Any]] = {target.path: [] for target in targets}

    def look(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            x = map_of(output)
            seen[path].append(x.clone() if isinstance(x, Tensor) else x)  # networks add to their maps in place

        return hook

    handles = [target.module.register_forward_hook(look(target.path)) for target in targets]
    shapes = [tuple(x.shape) for x in (*arguments, *named.values()) if isinstance(x, Tensor)]
    try:
        with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*arguments, **named)
    except Exception as error:  # whatever the network raises on an input that is not for it
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the dry run on inputs {shapes} failed ({type(error).__name__}: {what}); give example= or channels="
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for path, maps in seen.items():
        if not maps:
            raise ValueError(f"{path!r} is not called by the network, so nothing can be gated there")
        for x in maps:
            if not isinstance(x, Tensor) or x.ndim != 4:
                got = tuple(x.shape) if isinstance(x, Tensor) else "no tensor"
                raise ValueError(f"a gate needs maps (batch, channels, height, width), but after {path!r} come {got}")
        if len({x.shape[1] for x in maps}) > 1:
            raise ValueError(f"{path!r} is called with several numbers of channels: {[x.shape[1] for x in maps]}")
    return DryRun(shapes, counter.get_total_flops() // 2, {path: maps[0] for path, maps in seen.items()})


def _inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named inputs of the dry run."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if example is not None:
        return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    config = getattr(model, "config", None)
    convolution = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.LazyConv2d))), None)
    count = getattr(config, "num_channels", None) or getattr(convolution, "in_channels", 0)
    if not count:
        raise ValueError(f"{type(model).__name__} does not say what it takes: give example= or channels=")
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    noise = torch.randn(1, count, height, width, generator=torch.Generator().manual_seed(0))
    return (noise.to(device=weight.device, dtype=weight.dtype),), {}


@torch.no_grad()
def measure(gate: nn.Module, map_BCHW: Tensor) -> tuple[int, float | None]:
    """Multiply-adds of the gate on a map, and |gate(x) - x| / |x|; None for the latter on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with evaluating(gate), FlopCounterMode(display=False) as counter:
        out_BCHW = gate(map_BCHW)
    flops = counter.get_total_flops() // 2
    if map_BCHW.is_meta:
        return flops, None
    scale = torch.linalg.vector_norm(map_BCHW.double())
    return flops, (torch.linalg.vector_norm((out_BCHW - map_BCHW).double()) / scale.clamp(min=1e-30)).item()
