"""Windows and neighbourhoods: the definition (card `neighborhood`), on tiles as on the whole matrix."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from saccade.ops import masks, windows
from saccade.ops.attend import attend, problem_of
from saccade.ops.masks import Mask
from saccade.ops.merge import merge
from saccade.ops.partitions import window_attend
from saccade.ops.planning import Problem
from saccade.ops.windows.layout import cut_grids

GOLDEN = Path(__file__).parents[1] / "golden" / "neighborhood"


def ask(q: Tensor, k: Tensor, v: Tensor, mask: Mask, return_lse: bool = True, **options) -> Problem:
    given = {
        "score": None,
        "score_mod": None,
        "normalize": "softmax",
        "scale": None,
        "dropout": 0.0,
        "memory_mb": 64.0,
    }
    given |= options
    # the mask as it is: `attend` would simplify it, and leave out keys that nobody sees
    return replace(problem_of(q, k, v, None, return_lse=return_lse, **given), mask=mask)


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options) -> tuple[Tensor, Tensor]:
    problem = ask(q, k, v, mask, **options)
    assert windows.regular(problem) is not None
    out, lse = windows.run(problem, q, k, v)
    assert lse is not None
    return out, lse


def inputs(
    n: int,
    m: int | None = None,
    H: int = 2,
    K: int = 2,
    D: int = 8,
    E: int = 8,
    dtype=torch.float64,
    B: int = 1,
):
    torch.manual_seed(0)
    m = n if m is None else m
    q, k, v = torch.randn(B, H, n, D), torch.randn(B, K, m, D), torch.randn(B, K, m, E)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def assert_equals_reference(mask: Mask, n: int, m: int | None = None, tolerance: float = 1e-10, **options) -> None:
    """Output, LSE and all gradients, those of the LSE included."""
    q, k, v = inputs(n, m, **options)
    out, lse = tiled(q, k, v, mask)
    want, want_lse = attend(q, k, v, mask=mask, return_lse=True, backend="reference")
    seen = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)

    def loss(o: Tensor, s: Tensor) -> Tensor:
        return (o * grad_out).sum() + (s.masked_fill(~seen, 0.0) * grad_lse).sum()

    got = torch.autograd.grad(loss(out, lse), (q, k, v))
    expected = torch.autograd.grad(loss(want, want_lse), (q, k, v))
    for a, b in zip((out, lse[seen], *got), (want, want_lse[seen], *expected)):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


NEIGHBORHOODS = {
    "odd": masks.neighborhood(19, 5),
    "even": masks.neighborhood(20, 6),
    "dilation does not divide": masks.neighborhood(23, 5, 4),
    "1-D causal, stride": masks.neighborhood(21, 6, 1, True, stride=4),
    "2-D": masks.neighborhood((11, 13), (5, 4)),
    "2-D dilated, one axis causal": masks.neighborhood((13, 9), (3, 4), (3, 2), (True, False)),
    "2-D stride": masks.neighborhood((12, 10), (6, 5), stride=(3, 2)),
    "2-D wide": masks.neighborhood((40, 9), (13, 5)),
    "window partitioning": masks.neighborhood((12, 8), 4, stride=4),
    "3-D": masks.neighborhood((5, 7, 9), (3, 4, 5)),
    "3-D dilated and causal": masks.neighborhood((6, 7, 5), (3, 2, 2), (2, 3, 1), (True, False, True)),
    "whole grid": masks.neighborhood((5, 6), (5, 6)),
    "one key": masks.neighborhood((5, 6), 1),
}


@pytest.mark.parametrize("mask", NEIGHBORHOODS.values(), ids=NEIGHBORHOODS)
def test_neighborhood_equals_the_brute_force_mask_forward_and_backward(mask: masks.Neighborhood) -> None:
    n = int(torch.Size(mask.size).numel())
    assert_equals_reference(mask, n)
    assert_equals_reference(mask, n, H=6, K=2, E=5, B=2)
    # the native code, where there is any
    assert_equals_reference(mask, n, H=6, K=2, E=5, B=2, dtype=torch.float32, tolerance=5e-5)


@pytest.mark.parametrize(
    ("mask", "n", "m"),
    [
        (masks.window(5), 40, 40),
        (masks.window(30, 7), 131, 131),
        (masks.window(3, -2), 50, 50),
        (masks.window(0), 17, 17),
        (masks.window(300, 300), 90, 90),
        (masks.window(20, offset=37), 60, 97),
        (masks.window(9, 4), 60, 31),
        (masks.window(1, 40), 1, 30),
        (masks.window(-3, 7), 20, 20),
        (masks.window(400), 700, 700),
    ],
    ids=str,
)
def test_band_equals_the_brute_force_mask_forward_and_backward(mask: Mask, n: int, m: int) -> None:
    assert_equals_reference(mask, n, m)
    assert_equals_reference(mask, n, m, H=4, K=1, E=3)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_small_neighborhood(data: st.DataObject) -> None:
    size = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    kernel = tuple(data.draw(st.integers(1, n)) for n in size)
    dilation = tuple(data.draw(st.integers(1, n // w)) for n, w in zip(size, kernel))
    stride = tuple(data.draw(st.integers(1, w)) for w in kernel)
    causal = tuple(data.draw(st.booleans()) for _ in size)
    mask = masks.neighborhood(size, kernel, dilation, causal, stride=stride)
    assert_equals_reference(mask, int(torch.Size(size).numel()), D=2, E=3)


@pytest.mark.parametrize("module", ["na1d", "na2d", "na3d"])
def test_golden(module: str) -> None:
    with safe_open(GOLDEN / f"{module}.a.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        args = json.loads(file.metadata()["args"])
    grid = tensors["input.q"].shape[1:-2]
    q, k, v = (tensors[f"input.{name}"].flatten(1, -3).transpose(1, 2) for name in "qkv")
    mask = masks.neighborhood(
        tuple(grid), args["kernel_size"], args["dilation"], args["is_causal"], stride=args["stride"]
    )
    n = q.shape[2]
    assert torch.equal(mask.dense(n, n)[0, 0], tensors["output.mask"])
    out, lse = tiled(q, k, v, mask)
    torch.testing.assert_close(out.transpose(1, 2).unflatten(1, grid), tensors["output.out"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.transpose(1, 2).unflatten(1, grid), tensors["output.lse"], atol=1e-5, rtol=1e-5)


def test_every_query_has_the_kernels_number_of_neighbours() -> None:
    for size, kernel, dilation in [(19, 5, 3), ((9, 10), (4, 3), (2, 3)), ((4, 5, 6), (2, 3, 3), (2, 1, 2))]:
        mask = masks.neighborhood(size, kernel, dilation)
        n = int(torch.Size(mask.size).numel())
        assert (mask.dense(n, n).sum(-1) == torch.Size(mask.kernel).numel()).all()


def test_causal_1d_is_a_band() -> None:
    dense = masks.neighborhood(23, 6, 1, True).dense(23, 23)
    assert torch.equal(dense, masks.window(5).dense(23, 23))


def test_mask_is_the_product_of_its_axes() -> None:
    mask = masks.neighborhood((5, 6, 4), (3, 2, 2), (1, 2, 2), (True, False, False))
    axes = [masks.neighborhood(n, w, d, c).dense(n, n)[0, 0] for n, w, d, c in zip(*map(tuple, (
        mask.size, mask.kernel, mask.dilation, mask.causal)))]  # fmt: skip
    product = torch.kron(torch.kron(axes[0].int(), axes[1].int()), axes[2].int()).bool()
    assert torch.equal(mask.dense(120, 120)[0, 0], product)


def test_whole_grid_is_dense_attention_and_one_key_gives_its_value() -> None:
    q, k, v = inputs(30)
    torch.testing.assert_close(
        tiled(q, k, v, masks.neighborhood((5, 6), (5, 6)))[0], F.scaled_dot_product_attention(q, k, v)
    )
    assert torch.equal(tiled(q, k, v, masks.neighborhood((5, 6), 1))[0], v)


def test_dilation_is_each_residue_class_by_itself() -> None:
    q, k, v = inputs(23)
    whole = tiled(q, k, v, masks.neighborhood(23, 5, 4))[0]
    for r in range(4):
        part = [x[:, :, r::4] for x in (q, k, v)]
        mask = masks.neighborhood(part[0].shape[2], 5)
        torch.testing.assert_close(whole[:, :, r::4], tiled(*part, mask)[0])


def test_stride_of_the_kernel_is_window_partitioning() -> None:
    q, k, v = inputs(12 * 8)
    whole = tiled(q, k, v, masks.neighborhood((12, 8), 4, stride=4))[0]
    torch.testing.assert_close(whole, window_attend(q, k, v, (12, 8), 4))


def test_interior_queries_of_a_shifted_input_give_shifted_outputs() -> None:
    q, k, v = inputs(20 * 18)
    mask = masks.neighborhood((20, 18), (5, 3))
    out = tiled(q, k, v, mask)[0].unflatten(2, (20, 18))
    moved = [x.unflatten(2, (20, 18)).roll((3, 2), (2, 3)).flatten(2, 3) for x in (q, k, v)]
    moved_out = tiled(*moved, mask)[0].unflatten(2, (20, 18))
    torch.testing.assert_close(moved_out[:, :, 5:18, 3:17], out[:, :, 2:15, 1:15])


def test_merge_with_extra_keys_is_one_softmax_forward_and_gradient() -> None:
    q, k, v = inputs(30)
    extra_k, extra_v = (torch.randn(1, 2, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = masks.neighborhood((5, 6), 3)
    extra = attend(q, extra_k, extra_v, return_lse=True, backend="reference")
    out, _ = merge(*tiled(q, k, v, mask), *extra)
    both = torch.cat([mask.dense(30, 30), torch.ones(1, 1, 30, 7, dtype=torch.bool)], -1)
    want = attend(q, torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2), mask=both, backend="reference")
    torch.testing.assert_close(out, want)
    leaves, grad = (q, k, v, extra_k, extra_v), torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(a, b)


def test_only_boxes_that_the_neighbourhood_needs_are_visited() -> None:
    q = k = v = torch.empty(1, 1, 4096, 64)
    problem = ask(q, k, v, masks.neighborhood((64, 64), (13, 13)))
    spec = windows.regular(problem)
    assert spec is not None
    for backward in (False, True):
        (grid,) = cut_grids(spec, 4096, 4096, 1, backward)
        computed = torch.zeros(64, 64, dtype=torch.long)
        for part in grid.parts:
            # the seven queries at a border share their 13 keys; elsewhere a box is the tile and its halo
            for segment in (part.segments[part.order.index(axis)] for axis in (0, 1)):
                border = segment.query in (0, 57)
                assert segment.box == (13 if border else segment.tile + 12)
                assert segment.tile == 7 or not border
                assert segment.key >= 0 and segment.key + segment.span <= 64
            one, two = (part.segments[part.order.index(axis)] for axis in (0, 1))
            computed[one.query : one.query + one.queries, two.query : two.query + two.queries] += part.box
            assert part.pairs == one.queries * two.queries * part.box
        assert (computed >= 169).all() and computed.sum() == sum(part.pairs for part in grid.parts)
    assert windows.density(problem) < 0.075


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert_equals_reference(masks.window(20), 100, dtype=dtype, tolerance=tolerance)
    assert_equals_reference(masks.neighborhood((9, 10), 5), 90, dtype=dtype, tolerance=tolerance)


def test_gradcheck() -> None:
    q, k, v = inputs(12, D=2, E=3)
    for mask in (masks.window(3), masks.neighborhood((4, 3), (3, 2))):
        assert torch.autograd.gradcheck(lambda *x, mask=mask: tiled(*x, mask), (q, k, v))


def test_strided_inputs_and_a_small_memory_bound() -> None:
    q, k, v = (torch.randn(2, 150, 3, 8).transpose(1, 2) for _ in range(3))
    for mask in (masks.window(17), masks.neighborhood((10, 15), (5, 7))):
        want = attend(q, k, v, mask=mask, backend="reference")
        for memory_mb in (64.0, 0.01):
            torch.testing.assert_close(tiled(q, k, v, mask, memory_mb=memory_mb)[0], want)


def test_what_is_kept_between_calls_serves_other_modes_threads_and_inputs() -> None:
    mask = masks.neighborhood((10, 15), (5, 7), (1, 2))
    first, second = inputs(150), [x.detach() + 1.0 for x in inputs(150)]
    with torch.inference_mode():
        inside = tiled(*(x.detach() for x in first), mask)[0].clone()
    out = tiled(*first, mask)[0]
    torch.testing.assert_close(out.detach(), inside.clone())
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda x: tiled(*x, mask)[0].detach(), [first, second] * 6))
    for i, result in enumerate(results):
        q, k, v = second if i % 2 else first
        torch.testing.assert_close(result, attend(q, k, v, mask=mask, backend="reference").detach())
    torch.autograd.grad(out.sum(), first)


def test_lse_is_none_unless_asked_for() -> None:
    q, k, v = inputs(20)
    assert windows.run(ask(q, k, v, masks.window(3), return_lse=False), q, k, v)[1] is None


def test_compiles_into_one_graph() -> None:
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(40))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        problem = ask(q, k, v, masks.window(5, 9) & masks.causal(2), return_lse=False)
        assert windows.regular(problem) is not None
        return windows.run(problem, q, k, v)[0] * windows.relative_time(problem)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = compiled(q, k, v), function(q, k, v)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_memory_is_linear() -> None:
    """No buffer of a long window grows with N x M: the largest tensor allocated is a copy of an input, or a piece."""
    n = 32768
    q, k, v = (torch.randn(1, 1, n, 4) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        windows.run(ask(q, k, v, masks.window(15), return_lse=False), q, k, v)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 2 * 2**20 * torch.get_num_threads() + 4 * q.nbytes


def test_what_is_not_regular() -> None:
    q, k, v = inputs(20)
    for mask in (
        masks.causal(),
        masks.window(3) & masks.prefix(5),
        masks.window(3) & masks.window(-5, 9),
        None,
    ):
        assert windows.regular(ask(q, k, v, mask)) is None
    assert windows.regular(ask(q, k, v, masks.window(3), return_lse=False, normalize="relu")) is None
    assert windows.regular(ask(q, k, v, masks.window(3), return_lse=False, dropout=0.1)) is None
    assert windows.regular(ask(q, k, v, masks.window(3), score_mod=lambda s, b, h, i, j: s)) is None
    with pytest.raises(ValueError, match="must be a window or a neighbourhood"):
        windows.run(ask(q, k, v, masks.causal()), q, k, v)


def test_expected_time_follows_the_window() -> None:
    q = torch.empty(1, 4, 16384, 64)
    times = [windows.relative_time(ask(q, q, q, masks.window(w))) for w in (127, 511, 2047)]
    assert times == sorted(times) and times[1] < 0.06
    assert windows.extra_bytes(ask(q, q, q, masks.window(511))) < 8 * q.nbytes
