"""Dense image networks against themselves, written plainly: `python benchmarks/dense.py [--quick] [CASE ...]`.

- **networks**: each at its published size, batch 1, fp32, in inference. The plain one has the same weights, but
  attention by the whole matrix of scores, deformable sampling by `F.grid_sample` level by level, key-wise attention
  region by region, DCT statistics position by position, and no C. Both are proved equal before they are timed; the
  goal is that none is slower than 0.95 of it. A network none of whose operators has another form says so. `MiB`, a case
  of its own, is the peak of extra tensors on an image of 1024 x 1024; some take minutes.
- **rt-detrv2**: R18 at 640 x 640 against transformers' RTDetrV2 with the same weights, as built, with normalisation
  folded into the convolutions; the goal is 1.2 x of the best.
- **exponents**: time of UPLiFT's local attender and of FEAT's WKV by pixels, 32 x 32 to 512 x 512; at most 1.05.
- **stya2k**: its two attentions on 64 x 64 features against all-to-all attention, as AdaAttN's; at least 5 x. The
  memory of both at 64 x 64 and 128 x 128: four times the positions should ask for four times as much, not sixteen.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.ops.attend import attend
from saccade.ops.deformable import deformable_attend, deformable_attend_reference
from saccade.ops.frequency.dct import dct_statistics, dct_statistics_reference
from saccade.ops.keywise import (
    distributed_attention,
    distributed_reference,
    progressive_attention,
    progressive_reference,
)
from saccade.ops.measure import fastest, peak_bytes
from saccade.ops.native import build
from saccade.train.scaling import fit_power

LEAST, RT_DETR_GOAL, EXPONENT, ALL_TO_ALL = 0.95, 1.2, 1.05, 5.0
#: of outputs, relative to their scale
TOLERANCE = 1e-4
MIB = 2**20


# ---------------------------------------------------------------------------- the plain forms


def plain_attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The whole matrix of scores; `mask` is a tensor, True where a query may attend, or None."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


PLAIN: Mapping[Callable[..., Any], Callable[..., Any]] = {
    attend: plain_attend,
    deformable_attend: deformable_attend_reference,
    dct_statistics: dct_statistics_reference,
    distributed_attention: distributed_reference,
    progressive_attention: progressive_reference,
}


@contextmanager
def plainly() -> Iterator[None]:
    """Every module that has a fast form by name has the plain one, and nothing is computed in C."""
    changed = [
        (module, name, value)
        for path, module in list(sys.modules.items())
        if path.startswith("saccade.") and not path.startswith("saccade.ops.")
        for name, value in list(vars(module).items())
        if any(value is fast for fast in PLAIN)
    ]
    try:
        for module, name, value in changed:
            setattr(module, name, PLAIN[value])
        with build.turned_off("turned off for this benchmark"):
            yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


# ---------------------------------------------------------------------------- networks


def images(*channels: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of a side: square images of so many channels."""
    return lambda side: tuple(torch.rand(1, each, side, side) for each in channels)


PHOTOGRAPH = images(3)


@dataclass(frozen=True)
class Network:
    """A case.

    Attributes:
        side: of the image, published where the card says one.
        arguments: of `catalogue.create`.
        inputs: a side -> the arguments of the call.
        large: the side at which memory is measured; None where the network takes one size only, or no image.
        alike: no operator has another form here: it is only measured.
        double: the two are compared in double precision, since rounding decides which level a box is read from.
    """

    side: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], tuple[Any, ...]] = PHOTOGRAPH
    large: int | None = 1024
    alike: bool = False
    double: bool = False


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if is_dataclass(output):
        return [t for f in fields(output) for t in tensors(getattr(output, f.name))]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for each in output for t in tensors(each)] if isinstance(output, list | tuple) else []


def network_row(slug: str, case: Network, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = catalogue.create(slug, **case.arguments).eval()
    inputs = case.inputs(case.side)

    def run() -> Any:
        with torch.no_grad():
            return model(*inputs)

    def run_plainly() -> Any:
        with plainly():
            return run()

    def prove() -> None:
        for ours, plain in zip(tensors(run()), tensors(run_plainly()), strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=TOLERANCE * float(plain.abs().max().clamp(min=1e-6)))

    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    row["shapes"] = ", ".join("x".join(map(str, x.shape)) for x in inputs if isinstance(x, Tensor) and x.ndim > 1)
    if case.alike:
        run()
        row["seconds"] = fastest(run, repeats=5, budget=4.0)[0]
    else:
        if case.double:
            kept, inputs = inputs, tuple(x.double() if x.is_floating_point() else x for x in inputs)
            model.double()
            prove()
            model.float()
            inputs = kept
        else:
            prove()
        row["seconds"], row["plain_seconds"] = fastest(run, run_plainly, repeats=2 if quick else 8, budget=8.0)
        row["speedup"] = row["plain_seconds"] / row["seconds"]
    return row


def memory_row(slug: str, case: Network) -> dict[str, Any]:
    """The peak of one call; it may take minutes."""
    assert case.large is not None
    model, inputs = catalogue.create(slug, **case.arguments).eval(), case.inputs(case.large)

    def run() -> None:
        with torch.no_grad():
            model(*inputs)

    return {"bytes": peak_bytes(run)}


# ---------------------------------------------------------------------------- RT-DETRv2 beside transformers


def rt_detr_row(quick: bool) -> dict[str, Any]:
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    from saccade.models.rt_detrv2 import RTDETRv2

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        out_features=["stage2", "stage3", "stage4"],
    )
    theirs = RTDetrV2ForObjectDetection(
        RTDetrV2Config(
            backbone_config=backbone, encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=3
        )
    ).eval()
    ours = RTDETRv2.from_config("RT-DETRv2-S").eval()
    image = torch.randn(1, 3, 640, 640)
    folded = copy.deepcopy(ours)
    folded.fuse()
    contenders = {"transformers": theirs, "seconds": ours, "folded": folded}

    def call(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return model(pixel_values=image)

        run()
        return run

    times = fastest(*(call(model) for model in contenders.values()), repeats=2 if quick else 12, budget=30.0)
    row: dict[str, Any] = dict(zip(contenders, times, strict=True))
    return row | {"folded": row["transformers"] / row["folded"], "speedup": row["transformers"] / row["seconds"]}


# ---------------------------------------------------------------------------- exponents, and key-wise attention


def sides(quick: bool) -> list[int]:
    return [32, 64, 128] if quick else [32, 64, 128, 256, 512]


def exponent_row(make: Callable[[int], Callable[[], object]], quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    lengths = [side * side for side in sides(quick)]
    calls = [make(side) for side in sides(quick)]
    best = [math.inf] * len(calls)
    for _ in range(1 if quick else 4):
        for place, call in enumerate(calls):
            call()
            best[place] = min(best[place], fastest(call, repeats=max(2, 65536 // lengths[place]), budget=2.0)[0])
    fit = fit_power(lengths, best)
    assert fit is not None
    return {"lengths": lengths, "seconds": best, "exponent": fit.exponent}


def attender(side: int) -> Callable[[], object]:
    """UPLiFT's, to `side` x `side` from a quarter of it, 384 channels as of a ViT-S."""
    from saccade.models.uplift.attender import local_attend

    weights, values = torch.rand(1, 17, side, side).softmax(1), torch.randn(1, 384, side // 4, side // 4)
    return lambda: local_attend(weights, values)


def bidirectional_wkv(side: int) -> Callable[[], object]:
    from saccade.ops.wkv import wkv

    k, v = torch.randn(2, 1, side * side, 64).unbind()
    w, u = torch.rand(64) / side**2, torch.randn(64)
    return lambda: wkv(k, v, w, u)


def style_row(quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    for side in (64, 128):
        q, k, v = torch.randn(3, 1, 512, side, side).unbind()

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            spread = distributed_attention(q, k, v, region=8, num_heads=1)
            return spread + progressive_attention(q, k, v, region=8, num_heads=1)[0]

        def matrix(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return plain_attend(q.flatten(2).mT, k.flatten(2).mT, v.flatten(2).mT)

        def fused(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return attend(*(x.flatten(2).mT[:, None] for x in (q, k, v)))

        row[f"bytes_{side}"] = peak_bytes(ours)
        if side == 64:
            row["seconds"], row["plain_seconds"], row["fused_seconds"] = fastest(
                ours, matrix, fused, repeats=2 if quick else 10, budget=10.0
            )
            row["plain_bytes"] = peak_bytes(matrix)
    row["speedup"] = row["plain_seconds"] / row["seconds"]
    row["over_fused"] = row["fused_seconds"] / row["seconds"]
    return row


# ---------------------------------------------------------------------------- the record


def volumes(side: int) -> tuple[Tensor, ...]:
    """128 slices, and the sixteen bands of their wavelets."""
    return torch.rand(1, 4, 128, side, side), torch.rand(1, 16, 128, side, side)


def features(side: int) -> tuple[Tensor, ...]:
    """An image, and those of a ViT-S/14."""
    side -= side % 14
    return torch.rand(1, 3, side, side), torch.randn(1, 384, side // 14, side // 14)


def boxes(side: int) -> tuple[Tensor, ...]:
    """An image, 500 boxes by centre and size, and a step of diffusion."""
    return torch.randn(1, 3, side, side), 0.2 + 0.6 * torch.rand(1, 500, 4), torch.tensor([300])


NETWORKS: Mapping[str, Network] = {
    "amfusionnet": Network(256, inputs=images(1, 1), alike=True),
    "fsatfusion": Network(256, inputs=images(1, 1)),
    "robust-rgbd": Network(352, inputs=images(3, 1)),
    "vtff": Network(224, large=None),
    "dfyp": Network(32, inputs=lambda side: (torch.randn(8, 9, side, side), torch.full((8,), 2010)), large=None),
    "mcaf-net": Network(64),
    "uplift": Network(224, {"in_channels": 384, "patch": 14}, features),
    "stya2k": Network(256, inputs=images(3, 3)),
    "feat": Network(
        16,
        {"dim": 512, "num_heads": 8},
        lambda side: (torch.randn(1, 16, 4, side, side), torch.tensor([500])),
        large=128,
    ),
    "structured-awareness-decoder": Network(224),
    "hff-net": Network(32, inputs=volumes, large=None),
    "smaformer": Network(224),
    "cpdr": Network(256),
    "rt-detrv2": Network(640),
    "context-aware-fusion": Network(512, inputs=boxes, double=True),
}

CASES: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    **{slug: partial(network_row, slug, case) for slug, case in NETWORKS.items()},
    **{
        f"memory of {slug}": lambda quick, slug=slug, case=case: memory_row(slug, case)
        for slug, case in NETWORKS.items()
        if case.large is not None
    },
    "rt-detrv2 beside transformers": rt_detr_row,
    "exponent of uplift": lambda quick: exponent_row(attender, quick),
    "exponent of wkv": lambda quick: exponent_row(bidirectional_wkv, quick),
    "stya2k beside all-to-all": style_row,
}


def verdicts(kept: Kept) -> list[Verdict]:
    found = []
    for case, row in kept.items():
        if case in NETWORKS and "speedup" in row:
            got = row["speedup"]
            found.append(Verdict(f"{case}, against itself, plainly:", LEAST, got, got >= LEAST))
        if case.startswith("exponent"):
            got = row["exponent"]
            found.append(Verdict(f"{case}:", EXPONENT, got, got <= EXPONENT, ceiling=True))
    if (row := kept.get("rt-detrv2 beside transformers")) is not None:
        got = max(row["speedup"], row["folded"])
        found.append(Verdict("RT-DETRv2-R18 at 640, the best form:", RT_DETR_GOAL, got, got >= RT_DETR_GOAL))
    if (row := kept.get("stya2k beside all-to-all")) is not None:
        got = row["speedup"]
        found.append(Verdict("StyA2K's attentions against all-to-all:", ALL_TO_ALL, got, got >= ALL_TO_ALL))
        growth = row["bytes_128"] / row["bytes_64"]
        found.append(Verdict("its memory at 4 times the positions, times:", 4.5, growth, growth <= 4.5, ceiling=True))
    return found


def sections(kept: Kept) -> dict[str, list[str]]:
    rows = []
    for slug in NETWORKS:
        if (row := kept.get(slug)) is None:
            continue
        plain = [f"{1e3 * row['plain_seconds']:.0f}", f"{row['speedup']:.2f}"] if "speedup" in row else ["same", ""]
        large = kept.get(f"memory of {slug}")
        memory = "" if large is None else f"{large['bytes'] / MIB:,.0f}"
        rows.append(
            [slug, row["shapes"], f"{row['parameters'] / 1e6:.2f}", f"{1e3 * row['seconds']:.0f}", *plain, memory]
        )
    columns = ["network", "inputs", "parameters (M)", "ms", "plainly, ms", "times as fast", "MiB at 1024 x 1024"]
    found = {"Networks": records.table(columns, rows, left=2)}
    if (row := kept.get("rt-detrv2 beside transformers")) is not None:
        found["RT-DETRv2-R18, 640 x 640"] = records.table(
            ["transformers' ms", "ours", "folded"],
            [
                [
                    f"{1e3 * row['transformers']:.0f}",
                    *(f"{row[n]:.2f} x" for n in ("speedup", "folded")),
                ]
            ],
        )
    grown = [(case, row) for case, row in kept.items() if case.startswith("exponent")]
    if grown:
        found["Time by pixels"] = records.table(
            ["", "pixels", "ms", "exponent"],
            [
                [
                    case.removeprefix("exponent of "),
                    ", ".join(map(str, row["lengths"])),
                    ", ".join(f"{1e3 * t:.2f}" for t in row["seconds"]),
                    f"{row['exponent']:.3f}",
                ]
                for case, row in grown
            ],
        )
    if (row := kept.get("stya2k beside all-to-all")) is not None:
        found["StyA2K's attentions, 512 channels on 64 x 64"] = records.table(
            ["ms", "all-to-all, the matrix, ms", "fused, ms", "MiB", "of the matrix, MiB", "ours at 128 x 128, MiB"],
            [
                [
                    *(f"{1e3 * row[n]:.0f}" for n in ("seconds", "plain_seconds", "fused_seconds")),
                    *(f"{row[n] / MIB:.0f}" for n in ("bytes_64", "plain_bytes", "bytes_128")),
                ]
            ],
            left=0,
        )
    return found


if __name__ == "__main__":
    records.command(
        __doc__ or "",
        "Speed of dense image networks",
        "dense",
        CASES,
        verdicts,
        sections,
        quick="few repeats",
    )
