"""The paper's claim as an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.vision.cbam.gate import CBAM, BasicBlock, initialize

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


def shapes(count: int, generator: torch.Generator, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 1, size, size) of unit noise with a bright 7x7 shape somewhere, their class, and where the shape is.

    The four classes are a square, a cross, a ring and two bars.
    """
    grid = torch.zeros(4, 7, 7)
    grid[0, 1:6, 1:6] = 1
    grid[1, 3], grid[1, :, 3] = 1, 1
    grid[2] = 1
    grid[2, 1:6, 1:6] = 0
    grid[3, 1:3], grid[3, 4:6] = 1, 1
    label_B = torch.randint(4, (count,), generator=generator)
    corner_B2 = torch.randint(size - 6, (count, 2), generator=generator)
    offset = torch.arange(7)
    rows, columns = corner_B2[:, :1, None] + offset[:, None], corner_B2[:, 1:, None] + offset
    where_BHW = torch.zeros(count, size, size)
    where_BHW[torch.arange(count)[:, None, None], rows, columns] = grid[label_B]
    image_BHW = torch.randn(count, size, size, generator=generator) + 1.5 * where_BHW
    return image_BHW[:, None], label_B, where_BHW[:, None]


def _network(gate: Callable[[int], nn.Module] | None) -> nn.Sequential:
    blocks = [BasicBlock(i, o, s, gate=gate) for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))]
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))
    return nn.Sequential(stem, *blocks, head)


def _claim(lab: Lab) -> ClaimResult:
    """A three-stage residual network with and without CBAM, same seeds and steps; error on fresh images, and M_s."""
    seeds = lab.size(2, 1)
    errors: dict[str, list[float]] = {"with": [], "without": []}
    ratios = []
    for seed in lab.progress(range(lab.seed, lab.seed + seeds), "seeds"):
        test, label_B, where_B1HW = shapes(lab.size(512, 8), torch.Generator().manual_seed(1000 + seed))
        for name, gate in (("with", CBAM), ("without", None)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = _network(gate)
                initialize(network)
            lab.train(network, _batches(seed, lab.size(32, 4)), _loss, 300, lr=1e-2, description=f"{name} CBAM")
            network.eval()
            with torch.no_grad():
                errors[name].append((network(test).argmax(1) != label_B).float().mean().item())
                if gate is not None:
                    ratios.append(_on_shape(network, test, where_B1HW))
    mean = {name: 100 * sum(values) / seeds for name, values in errors.items()}
    ratio = sum(ratios) / seeds
    return ClaimResult(
        {
            "error_with_cbam_percent": mean["with"],
            "error_without_percent": mean["without"],
            "spatial_gate_on_shape_over_off_ratio": ratio,
        },
        holds=mean["with"] < mean["without"] and ratio > 1,
        note=f"means of {seeds} seeds; the verdict depends on learning rate and steps, at others CBAM can be behind",
    )


def _batches(seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        image, label, _ = shapes(size, generator)
        yield image, label


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def _on_shape(network: nn.Sequential, image_B1HW: Tensor, where_B1HW: Tensor) -> float:
    """Mean of the last block's M_s on the shape over its mean off the shape; positions seen at the block's stride."""
    seen: list[Tensor] = []
    gate = network[3].gate
    assert isinstance(gate, CBAM)
    handle = gate.register_forward_hook(
        lambda module, inputs, _: seen.append(module.spatial_gate(inputs[0] * module.channel_gate(inputs[0])))
    )
    network(image_B1HW)
    handle.remove()
    on_B1HW = F.adaptive_max_pool2d(where_B1HW, seen[0].shape[-2:]) > 0
    return (seen[0][on_B1HW].mean() / seen[0][~on_B1HW].mean()).item()


CLAIM = Claim(
    paper="CBAM lowers the error of residual networks at hardly any cost; its spatial gate looks at the object",
    expected="lower error than the same network without CBAM after the same steps; M_s larger on the shape",
    run=_claim,
)
