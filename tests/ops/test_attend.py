"""The front door: all paths agree with the reference, the plan agrees with the call, bad input is one clear line."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade import attend, masks
from saccade.ops.backends import BACKENDS
from saccade.ops.measure import peak_bytes
from saccade.ops.native import build

PATHS = ("sdpa", "blocksparse", "stream")


def qkv(B=1, H=2, K=2, N=5, M=5, D=4, E=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, N, D), (B, K, M, D), (B, K, M, E))
    return [torch.randn(shape, dtype=dtype, generator=g) for shape in shapes]


def test_equals_sdpa_and_its_gradients() -> None:
    ours = [x.requires_grad_() for x in qkv(N=7, M=7)]
    theirs = [x.requires_grad_() for x in qkv(N=7, M=7)]
    a = saccade.attend(*ours, mask=masks.causal())
    b = F.scaled_dot_product_attention(*theirs, is_causal=True)
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.causal(1), masks.window(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_scale(path, scale, mask, dtype) -> None:
    results = []
    for backend in (path, "reference"):
        inputs = [x.requires_grad_() for x in qkv(N=9, M=9, dtype=dtype)]
        alone = saccade.attend(*inputs, mask=mask, scale=scale, backend=backend)
        out, lse = saccade.attend(*inputs, mask=mask, scale=scale, backend=backend, return_lse=True)
        results.append((alone, out, lse, *torch.autograd.grad(alone.sin().sum() + out.sum() + lse.sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, check_dtype=False)


@st.composite
def problems(draw):
    K = draw(st.sampled_from([1, 2]))
    N, M = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    shape = {
        "B": draw(st.integers(1, 2)),
        "H": K * draw(st.integers(1, 2)),
        "K": K,
        "N": N,
        "M": M,
        "D": draw(st.integers(1, 9)),
        "E": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 99)),
    }
    left = draw(st.integers(-3, 20))
    options = [
        None,
        masks.causal(draw(st.integers(-3, 5))),
        masks.window(left, draw(st.integers(-left, 10))),
        masks.prefix(draw(st.integers(0, 45))) | masks.causal(),
        ~masks.window(3, 3),
        masks.window(5, 1, sinks=3),
        masks.documents(torch.arange(N)[None] // 7, torch.arange(M)[None] // 7),
        masks.padding(torch.rand(shape["B"], M, generator=torch.Generator().manual_seed(shape["seed"])) > 0.5),
        torch.rand(shape["B"], shape["H"], N, M, generator=torch.Generator().manual_seed(shape["seed"])) > 0.7,
    ]
    return shape, draw(st.sampled_from(options))


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(PATHS))
def test_every_path_agrees_with_the_reference(problem, path) -> None:
    shape, mask = problem
    ours = [x.requires_grad_() for x in qkv(**shape)]
    reference = [x.requires_grad_() for x in qkv(**shape)]
    out, lse = saccade.attend(*ours, mask=mask, return_lse=True, backend=path)
    expected, expected_lse = saccade.attend(*reference, mask=mask, return_lse=True, backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse, check_dtype=False)
    for o, l in ((out, lse), (expected, expected_lse)):
        finite = torch.where(l.isfinite(), l, 0.0)
        (o.sin().sum() + finite.cos().sum()).backward()
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_the_plan_is_what_happens(problem) -> None:
    shape, mask = problem
    inputs = qkv(**shape)
    forecast = saccade.plan(*inputs, mask=mask)
    called = []
    module = BACKENDS[forecast.backend]
    real = module.run
    module.run = lambda *arguments: called.append(forecast.backend) or real(*arguments)
    try:
        saccade.attend(*inputs, mask=mask)
    finally:
        module.run = real
    # the front door calls the simplest case, plain SDPA, without going through its module
    assert called == [forecast.backend] or (not called and forecast.backend == "sdpa")
    assert 0 <= forecast.density <= 1 and forecast.bytes > 0 and forecast.backend in str(forecast)


@pytest.mark.parametrize("path", [None, *PATHS, "reference"])
def test_rows_that_may_attend_to_nothing_give_zeros(path) -> None:
    inputs = [x.requires_grad_() for x in qkv(N=20, M=20)]
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    out, lse = saccade.attend(*inputs, mask=mask, return_lse=True, backend=path)
    assert not out[:, :, 3].any() and (lse[:, :, 3] == -torch.inf).all() and lse[:, :, 4].isfinite().all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    nothing = saccade.attend(*inputs, mask=torch.zeros(20, 20, dtype=torch.bool), backend=path)
    assert not nothing.any()


@pytest.mark.parametrize("path", [None, *PATHS, "reference"])
@pytest.mark.parametrize("shape", [{"B": 0}, {"N": 0}, {"M": 0}])
def test_empty_axes(path, shape) -> None:
    inputs = [x.requires_grad_() for x in qkv(**shape)]
    out, lse = saccade.attend(*inputs, return_lse=True, backend=path)
    assert out.shape == (*inputs[0].shape[:3], 4) and not out.any()
    assert (lse == -torch.inf).all() and lse.dtype == torch.float64
    (out.sum() + lse.sum()).backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


@pytest.mark.parametrize("path", [None, *PATHS, "reference"])
def test_any_memory_layout_will_do(path) -> None:
    q, k, v = (torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    outs = [saccade.attend(q, k, v, return_lse=True, backend=path)]
    heads_last = [x.contiguous(memory_format=torch.channels_last) for x in (q, k, v)]
    outs.append(saccade.attend(*heads_last, return_lse=True, backend=path))
    gradients = [torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v)) for out, lse in outs]
    for pair in (*zip(*outs, strict=True), *zip(*gradients, strict=True)):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("path", [None, *PATHS, "reference"])
def test_values_of_no_width_still_have_an_lse(path) -> None:
    q, k, v = qkv(N=20, M=20)
    out, lse = saccade.attend(q, k, v[..., :0], mask=masks.window(3), return_lse=True, backend=path)
    expected = saccade.attend(q, k, v, mask=masks.window(3), return_lse=True, backend="reference")[1]
    assert out.shape == (1, 2, 20, 0)
    torch.testing.assert_close(lse, expected, check_dtype=False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(path, dtype) -> None:
    inputs = qkv(H=4, N=40, M=40, D=8, E=8)
    expected = saccade.attend(*inputs, mask=masks.causal(2), backend="reference")
    out = saccade.attend(*(x.to(dtype) for x in inputs), mask=masks.causal(2), backend=path)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=0)


def test_merge_of_two_halves_is_the_whole() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(N=9, M=12))
    a = saccade.attend(q, k[:, :, :5], v[:, :, :5], return_lse=True)
    b = saccade.attend(q, k[:, :, 5:], v[:, :, 5:], return_lse=True)
    out, lse = saccade.merge(*a, *b)
    whole, whole_lse = saccade.attend(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
    for x, y in zip(
        torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v)),
        torch.autograd.grad(whole.sin().sum() + whole_lse.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_merge_with_nothing_is_the_other() -> None:
    q, k, v = qkv()
    out, lse = (x.requires_grad_() for x in saccade.attend(q, k, v, return_lse=True))
    none, none_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    merged = saccade.merge(out, lse, none, none_lse)
    torch.testing.assert_close(merged, (out, lse))
    both = saccade.merge(none.requires_grad_(), none_lse.requires_grad_(), none, none_lse)
    assert not both[0].any() and (both[1] == -torch.inf).all()
    (gradient,) = torch.autograd.grad(merged[0].sum(), lse)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="merge needs"):
        saccade.merge(out, lse, none, none_lse[..., 1:])


def test_nothing_falls_back_to_something_quadratic() -> None:
    # 1 x 2 x 8192 x 8192 as a float mask would be 335 MB
    x = torch.randn(1, 2, 8192, 64)
    mask = masks.window(100) | masks.prefix(8)
    assert saccade.plan(x, x, x, mask=mask).backend == "blocksparse"
    with pytest.raises(ValueError, match="backend 'sdpa' cannot do this: the mask as a tensor would take"):
        saccade.attend(x, x, x, mask=mask, backend="sdpa")
    with pytest.raises(ValueError, match=r"cannot do this: .*dropout"):
        saccade.attend(x, x, x, dropout=0.1, backend="sdpa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: ((q[0], k, v), {}), "query must have 4 axes"),
        (lambda q, k, v: ((q, k.float(), v), {}), "key is torch.float32"),
        (lambda q, k, v: ((q.int(), k, v), {}), "query must be floating point"),
        (lambda q, k, v: ((q, k, None), {}), "value must be a tensor, got NoneType"),
        (lambda q, k, v: ((q, k[..., :2], v), {}), "one head_dim, got 4 and 2"),
        (lambda q, k, v: ((q, k, v[:, :, :3]), {}), "key and value must agree"),
        (lambda q, k, v: ((q, k.repeat(2, 1, 1, 1), v), {}), "one batch size"),
        (lambda q, k, v: ((q, k.repeat(1, 2, 1, 1)[:, :3], v.repeat(1, 2, 1, 1)[:, :3]), {}), "must divide"),
        (lambda q, k, v: ((q, k, v), {"mask": torch.ones(3, 3, dtype=torch.bool)}), "mask must broadcast"),
        (lambda q, k, v: ((q, k, v), {"mask": torch.ones(5, 5)}), "mask must be a bool tensor"),
        (lambda q, k, v: ((q, k, v), {"mask": "causal"}), "mask must be a bool tensor or a mask"),
        (lambda q, k, v: ((q, k, v), {"mask": masks.neighborhood((2, 2), 1)}), "grid of"),
        (lambda q, k, v: ((q, k, v), {"normalize": "hardmax"}), "normalize must be one of"),
        (lambda q, k, v: ((q, k, v), {"backend": "magic"}), "backend must be one of"),
        (lambda q, k, v: ((q, k, v), {"dropout": 1.5}), "dropout must be in"),
        (lambda q, k, v: ((q, k, v), {"memory_mb": 0}), "memory_mb must be positive"),
        (lambda q, k, v: ((q, k, v), {"normalize": "relu", "return_lse": True}), "return_lse needs"),
    ],
)
def test_bad_arguments(change, message) -> None:
    arguments, options = change(*qkv())
    for call in (saccade.attend, saccade.plan):
        with pytest.raises(ValueError, match=message) as error:
            call(*arguments, **options)
        assert "\n" not in str(error.value)


NAN_MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.window(3),
    "grid": masks.neighborhood((4, 6), 3),
    "documents": masks.documents(torch.arange(24)[None] // 7) & masks.causal(),
    "padding": masks.padding(torch.arange(24)[None] < 20),
    "tail": masks.function(lambda b, h, q, k: (k >= 22) & (q % 3 > 0)),
    "tensor": torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.3,
}


@pytest.mark.parametrize("path", [None, *PATHS, "reference"])
@pytest.mark.parametrize("mask", NAN_MASKS.values(), ids=NAN_MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_reaches_the_rows_that_attend_to_it_and_no_others(path, mask, dtype) -> None:
    allowed = torch.ones(24, 24, dtype=torch.bool)
    if mask is not None:
        allowed = masks.dense(mask).mask_BHNM[0, 0] if isinstance(mask, torch.Tensor) else mask.dense(24, 24)[0, 0]
    for place, token in itertools.product(range(3), (7, 23)):
        inputs = qkv(N=24, M=24, dtype=dtype)
        inputs[place][0, 0, token, 1] = torch.nan
        attends = allowed[:, token] if place else (torch.arange(24) == token) & allowed.any(-1)
        for out, lse in (
            (saccade.attend(*inputs, mask=mask, backend=path), None),
            saccade.attend(*inputs, mask=mask, backend=path, return_lse=True),
        ):
            assert torch.equal(out[0, 0].isnan().any(-1), attends)
            assert not out[0, 1].isnan().any()
            if place == 2:
                assert not out[0, 0, :, [0, 2, 3]].isnan().any()
            if lse is not None:
                assert torch.equal(lse[0, 0].isnan(), attends if place < 2 else torch.zeros(24, dtype=torch.bool))


@pytest.mark.parametrize("path", [None, *PATHS, "reference"])
@pytest.mark.parametrize("M", [1, 7, 17])
def test_nan_is_never_lost(path, M) -> None:
    """Torch's kernel gives zeros where every score that does not fill a vector is NaN."""
    last = torch.arange(M)[None] == M - 1
    for mask, place in itertools.product((None, masks.causal(), masks.padding(last), masks.dense(last)), range(2)):
        inputs = qkv(N=2, M=M, dtype=torch.float32)
        inputs[place].fill_(torch.nan)
        assert saccade.attend(*inputs, mask=mask, backend=path).isnan().all(), (mask, place)


@pytest.mark.parametrize("M", [7, 17])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_is_not_lost_when_compiled(M, masked) -> None:
    torch._dynamo.reset()
    mask = masks.dense(torch.arange(M)[None] == M - 1) if masked else None
    call = torch.compile(lambda q, k, v: saccade.attend(q, k, v, mask=mask), backend="aot_eager", fullgraph=True)
    q, k, v = qkv(N=2, M=M, dtype=torch.float32)
    assert call(q, torch.full_like(k, torch.nan), v).isnan().all()


@pytest.mark.parametrize("path", [None, *PATHS])
def test_infinities_are_no_error_and_padding_does_not_matter(path) -> None:
    q, k, v = qkv(N=6, M=6)
    v[:, :, 0, 0], v[:, :, 1, 0] = torch.inf, -torch.inf
    for mask in (None, masks.causal(), masks.window(2)):
        saccade.attend(q, k, v, mask=mask, backend=path)
    inputs = qkv(B=2, N=20, M=20)
    real = torch.arange(20) < torch.tensor([[20], [13]])
    results = []
    for content in (0.0, torch.nan):
        q, k, v = (x.masked_fill(~real[:, None, :, None], content).requires_grad_() for x in inputs)
        out = saccade.attend(q, k, v, mask=masks.padding(real) & masks.causal(), backend=path)[:, :, :13]
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(clean, dirty)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(3), masks.neighborhood((4, 6), 3)])
def test_compiles_whole(mask) -> None:
    torch._dynamo.reset()
    q, k, v = qkv(H=4, K=2, N=24, M=24, dtype=torch.float32)
    call = torch.compile(lambda q, k, v: saccade.attend(q, k, v, mask=mask), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(q, k, v), saccade.attend(q, k, v, mask=mask))


@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["dense", "causal"])
def test_memory_is_linear_whatever_the_strides(mask) -> None:
    """SDPA takes a path of quadratic memory where heads are not laid out densely."""
    q, k, v = (torch.randn(1, 2, 8, 1024).mT for _ in range(3))
    assert q.stride(-1) != 1
    assert peak_bytes(lambda: saccade.attend(q, k, v, mask=mask)) < 1024 * 1024 * 4 / 2
    expected = F.scaled_dot_product_attention(*(x.contiguous() for x in (q, k, v)), is_causal=mask is not None)
    torch.testing.assert_close(saccade.attend(q, k, v, mask=mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["dense", "causal"])
def test_rows_may_overlap(mask, return_lse: bool) -> None:
    """torch's flash kernel reads past such rows."""
    q, k, v = (torch.randn(1, 2, 31 + 15).unfold(-1, 16, 1) for _ in range(3))
    given = {"mask": mask, "return_lse": return_lse}
    expected = saccade.attend(*(x.contiguous() for x in (q, k, v)), backend="reference", **given)
    torch.testing.assert_close(saccade.attend(q, k, v, **given), expected)


def test_plan_says_in_which_language(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 1024, 32)
    mask = masks.window(40)
    monkeypatch.setattr(build, "_outcome", (None, "no compiler here"))
    assert "in torch (no compiler here)" in saccade.plan(q, q, q, mask=mask).reason
    assert "in torch (single precision only)" in saccade.plan(*(q.double(),) * 3, mask=mask).reason
    monkeypatch.setattr(build, "_outcome", (object(), None))
    assert saccade.plan(q, q, q, mask=mask).reason.endswith("forward in C")


def test_autocast_makes_one_type_of_several() -> None:
    q, k, v = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4).bfloat16(), torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match=r"key is torch\.bfloat16"):
        saccade.attend(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert saccade.attend(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["stream", "blocksparse"])
@pytest.mark.parametrize("shape", [(1, 2, 70, 8), (1, 1, 1, 4)])
def test_second_derivatives_are_refused_in_words(backend: str, shape: tuple[int, ...]) -> None:
    """And first ones that are asked for with a graph, as penalties do, are the same."""
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def gradient(backend: str) -> Tensor:
        out = attend(q, k, v, mask=masks.prefix(50), backend=backend)
        return torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]

    gradient("reference").sum().backward()
    found = gradient(backend)
    torch.testing.assert_close(found, gradient("reference"))
    with pytest.raises(RuntimeError, match="has first derivatives only: backend='reference' has all"):
        found.sum().backward()
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(found.sum(), v)


@pytest.mark.parametrize(
    "mask",
    [masks.causal(), masks.causal() & masks.window(3), masks.prefix(5) | masks.causal(), masks.neighborhood(10**8, 5)],
    ids=repr,
)
def test_plans_take_no_longer_for_longer_sequences(mask) -> None:
    """Neither N x M blocks nor anything of length N is made."""
    x = torch.zeros(()).expand(1, 1, 10**8, 4)
    forecasts = []
    assert peak_bytes(lambda: forecasts.append(saccade.plan(x, x, x, mask=mask))) < 10**8
    assert forecasts[0].backend == "blocksparse" and forecasts[0].relative_time < 1


@pytest.mark.parametrize("make", [lambda n: masks.window(40, 3), lambda n: masks.neighborhood(n, 9)])
def test_a_long_forecast_is_a_short_one_many_times(make) -> None:
    short, long = (
        saccade.plan(*(torch.zeros(()).expand(1, 2, n, 32),) * 3, mask=make(n)).relative_time for n in (2**17, 2**20)
    )
    assert long == pytest.approx(short / 8, rel=0.1)
