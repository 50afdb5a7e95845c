"""Every gate and backbone of the catalogue against its alternative in one run: `python benchmarks/vision.py`.

Gates stand in a bottleneck of ResNet-50's stages 2 (512 channels on 28 x 28) and 3 (1024 on 14 x 14), batch 8, float32.
`times as fast` compares a gate alone with the plainest correct implementation of its card, written here and proved
equal before it is timed: forwards (as in inference) and forwards with backwards (as in training); the goal is that none
is slower, for which two runs of the same code may differ by 3 %. `overhead` is the time that a gate adds to the block.
`MiB` is the peak of extra tensors with backwards, output and gradients included. Split attention replaces the block's 3
x 3 convolution, so that its overhead is that over the plain one.
Backbones of 20 to 35 million parameters (and two others that say so) run on 224 x 224 images beside transformers'
Swin-T and ConvNeXt-T with random weights, in inference; `rate` is operations per second, two for each multiply-add, and
the goal of ours is half of Swin-T's. Deformable sampling against a naive gather is `benchmarks/ops_deformable.py`.
All contenders are called in turns; the fastest call of each counts.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops_deformable
from saccade import catalogue
from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.models import resnest
from saccade.ops.measure import fastest, peak_bytes
from saccade.train.files import write_text
from saccade.vision.cbam import Bottleneck

BATCH = 8
#: (width of the 3 x 3 convolution, height and width of the map); four times as many channels come out
STAGES = {"2": (128, 28), "3": (256, 14)}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
#: two runs of the same code differ by so much
NOISE = 0.03
#: of values, and of gradients on smaller maps in double precision (a ReLU's may jump with rounding)
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-6
#: millions of parameters of the backbones that are compared with Swin-T (28.3) and ConvNeXt-T (28.6)
SIZES = (20.0, 35.0)
LEAST_RATE = 0.5

Plain = Callable[[Any, Tensor], Tensor]


# ---------------------------------------------------------------------------- gates, plainly, from their cards


def plain_cbam(m: Any, x: Tensor) -> Tensor:
    def mlp(z: Tensor) -> Tensor:
        return m.expand(F.relu(m.reduce(z)))

    x = x * (mlp(x.mean((2, 3))) + mlp(x.amax((2, 3)))).sigmoid()[:, :, None, None]
    return x * m.norm(m.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1))).sigmoid()


def plain_triplet(m: Any, x: Tensor) -> Tensor:
    def gated(t: Tensor, plane: Any) -> Tensor:
        return t * plane.norm(plane.conv(torch.cat([t.amax(1, keepdim=True), t.mean(1, keepdim=True)], 1))).sigmoid()

    cw = gated(x.permute(0, 2, 1, 3).contiguous(), m.cw).permute(0, 2, 1, 3)
    hc = gated(x.permute(0, 3, 2, 1).contiguous(), m.hc).permute(0, 3, 2, 1)
    return (cw + hc + gated(x, m.hw)) / 3


def plain_deformable_conv(
    x: Tensor, offset: Tensor, conv: nn.Conv2d, mask: Tensor | None = None, stride: int = 1
) -> Tensor:
    """A 3 x 3 deformable convolution: each tap read by grid sampling, then one matrix product."""
    height, width = x.shape[2:]
    rows, columns = torch.meshgrid(*(torch.arange(n) * stride for n in offset.shape[2:]), indexing="ij")
    taps = []
    for tap in range(9):
        y = rows + tap // 3 - 1 + offset[:, 2 * tap]
        z = columns + tap % 3 - 1 + offset[:, 2 * tap + 1]
        # grid sampling wants the map's pixels between -1 and 1
        grid = torch.stack([(2 * z + 1) / width - 1, (2 * y + 1) / height - 1], -1)
        read = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
        taps.append(read if mask is None else read * mask[:, tap, None])
    columns_B9HW = torch.stack(taps, 2).flatten(1, 2)
    return F.conv2d(columns_B9HW, conv.weight.flatten(1)[:, :, None, None], conv.bias)


def plain_das(m: Any, x: Tensor) -> Tensor:
    c = F.gelu(F.instance_norm(m.pointwise(m.depthwise(x))))
    d = plain_deformable_conv(c, m.offset(c), m.conv)
    return x * m.norm(d.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).sigmoid()


def plain_lkca(m: Any, x: Tensor) -> Tensor:
    v = F.conv2d(x, m.v_proj.weight[:, :, None, None], m.v_proj.bias)
    kernel = m.kernel.repeat_interleave(x.shape[1] // m.num_heads, 0)[:, None]
    o = F.conv2d(v, kernel, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2), groups=x.shape[1])
    return F.conv2d(o, m.out_proj.weight[:, :, None, None], m.out_proj.bias)


def plain_lkca_attention(m: Any, x: Tensor) -> Tensor:
    """The other view of the card: windows of the kernel, flattened, are the rows of a matrix."""
    B, C, H, W = x.shape
    v = F.linear(x.flatten(2).mT, m.v_proj.weight, m.v_proj.bias)
    y, z = (size // 2 for size in m.kernel.shape[1:])  # the centre; H - 1 and W - 1 for the map it was made for
    a = torch.stack([m.kernel[0, y - n // W :, z - n % W :][:H, :W].flatten() for n in range(H * W)])
    return F.linear(a @ v, m.out_proj.weight, m.out_proj.bias).mT.reshape(B, C, H, W)


def plain_self(m: Any, x: Tensor) -> Tensor:
    k, q, v = m.key(x).flatten(2), m.query(x).flatten(2), m.value(x).flatten(2)
    return m.gamma * (v @ (q.mT @ k).softmax(-1).mT).view(x.shape) + x


def plain_multi_head(m: Any, x: Tensor) -> Tensor:
    k, q, v = (p(x).flatten(2).unflatten(1, (m.num_heads, -1)) for p in (m.key, m.query, m.value))
    a = (k.mT @ q * k.shape[2] ** -0.5).softmax(-1)
    return m.gamma * m.linear((v @ a.mT).flatten(1, 2).view(x.shape)) + x


def plain_residual_cbam(m: Any, x: Tensor) -> Tensor:
    def mlp(z: Tensor) -> Tensor:
        return m.up(F.relu(m.down(z)))

    f = x * (mlp(x.amax((2, 3))) + mlp(x.mean((2, 3)))).sigmoid()[:, :, None, None]
    s = m.conv(torch.cat([f.amax(1, keepdim=True), f.mean(1, keepdim=True)], 1)).sigmoid()
    return s * f + x


def plain_domain_attention(m: Any, x: Tensor) -> Tensor:
    s = x.mean((2, 3))
    firsts = zip(m.reduce.weight.chunk(m.num_adapters), m.reduce.bias.chunk(m.num_adapters))
    seconds = zip(m.expand_weight, m.expand_bias)
    bank = [F.linear(F.relu(F.linear(s, *first)), *second) for first, second in zip(firsts, seconds)]
    w = m.assign(s).softmax(-1)
    return x * (torch.stack(bank, 2) @ w[:, :, None]).sigmoid()[..., None]


def plain_split(m: Any, x: Tensor) -> Tensor:
    u = F.relu(m.norm(m.conv(x)))
    parts = u.chunk(m.radix, 1)
    s = sum(parts[1:], parts[0]).mean((2, 3), keepdim=True)
    a = m.expand(F.relu(m.reduce_norm(m.reduce(s))))
    a = a.view(len(x), m.groups, m.radix, -1).transpose(1, 2).softmax(1).reshape(len(x), -1, 1, 1)
    weighted = [w * part for w, part in zip(a.chunk(m.radix, 1), parts)]
    return sum(weighted[1:], weighted[0])


def plain_dyrelu(m: Any, x: Tensor) -> Tensor:
    theta = m.up(F.relu(m.down(x.mean((2, 3)))))
    a1, b1, a2, b2 = (F.relu6(theta + 3) / 6 - 0.5)[:, :, None, None].chunk(4, 1)
    return torch.max(x * (a1 * 2 + 1) + b1, x * (a2 * 2) + b2)


def plain_dyconv(m: Any, maps: Sequence[Tensor]) -> list[Tensor]:
    def branch(b: Any, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return b.norm(plain_deformable_conv(x, offset, b.conv, mask, b.conv.stride[0]))

    out = []
    for i, x in enumerate(maps):
        both = m.offset(x)
        offset, mask = both[:, :18], both[:, 18:].sigmoid()
        found = [branch(m.own, x, offset, mask)]
        if i > 0:
            found.append(branch(m.finer, maps[i - 1], offset, mask))
        if i < len(maps) - 1:
            size = maps[i + 1].shape[2:]
            fitted = [F.interpolate(t, size, mode="bilinear", align_corners=True) for t in (offset, mask)]
            f = branch(m.coarser, maps[i + 1], *fitted)
            found.append(F.interpolate(f, x.shape[2:], mode="bilinear", align_corners=True))
        gated = [F.relu6(F.relu(m.scale(f.mean((2, 3), keepdim=True))) + 3) / 6 * f for f in found]
        out.append(plain_dyrelu(m.task, sum(gated[1:], gated[0]) / len(gated)))
    return out


@dataclass(frozen=True)
class Gate:
    """How a gate of the catalogue is built and done plainly.

    Attributes:
        plain: the plain forms; the fastest of them counts.
        options: beside the channels, by the side of the map.
    """

    plain: tuple[Plain, ...] = ()
    options: Callable[[int], dict[str, Any]] = field(default=lambda side: {})


#: by slug, and by variant where a paper has several; a gate of the catalogue that is not here misses its goal
GATES: dict[str, dict[str, Gate]] = {
    "cbam": {"": Gate((plain_cbam,))},
    "triplet": {"": Gate((plain_triplet,))},
    "das": {"": Gate((plain_das,))},
    "lkca": {"": Gate((plain_lkca, plain_lkca_attention), lambda side: {"size": side})},
    "cnntention": {
        "self": Gate((plain_self,), lambda side: {"form": "self"}),
        "multi-head": Gate((plain_multi_head,), lambda side: {"form": "multi-head"}),
        "cbam": Gate((plain_residual_cbam,), lambda side: {"form": "cbam"}),
    },
    "domain-attention": {"": Gate((plain_domain_attention,))},
}


# ---------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """What is measured, and its goals as {figure: the least}."""

    measure: Callable[[], dict[str, Any]]
    goals: dict[str, float]


def stir(module: nn.Module) -> nn.Module:
    """Values other than zero where a module starts at zero, so that what it multiplies is seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02) if parameter.numel() > 1 else parameter.fill_(0.5)
    return module


def inference(function: Callable[..., object], *inputs: object) -> Callable[[], object]:
    return torch.no_grad()(lambda: function(*inputs))


def training(module: nn.Module, function: Callable[..., Any], x: Tensor | list[Tensor]) -> Callable[[], object]:
    """A step forwards and backwards, to the input and to the parameters."""
    leaves = [t.detach().requires_grad_() for t in (x if isinstance(x, list) else [x])]
    wanted = [*leaves, *module.parameters()]

    def step() -> tuple[Tensor | None, ...]:
        y = function(leaves if isinstance(x, list) else leaves[0])
        return torch.autograd.grad(y if isinstance(y, list) else [y], wanted, sought, allow_unused=False)

    with torch.no_grad():
        y = function(leaves if isinstance(x, list) else leaves[0])
    sought = [torch.randn(t.shape) for t in (y if isinstance(y, list) else [y])]
    return step


def check_equal(ours: Callable[[], Any], plain: Callable[[], Any], tolerance: float, name: str) -> None:
    """Raise AssertionError unless both give the same tensors, as parts of the largest number in each.

    Gradients that are sums to zero, as those of biases before a norm, are rounding: they count as parts of a thousandth
    of the largest of all.
    """
    pairs = list(zip(*(t if isinstance(t, (list, tuple)) else [t] for t in (ours(), plain())), strict=True))
    least = 1e-3 * max(b.abs().max().item() for _, b in pairs)
    for a, b in pairs:
        off = (a - b).abs().max().item() / max(b.abs().max().item(), least)
        assert off < tolerance, f"{name}: the plain form differs by {off:.1e}"


def check_gradients(module: nn.Module, plain: Plain, x: Any) -> None:
    """The same of the gradients, in double precision on two maps of a fifth of the height and width."""
    small = [t[:2, :, : t.shape[2] // 5, : t.shape[3] // 5].double() for t in (x if isinstance(x, list) else [x])]
    precise = copy.deepcopy(module).double().train()
    calls = []
    for function in (precise, partial(plain, precise)):
        torch.manual_seed(1)  # the same gradients for both
        calls.append(training(precise, function, small if isinstance(x, list) else small[0]))
    check_equal(*calls, GRADIENT_TOLERANCE, f"{type(module).__name__}'s gradients")


def contest(module: nn.Module, plain: Sequence[Plain], x: Any, budget: float = 1.0) -> dict[str, Any]:
    """A module against its plain forms, in inference and in training."""
    row: dict[str, Any] = {}
    rivals = [copy.deepcopy(module) for _ in plain]  # running statistics of their own
    for kind, suffix in (("inference", ""), ("training", "_both")):
        learns = kind == "training"
        calls, forwards = [], []
        for m, function in [(module, module), *((m, partial(f, m)) for m, f in zip(rivals, plain, strict=True))]:
            m.train(learns)
            forwards.append(inference(function, x))
            calls.append(training(m, function, x) if learns else forwards[-1])
        for forward, form in zip(forwards[1:], plain, strict=True):
            check_equal(forwards[0], forward, TOLERANCE, f"{type(module).__name__}'s values in {kind}")
            if learns:
                check_gradients(module, form, x)
        ours, *others = fastest(*calls, repeats=30, budget=budget * len(calls) / 2)
        row |= {f"seconds{suffix}": ours}
        if others:
            best = others.index(min(others))
            row |= {f"plain_seconds{suffix}": others[best], f"speedup{suffix}": others[best] / ours}
            if learns:
                row["plain_bytes"] = peak_bytes(calls[1 + best])
        if learns:
            row["bytes"] = peak_bytes(calls[0])
    return row


def overhead(block: nn.Module, bare: nn.Module, x: Tensor, budget: float = 1.0) -> dict[str, float]:
    """What a block takes more than another, as a share of that."""
    row = {}
    for learns, suffix in ((False, ""), (True, "_both")):
        modules = [m.train(learns) for m in (block, bare)]
        calls = [training(m, m, x) if learns else inference(m, x) for m in modules]
        ours, without = fastest(*calls, repeats=20, budget=budget)
        row |= {
            f"block_seconds{suffix}": ours,
            f"bare_seconds{suffix}": without,
            f"overhead{suffix}": ours / without - 1,
        }
    return row


def map_of(channels: int, side: int, layout: str) -> Tensor:
    return torch.randn(BATCH, channels, side, side).contiguous(memory_format=FORMATS[layout])


def gate_row(slug: str, gate: Gate, stage: str, layout: str) -> dict[str, Any]:
    torch.manual_seed(0)
    width, side = STAGES[stage]
    channels, options = 4 * width, gate.options(side)
    module = stir(catalogue.create(slug, channels=channels, **options)).to(memory_format=FORMATS[layout])
    x = map_of(channels, side, layout)
    row = contest(module, gate.plain, x)
    kept = module.eval()(x)
    assert kept.is_contiguous(memory_format=FORMATS[layout]), f"{slug} does not keep a map {layout}"
    block = Bottleneck(channels, width, gate=lambda _: module)
    bare = Bottleneck(channels, width, gate=None)
    bare.load_state_dict(block.state_dict(), strict=False)
    return row | overhead(*(m.to(memory_format=FORMATS[layout]) for m in (block, bare)), x)


def split_row(stage: str, layout: str) -> dict[str, Any]:
    """ResNeSt's split attention of two branches, and its block against that with a plain convolution."""
    torch.manual_seed(0)
    width, side = STAGES[stage]
    block, bare = (
        stir(resnest.Bottleneck(4 * width, width, radix=radix)).to(memory_format=FORMATS[layout]) for radix in (2, 0)
    )
    row = contest(copy.deepcopy(block.conv2), (plain_split,), map_of(width, side, layout))
    return row | overhead(block, bare, map_of(4 * width, side, layout))


def head_row(layout: str) -> dict[str, Any]:
    """A block of Dynamic Head on three levels of 256 channels, batch 1."""
    from saccade.vision.dynamic_head import DyConv

    torch.manual_seed(0)
    maps = [map_of(256, side, layout)[:1] for side in (40, 20, 10)]
    return contest(DyConv(256).to(memory_format=FORMATS[layout]), (plain_dyconv,), maps, budget=3.0)


def task_row(stage: str, layout: str) -> dict[str, Any]:
    """Its task-aware part alone, on the map that gates have."""
    from saccade.vision.dynamic_head import DyReLU

    torch.manual_seed(0)
    width, side = STAGES[stage]
    module = DyReLU(4 * width).to(memory_format=FORMATS[layout])
    return contest(module, (plain_dyrelu,), map_of(4 * width, side, layout))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(SwinConfig(num_labels=1000, drop_path_rate=0.0))


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(num_labels=1000))


def counted(build: Callable[[], nn.Module], resolution: int = 224) -> tuple[int, float]:
    """Parameters, and operations on one image (two for each multiply-add), counted without computing."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, image = build().eval(), torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return sum(p.numel() for p in model.parameters()), float(counter.get_total_flops())


def backbone_row(build: Callable[[], nn.Module], batch: int) -> dict[str, Any]:
    """A backbone beside both rivals; times are those of one image."""
    torch.manual_seed(0)
    names = ("", "swin_", "convnext_")
    builds = (build, swin, convnext)
    images = torch.randn(batch, 3, 224, 224)
    models = [b().eval() for b in builds]
    calls = [inference(m, images) for m in models]
    for call in calls:
        call()
    row: dict[str, Any] = {"batch": batch}
    for name, b, call, took in zip(names, builds, calls, fastest(*calls, repeats=10, budget=4.0), strict=True):
        parameters, operations = counted(b)
        row |= {
            f"{name}seconds": took / batch,
            f"{name}parameters": parameters,
            f"{name}operations": operations,
            f"{name}rate": operations * batch / took,
            f"{name}bytes": peak_bytes(call),
        }
    return row | {"rate_of_swin": row["rate"] / row["swin_rate"]}


def deformable_row(make: Callable[[], ops_deformable.Case]) -> dict[str, Any]:
    torch.manual_seed(0)
    found = ops_deformable.measure(make(), 5)
    return {
        "seconds": found["forward_ms"] / 1e3,
        "speedup": found["speedup"],
        "seconds_both": found["both_ms"] / 1e3,
        "speedup_both": found["speedup_both"],
    }


def backbones() -> dict[str, Callable[[], nn.Module]]:
    """The published sizes near Swin-T's, and CoSwin built as Swin-T and the smaller BEVANet."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for summary in catalogue.parts():
        if summary.kind.published:
            for size in catalogue.part(summary.slug).published:
                if SIZES[0] <= size.parameters <= SIZES[1] and set(size.inputs.values()) == {(1, 3, 224, 224)}:
                    found[f"{summary.slug}, {size.name}"] = partial(catalogue.create, summary.slug, **size.arguments)
    found["coswin, as Swin-T"] = partial(catalogue.create, "coswin", num_classes=1000, patch_size=4, window_size=7)
    found["bevanet, BEVANet-S (segmentation, 15 million)"] = partial(catalogue.create, "bevanet")
    return found


def cases() -> dict[str, dict[str, Case]]:
    """All cases by section: gates, blocks, deformable sampling, backbones."""
    speed = {"speedup": 1.0, "speedup_both": 1.0}
    gates: dict[str, Case] = {}
    for summary in catalogue.parts():
        if summary.kind.insertable:
            for variant, gate in GATES.get(summary.slug, {"": Gate()}).items():
                title = ", ".join(filter(None, (summary.slug, variant)))
                for stage in STAGES:
                    for layout in FORMATS:
                        measure = partial(gate_row, summary.slug, gate, stage, layout)
                        gates[f"{title}, stage {stage}, {layout}"] = Case(measure, speed)
    blocks: dict[str, Case] = {}
    for layout in FORMATS:
        for stage in STAGES:
            blocks[f"resnest, split attention, stage {stage}, {layout}"] = Case(
                partial(split_row, stage, layout), speed
            )
            blocks[f"dynamic-head, task-aware part, stage {stage}, {layout}"] = Case(
                partial(task_row, stage, layout), speed
            )
        blocks[f"dynamic-head, a block, 40 + 20 + 10 squared, {layout}"] = Case(partial(head_row, layout), speed)
    twice = {"speedup": ops_deformable.GOAL, "speedup_both": ops_deformable.GOAL}
    sampling = {
        f"deformable, {name}": Case(partial(deformable_row, make), twice if has_goal else {})
        for name, make, has_goal in ops_deformable.CASES
    }
    networks = {
        f"{name}, batch {batch}": Case(partial(backbone_row, build, batch), {"rate_of_swin": LEAST_RATE})
        for name, build in backbones().items()
        for batch in (1, 8)
    }
    return {"Gates": gates, "Blocks": blocks, "Deformable sampling": sampling, "Backbones": networks}


# ---------------------------------------------------------------------------- what is shown


TITLES = {
    "speedup": "times as fast as the plain form",
    "speedup_both": "with backwards, times as fast as the plain form",
    "rate_of_swin": "share of Swin-T's rate",
}


def verdicts(name: str, case: Case, figures: dict[str, Any]) -> list[Verdict]:
    """The goals of a case; a gate that has no plain form here misses them."""
    slack = NOISE if case.goals.get("speedup") == 1.0 else 0.0
    return [
        Verdict(f"{name}: {TITLES[figure]}", wanted, got, got >= wanted - slack)
        for figure, wanted in case.goals.items()
        for got in [figures.get(figure, 0.0)]
    ]


COLUMNS = (
    "case", "ms", "times as fast", "with backwards, ms", "times as fast", "MiB", "plain MiB", "block, ms", "overhead",
    "with backwards, ms", "overhead",
)  # fmt: skip
NETWORK_COLUMNS = (
    "network", "batch", "ms an image", "rate, GFLOP/s", "over Swin-T's", "MiB", "parameters, M", "GFLOP",
)  # fmt: skip


def shown(figures: dict[str, Any]) -> list[str]:
    """The cells of a gate or block; empty where it has no such figure."""
    forms = (
        ("seconds", ".2f", 1e3), ("speedup", ".2f", 1), ("seconds_both", ".2f", 1e3), ("speedup_both", ".2f", 1),
        ("bytes", ".1f", 2**-20), ("plain_bytes", ".1f", 2**-20), ("block_seconds", ".1f", 1e3),
        ("overhead", "+.0%", 1), ("block_seconds_both", ".1f", 1e3), ("overhead_both", "+.0%", 1),
    )  # fmt: skip
    return [format(figures[name] * unit, form) if name in figures else "" for name, form, unit in forms]


def network_rows(kept: Kept) -> list[list[str]]:
    """Each backbone by batch, and the rivals' fastest of all runs."""
    rows, rivals = [], {}
    for name, figures in kept.items():
        batch = figures["batch"]
        for title, prefix in ((name.rsplit(", ", 1)[0], ""), ("Swin-T", "swin_"), ("ConvNeXt-T", "convnext_")):
            rate = figures[f"{prefix}rate"]
            row = [
                title, f"{batch}", f"{figures[f'{prefix}seconds'] * 1e3:.1f}", f"{rate / 1e9:.0f}",
                f"{rate / figures['swin_rate']:.2f}", f"{figures[f'{prefix}bytes'] / 2**20:.0f}",
                f"{figures[f'{prefix}parameters'] / 1e6:.1f}", f"{figures[f'{prefix}operations'] / 1e9:.1f}",
            ]  # fmt: skip
            if not prefix:
                rows.append(row)
            elif (title, batch) not in rivals or float(rivals[title, batch][3]) < rate / 1e9:
                rivals[title, batch] = row
    return sorted(rows + list(rivals.values()), key=lambda row: (int(row[1]), float(row[2])))


def tables(kept: dict[str, Kept]) -> dict[str, list[str]]:
    """A table of each section."""
    return {
        section: records.table(NETWORK_COLUMNS, network_rows(found))
        if section == "Backbones"
        else records.table(COLUMNS[: 5 if section == "Deformable sampling" else None], rows_of(section, found))
        for section, found in kept.items()
    }


def rows_of(section: str, kept: Kept) -> list[list[str]]:
    return [
        [name, *shown(figures)[: 4 if section == "Deformable sampling" else None]] for name, figures in kept.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of cases' names, e.g. a slug; all where none is given")
    parser.add_argument("--quick", action="store_true", help="stage 3 and batch 1 only")
    parser.add_argument("--json", type=Path, help="keep the figures in this file, beside those of other cases in it")
    parser.add_argument("--markdown", type=Path, help="write all figures that are kept as a page")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args()
    sections = cases()
    every = {name: case for section in sections.values() for name, case in section.items()}
    if arguments.list:
        print("\n".join(every))
        return
    for asked in arguments.names:
        if not any(name.startswith(asked) for name in every):
            parser.error(f"no case begins with {asked!r}; there is {'; '.join(every)}")
    wanted = [name for name in every if not arguments.names or name.startswith(tuple(arguments.names))]
    if arguments.quick:
        wanted = [name for name in wanted if "stage 2" not in name and "batch 8" not in name]
    known, begin = records.known(arguments.json), records.stamp()
    for name in wanted:
        known[name] = {**begin, **every[name].measure()}
        records.keep(arguments.json, known)
        print(f"{name}: {known[name]['seconds'] * 1e3:.2f} ms", flush=True)
        print("".join(f"  {verdict}\n" for verdict in verdicts(name, every[name], known[name])), end="", flush=True)
    if arguments.markdown:
        kept = {section: {name: known[name] for name in found if name in known} for section, found in sections.items()}
        page = records.page(
            "Speed and memory of gates and backbones",
            "python benchmarks/vision.py --json FILE --markdown docs/speed-vision.md",
            (__doc__ or "").split("\n\n")[1],
            {name: figures for found in kept.values() for name, figures in found.items()},
            [name for name in every if name not in known],
            [v for name, case in every.items() if name in known for v in verdicts(name, case, known[name])],
            tables(kept),
        )
        write_text(arguments.markdown, page)


if __name__ == "__main__":
    main()
