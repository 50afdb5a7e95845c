"""Dynamic Head: blocks between a feature pyramid and any detection head, with attention over levels, places and tasks.

Dai, Chen, Xiao, Chen, Liu, Yuan, Zhang, "Dynamic Head: Unifying Object Detection Heads with Attentions", CVPR 2021,
arXiv 2106.08322.

    W(F) = pi_C( pi_S( pi_L(F) F ) F ) F,   F a pyramid of levels x_0 (finest) .. x_{L-1} of C channels

A block, the same weights for all levels (and all levels from the block's input):

    offset, mask = split(conv3x3(x_l)),  mask = sigmoid(mask)                          9 taps, (dy, dx) and m each
    own     = GN(DC(x_l; offset, mask))                                                spatial-aware:
    finer   = GN(DC(x_{l-1}; offset, mask)), stride 2                                  DC is a modulated deformable
    coarser = up(GN(DC(x_{l+1}; offset', mask')))                                      convolution 3x3, each its own
    a(f)    = hsigmoid(relu(w . mean(f) + b))                                          scale-aware, one w for all
    z_l     = mean over the branches that exist of a(f) f
    theta   = hsigmoid(W_2 relu(W_1 mean(z_l)))  = (a_1, b_1, a_2, b_2) per channel    task-aware (DyReLU):
    y_l     = max(alpha_1 z_l + beta_1, alpha_2 z_l + beta_2),  alpha_i = lambda (a_i - 1/2) + (1, 0)_i,
                                                                beta_i = b_i - 1/2
    hsigmoid(t) = relu6(t + 3) / 6,   up: bilinear with aligned corners to the size of x_l,   GN: 16 groups

Symbols: L `levels` of the input, C `channels`, lambda `slope`.

Where paper and code differ we follow the code, whose weights were published. The paper's gate is max(0, min(1, (t +
1) / 2)): `scale_gate="paper"`. The paper's spatial attention sums over all levels, the code's over neighbours. The
code's kernel reads the offsets of the coarser branch, which were made on the grid of x_l, as if they lay in the shape
of x_{l+1}: the first 18 H' W' numbers of a sample's 18 H W. That is `high_offset="prefix"`, for which published weights
were trained; "resize", the default for new training, resizes them to the coarser grid, with aligned corners as in `up`.

Initialisation: deformable convolutions uniform in 1 / sqrt(9 C), without bias; the scale gate normal with deviation
0.01; offsets as PyTorch has it, not zero. Offsets and sampling run in single precision at least.

Levels may have any sizes of which the next is the half, rounded up. Cost: three 3 x 3 convolutions a place and block.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, Names, register
from saccade.ops.deformable import deformable_conv
from saccade.ops.export import output

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

GROUPS = 16
HIGH_OFFSETS = ("resize", "prefix")
SCALE_GATES = ("code", "paper")


@output
@dataclass
class Pyramid:
    """What the head returns.

    Attributes:
        maps: of the input's sizes, from fine to coarse; a dict with the input's names where that was one.
    """

    maps: list[Tensor] | dict[str, Tensor]


def fit_to_coarser(maps_BKHW: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """Offsets or masks (B, K, H, W) of a level for the grid (H', W') of the next coarser one.

    "resize" is bilinear with aligned corners; "prefix" takes the first K H' W' numbers of each sample.
    """
    if how == "resize":
        return F.interpolate(maps_BKHW, size, mode="bilinear", align_corners=True)
    K, height, width = maps_BKHW.shape[1], *size
    return maps_BKHW.flatten(1)[:, : K * height * width].unflatten(1, (K, height, width))


class DyReLU(nn.Module):
    """Task-aware attention: the larger of two lines per channel, whose slopes and intercepts the map itself sets.

    x (B, C, H, W) -> y of that shape. With a last layer of zeros it is a ReLU.

    Args:
        channels: C.
        reduction: the hidden layer has C // reduction units, at least 1.
        slope: lambda, the range of slopes.
        slopes, intercepts: of the two lines at theta = 1/2.

    Raises:
        ValueError: if channels or reduction are below 1.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        slope: float = 2.0,
        slopes: tuple[float, float] = (1.0, 0.0),
        intercepts: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be positive, got {channels} and {reduction}")
        self.slope, self.slopes, self.intercepts = slope, slopes, intercepts
        hidden = max(1, channels // reduction)
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, 4 * channels)

    def lines(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha_1, beta_1, alpha_2, beta_2, each (B, C, 1, 1)."""
        theta = F.hardsigmoid(self.up(F.relu(self.down(x_BCHW.mean((2, 3)))))) - 0.5
        a1, b1, a2, b2 = theta[:, :, None, None].chunk(4, 1)
        return (
            self.slope * a1 + self.slopes[0],
            b1 + self.intercepts[0],
            self.slope * a2 + self.slopes[1],
            b2 + self.intercepts[1],
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        alpha1, beta1, alpha2, beta2 = self.lines(x_BCHW)
        return torch.maximum(alpha1 * x_BCHW + beta1, alpha2 * x_BCHW + beta2)


class Branch(nn.Module):
    """A modulated deformable convolution 3x3 and a group norm."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1)  # the weights; its places are moved
        self.norm = nn.GroupNorm(GROUPS, channels)
        nn.init.uniform_(self.conv.weight, -((9 * channels) ** -0.5), (9 * channels) ** -0.5)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        y_BCHW = deformable_conv(
            x_BCHW, offset, self.conv.weight, self.conv.bias, stride=self.conv.stride[0], padding=1, mask_BkHW=mask
        )
        # PyTorch's functional form refuses a group of a single number, which the coarsest level may be
        return torch.group_norm(y_BCHW, GROUPS, self.norm.weight, self.norm.bias, self.norm.eps)


class DyConv(nn.Module):
    """One block: a list of maps (B, C, H_l, W_l), from fine to coarse, to another of the same shapes.

    Args:
        channels: C, a multiple of 16.
        reduction: of the task-aware attention's hidden layer.
        high_offset: "resize" or "prefix", see the top of this file.
        scale_gate: "code" or "paper".

    Raises:
        ValueError: if an argument is not offered.
    """

    def __init__(
        self, channels: int = 256, reduction: int = 4, high_offset: str = "resize", scale_gate: str = "code"
    ) -> None:
        super().__init__()
        if channels < 1 or channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, got {channels}")
        if high_offset not in HIGH_OFFSETS:
            raise ValueError(f"high_offset must be one of {', '.join(HIGH_OFFSETS)}, got {high_offset!r}")
        if scale_gate not in SCALE_GATES:
            raise ValueError(f"scale_gate must be one of {', '.join(SCALE_GATES)}, got {scale_gate!r}")
        self.high_offset, self.scale_gate = high_offset, scale_gate
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        self.own, self.finer, self.coarser = Branch(channels), Branch(channels, stride=2), Branch(channels)
        self.scale = nn.Conv2d(channels, 1, 1)
        self.task = DyReLU(channels, reduction)
        nn.init.normal_(self.scale.weight, std=0.01)
        nn.init.zeros_(self.scale.bias)  # type: ignore[arg-type]

    def gate(self, f_BCHW: Tensor) -> Tensor:
        """a(f), (B, 1, 1, 1)."""
        t = self.scale(f_BCHW.mean((2, 3), keepdim=True))
        return F.hardsigmoid(F.relu(t)) if self.scale_gate == "code" else ((t + 1) / 2).clamp(0, 1)

    def branches(self, maps: Sequence[Tensor], level: int) -> dict[str, Tensor]:
        """What reaches a level from itself and its neighbours, ungated: "own", "finer", "coarser" where they exist."""
        x_BCHW = maps[level]
        offset, logits = self.offset(x_BCHW).split((18, 9), 1)
        mask = logits.sigmoid()
        found = {"own": self.own(x_BCHW, offset, mask)}
        if level:
            found["finer"] = self.finer(maps[level - 1], offset, mask)
        if level + 1 < len(maps):
            height, width = maps[level + 1].shape[2:]
            fitted = [fit_to_coarser(m, (height, width), self.high_offset) for m in (offset, mask)]
            f_BCHW = self.coarser(maps[level + 1], *fitted)
            found["coarser"] = F.interpolate(f_BCHW, tuple(x_BCHW.shape[2:]), mode="bilinear", align_corners=True)
        return found

    def scales(self, maps: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The scale-aware weights (B,) of each level's branches, for looking at."""
        levels = range(len(maps))
        return [{name: self.gate(f).flatten() for name, f in self.branches(maps, level).items()} for level in levels]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for level in range(len(maps)):
            gated = [self.gate(f_BCHW) * f_BCHW for f_BCHW in self.branches(maps, level).values()]
            out.append(self.task(sum(gated[1:], gated[0]) / len(gated)))
        return out


class DynamicHead(nn.Module):
    """The head: blocks one after the other.

    Args:
        channels: C, a multiple of 16.
        blocks: how many; the paper finds six enough.
        reduction, high_offset, scale_gate: of each block, see `DyConv`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        channels: int = 256,
        blocks: int = 6,
        *,
        reduction: int = 4,
        high_offset: str = "resize",
        scale_gate: str = "code",
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks must be positive, got {blocks}")
        self.channels = channels
        self.blocks = nn.ModuleList(DyConv(channels, reduction, high_offset, scale_gate) for _ in range(blocks))

    def forward(self, maps: Sequence[Tensor] | Mapping[str, Tensor]) -> Pyramid:
        """Maps (B, C, H_l, W_l) from fine to coarse, a sequence or a dict, each level half the last, rounded up.

        Raises:
            ValueError: if channels or sizes of the maps do not fit.
        """
        levels = list(maps.values() if isinstance(maps, Mapping) else maps)
        _check_pyramid(levels, self.channels)
        for block in self.blocks:
            levels = block(levels)
        return Pyramid(dict(zip(maps, levels)) if isinstance(maps, Mapping) else levels)


def _check_pyramid(levels: list[Tensor], channels: int) -> None:
    if not levels:
        raise ValueError("maps must have at least one level, got none")
    for level, x in enumerate(levels):
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(f"maps must be (batch, {channels}, height, width), got {tuple(x.shape)} at level {level}")
        if level:
            finer = levels[level - 1].shape
            expected = (finer[0], channels, (finer[2] + 1) // 2, (finer[3] + 1) // 2)
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"level {level} must be {expected}, half of level {level - 1} rounded up, got {tuple(x.shape)}"
                )


_TASK = Names({"fc.0.{leaf}": "down.{leaf}", "fc.2.{leaf}": "up.{leaf}"})
_BLOCK = Names({
    **{
        name: place
        for i, branch in enumerate(("coarser", "own", "finer"))
        for name, place in {
            f"DyConv.{i}.conv.{{leaf}}": f"{branch}.conv.{{leaf}}",
            f"DyConv.{i}.bn.{{leaf}}": f"{branch}.norm.{{leaf}}",
        }.items()
    },
    "AttnConv.1.{leaf}": "scale.{leaf}",
    "offset.{leaf}": "offset.{leaf}",
    **_TASK.within("relu.", "task."),
})  # fmt: skip
_TOWER = Names(_BLOCK.within("dyhead_tower.{n}.", "blocks.{n}."))


def _convert_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower, alone or in a released detector, of which everything else is left out."""
    prefix = "backbone."
    if any(name.startswith(f"{prefix}dyhead_tower.") for name in state):
        tower = f"{prefix}dyhead_tower."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(tower)}
    return _TOWER(state)


def _build_network(args: dict[str, Any]) -> DynamicHead:
    channels = args.get("channels", 256)
    _same_channels(args.get("in_channels", channels), channels)
    return DynamicHead(channels, args.get("num_convs", 6), high_offset="prefix")


def _same_channels(inputs: int, outputs: int) -> int:
    """The authors' modules take two numbers of channels, but their DyReLU runs only where they are equal."""
    if inputs != outputs:
        raise ValueError(f"input and output channels must be equal, got {inputs} and {outputs}")
    return inputs


def _run_levels(module: DyConv | DynamicHead, inputs: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Tensor]:
    names = sorted(inputs, key=lambda name: int(name[1:]))  # p0 is the finest
    levels = [inputs[name] for name in names]
    return dict(zip(names, module(levels).maps if isinstance(module, DynamicHead) else module(levels)))


def _scene(count: int, channels: int, size: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Noisy pyramids of three levels with an object and a distractor in the middle one; where the object is, finest."""
    maps = [torch.randn(count, channels, size // s, size // s, generator=generator) for s in (1, 2, 4)]
    side = size // 2
    # signs over channels of the object and of the distractor: orthogonal
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]]).repeat(1, channels // 4)
    places = torch.rand(count, side * side, generator=generator).topk(2).indices
    flat, truth = maps[1].flatten(2), torch.zeros(count, side * side)
    for place, sign in zip(places.T, signs):
        flat[torch.arange(count), :, place] += 1.5 * sign
    truth[torch.arange(count), places[:, 0]] = 1.0
    return [maps[0], flat.view_as(maps[1]), maps[2]], F.interpolate(truth.view(count, 1, side, side), scale_factor=2)


def _area(logits: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve over all places."""
    ranks = torch.empty(logits.numel())
    ranks[logits.flatten().argsort()] = torch.arange(1.0, logits.numel() + 1)
    positive = truth.flatten() > 0
    n, m = int(positive.sum()), int((~positive).sum())
    return ((ranks[positive].double().sum() - n * (n + 1) / 2) / (n * m)).item()


def _claim(lab: Lab) -> ClaimResult:
    """An object whose evidence lies in the middle level is to be found in the finest."""
    channels, size = lab.size(32, 16), lab.size(12, 8)

    class Reader(nn.Module):
        """A linear read-out of the finest level, after a block or after convolutions on that level alone."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.read = block, nn.Conv2d(channels, 1, 1)

        def forward(self, maps: list[Tensor]) -> Tensor:
            return self.read(self.block(maps)[0] if isinstance(self.block, DyConv) else self.block(maps[0]))

    def convolutions() -> nn.Module:
        """Four, with slightly more parameters than a block."""
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
        return nn.Sequential(*layers)

    def loss(model: nn.Module, batch: tuple[list[Tensor], Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    maps, truth = _scene(lab.size(128, 2), channels, size, torch.Generator().manual_seed(10**6))
    areas: dict[str, list[float]] = {"block": [], "convolutions": []}
    gates: dict[str, list[float]] = {"coarser": [], "own": []}
    measured = {}
    for seed in range(lab.seed, lab.seed + 2):
        for name in areas:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = Reader(DyConv(channels) if name == "block" else convolutions())
            measured[f"{name}_parameters"] = float(sum(p.numel() for p in model.block.parameters()))
            generator = torch.Generator().manual_seed(seed)

            def batches(generator: torch.Generator = generator) -> Iterator[tuple[list[Tensor], Tensor]]:
                while True:
                    yield _scene(lab.size(16, 2), channels, size, generator)

            lab.train(model, batches(), loss, 150, lr=3e-3, description=f"{name}, seed {seed}")
            with torch.no_grad():
                areas[name].append(_area(model.eval()(maps), truth))
                if isinstance(model.block, DyConv):
                    for branch, weight in model.block.scales(maps)[0].items():
                        gates[branch].append(weight.mean().item())
    for name, found in areas.items():
        measured[f"{name}_auc"] = sum(found) / len(found)
        measured[f"{name}_auc_spread"] = max(found) - min(found)
    for name, found in gates.items():
        measured[f"{name}_gate"] = sum(found) / len(found)
    gain = measured["block_auc"] - measured["convolutions_auc"]
    note = ""
    if measured["coarser_gate"] <= measured["own_gate"]:
        note = "the scale gate does not prefer the branch that has the evidence: norms and read-out weigh branches too"
    return ClaimResult(measured, holds=gain > 0.2, note=note)


register(
    "dynamic-head",
    kind="model",
    summary="Blocks on a feature pyramid with scale-, spatial- and task-aware attention, before any detection head.",
    taxonomy={"sequences": "self", "levels": "multi", "positions": "local", "representations": "multi-dimensional"},
    efficiency="",
    complexity="time O(27 C^2) per place and block: three deformable 3 x 3 convolutions",
    invariants=(
        "with zero offsets and mask logits a branch is half the plain convolution, and its bias",
        "with a zero scale gate all branches weigh a half; with a zero last layer DyReLU is ReLU",
        "one level alone is its own branch; end levels average two branches, inner ones three",
        "each level keeps its shape",
    ),
    build=DynamicHead,
    example={"channels": 16, "blocks": 1},
    inputs=lambda module, size: (
        [torch.randn(2, module.channels, -(-size // s), -(-(size + 1) // s)) for s in (1, 2)],
    ),
    ports=(
        AuthorsPort("network", build=_build_network, convert=_convert_network, run=_run_levels),
        AuthorsPort(
            "dyconv",
            build=lambda args: DyConv(_same_channels(args["in_channels"], args["out_channels"]), high_offset="prefix"),
            convert=_BLOCK,
            run=_run_levels,
        ),
        AuthorsPort(
            "dyrelu",
            build=lambda args: DyReLU(
                _same_channels(args["inp"], args["oup"]),
                args.get("reduction", 4),
                slopes=tuple(args.get("init_a", (1.0, 0.0))),
                intercepts=tuple(args.get("init_b", (0.0, 0.0))),
            ),
            convert=_TASK,
            run=lambda module, inputs, args: {"y": module(inputs["x"])},
        ),
    ),
    claim=Claim(
        paper="attention over levels, places and tasks adds some 3.6 AP to ATSS (ResNet-50), each kind alone helps",
        expected="one block finds in the finest level an object whose evidence is in a coarser one; convolutions "
        "of equal size on the finest level cannot",
        run=_claim,
    ),
)
