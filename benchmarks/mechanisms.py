"""Every mechanism that promises speed or memory, against dense SDPA in one run: `python benchmarks/mechanisms.py`.

Forward, 4 heads of 64 unless a case says otherwise, from 1k to 64k tokens. `ideal` is dense pairs over computed pairs
(for whole layers, dense over computed operations), `of ideal` the share of it that the speed-up reaches, selection
included; `selection` is the time of choosing alone, as a share of the dense time; `MiB` the peak of extra tensors, the
output included; `exponent` the power of N with which time (and memory) grow, fitted over the three longest lengths.
The fastest of some calls counts, for both. Dense SDPA is timed on one head and multiplied by the heads, in which it is
linear; where it is causal on two, as its threads get unequal shares of one. Beyond 32k tokens dense attention is not
run: it counts as four times as slow for twice as many.

Figures are kept with `--json FILE`, to which a later run of other cases adds; `--markdown FILE` writes them as a page.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from saccade import catalogue
from saccade.bench import records
from saccade.bench.records import Kept, Verdict
from saccade.ops.measure import fastest, peak_bytes
from saccade.train.files import write_text
from saccade.train.scaling import fit_power

H, D = 4, 64
LENGTHS = (1024, 4096, 16384, 32768, 65536)
QUICK = (4096, 16384)
LONGEST_DENSE = 32768
#: lengths of the figures in bfloat16, and of cases whose time is quadratic: they promise memory
HALF, QUADRATIC = (16384,), (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Trial:
    """One mechanism at one length.

    Attributes:
        run: the call that is timed.
        pairs: (query, key) pairs that it computes per head, on average; None where it computes none (linear ones).
        ideal: the ideal speed-up where it does not follow from the pairs (whole layers: from operations).
        select: the choice of them alone, where there is one.
        causal: which dense attention it is compared with.
        heads, width: of that dense attention.
        dense: another alternative than SDPA on q, k, v of that shape: its seconds.
    """

    run: Callable[[], object]
    pairs: float | None = None
    ideal: float | None = None
    select: Callable[[], object] | None = None
    causal: bool = True
    heads: int = H
    width: int = D
    dense: Callable[[], float] | None = None


@dataclass(frozen=True)
class Case:
    """A mechanism's trials by length, its goals as {figure: (length, least or most)}, its lengths and its rival."""

    make: Callable[[int, torch.dtype], Trial]
    goals: dict[str, tuple[int, float]] = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    rival: str = "SDPA"


CASES: dict[str, Case] = {}
SPARSE = {"of_ideal": (16384, 0.7), "selection": (16384, 0.08)}
LINEAR = {"speedup": (32768, 10.0), "exponent": (65536, 1.05)}
NEAR = {"of_ideal": (16384, 0.6)}
COARSE = {"exponent": (65536, 1.3)}
STREAMED = {"memory_exponent": (QUADRATIC[-1], 1.05)}
STREAMED_LAYER = {"memory_exponent": (QUADRATIC[2], 1.05)}
#: figures that must stay below their goal; the others must reach it
CEILINGS = ("selection", "exponent", "memory_exponent")


def case(
    name: str,
    goals: dict[str, tuple[int, float]] | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    rival: str = "SDPA",
) -> Callable[..., Callable[..., Trial]]:
    """Register a function (length, dtype) -> Trial under a slug, or `slug, variant`."""

    def register(make: Callable[[int, torch.dtype], Trial]) -> Callable[[int, torch.dtype], Trial]:
        CASES[name] = Case(make, goals or {}, lengths, rival)
        return make

    return register


def tensors(n: int, dtype: torch.dtype, *, heads: int = H, width: int = D, count: int = 3) -> list[Tensor]:
    """q, k, v of one sequence."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, width).to(dtype) for _ in range(count)]


def kept_pairs(keep_BHnm: Tensor, block: tuple[int, int], n: int, causal: bool) -> float:
    """Pairs of a block map, per head: whole blocks, half of those on the diagonal where it is causal."""
    tiles = keep_BHnm.float().mean((0, 1))
    if causal:
        rows = torch.arange(tiles.shape[0])[:, None] * block[0]
        columns = torch.arange(tiles.shape[1])[None] * block[1]
        tiles = tiles * ((rows + block[0] / 2 - columns) / block[1]).clamp(0, 1)
    return min(tiles.sum().item() * block[0] * block[1], float(n) * n)


@case("moba", {**SPARSE, "speedup": (32768, 5.0)})
def moba(n: int, dtype: torch.dtype) -> Trial:
    """Blocks of 512, the own one and two more."""
    from saccade.attention.moba import moba_attend, moba_route

    q, k, v = tensors(n, dtype)
    block, top_k = min(512, n // 4), 3
    past = (torch.arange(n) // block).clamp(max=top_k - 1).sum().item() * block
    own = n * (block + 1) / 2
    return Trial(
        lambda: moba_attend(q, k, v, block_size=block, top_k=top_k),
        pairs=past + own,
        select=lambda: moba_route(q, k, block_size=block, top_k=top_k),
    )


@case("spargeattn", SPARSE)
def spargeattn(n: int, dtype: torch.dtype) -> Trial:
    """A tenth of the blocks of 128 x 64, predicted from block means."""
    from saccade.attention.spargeattn import sparge_block_map, spargeattn_attend

    q, k, v = tensors(n, dtype)
    options = {"top_k": 0.1, "block_q": 128, "block_k": 64}
    # means of random tokens are noise; the threshold on their self-similarity would keep every block
    options["similarity_threshold"] = -1.0
    keep = sparge_block_map(q, k, **options)
    return Trial(
        lambda: spargeattn_attend(q, k, v, **options),
        pairs=kept_pairs(keep, (128, 64), n, causal=False),
        select=lambda: sparge_block_map(q, k, **options),
        causal=False,
    )


@case("mosa", {"of_ideal": (16384, 0.7)}, rival="softmax layer")
def mosa(n: int, dtype: torch.dtype) -> Trial:
    """28 heads that pick a sixteenth of the tokens each, against 4 dense heads; whole layers."""
    torch.manual_seed(0)
    module = catalogue.create("mosa", dim=H * D, num_heads=28, num_other_heads=0, head_dim=D, sparsity=16).to(dtype)
    x = torch.randn(1, n, H * D).to(dtype)
    kept, C = n // 16, H * D
    dense_flops = 2 * n * n * D * H + 8 * n * C * C
    sparse_flops = 28 * (2 * kept * kept * D + 8 * kept * C * D)
    return layer_trial(module, x, ideal=dense_flops / sparse_flops)


@case("prism", SPARSE)
def prism(n: int, dtype: torch.dtype) -> Trial:
    """Blocks of 128; a tenth of the pooled weight of each band."""
    from saccade.attention.prism import prism_attend, prism_blocks

    q, k, v = tensors(n, dtype)
    options: dict[str, Any] = {"low_freq_threshold": 0.1, "high_freq_threshold": 0.1}
    keep = prism_blocks(q, k, **options)
    return Trial(
        lambda: prism_attend(q, k, v, **options),
        pairs=kept_pairs(keep, (128, 128), n, causal=True),
        select=lambda: prism_blocks(q, k, **options),
    )


@case("block-sparse-vggt", SPARSE)
def block_sparse_vggt(n: int, dtype: torch.dtype) -> Trial:
    """Frames of 1024 tokens, 5 of them special; a tenth of the blocks of 128 x 64."""
    from saccade.attention.block_sparse_vggt import block_sparse_vggt_attend, vggt_block_map

    q, k, v = tensors(n, dtype)
    frames, special = n // 1024, 5
    patches = n - frames * special
    keep = vggt_block_map(q[:, :, :patches], k[:, :, :patches], sparse_ratio=0.9)
    pairs = kept_pairs(keep, (128, 64), patches, causal=False)
    return Trial(
        lambda: block_sparse_vggt_attend(q, k, v, frames=frames, special_tokens=special, sparse_ratio=0.9),
        # special queries see all, patches all special keys
        pairs=pairs + frames * special * n + patches * frames * special,
        select=lambda: vggt_block_map(q[:, :, :patches], k[:, :, :patches], sparse_ratio=0.9),
        causal=False,
    )


@case("rectified-spaattn", SPARSE)
def rectified_spaattn(n: int, dtype: torch.dtype) -> Trial:
    """A tenth of the blocks of 128 x 128 token by token; means for the others."""
    from saccade.attention.rectified_spaattn import rectified_map, rectified_spaattn_attend

    q, k, v = tensors(n, dtype)
    options: dict[str, Any] = {"drop_rate": 0.9, "cdf_threshold": 0.0}
    keep = rectified_map(q, k, **options).critical_BHnm
    return Trial(
        lambda: rectified_spaattn_attend(q, k, v, **options),
        pairs=kept_pairs(keep, (128, 128), n, causal=False),
        select=lambda: rectified_map(q, k, **options),
        causal=False,
    )


@case("nats", SPARSE)
def nats(n: int, dtype: torch.dtype) -> Trial:
    """Roles given: of the chunks of 64, one in twenty Global, a fifth Local, the others Sliding (window 256)."""
    from saccade.attention.nats import lifetimes, nats_attend

    q, k, v = tensors(n, dtype)
    role = torch.rand(1, H, n // 64)
    role_BKn = torch.where(role < 0.05, 0, torch.where(role < 0.25, 1, 2))
    roles = F.one_hot(role_BKn, 3).to(dtype)
    until = lifetimes(role_BKn, n, window=256, chunk_size=64).clamp(max=n - 1)
    live = (until - torch.arange(n) + 1).sum().item() / H
    return Trial(lambda: nats_attend(q, k, v, roles, window=256, chunk_size=64), pairs=float(live))


def mra_trial(n: int, dtype: torch.dtype, mode: str) -> Trial:
    from saccade.attention.mra import mra_attend

    q, k, v = tensors(n, dtype)
    exact, means = 8 * (n // 32) * 32 * 32, (n // 32) ** 2
    return Trial(
        lambda: mra_attend(q, k, v, mode=mode),  # type: ignore[arg-type]
        pairs=exact + means * (2 if mode == "full" else 1),
        causal=False,
    )


@case("mra", COARSE)
def mra(n: int, dtype: torch.dtype) -> Trial:
    """MRA-2: eight blocks of 32 x 32 a row, means elsewhere."""
    return mra_trial(n, dtype, "full")


@case("mra, sparse", COARSE)
def mra_sparse(n: int, dtype: torch.dtype) -> Trial:
    """MRA-2-s: the blocks alone."""
    return mra_trial(n, dtype, "sparse")


def combiner_trial(n: int, dtype: torch.dtype, variant: str) -> Trial:
    """Segments of about sqrt(N), as by default; pairs of tokens, and of tokens and spans."""
    from saccade.attention.combiner import combiner_attend

    q, k, v = tensors(n, dtype)
    root = math.isqrt(n - 1) + 1
    s = -(-root // 16) * 16
    rows = -(-n // s)
    before, own = (rows - 1) / 2, (s + 1) / 2
    per_token = {
        "fixed": own + before,
        "rowmajor": s + own + before,
        # own row and column; other columns; left and right; and the spans' own sums
        "mixture": own + before + (s - 1) * (rows - 1) / rows + 2 * before + (rows + 1) / 2 + 2 * own,
        "logn": 1 + 2 * math.log2(n) / 2,
    }[variant]
    return Trial(lambda: combiner_attend(q, k, v, variant=variant), pairs=per_token * n)  # type: ignore[arg-type]


for _variant in ("fixed", "logn", "rowmajor", "mixture"):
    case(f"combiner, {_variant}", COARSE)(partial(combiner_trial, variant=_variant))


def grid_trial(n: int, dtype: torch.dtype, axes: int, kernel: int) -> Trial:
    """A grid of powers of two as square (cubic) as n allows."""
    from saccade.attention.neighborhood import neighborhood_attend
    from saccade.ops import masks

    q, k, v = tensors(n, dtype)
    powers = n.bit_length() - 1
    size = tuple(1 << (powers // axes + (axis >= axes - powers % axes)) for axis in range(axes))
    mask = masks.neighborhood(size, kernel)
    assert isinstance(mask, masks.Neighborhood)
    pairs = 1.0
    for axis, length in enumerate(size):
        _, first, last = mask.axis_window(axis, torch.arange(length))
        pairs *= float((last - first + 1).sum())
    return Trial(lambda: neighborhood_attend(q, k, v, size, kernel), pairs=pairs, causal=False)


for _axes, _kernel in ((2, 13), (2, 7), (3, 5)):
    _name = " x ".join([str(_kernel)] * _axes)
    case(f"neighborhood, {_name}", NEAR)(partial(grid_trial, axes=_axes, kernel=_kernel))


def flash_window_trial(n: int, dtype: torch.dtype, rival: str, shift: int) -> Trial:
    """Swin-T's first stage: 7 x 7 windows on a map of n positions, 96 channels in 3 heads, batch 8, with bias.

    From the packed q, k, v of one projection to the map of merged heads; the rival rolls, cuts and joins as Swin does.
    """
    from saccade.ops.partitions import packed_window_attend

    side, w, heads, batch = math.isqrt(n), 7, 3, 8
    torch.manual_seed(0)
    m, tokens = side // w, w * w
    qkv = torch.randn(batch, n, 3, heads, 32).to(dtype)
    bias = (0.02 * torch.randn(heads, tokens, tokens)).to(dtype)
    region = (torch.arange(side) >= side - w).long() + (torch.arange(side) >= side - shift).long()
    regions = (3 * region[:, None] + region).view(m, w, m, w).transpose(1, 2).reshape(m * m, 1, tokens)
    hidden = torch.where(regions == regions.mT, 0.0, -100.0).to(dtype)[:, None] if shift else None

    def plain() -> Tensor:
        x = qkv.view(batch, side, side, -1)
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        x = x.view(batch, m, w, m, w, -1).transpose(2, 3).reshape(-1, tokens, 3, heads, 32)
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        added = bias[None] if hidden is None else (bias + hidden).repeat(batch, 1, 1, 1)
        if rival == "eager":
            y = (q * 32**-0.5 @ k.mT + added).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        y = y.transpose(1, 2).reshape(batch, m, m, w, w, -1).transpose(2, 3).reshape(batch, side, side, -1)
        return y.roll((shift, shift), (1, 2)) if shift else y

    return Trial(
        lambda: packed_window_attend(qkv, (side, side), w, shift, bias).transpose(1, 2).flatten(2),
        dense=lambda: fastest(plain, repeats=30)[0],
    )


for _rival in ("SDPA batched over windows", "eager"):
    for _label, _shift in (("plain", 0), ("shifted", 3)):
        case(f"flash-window, {_label}, against {_rival.split()[0]}", {"speedup": (3136, 1.0)}, (3136,), _rival)(
            partial(flash_window_trial, rival=_rival, shift=_shift)
        )


@case("lightning", LINEAR)
def lightning(n: int, dtype: torch.dtype) -> Trial:
    """The operator with the paper's decays."""
    from saccade.attention.lightning import decay_slopes, lightning_attend

    q, k, v = tensors(n, dtype)
    slopes = torch.as_tensor(decay_slopes(H))
    return Trial(lambda: lightning_attend(q, k, v, slopes))


def efficient_trial(n: int, dtype: torch.dtype, causal: bool) -> Trial:
    from saccade.attention.efficient_attention import efficient_attend

    q, k, v = tensors(n, dtype)
    return Trial(lambda: efficient_attend(q, k, v, causal=causal), causal=causal)


case("efficient-attention, bidirectional", LINEAR)(partial(efficient_trial, causal=False))
case("efficient-attention, causal", LINEAR)(partial(efficient_trial, causal=True))


def fast_trial(n: int, dtype: torch.dtype, degree: int, width: int) -> Trial:
    """Causal: the features of degree p are (D + 1) ** p."""
    from saccade.attention.fast import fastmax_attend

    q, k, v = tensors(n, dtype, width=width)
    return Trial(lambda: fastmax_attend(q, k, v, degree=degree, causal=True), width=width)


for _degree in (1, 2):
    for _width in (32, 64):
        case(f"fast, p={_degree}, D={_width}", LINEAR)(partial(fast_trial, degree=_degree, width=_width))


def slay_trial(n: int, dtype: torch.dtype, variant: str) -> Trial:
    """Features, product and sums of causal attention, without the projections."""
    torch.manual_seed(0)
    module = catalogue.create("slay", dim=H * D, num_heads=H, causal=True, variant=variant).to(dtype)
    q, k, v = tensors(n, dtype)
    run = partial(module.aggregate, q, k, v, query_mask_BN=None, mask_BM=None, causal=True)  # type: ignore[arg-type]
    return Trial(torch.no_grad()(run))


for _variant in ("anchor", "hadamard"):
    case(f"slay, {_variant}", LINEAR)(partial(slay_trial, variant=_variant))


def layer_trial(
    module: nn.Module, x: Tensor, *, causal: bool = True, heads: int = H, ideal: float | None = None
) -> Trial:
    """A whole layer on x (1, N, C) against a softmax layer of the same width."""
    return Trial(
        torch.no_grad()(lambda: module(x)),
        ideal=ideal,
        causal=causal,
        dense=lambda: layer_seconds(x.shape[1], x.dtype, causal, heads, x.shape[2]),
    )


@case("mega, chunk 128", LINEAR, rival="softmax layer")
def mega(n: int, dtype: torch.dtype) -> Trial:
    """A layer of 256 channels, causal."""
    torch.manual_seed(0)
    module = catalogue.create("mega", dim=H * D, num_heads=1, causal=True, chunk_size=128).to(dtype).eval()
    return layer_trial(module, torch.randn(1, n, H * D).to(dtype))


@case("moh, gathered", {"of_ideal": (16384, 0.7)}, (1024, 4096, 16384), rival="softmax layer")
def moh(n: int, dtype: torch.dtype) -> Trial:
    """Two shared heads and two of six others for each token: half of eight heads."""
    torch.manual_seed(0)
    heads, C = 8, 8 * D
    options = {"shared_heads": 2, "routed_heads": 2, "form": "gathered"}
    module = catalogue.create("moh", dim=C, num_heads=heads, **options).to(dtype).eval()
    scores, projections = 4 * n * n * C, 8 * n * C * C
    ideal = (scores + projections) / (scores / 2 + projections)
    return layer_trial(module, torch.randn(1, n, C).to(dtype), causal=False, heads=heads, ideal=ideal)


@case("set-transformer, ISAB", LINEAR, rival="softmax layer")
def set_transformer(n: int, dtype: torch.dtype) -> Trial:
    """32 inducing points."""
    from saccade.attention.set_transformer import ISAB

    torch.manual_seed(0)
    module = ISAB(H * D, H * D, H, 32).to(dtype)
    return layer_trial(module, torch.randn(1, n, H * D).to(dtype), causal=False)


def recurrent_trial(n: int, dtype: torch.dtype, update: str) -> Trial:
    torch.manual_seed(0)
    module = catalogue.create("efficient-attention-survey", dim=H * D, num_heads=H, update=update).to(dtype).eval()
    return layer_trial(module, torch.randn(1, n, H * D).to(dtype))


for _update in ("kernel", "decay", "gated", "gated-channel", "delta", "gated-delta"):
    case(f"efficient-attention-survey, {_update}", LINEAR, rival="softmax layer")(
        partial(recurrent_trial, update=_update)
    )


@case("attention-engine, sigmoid", STREAMED, QUADRATIC)
def engine_sigmoid(n: int, dtype: torch.dtype) -> Trial:
    from saccade.attention.attention_engine import sigmoid_attend
    from saccade.ops import masks

    q, k, v = tensors(n, dtype)
    return Trial(lambda: sigmoid_attend(q, k, v, mask=masks.causal()))


@case("attention-engine, relu", STREAMED, QUADRATIC)
def engine_relu(n: int, dtype: torch.dtype) -> Trial:
    from saccade.attention.attention_engine import relu_attend
    from saccade.ops import masks

    q, k, v = tensors(n, dtype)
    return Trial(lambda: relu_attend(q, k, v, mask=masks.causal()))


@case("attention-engine, retention", STREAMED, QUADRATIC)
def engine_retention(n: int, dtype: torch.dtype) -> Trial:
    from saccade.attention.attention_engine import retention_attend

    q, k, v = tensors(n, dtype)
    decay = 1 - 2.0 ** (-5 - torch.arange(H))
    return Trial(lambda: retention_attend(q, k, v, decay))


@case("flex-attention, soft cap", STREAMED, QUADRATIC)
def flex_soft_cap(n: int, dtype: torch.dtype) -> Trial:
    from saccade.ops import masks, score_mods
    from saccade.ops.attend import attend

    q, k, v = tensors(n, dtype)
    return Trial(lambda: attend(q, k, v, mask=masks.causal(), score_mod=score_mods.soft_cap(20.0)))


def quadratic_trial(n: int, dtype: torch.dtype, slug: str, options: dict[str, Any]) -> Trial:
    torch.manual_seed(0)
    module = catalogue.create(slug, dim=D, num_heads=1, causal=True, **options).to(dtype).eval()
    return layer_trial(module, torch.randn(1, n, D).to(dtype), heads=1)


for _slug, _options in (
    ("neural-attention", {"projection_dim": 16}),
    ("multi-token", {}),
    ("adaptive-filter", {}),
    ("comateformer", {}),
):
    case(f"{_slug}, one head", STREAMED_LAYER, QUADRATIC[:3], rival="softmax layer")(
        partial(quadratic_trial, slug=_slug, options=_options)
    )


@cache
def dense_seconds(n: int, dtype: torch.dtype, causal: bool, heads: int = H, width: int = D) -> float:
    """Dense SDPA of one or two heads, times the heads."""
    if n > LONGEST_DENSE:
        return 4 * dense_seconds(n // 2, dtype, causal, heads, width)
    timed = 2 if causal else 1
    q, k, v = tensors(n, dtype, heads=timed, width=width)
    run = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
    return heads / timed * fastest(run, repeats=10, budget=2.0)[0]


@cache
def layer_seconds(n: int, dtype: torch.dtype, causal: bool, heads: int, dim: int) -> float:
    """A layer of softmax attention."""
    if n > LONGEST_DENSE:
        return 4 * layer_seconds(n // 2, dtype, causal, heads, dim)
    module = catalogue.create("softmax", dim=dim, num_heads=heads, causal=causal).to(dtype)
    x = torch.randn(1, n, dim).to(dtype)
    return fastest(torch.no_grad()(lambda: module(x)), repeats=10, budget=2.0)[0]


def measure(found: Case, n: int, dtype: torch.dtype) -> dict[str, float]:
    """The figures of one mechanism at one length."""
    trial = found.make(n, dtype)
    (ours,) = fastest(trial.run, repeats=10)
    if trial.dense is None:
        dense = dense_seconds(n, dtype, trial.causal, trial.heads, trial.width)
    else:
        dense = trial.dense()
    ours = min(ours, *fastest(trial.run, repeats=10))
    row = {"length": n, "seconds": ours, "speedup": dense / ours, "bytes": float(peak_bytes(trial.run))}
    ideal = trial.ideal
    if trial.pairs is not None:
        ideal = (n * (n + 1) / 2 if trial.causal else n * n) / trial.pairs
    if ideal is not None:
        row["ideal"] = ideal
        row["of_ideal"] = row["speedup"] / row["ideal"]
    if trial.select is not None:
        row["selection"] = fastest(trial.select, repeats=10)[0] / dense
    return row


def with_growth(rows: list[dict[str, float]]) -> None:
    """Exponents of time and memory over the three longest lengths, in the last row."""
    if len(rows) < 3:
        return
    for name, figure in (("exponent", "seconds"), ("memory_exponent", "bytes")):
        fit = fit_power([row["length"] for row in rows], [row[figure] for row in rows], 3)
        rows[-1][name] = math.nan if fit is None else fit.exponent


def verdicts(name: str, figures: dict[str, Any]) -> list[Verdict]:
    """The goals of a case whose length was measured, in float32."""
    results = []
    for figure, (length, wanted) in CASES[name].goals.items():
        rows = [row for row in figures.get("float32", []) if row["length"] == length and figure in row]
        if rows:
            got, ceiling = rows[0][figure], figure in CEILINGS
            goal = f"{name}: {figure.replace('_', ' ')} at {length}"
            results.append(Verdict(goal, wanted, got, got <= wanted if ceiling else got >= wanted, ceiling))
    return results


COLUMNS = (
    "mechanism", "against", "N", "ms", "times as fast", "ideal", "of ideal", "selection", "MiB", "exponent",
    "memory exponent", "bf16 ms", "bf16 times as fast",
)  # fmt: skip


def table_rows(kept: Kept) -> list[list[str]]:
    """What is shown of each mechanism and length: float32, and bfloat16 where it was measured."""
    shown = []
    for name, figures in kept.items():
        half = {row["length"]: row for row in figures.get("bfloat16", [])}
        single = {row["length"]: row for row in figures.get("float32", [])}
        for n in sorted({*half, *single}):
            cells = [name, CASES[name].rival, f"{n:.0f}"]
            row = single.get(n, {})
            for figure, form, unit in (
                ("seconds", ".1f", 1e3), ("speedup", ".2f", 1), ("ideal", ".1f", 1), ("of_ideal", ".0%", 1),
                ("selection", ".1%", 1), ("bytes", ".1f", 2**-20), ("exponent", ".2f", 1),
                ("memory_exponent", ".2f", 1),
            ):  # fmt: skip
                cells.append(format(row[figure] * unit, form) if figure in row else "")
            row = half.get(n, {})
            cells += [f"{row['seconds'] * 1e3:.1f}", f"{row['speedup']:.2f}"] if row else ["", ""]
            shown.append(cells)
    return shown


def page(kept: Kept) -> str:
    """The figures as Markdown."""
    return records.page(
        "Speed and memory of the mechanisms",
        "python benchmarks/mechanisms.py --json FILE --markdown docs/speed.md",
        (__doc__ or "").split("\n\n")[1],
        kept,
        [name for name in CASES if name not in kept],
        [verdict for name, figures in kept.items() for verdict in verdicts(name, figures)],
        {"Figures": records.table(COLUMNS, table_rows(kept), left=2)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="slugs, or names of cases; all where none is given")
    parser.add_argument("--quick", action="store_true", help="4k and 16k tokens only")
    parser.add_argument("--lengths", help="comma-separated lengths")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="float32")
    parser.add_argument("--json", type=Path, help="keep the figures in this file, beside those of other cases in it")
    parser.add_argument("--markdown", type=Path, help="write all figures that are kept as a page")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return
    wanted = [name for name in CASES if not arguments.names or {name, name.split(",")[0]} & set(arguments.names)]
    unknown = [asked for asked in arguments.names if not any(asked in (name, name.split(",")[0]) for name in CASES)]
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}; there is {'; '.join(CASES)}")
    asked = tuple(map(int, arguments.lengths.split(","))) if arguments.lengths else None
    dtypes = ("float32", "bfloat16") if arguments.dtype == "both" else (arguments.dtype,)
    known, begin = records.known(arguments.json), records.stamp()
    measured: Kept = {}
    for name in wanted:
        figures: dict[str, Any] = dict(begin)
        found = CASES[name]
        for dtype in dtypes:
            lengths = tuple(n for n in found.lengths if not arguments.quick or n in QUICK) or found.lengths
            if asked and len(found.lengths) > 1:  # a case of one length is a shape of its own
                lengths = asked
            if dtype == "bfloat16" and arguments.dtype == "both":
                lengths = tuple(n for n in lengths if n in HALF) or lengths
            rows = figures[dtype] = []
            for n in lengths:
                rows.append(measure(found, n, getattr(torch, dtype)))
                said = f"{rows[-1]['seconds'] * 1e3:.1f} ms, {rows[-1]['speedup']:.2f} times as fast as {found.rival}"
                print(f"{name}, {dtype}, {n}: {said}", flush=True)
            with_growth(rows)
        known[name] = measured[name] = figures
        records.keep(arguments.json, known)
    table = Table(title=f"Mechanisms: {H} heads of {D}; {begin['machine']}")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right")
    for cells in table_rows(measured):
        table.add_row(*cells)
    Console(width=180).print(table)
    print("\n".join(str(verdict) for name, figures in measured.items() for verdict in verdicts(name, figures)))
    if arguments.markdown:
        write_text(arguments.markdown, page({name: known[name] for name in CASES if name in known}))


if __name__ == "__main__":
    main()
