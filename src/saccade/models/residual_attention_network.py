"""Residual attention network: a trunk of residual units, multiplied by one plus a mask that an hourglass draws.

Wang et al., "Residual Attention Network for Image Classification", arXiv 1704.06904 (CVPR 2017).

    h = units_p(x);   T = units_t(h)                                                        (trunk)
    d_1 = units(pool(h)), d_2 = units(pool(d_1)), .. d_D                                    (down, 3x3 max, stride 2)
    u_D = d_D;   u_i = units(up(u_{i+1}) + skip_i(d_i)),  i = D - 1 .. 1                    (up, bilinear)
    M = sigmoid(conv(ReLU(norm(conv(ReLU(norm(up(u_1))))))))                                (mask, of T's shape)
    y = units_p((1 + M) T)

Symbols: p = 1 units before and after, t = 2 in the trunk, r = 1 between poolings (2r at the bottom), D `depth`: 3, 2, 1
in the stages of strides 4, 8, 16 (the modules A, B, C), so that the smallest map is 7 x 7 of a 224 x 224 image. D = 0,
for small images, draws the mask by 2r units at full size. Units are pre-activation bottlenecks; with `groups` (32 in
AttentionNeXt) they are ResNeXt's, post-activation. The mask's last two convolutions keep their norms before them then,
and the network's last norm falls away, our choice where the source says nothing.

`activation` of the mask's last values v: "mixed", sigmoid(v); "channel", v / |v| over the channels of a position;
"spatial", sigmoid of v standardised over the positions of a channel. `residual=False` is the paper's naive attention
learning, M T. `attention=False` leaves the mask out, f = T, to compare with.

From the authors' Caffe graphs, not the paper's text: pooling has no padding and rounds up, bilinear interpolation puts
corners on corners. A map of one pixel is pooled to itself. Small images: a 3x3 stem of 32 channels, stages of strides
1, 2, 4 and a last one that keeps the size (`small_images`).

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import AuthorsPort, Claim, ClaimResult, Names, Published, register
from saccade.models.backbone import Backbone, check_images

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab

ACTIVATIONS = ("mixed", "channel", "spatial")


def mask_of(logits_BCHW: Tensor, activation: str = "mixed", eps: float = 1e-5) -> Tensor:
    """M of the mask branch's last values, see the top of this file; `eps` is added to the spatial variance."""
    if activation == "mixed":
        return logits_BCHW.sigmoid()
    if activation == "channel":
        return F.normalize(logits_BCHW, dim=1)
    if logits_BCHW.shape[2] * logits_BCHW.shape[3] == 1:  # a single value lies at its mean
        return torch.zeros_like(logits_BCHW).sigmoid()
    return F.instance_norm(logits_BCHW, eps=eps).sigmoid()


def pool(x_BCHW: Tensor) -> Tensor:
    """3x3 maximum with stride 2, no padding, rounded up; H -> max(1, ceil((H - 1) / 2))."""
    height, width = x_BCHW.shape[2:]
    return F.max_pool2d(x_BCHW, (min(3, height), min(3, width)), 2, ceil_mode=True)


def enlarge(x_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """Bilinear interpolation to the size of another map, corners on corners."""
    return F.interpolate(x_BCHW, like_BCHW.shape[2:], mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """t = ReLU(norm(x)); 1x1, 3x3 and 1x1 convolutions of t at a quarter of the channels; plus x, or a 1x1 of t."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        inner = channels // 4
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        changed = stride > 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changed else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        t_BCHW = F.relu(self.norm(x_BCHW))
        y_BCHW = F.relu(self.norm1(self.conv1(t_BCHW)))
        y_BCHW = self.conv3(F.relu(self.norm2(self.conv2(y_BCHW))))
        return (x_BCHW if self.shortcut is None else self.shortcut(t_BCHW)) + y_BCHW


class GroupedUnit(nn.Module):
    """ResNeXt's unit: 1x1, grouped 3x3 and 1x1 convolutions at half of the channels, each with a norm; plus x; ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, *, groups: int = 32) -> None:
        super().__init__()
        inner = channels // 2
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        y_BCHW = self.norm3(self.conv3(F.relu(self.norm2(self.conv2(y_BCHW)))))
        return F.relu(self.shortcut(x_BCHW) + y_BCHW)


class SoftMask(nn.Module):
    """The mask branch: h (B, C, H, W) -> M of the same shape.

    Args:
        channels: C.
        depth: D poolings.
        units: r.
        activation: of `ACTIVATIONS`.
        groups: 0, or those of ResNeXt's units.
    """

    def __init__(self, channels: int, depth: int, units: int = 1, activation: str = "mixed", groups: int = 0) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        levels = max(depth, 1)
        self.down = nn.ModuleList(
            _units(channels, units if i < levels - 1 else 2 * units, groups) for i in range(levels)
        )
        self.skip = nn.ModuleList(_unit(channels, channels, 1, groups) for _ in range(levels - 1))
        self.up = nn.ModuleList(_units(channels, units, groups) for _ in range(levels - 1))
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)

    def logits(self, h_BCHW: Tensor) -> Tensor:
        """The values before the last activation."""
        u_BCHW, maps = h_BCHW, []
        for stage in self.down:
            u_BCHW = stage(pool(u_BCHW) if self.depth else u_BCHW)
            maps.append(u_BCHW)
        for i in range(len(self.skip) - 1, -1, -1):
            u_BCHW = self.up[i](enlarge(u_BCHW, maps[i]) + self.skip[i](maps[i]))
        if self.depth:
            u_BCHW = enlarge(u_BCHW, h_BCHW)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(u_BCHW))))))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return mask_of(self.logits(h_BCHW), self.activation)


class AttentionModule(nn.Module):
    """y = units((1 + M) T), see the top of this file; (B, C, H, W) -> the same shape, any H and W.

    Args:
        channels: C, a multiple of 4.
        depth: D; 3, 2, 1 are the modules A, B, C.
        before, trunk, between: p, t, r.
        activation: of the mask.
        residual: False is naive attention learning, M T.
        attention: False leaves the mask out.
        groups: 0, or those of ResNeXt's units in place of the pre-activation ones.

    Raises:
        ValueError: if an argument is out of range, or the input does not fit.
    """

    def __init__(
        self,
        channels: int,
        depth: int = 1,
        *,
        before: int = 1,
        trunk: int = 2,
        between: int = 1,
        activation: str = "mixed",
        residual: bool = True,
        attention: bool = True,
        groups: int = 0,
    ) -> None:
        super().__init__()
        _check_channels([channels], groups)
        if depth < 0 or min(before, trunk, between) < 1:
            raise ValueError(
                "depth must not be negative and before, trunk and between must be positive, "
                f"got {depth}, {before}, {trunk} and {between}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.channels, self.residual = channels, residual
        self.before = _units(channels, before, groups)
        self.trunk = _units(channels, trunk, groups)
        self.mask = SoftMask(channels, depth, between, activation, groups) if attention else None
        self.after = _units(channels, before, groups)

    def branches(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """T and M (None without attention)."""
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.channels or 0 in x_BCHW.shape[2:]:
            raise ValueError(f"x must be (batch, {self.channels}, height, width), got {tuple(x_BCHW.shape)}")
        h_BCHW = self.before(x_BCHW)
        return self.trunk(h_BCHW), None if self.mask is None else self.mask(h_BCHW)

    def attend(self, trunk_BCHW: Tensor, mask_BCHW: Tensor | None) -> Tensor:
        """f, of T and M."""
        if mask_BCHW is None:
            return trunk_BCHW
        return trunk_BCHW * (1 + mask_BCHW) if self.residual else trunk_BCHW * mask_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.after(self.attend(*self.branches(x_BCHW)))


class ResidualAttentionNetwork(Backbone):
    """Three stages of a unit and attention modules, then three units; strides 4, 8, 16, 32. Default: Attention-56.

    m modules in each of the three stages make a trunk of 36 m + 20 layers: `modules=(m, m, m)` for 56, 92, 128, 164,
    236, 452 (m = 1, 2, 3, 4, 6, 12). The Attention-92 that the authors published has modules (1, 2, 3); for CIFAR,
    `ResidualAttentionNetwork((1, 2, 3), (128, 256, 512, 1024), small_images=True)`.

    Args:
        modules: of each attention stage.
        channels: of each stage, one more than `modules`, multiples of 4.
        depths: D of each attention stage; by default 3, 2, 1, or 2, 1, 0 with `small_images`.
        stem_width: channels of the stem, by default 64, or 32 with `small_images`.
        small_images: a 3x3 stem without stride or pooling and a last stage without stride: strides 1, 2, 4, 4.
        before, trunk, between, activation, residual, attention, groups: see `AttentionModule`; 32 groups are the
            paper's AttentionNeXt.
        drop: dropout before the head.
        in_channels: of the images.
        num_classes: of the head; 0 has none.

    Raises:
        ValueError: if arguments are out of range or lists differ in length.
    """

    slug = "residual-attention-network"

    def __init__(
        self,
        modules: Sequence[int] = (1, 1, 1),
        channels: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] | None = None,
        *,
        stem_width: int | None = None,
        small_images: bool = False,
        before: int = 1,
        trunk: int = 2,
        between: int = 1,
        activation: str = "mixed",
        residual: bool = True,
        attention: bool = True,
        groups: int = 0,
        drop: float = 0.0,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        count = len(modules)
        if depths is None:
            depths = [max(0, count - i - small_images) for i in range(count)]
        if stem_width is None:
            stem_width = 32 if small_images else 64
        if not modules or min(modules) < 0 or len(channels) != count + 1 or len(depths) != count:
            raise ValueError(
                "modules and depths must have an entry per attention stage and channels one more, "
                f"got {tuple(modules)}, {tuple(depths)} and {tuple(channels)}"
            )
        _check_channels(channels, groups)
        if min(stem_width, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "stem_width and in_channels must be positive and num_classes not negative, "
                f"got {stem_width}, {in_channels} and {num_classes}"
            )
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be at least 0 and below 1, got {drop}")
        self.in_channels, self.small_images = in_channels, small_images
        stem = (3, 1, 1) if small_images else (7, 2, 3)
        self.stem = nn.Conv2d(in_channels, stem_width, *stem, bias=False)
        # a pre-activation unit begins with a norm, so the stem needs one only where it is pooled
        self.stem_norm = None if small_images and not groups else nn.BatchNorm2d(stem_width)
        self.stages = nn.ModuleList()
        current, strides = stem_width, [1 if small_images else 4]
        for i, width in enumerate(channels):
            stride = 2 if 0 < i < count or (i == count and not small_images) else 1
            if i:
                strides.append(strides[-1] * stride)
            stage: list[nn.Module] = [_unit(current, width, stride, groups)]
            if i < count:
                stage.extend(
                    AttentionModule(
                        width, depths[i], before=before, trunk=trunk, between=between,
                        activation=activation, residual=residual, attention=attention, groups=groups,
                    )
                    for _ in range(modules[i])
                )  # fmt: skip
            else:
                stage.append(_units(width, 2, groups))
            self.stages.append(nn.Sequential(*stage))
            current = width
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.norm = nn.Identity() if groups else nn.BatchNorm2d(current)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(current, num_classes) if num_classes else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """As `Backbone.features`; the maps of pre-activation units are sums before the next norm and ReLU."""
        check_images(x_BCHW, self.in_channels)
        x_BCHW = self.stem(x_BCHW)
        if self.stem_norm is not None:
            x_BCHW = F.relu(self.stem_norm(x_BCHW))
        if not self.small_images:
            x_BCHW = pool(x_BCHW)
        maps = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        return None if self.head is None else self.head(self.drop(F.relu(self.norm(x_BCHW)).mean((2, 3))))


def _unit(in_channels: int, channels: int, stride: int, groups: int) -> nn.Module:
    if groups:
        return GroupedUnit(in_channels, channels, stride, groups=groups)
    return ResidualUnit(in_channels, channels, stride)


def _units(channels: int, count: int, groups: int = 0) -> nn.Sequential:
    return nn.Sequential(*(_unit(channels, channels, 1, groups) for _ in range(count)))


def _check_channels(channels: Sequence[int], groups: int) -> None:
    if groups < 0:
        raise ValueError(f"groups must not be negative, got {groups}")
    parts = 2 * groups if groups else 4
    if any(width < parts or width % parts for width in channels):
        raise ValueError(f"channels must be positive multiples of {parts}, got {', '.join(map(str, channels))}")


# The authors' names: each norm has the name of the layer before it, ours that of the unit which it begins.

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


def _claim(lab: Lab) -> ClaimResult:
    """Noisy digits: (1 + M) T, M T, T alone, and T with as many parameters; two seeds, equal steps."""
    digits, noise = lab.data.digits(), 0.2

    def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + noise * torch.randn(images.shape, generator=generator)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(digits.train_labels), (lab.size(32, 4),), generator=generator)
            yield noisy(digits.train_images[chosen], generator), digits.train_labels[chosen]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).logits, batch[1])

    images, labels = noisy(digits.test_images, torch.Generator().manual_seed(99)), digits.test_labels
    widths = lab.size((32, 64, 64), (8, 8, 8))
    measured: dict[str, float] = {}
    forms: dict[str, dict[str, Any]] = {
        "attention": {},
        "naive": {"residual": False},
        "trunk_alone": {"attention": False},
        "longer_trunk": {"attention": False, "trunk": 7},
    }
    for name, form in forms.items():
        errors = []
        for seed in range(lab.seed, lab.seed + 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = ResidualAttentionNetwork(
                    (1, 1), widths, (2, 1), stem_width=8, small_images=True, in_channels=1, num_classes=10, **form
                )
            lab.train(model, batches(seed), loss, 120, lr=1e-2, description=f"{name}, seed {seed}")
            with torch.no_grad():
                errors.append(100 * (model.eval()(images).logits.argmax(1) != labels).float().mean().item())
        measured[f"{name}_thousand_parameters"] = sum(p.numel() for p in model.parameters()) / 1e3
        measured[f"{name}_error_percent"] = sum(errors) / 2
        measured[f"{name}_spread_of_error_percent"] = max(errors) - min(errors)
    error, spread = measured["attention_error_percent"], measured["attention_spread_of_error_percent"]
    return ClaimResult(
        measured,
        holds=all(
            measured[f"{other}_error_percent"] - error > max(spread, measured[f"{other}_spread_of_error_percent"])
            for other in ("naive", "trunk_alone", "longer_trunk")
        ),
        note="holds if the error is below all others' by more than the spread between seeds",
    )


register(
    "residual-attention-network",
    kind="model",
    summary="Residual backbone whose trunk is multiplied by one plus a soft mask drawn by an hourglass branch.",
    taxonomy={
        "sequences": "self",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="linear in pixels; the mask branch adds about r (1 + 1/2 + 1/4 ..) units and two 1x1 convolutions",
    invariants=(
        "a mask head of zeros gives 1.5 T; one that closes gives T, the plain residual stage; one that opens gives 2 T",
        "naive learning with M = 1 is the trunk",
        "|f| lies between |T| and 2 |T|, signs are T's",
        "the channel activation has norm 1 over the channels of each position",
        "m modules a stage make a trunk of 36 m + 20 layers",
        "any image size: interpolation goes to the stored size",
    ),
    build=ResidualAttentionNetwork,
    example={"modules": (1,), "channels": (8, 16), "depths": (2,), "stem_width": 4, "num_classes": 5},
    inputs=lambda module, size: (torch.rand(2, 3, size, size + 2),),
    ports=(
        AuthorsPort("network", build=_build_network, convert=_convert_network, run=_run_network),
        *(AuthorsPort(f"attention_{letter}", build=_build, convert=_convert, run=_run) for letter in ("a", "b", "c")),
    ),
    claim=Claim(
        paper="the mask lowers the error at fewer FLOPs (ImageNet, 56 layers: 21.8 % against ResNet-152's 22.2 %); "
        "multiplying by 1 + M beats multiplying by M, the more the deeper (CIFAR-10)",
        expected="lower error with (1 + M) T than with M T, the trunk alone and a trunk of as many parameters",
        run=_claim,
    ),
    published=(
        Published(
            "Attention-56",
            {"modules": (1, 1, 1)},
            31.9,
            6.2,
            tolerance=0.015,
            note="FLOPs are printed with two digits; the modules are proved on the authors' graph",
        ),
        Published(
            "Attention-92",
            {"modules": (1, 2, 3)},
            51.3,
            10.4,
            tolerance=0.025,
            note="figures recalled from the paper; the same modules as in Attention-56, counted by the authors' graph",
        ),
    ),
)
