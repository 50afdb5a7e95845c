"""The C code against the definition in double precision, on vectors of every width that this machine can run."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.attention.nats import Lifetimes
from saccade.ops import masks, score_mods
from saccade.ops.backends.blocksparse import blocksparse_attend
from saccade.ops.masks import Mask
from saccade.ops.measure import peak_bytes
from saccade.ops.native import build, gather
from saccade.ops.native.blocks import attend_ranges
from saccade.ops.native.grid import _grids, attend_grid
from saccade.ops.native.routes import attend_routes
from saccade.ops.routed import routed_attend
from saccade.ops.selective_scan import selective_scan, selective_scan_reference
from saccade.ops.wkv import DISTANCES, wkv, wkv_reference

INF = float("inf")

if reason := build.refusal(torch.device("cpu"), torch.float32):
    pytest.skip(f"no native code: {reason}", allow_module_level=True)

FLAGS = {"own": build.FLAGS}
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS["avx2"] = tuple("-march=haswell" if flag == "-march=native" else flag for flag in build.FLAGS)
    FLAGS["sse2"] = tuple("-march=x86-64" if flag == "-march=native" else flag for flag in build.FLAGS)


@pytest.fixture(params=FLAGS, scope="module", autouse=True)
def code(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param != "own" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the machine's own vectors are no wider")
    compiled = build.load(build.compile_source(FLAGS[request.param]))
    before, build._outcome = build._outcome, (compiled, None)
    _grids.cache_clear()
    yield
    build._outcome = before
    _grids.cache_clear()


def inputs(B: int, H: int, K: int, N: int, M: int, D: int, E: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator) for s in ((B, H, N, D), (B, K, M, D), (B, K, M, E))]


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double() for x in (q, k, v))
    return saccade.attend(q, k, v, mask=mask, scale=scale, return_lse=True, backend="reference")


def gradients_agree(function: Callable[..., tuple[Tensor, Tensor]], truth: Callable[..., Any], *given: Tensor) -> None:
    """Gradients of a weighted sum of output and LSE; rows without keys have none through their LSE."""
    results = []
    for call, dtype in ((function, torch.float32), (truth, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        out, lse = call(*leaves)
        generator = torch.Generator().manual_seed(2)
        loss = (out * torch.randn(out.shape, generator=generator)).sum()
        loss = loss + (lse.masked_fill(lse.isneginf(), 0.0) * torch.randn(lse.shape, generator=generator)).sum()
        results.append(torch.autograd.grad(loss, leaves))
    # a bias has a gradient of thousands of terms, which cancel
    for x, y in zip(*results):
        torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-4 * max(1.0, float(y.abs().max())))


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(found, expected):
        assert x.dtype == torch.float32
        assert x.isneginf().equal(y.isneginf())
        x, y = x.nan_to_num(neginf=0), y.float().nan_to_num(neginf=0)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * max(1.0, float(y.abs().max())))


few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 150), st.integers(1, 150),
    st.sampled_from([(1, 1), (20, 9), (64, 64), (33, 40)]), st.sampled_from([(16, 16), (64, 32), (7, 20), (200, 130)]),
    st.integers(0, 99),
)  # fmt: skip
def test_blocks(
    B: int, heads: tuple[int, int], N: int, M: int, widths: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    H, K = heads
    q, k, v = inputs(B, H, K, N, M, *widths, seed)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(B, H, -(-N // size[0]), -(-M // size[1]), generator=generator) < 0.6
    bias = torch.randn(keep.shape, generator=generator)
    pairs = torch.rand(B, 1, N, M, generator=generator) < 0.7
    mask = masks.blocks(keep, size)
    for more in (None, masks.causal(), masks.dense(pairs), masks.padding(pairs[:, 0, 0])):
        whole = mask if more is None else mask & more
        found = blocksparse_attend(q, k, v, whole, block_size=size, scale=0.4, return_lse=True)
        agree(found, definition(q, k, v, whole, 0.4))
        gradients_agree(
            lambda q, k, v, whole=whole: blocksparse_attend(q, k, v, whole, block_size=size, return_lse=True),
            lambda q, k, v, whole=whole: definition(q, k, v, whole, widths[0] ** -0.5), q, k, v,
        )  # fmt: skip

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return blocksparse_attend(q, k, v, mask, block_size=size, block_bias=bias, scale=-0.3, return_lse=True)

    def truth(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        spread = bias.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, :N, :M]
        scores = -0.3 * q @ k.repeat_interleave(H // K, 1).mT + spread
        scores = scores.masked_fill(~mask.dense(N, M), -1e30)
        dead = ~mask.dense(N, M).any(-1)
        out = scores.softmax(-1).masked_fill(dead[..., None], 0.0) @ v.repeat_interleave(H // K, 1)
        return out, scores.logsumexp(-1).masked_fill(dead, -INF)

    agree(biased(q, k, v, bias), truth(q.double(), k.double(), v.double(), bias.double()))
    gradients_agree(biased, truth, q, k, v, bias)


def modifications(B: int, H: int, N: int, M: int) -> dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]]:
    """By name: the shape of a parameter, and what is made of it."""
    return {
        # slopes below 1, as ALiBi's are: the LSE, from which weights are made again, is rounded at the size of scores
        "alibi": ((H,), lambda p: score_mods.alibi(p.sigmoid())),
        "cap": ((1,), lambda p: score_mods.soft_cap(0.7)),
        "distances": ((1, 31), score_mods.relative_bias),
        "buckets": ((H, 8), lambda p: score_mods.bucketed_bias(p, max_distance=40)),
        "bias": ((B, H, N, M), score_mods.bias),
        "bias of heads": ((1, H, N, M), score_mods.bias),
        "bias of batch rows": ((B, 1, N, M + 3), score_mods.bias),
        "bias of keys": ((B, 1, 1, M), score_mods.bias),
        "all": (
            (H, 5),
            lambda p: score_mods.compose(
                score_mods.relative_bias(p),
                score_mods.soft_cap(2.0),
                score_mods.alibi(p[:, 0], symmetric=True),
                score_mods.soft_cap(5.0),
                score_mods.bias(p.expand(N, H, 5).permute(1, 0, 2).repeat(1, 1, -(-M // 5))),
            ),
        ),
    }


@few
@given(
    st.sampled_from(sorted(modifications(1, 1, 1, 1))), st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(1, 150), st.integers(1, 150), st.sampled_from([(5, 3), (40, 64)]), st.integers(0, 99),
)  # fmt: skip
def test_modified_scores(
    name: str, B: int, heads: tuple[int, int], N: int, M: int, widths: tuple[int, int], seed: int
) -> None:
    """With masks of every kind that C has, and gradients of what they are made of."""
    H, K = heads
    shape, make = modifications(B, H, N, M)[name]
    generator = torch.Generator().manual_seed(seed)
    given = [*inputs(B, H, K, N, M, *widths, seed), torch.randn(shape, generator=generator)]
    pairs = torch.rand(B, 1, N, M, generator=generator) < 0.5
    keep = torch.rand(B, H, -(-N // 32), -(-M // 16), generator=generator) < 0.6
    for mask in (None, masks.causal(3), masks.dense(pairs), masks.blocks(keep, (32, 16)) & masks.window(60, 20)):

        def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor, mask: Mask | None = mask) -> tuple[Tensor, Tensor]:
            backend = "reference" if q.dtype == torch.float64 else "blocksparse"
            used = v + 0 * p.sum()  # not every modification has a parameter
            return saccade.attend(q, k, used, mask=mask, score_mod=make(p), return_lse=True, backend=backend)

        agree(attend(*given), attend(*(x.double() for x in given)))
        gradients_agree(attend, attend, *given)


def test_a_soft_cap_is_exact_about_zero_and_far_from_it() -> None:
    """To four units in the last place."""
    s = torch.cat([torch.logspace(-12, 4, 500), -torch.logspace(-12, 4, 500), torch.zeros(1)])
    q, k = torch.ones(1, 1, 1, 1), s[None, None, :, None]
    for key in range(0, len(s), 50):
        one = k[:, :, key : key + 1]
        _, lse = saccade.attend(q, one, one, score_mod=score_mods.soft_cap(1.0), scale=1.0, return_lse=True)
        torch.testing.assert_close(lse.flatten(), s[key : key + 1].double().tanh().float(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("band", [None, masks.causal(), masks.window(30, 5), masks.causal(-40)])
@pytest.mark.parametrize(("batch", "H", "K"), [(1, 4, 2), (2, 3, 3)])
def test_documents(batch: int, H: int, K: int, band: Mask | None) -> None:
    q, k, v = inputs(2, H, K, 150, 170, 20, 9)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-3, 5, (batch, 170), generator=generator)
    for key_ids in (ids, ids.sort()[0], torch.arange(170)[None] // 40 * 2**40):
        documents = masks.documents(key_ids[:, :150], key_ids)
        mask = documents if band is None else documents & band
        agree(
            blocksparse_attend(q, k, v, mask, block_size=(64, 32), scale=0.4, return_lse=True),
            definition(q, k, v, mask, 0.4),
        )
        gradients_agree(
            lambda q, k, v, mask=mask: blocksparse_attend(q, k, v, mask, block_size=(64, 32), return_lse=True),
            lambda q, k, v, mask=mask: definition(q, k, v, mask, 20**-0.5), q, k, v,
        )  # fmt: skip


@few
@given(st.integers(1, 200), st.integers(1, 200), st.integers(-90, 60), st.integers(0, 90))
def test_ranges(N: int, M: int, low: int, width: int) -> None:
    q, k, v = inputs(2, 4, 2, N, M, 24, 16)
    row = torch.arange(N)
    found = attend_ranges(q, k, v, (row + low).clamp(0, M), (row + low + width).clamp(-1, M - 1), None, 0.3)
    distance = torch.arange(M) - row[:, None]
    pairs = (distance >= low) & (distance <= low + width)
    agree(found, definition(q, k, v, pairs, 0.3))
    band = masks.window(20, 9)
    gradients_agree(
        lambda q, k, v: saccade.attend(q, k, v, mask=band, backend="blocksparse", return_lse=True),
        lambda q, k, v: definition(q, k, v, band, 24**-0.5), q, k, v,
    )  # fmt: skip


@few
@given(st.sampled_from([(1, 1), (4, 2)]), st.integers(1, 150), st.integers(1, 150), st.integers(0, 99))
def test_rows_of_tensors_and_bands(heads: tuple[int, int], N: int, M: int, seed: int) -> None:
    q, k, v = inputs(2, *heads, N, M, 24, 16, seed)
    generator = torch.Generator().manual_seed(seed)
    H = heads[0]
    shapes = (2, H, N, M), (1, 1, N, M), (2, 1, 1, M), (1, H, 1, M), (1, 1, N, 1)
    tensors = [masks.dense(torch.rand(shape, generator=generator) < 0.6) for shape in shapes]
    padding = masks.padding(torch.rand(2, M, generator=generator) < 0.6)
    for mask in (*tensors, padding, padding & masks.causal(), masks.window(9, 30) & tensors[0], masks.causal(M - N)):
        found = blocksparse_attend(q, k, v, mask, scale=0.4, return_lse=True)
        agree(found, definition(q, k, v, mask, 0.4))
        gradients_agree(
            lambda q, k, v, mask=mask: blocksparse_attend(q, k, v, mask, return_lse=True),
            lambda q, k, v, mask=mask: definition(q, k, v, mask, 24**-0.5), q, k, v,
        )  # fmt: skip


@few
@given(st.sampled_from([(1, 1), (4, 2)]), st.integers(1, 150), st.integers(1, 150), st.integers(0, 99))
def test_keys_that_are_seen_for_a_while(heads: tuple[int, int], N: int, M: int, seed: int) -> None:
    H, K = heads
    q, k, v = inputs(2, H, K, N, M, 24, 16, seed)
    generator = torch.Generator().manual_seed(seed)
    born = torch.randint(0, N + 20, (2, K, M), generator=generator)
    mask = Lifetimes(born, born + torch.randint(-5, 60, (2, K, M), generator=generator), H // K, offset=3)
    agree(blocksparse_attend(q, k, v, mask, scale=0.4, return_lse=True), definition(q, k, v, mask, 0.4))
    gradients_agree(
        lambda q, k, v: blocksparse_attend(q, k, v, mask, return_lse=True),
        lambda q, k, v: definition(q, k, v, mask, 24**-0.5), q, k, v,
    )  # fmt: skip


@few
@given(st.data(), st.sampled_from([2, 3]))
def test_grids(data: st.DataObject, axes: int) -> None:
    size = tuple(data.draw(st.integers(3, 22 if axes == 2 else 9)) for _ in range(axes))
    dilation = tuple(data.draw(st.integers(1, max(1, n // 3))) for n in size)
    kernel = tuple(data.draw(st.integers(2, max(2, n // d))) for n, d in zip(size, dilation))
    stride = tuple(data.draw(st.integers(1, w)) for w in kernel)
    causal = tuple(data.draw(st.booleans()) for _ in size)
    mask = masks.neighborhood(size, kernel, dilation, causal=causal, stride=stride)
    assert isinstance(mask, masks.Neighborhood)
    N = 1
    for n in size:
        N *= n
    q, k, v = inputs(2, 4, 2, N, N, 20, 24)
    for scale in (0.3, -0.2):
        agree(attend_grid(q, k, v, mask, scale), definition(q, k, v, mask, scale))


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((13, 17), 7, {}),  # two queries a tile: two rows of them share a product, but the last
        ((19, 11), 8, {}),  # one a tile: three rows
        ((19, 11), 8, {"causal": True}),  # windows that grow
        ((17, 17), 7, {"stride": 3}),  # that jump
        ((17, 17), (2, 7), {"stride": (2, 1)}),  # too far to share
        ((4, 9, 13), (3, 5, 7), {}),
    ],
)
def test_rows_of_queries_that_share_a_product(
    size: tuple[int, ...], kernel: int | tuple[int, ...], options: dict[str, Any]
) -> None:
    mask = masks.neighborhood(size, kernel, **options)
    assert isinstance(mask, masks.Neighborhood)
    N = prod(size)
    q, k, v = inputs(1, 2, 1, N, N, 20, 24)
    agree(attend_grid(q, k, v, mask, 0.3), definition(q, k, v, mask, 0.3))


@few
@given(st.sampled_from([(1, 1), (4, 2)]), st.integers(1, 5), st.sampled_from([16, 20, 65, 130]), st.booleans())
def test_routes(heads: tuple[int, int], n: int, size: int, own: bool) -> None:
    H, K = heads
    N = n * size
    q, k, v = inputs(2, H, K, N, N, 24, 24)
    chosen = torch.rand(2, H, N, n).argsort(-1)[..., :2]
    chosen[torch.rand(chosen.shape) < 0.2] = -1
    block = torch.arange(N) // size
    if own:
        chosen[chosen >= block[:, None]] = -1
    pairs = torch.zeros(2, H, N, n + 1, dtype=torch.bool).scatter_(-1, chosen % (n + 1), True)[..., :n]
    pairs = pairs.repeat_interleave(size, -1)
    if own:
        pairs = pairs | ((block[:, None] == block) & torch.ones(N, N, dtype=torch.bool).tril())
    agree(attend_routes(q, k, v, chosen, size, 0.3, own), definition(q, k, v, pairs, 0.3))
    gradients_agree(
        lambda q, k, v: routed_attend(q, k, v, chosen, size, scale=0.3, own=own),
        lambda q, k, v: definition(q, k, v, pairs, 0.3), q, k, v,
    )  # fmt: skip


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_waiting_parts_are_merged_in_ranges(own: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.to(dtype) for x in inputs(1, 2, 1, 112, 128, 16, 24))  # the queries begin in the second block
    chosen = torch.rand(1, 2, 112, 8).argsort(-1)[..., :3]
    if own:
        chosen[chosen > torch.arange(112)[:, None] // 16] = -1
    whole = attend_routes(q, k, v, chosen, 16, 0.3, own)
    assert whole[0].dtype == dtype and whole[1].dtype == torch.float32
    monkeypatch.setattr("saccade.ops.native.routes.WAITING", 2**15)
    for x, y in zip(whole, attend_routes(q, k, v, chosen, 16, 0.3, own), strict=True):
        assert x.equal(y)


@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_large_and_small_scores(size: float) -> None:
    q, k, v = inputs(1, 2, 2, 90, 90, 32, 32)
    found = blocksparse_attend(size * q, k, v, masks.causal(), block_size=32, return_lse=True)
    out, lse = definition(size * q, k, v, masks.causal(), 32**-0.5)
    # a float32 score of 1e4 is off by 1e-3
    torch.testing.assert_close(found[0], out.float(), rtol=1e-4, atol=1e-5 if size < 1 else 5e-3)
    torch.testing.assert_close(found[1], lse.float(), rtol=1e-5, atol=1e-4)


def test_a_row_does_not_depend_on_others_or_on_threads() -> None:
    q, k, v = inputs(1, 2, 2, 150, 150, 32, 32)

    def call() -> Tensor:
        return blocksparse_attend(q, k, v, masks.causal(), block_size=32)

    whole = call()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert call().equal(whole)
    finally:
        torch.set_num_threads(threads)
    for x in (q, k, v):
        x[:, :, 77:] = 50 * torch.randn(73, 32)
    assert call()[:, :, :77].equal(whole[:, :, :77])


def test_nan_reaches_the_rows_that_attend_to_it() -> None:
    q, k, v = inputs(1, 1, 1, 70, 70, 16, 16)
    k[0, 0, 40, 3] = float("nan")
    out, lse = blocksparse_attend(q, k, v, masks.causal(), block_size=32, return_lse=True)
    assert not out[:, :, :40].isnan().any() and out[:, :, 40:].isnan().all() and lse[:, :, 40:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 13])
def test_half_precision_is_computed_in_single(dtype: torch.dtype, width: int) -> None:
    q, k, v = (x.to(dtype) for x in inputs(1, 4, 2, 75, 75, 16, width))
    # what is not a number, rounds to infinity, or is rounded to even
    v[0, 0, 30, :3] = torch.tensor([float("nan"), torch.finfo(dtype).max, INF])
    for mask in (masks.window(9), masks.blocks(torch.rand(1, 4, 5, 5) < 0.5, 16)):
        out, lse = blocksparse_attend(q, k, v, mask, block_size=16, return_lse=True)
        single, of_single = blocksparse_attend(*(x.float() for x in (q, k, v)), mask, block_size=16, return_lse=True)
        assert out.dtype == dtype and lse.dtype == torch.float32
        torch.testing.assert_close(out, single.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert lse.equal(of_single)
        # with gradients it is the same
        trained = blocksparse_attend(q.requires_grad_(), k, v, mask, block_size=16)
        torch.testing.assert_close(trained, out, rtol=0, atol=0, equal_nan=True)
        q = q.detach()


def test_bfloat16_needs_no_copy_of_the_queries_or_of_the_output() -> None:
    q, k, v = (x.bfloat16() for x in inputs(1, 8, 1, 512, 512, 64, 64))
    mask = masks.blocks(torch.ones(1, 1, 8, 8, dtype=torch.bool), 64)
    # the output, and keys and values in single precision, once as panels: a copy of the queries is 1 MiB
    assert peak_bytes(lambda: blocksparse_attend(q, k, v, mask)) < q.nbytes + 3 * k.nbytes * 2 + 2**19


def test_the_planner_takes_c_for_many_small_causal_problems_and_for_unequal_widths() -> None:
    """Torch's kernel computes nearly all of 128 x 128, and as if keys and values had one width, the larger."""

    def backend(N: int, D: int, E: int, batch: int = 64, **options: Any) -> str:
        q, v = torch.empty(batch, 4, N, D), torch.empty(batch, 4, N, E)
        return saccade.plan(q, q, v, **options).backend

    assert backend(128, 64, 64, mask=masks.causal()) == "blocksparse"
    assert backend(128, 64, 64, batch=1, mask=masks.causal()) == "sdpa"
    assert backend(512, 64, 128) == "blocksparse"
    assert backend(512, 64, 64) == "sdpa"


@few
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 9), st.integers(1, 80), st.sampled_from([1, 2, 5]),
    st.sampled_from([torch.int32, torch.int64]), st.integers(0, 99),
)  # fmt: skip
def test_sums_over_rows(R: int, K: int, S: int, D: int, threads: int, kind: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, query = (torch.randn(n, D, generator=generator) for n in (R, K))
    weight, index = torch.randn(K, S, generator=generator), torch.randint(R, (K, S), generator=generator)
    read = rows.double()[index]
    added = torch.zeros(R, D, dtype=torch.double)
    added.index_add_(0, index.flatten(), (weight.double()[..., None] * query.double()[:, None]).flatten(0, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [
            gather.gather(rows, index.to(kind), weight),
            gather.gather_dot(query, rows, index.to(kind)),
            gather.scatter(index.to(kind), weight, query, R),
        ]
    finally:
        torch.set_num_threads(before)
    for x, y in zip(
        found, ((weight.double()[..., None] * read).sum(1), (read @ query.double()[..., None])[..., 0], added)
    ):
        torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-5 * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("stray", [-1, 5, 2**31 - 1])
def test_indices_that_are_no_rows_are_refused(stray: int) -> None:
    index, weight = torch.tensor([[0, stray], [1, 4]]), torch.ones(2, 2)
    for call in (
        lambda: gather.gather(torch.ones(5, 3), index, weight),
        lambda: gather.gather_dot(torch.ones(2, 3), torch.ones(5, 3), index),
        lambda: gather.scatter(index, weight, torch.ones(2, 3), 5),
    ):
        with pytest.raises(IndexError, match="5 rows"):
            call()
    table, places = torch.ones(1, 1, 4, 4), [torch.tensor([0]), torch.tensor([0]), torch.tensor([0])]
    for axis in range(3):
        places[axis] = torch.tensor([stray])
        with pytest.raises(IndexError, match="windows"):
            gather.crops(table, *places, torch.zeros(1), torch.zeros(1), 2, 2)
        with pytest.raises(IndexError, match="windows"):
            gather.crops_gradients(torch.ones(1, 1, 2, 2), table, *places, torch.zeros(1), torch.zeros(1))
        places[axis] = torch.tensor([0])


@few
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.sampled_from([(1, 1), (7, 9), (3, 17), (16, 33)]),
    st.sampled_from([1, 2, 5]), st.integers(0, 99),
)  # fmt: skip
def test_crops(G: int, T: int, K: int, size: tuple[int, int], threads: int, seed: int) -> None:
    (H, W), generator = size, torch.Generator().manual_seed(seed)
    table = torch.randn(G, T, 2 * H + 3, 2 * W + 2, generator=generator)
    group = torch.randint(G, (K,), generator=generator)
    top, left = torch.randint(H + 3, (K,), generator=generator), torch.randint(W + 2, (K,), generator=generator)
    down, across = torch.rand(2, K, generator=generator)
    grad = torch.randn(K, T, H, W, generator=generator)

    def defined(table: Tensor, down: Tensor, across: Tensor) -> Tensor:
        windows = []
        for k in range(K):
            cells = table[group[k], :, top[k] : top[k] + H + 1, left[k] : left[k] + W + 1]
            lines = cells[:, :-1] + (cells[:, 1:] - cells[:, :-1]) * down[k]
            windows.append(lines[..., :-1] + (lines[..., 1:] - lines[..., :-1]) * across[k])
        return torch.stack(windows)

    leaves = [x.double().requires_grad_() for x in (table, down, across)]
    expected = defined(*leaves)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gather.crops(table, group, top, left, down, across, H, W)
        of = gather.crops_gradients(grad, table, group, top, left, down, across)
    finally:
        torch.set_num_threads(before)
    for x, y in zip((found, *of), (expected.detach(), *gradients)):
        torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=1e-5 * max(1.0, float(y.abs().max())))


@few
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 63, 64, 65, 150]), st.sampled_from([1, 16, 33, 80]),
    st.sampled_from([1e-3, 0.1, 20.0]), st.sampled_from(DISTANCES), st.sampled_from([1, 2, 5]), st.integers(0, 99),
)  # fmt: skip
def test_wkv(B: int, T: int, C: int, decay: float, distance: str, threads: int, seed: int) -> None:
    """Both ways, with decays of either sign."""
    generator = torch.Generator().manual_seed(seed)
    k, v, grad = torch.randn(3, B, T, C, generator=generator)
    w, u = torch.randn(2, C, generator=generator)
    given, results = (2 * k, v, decay * w, u), []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for function, dtype in ((wkv, torch.float32), (wkv_reference, torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in given]
            out = function(*leaves, distance=distance)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    finally:
        torch.set_num_threads(before)
    # gradients are sums over tokens of what cancels, those of w times distances
    size = max(1.0, results[1][2].abs().max().item()) * v.abs().max().item()
    for name, x, y in zip("ykvwu", *results, strict=True):
        bound = 2e-6 * size * {"w": B * T, "u": B}.get(name, 1)
        torch.testing.assert_close(x, y.float(), rtol=2e-5, atol=bound)


@few
@given(
    st.integers(1, 2), st.sampled_from([1, 2, 63, 64, 65, 150]), st.sampled_from([1, 16, 33, 80]),
    st.sampled_from([1, 4, 16, 19]), st.integers(1, 3), st.sampled_from([1e-3, 0.1, 20.0]), st.sampled_from([1, 2, 5]),
    st.integers(0, 99),
)  # fmt: skip
def test_selective_scan(B: int, T: int, C: int, N: int, G: int, step: float, threads: int, seed: int) -> None:
    """Both ways, with decays that leave nearly all and nearly nothing."""
    generator = torch.Generator().manual_seed(seed)
    u, grad = torch.randn(2, B, T, G * C, generator=generator)
    delta = step * torch.rand(B, T, G * C, generator=generator)
    a = -torch.rand(G * C, N, generator=generator)
    b, c = torch.randn(2, B, T, G, N, generator=generator)
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for function, dtype in ((selective_scan, torch.float32), (selective_scan_reference, torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in (u, delta, a, b, c)]
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    finally:
        torch.set_num_threads(before)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=2e-5, atol=1e-5 * max(1.0, float(y.abs().max())))
