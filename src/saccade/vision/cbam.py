"""CBAM: first which channels matter, then where, as two gates on a feature map.

Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, arXiv 1807.06521.

    M_c(F) = sigmoid( sum_p MLP(pool_p(F)) ),           MLP(z) = W1 ReLU(W0 z + b0) + b1      (channel gate)
    F'     = M_c(F) F
    M_s(F')= sigmoid( BN( conv_kxk([max_C F'; mean_C F']) ) )                                 (spatial gate)
    F''    = M_s(F') F'

Symbols: F the feature map, pool_p the poolings over all positions (`pool_types`), W0 (C/r, C) and W1 (C, C/r) one
MLP shared by the poolings, r `reduction`, k `kernel_size`.

Where paper and authors' code differ, this follows the code: biases in the MLP, a BatchNorm (momentum 0.01) after the
convolution, and the order [max; mean] (the paper writes no biases, no norm, and [avg; max]). The sum over poolings is
taken before the sigmoid. Padded borders of an image are part of the pools.

Placement: on the residual branch, after its last norm and before the addition (`BasicBlock`, `Bottleneck`), in every
block; in a plain stack after the last convolution of each block. `initialize(network)` sets the authors' weights: the
spatial gate's norm starts at weight 0, so that M_s is 1/2 everywhere and the gate opens as it learns.

Shape letters: B batch, C channels, R reduced channels, H height, W width, P poolings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, register

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

#: descriptors (B, C) of a map (B, C, H, W); "lp" and "lse" are sums over positions, as in the authors' code
POOLS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x_BCHW: x_BCHW.mean((2, 3)),
    "max": lambda x_BCHW: x_BCHW.amax((2, 3)),
    "lp": lambda x_BCHW: torch.linalg.vector_norm(x_BCHW, dim=(2, 3)),
    "lse": lambda x_BCHW: x_BCHW.logsumexp((2, 3)),
}


def channel_gate(x_BCHW: Tensor, mlp: Callable[[Tensor], Tensor], pool_types: Sequence[str] = ("avg", "max")) -> Tensor:
    """M_c, (B, C, 1, 1): the sigmoid of the sum of `mlp` (on (..., C)) over the poolings of `x_BCHW`."""
    pooled_PBC = torch.stack([POOLS[pool](x_BCHW) for pool in pool_types])
    return mlp(pooled_PBC).sum(0).sigmoid()[..., None, None]


def spatial_gate(x_BCHW: Tensor, convolution: Callable[[Tensor], Tensor]) -> Tensor:
    """M_s, (B, 1, H, W): the sigmoid of `convolution` ((B, 2, H, W) -> (B, 1, H, W)) on [max_C; mean_C]."""
    return convolution(torch.cat([x_BCHW.amax(1, keepdim=True), x_BCHW.mean(1, keepdim=True)], 1)).sigmoid()


class CBAM(nn.Module):
    """Channel gate, then spatial gate; F (B, C, H, W) -> F'' of the same shape and memory format, any H and W.

    Args:
        channels: C.
        reduction: r; the MLP is C // r wide.
        kernel_size: k of the spatial gate's convolution, odd.
        pool_types: any of "avg", "max", "lp", "lse".
        spatial: False leaves the spatial gate out (the authors' `no_spatial`).

    Raises:
        ValueError: if an argument is out of range, or the input is not (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        pool_types: Sequence[str] = ("avg", "max"),
        spatial: bool = True,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the number of channels ({channels}), got {reduction}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if not pool_types or isinstance(pool_types, str) or not set(pool_types) <= set(POOLS):
            raise ValueError(f"pool_types must be some of {', '.join(POOLS)}, got {pool_types!r}")
        self.channels, self.pool_types = channels, tuple(pool_types)
        self.reduce = nn.Linear(channels, channels // reduction)
        self.expand = nn.Linear(channels // reduction, channels)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False) if spatial else None
        self.norm = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01) if spatial else None

    def channel_gate(self, x_BCHW: Tensor) -> Tensor:
        """M_c of F, (B, C, 1, 1)."""
        return channel_gate(x_BCHW, lambda z: self.expand(F.relu(self.reduce(z))), self.pool_types)

    def spatial_gate(self, x_BCHW: Tensor) -> Tensor:
        """M_s of F' (the map after its channel gate), (B, 1, H, W)."""
        if self.conv is None or self.norm is None:
            raise ValueError("this CBAM was built with spatial=False and has no spatial gate")
        conv, norm = self.conv, self.norm
        return spatial_gate(x_BCHW, lambda maps: norm(conv(maps)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self._check(x_BCHW)
        x_BCHW = x_BCHW * self.channel_gate(x_BCHW)
        return x_BCHW if self.conv is None else x_BCHW * self.spatial_gate(x_BCHW)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """Both gates as one factor, (B, C, H, W): `module(x) == x * module.gate(x)`; what `attention_map` shows."""
        self._check(x_BCHW)
        channel_BC11 = self.channel_gate(x_BCHW)
        if self.conv is None:
            return channel_BC11.expand_as(x_BCHW)
        return channel_BC11 * self.spatial_gate(x_BCHW * channel_BC11)

    def _check(self, x_BCHW: Tensor) -> None:
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels:
            raise ValueError(f"x must be (batch, {self.channels}, height, width), got {tuple(x_BCHW.shape)}")

    def extra_repr(self) -> str:
        return f"channels={self.channels}, pool_types={self.pool_types}"


class _ResidualBlock(nn.Module):
    """y = ReLU( gate(branch(x)) + shortcut(x) ); the shortcut is a 1x1 convolution and norm where shapes change."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, gate: Callable[[int], nn.Module] | None, projected: bool
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1 or stride < 1:
            raise ValueError(f"channels and stride must be positive, got {in_channels}, {out_channels} and {stride}")
        self.gate = nn.Identity() if gate is None else gate(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if projected or stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def branch(self, x_BCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.gate(self.branch(x_BCHW)) + self.shortcut(x_BCHW))


class BasicBlock(_ResidualBlock):
    """ResNet's block of two 3x3 convolutions, with a gate on its residual branch.

    Args:
        in_channels: of the input.
        channels: of the output.
        stride: of the first convolution.
        gate: called with the number of gated channels; None is a plain block.
        projected: a projection on the shortcut also where the shapes would fit without.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        gate: Callable[[int], nn.Module] | None = CBAM,
        projected: bool = False,
    ) -> None:
        super().__init__(in_channels, channels, stride, gate, projected)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def branch(self, x_BCHW: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x_BCHW)))))


class Bottleneck(_ResidualBlock):
    """ResNet's 1x1, 3x3, 1x1 block, with a gate on its residual branch; the output has `4 * width` channels.

    Args:
        in_channels: of the input.
        width: channels of the 3x3 convolution.
        stride: of the 3x3 convolution.
        gate: called with the number of gated channels; None is a plain block.
        projected: a projection on the shortcut also where the shapes would fit without.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        gate: Callable[[int], nn.Module] | None = CBAM,
        projected: bool = False,
    ) -> None:
        super().__init__(in_channels, width * self.expansion, stride, gate, projected)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width * self.expansion)

    def branch(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        x_BCHW = F.relu(self.norm2(self.conv2(x_BCHW)))
        return self.norm3(self.conv3(x_BCHW))


@torch.no_grad()
def initialize(network: nn.Module) -> nn.Module:
    """The authors' initialisation of a residual network with CBAM, in place; call it once on the finished network.

    Convolutions Kaiming normal (fan out), norms weight 1, all biases 0; the norm inside each spatial gate weight 0.
    Linear layers keep PyTorch's weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, CBAM) and module.norm is not None:
            nn.init.zeros_(module.norm.weight)
    return network


# The authors' names.


def _renamed(names: Mapping[str, str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A conversion that replaces the prefixes of parameter names; a name that has none stays, and is refused later."""

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = {}
        for name, tensor in state.items():
            prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
            ours[names.get(prefix, "") + name[len(prefix) :]] = tensor
        return ours

    return convert


_GATE_NAMES = {
    "ChannelGate.mlp.1.": "reduce.",
    "ChannelGate.mlp.3.": "expand.",
    "SpatialGate.spatial.conv.": "conv.",
    "SpatialGate.spatial.bn.": "norm.",
}
_BLOCK_NAMES = {
    **{f"cbam.{theirs}": f"gate.{ours}" for theirs, ours in _GATE_NAMES.items()},
    **{f"bn{i}.": f"norm{i}." for i in (1, 2, 3)},
    "downsample.": "shortcut.",
}


def _build_gate(args: dict[str, Any]) -> CBAM:
    return CBAM(
        args["gate_channels"],
        args.get("reduction_ratio", 16),
        pool_types=args.get("pool_types", ("avg", "max")),
        spatial=not args.get("no_spatial", False),
    )


def _run_gate(module: CBAM, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    x_BCHW = inputs["x"]
    return {"channel_refined": x_BCHW * module.channel_gate(x_BCHW), "y": module(x_BCHW)}


def _build_bottleneck(args: dict[str, Any]) -> Bottleneck:
    return Bottleneck(
        args["inplanes"],
        args["planes"],
        args.get("stride", 1),
        gate=CBAM if args.get("use_cbam", False) else None,
        projected=bool(args.get("downsample")),
    )


# The claim: the card's experiment, a small bright shape on noise.


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


register(
    "cbam",
    kind="gate",
    summary="Channel gate from shared pooled descriptors, then a spatial gate from a 7x7 convolution.",
    supports=(),
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="time O(C^2 / r + k^2 H W + C H W), parameters 2 C^2 / r + C / r + C + 2 k^2 + 2",
    invariants=(
        "with both gates' last weights zero the output is the input over four, exactly",
        "average pooling without the spatial gate is SE with biases",
        "the channel gate does not depend on where things are, the spatial gate not on the order of channels",
        "gates lie strictly between 0 and 1, so signs stay and magnitudes fall",
        "after the authors' initialisation the spatial gate is 1/2 whatever its convolution",
    ),
    build=CBAM,
    example={"channels": 8, "reduction": 4},
    ports=(
        AuthorsPort("cbam", build=_build_gate, convert=_renamed(_GATE_NAMES), run=_run_gate),
        AuthorsPort(
            "bottleneck",
            build=_build_bottleneck,
            convert=_renamed(_BLOCK_NAMES),
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
    ),
    claim=Claim(
        paper="CBAM lowers the error of residual networks at hardly any cost; its spatial gate looks at the object",
        expected="lower error than the same network without CBAM after the same steps; M_s larger on the shape",
        run=_claim,
    ),
)
