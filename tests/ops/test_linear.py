"""Linear attention against its slow reference: every decay, every form, forward and backward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.ops import measure
from saccade.ops.linear import LinearState, linear_attend, linear_attend_reference, linear_step

B, H, D, E = 2, 4, 5, 3
KINDS = ["none", "float", "H", "HD", "BHN", "BHND"]


def decay_of(kind: str, n: int, dtype: torch.dtype = torch.float64) -> float | Tensor | None:
    sizes = {"H": (H,), "HD": (H, D), "BHN": (B, H, n), "BHND": (B, H, n, D)}
    return {"none": None, "float": 0.7}[kind] if kind not in sizes else torch.rand(sizes[kind], dtype=dtype)


def qkv(n: int, heads: int = H, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Positive queries and keys, so that denominators are not near 0."""
    return [
        torch.rand(B, H, n, D, dtype=dtype),
        torch.rand(B, heads, n, D, dtype=dtype),
        torch.randn(B, heads, n, E, dtype=dtype),
    ]


def state_of(normalize: bool, dtype: torch.dtype = torch.float64) -> Tensor | LinearState:
    kv = torch.randn(B, H, D, E, dtype=dtype)
    return LinearState(kv, torch.rand(B, H, D, dtype=dtype)) if normalize else kv


def tensors(state: Tensor | LinearState) -> list[Tensor]:
    return list(state) if isinstance(state, LinearState) else [state]


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) if b.numel() else 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "chunk"), [(1, None), (2, 1), (7, 3), (64, 16), (130, None), (150, 32)])
def test_equals_the_reference_forward_and_backward(kind: str, normalize: bool, n: int, chunk: int | None) -> None:
    torch.manual_seed(n)
    leaves, state, decay = qkv(n, heads=2), state_of(normalize), decay_of(kind, n)
    wrt = [x.requires_grad_() for x in [*leaves, *tensors(state), decay] if isinstance(x, Tensor)]
    options = {"decay": decay, "normalize": normalize, "state": state, "scale": 0.3, "return_state": True}
    results = []
    for function, extra in ((linear_attend, {"chunk_size": chunk}), (linear_attend_reference, {})):
        out, last = function(*leaves, **options, **extra)
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in [out, *tensors(last)])
        results.append([out, *tensors(last), *torch.autograd.grad(loss, wrt)])
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape and error(ours, expected) < 1e-11


@pytest.mark.parametrize("kind", ["H", "HD", "BHN", "BHND"])
def test_gradcheck(kind: str) -> None:
    torch.manual_seed(0)
    leaves = [*qkv(6), *state_of(True), decay_of(kind, 6).clamp(min=0.2)]

    def function(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
        out, last = linear_attend(
            q, k, v, decay=decay, normalize=True, state=LinearState(kv, z), return_state=True, chunk_size=4
        )
        return out, *last

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves], fast_mode=True)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_pieces_are_one_pass(kind: str, normalize: bool) -> None:
    torch.manual_seed(0)
    n = 40
    q, k, v = qkv(n, heads=2)
    decay = decay_of(kind, n)
    expected, last = linear_attend(q, k, v, decay=decay, normalize=normalize, return_state=True)
    pieces, state = [], None
    for begin, end in [(0, 0), (0, 17), *((i, i + 1) for i in range(17, n))]:
        part = [x[:, :, begin:end] for x in (q, k, v)]
        now = decay[:, :, begin:end] if kind.startswith("B") else decay
        options = {"decay": now, "normalize": normalize, "state": state}
        if end - begin == 1:
            out, state = linear_step(*part, **options)
        else:
            out, state = linear_attend(*part, **options, return_state=True)
        pieces.append(out)
    assert error(torch.cat(pieces, 2), expected) < 1e-11
    assert all(error(a, b) < 1e-11 for a, b in zip(tensors(state), tensors(last), strict=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_all_to_all(normalize: bool) -> None:
    torch.manual_seed(0)
    (q, _, _), (_, k, v), state = qkv(9), qkv(14, heads=2), state_of(normalize)
    options = {"causal": False, "normalize": normalize, "state": state, "feature_map": torch.exp, "return_state": True}
    (out, last), (expected, expected_last) = (f(q, k, v, **options) for f in (linear_attend, linear_attend_reference))
    assert out.shape == (B, H, 9, E) and error(out, expected) < 1e-12
    assert all(error(a, b) < 1e-12 for a, b in zip(tensors(last), tensors(expected_last), strict=True))
    weights = q.exp() @ k.exp().repeat_interleave(2, 1).mT
    plain = weights @ v.repeat_interleave(2, 1) / (weights.sum(-1, keepdim=True) if normalize else 1)
    assert error(linear_attend(q, k, v, **{**options, "state": None, "return_state": False}), plain) < 1e-12


@pytest.mark.parametrize("kind", ["H", "HD", "BHN", "BHND"])
@pytest.mark.parametrize("low", [0.5, 1e-4, 1e-30, 0.0])
def test_strong_decay_is_safe_and_exact_in_single_precision(kind: str, low: float) -> None:
    """Decays random between a lowest and 1, or all the lowest; outputs and gradients against double precision."""
    torch.manual_seed(0)
    n = 200
    for uniform in (True, False):
        drawn = decay_of(kind, n)
        decay = low + (1 - low) * drawn if uniform else torch.full_like(drawn, low)
        if low == 0.0 and uniform:
            decay = decay * (drawn > 0.3)
        inputs = [*qkv(n, heads=2), decay]
        results = []
        for dtype, function in ((torch.float32, linear_attend), (torch.float64, linear_attend_reference)):
            # the same numbers in both
            leaves = [x.float().to(dtype).requires_grad_() for x in inputs]
            out = function(*leaves[:3], decay=leaves[3])
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for index, (ours, expected) in enumerate(zip(*results, strict=True)):
            if index == 4:  # the factor 0 gets no gradient
                ours, expected = (torch.where(decay > 0, x, 0.0) for x in (ours, expected))
            assert ours.isfinite().all() and error(ours, expected) < 2e-5


@pytest.mark.parametrize("shape", [(1,), (1, 2), (1, 1, 100_000), (1, 1, 100_000, 2)])
@pytest.mark.parametrize("low", [1e-4, 0.5, 0.999])
def test_a_hundred_thousand_tokens(shape: tuple[int, ...], low: float) -> None:
    torch.manual_seed(0)
    n = 100_000
    q, k, v = (torch.rand(1, 1, n, 2).requires_grad_() for _ in range(3))
    decay = (low + (1 - low) * torch.rand(shape)).requires_grad_() if len(shape) > 2 else torch.full(shape, low)
    out = linear_attend(q, k, v, decay=decay, normalize=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (q, k, v)))
    last = [x.detach()[:, :, -400:].double() for x in (q, k, v)]
    now = decay.detach()[:, :, -400:].double() if len(shape) > 2 else decay.double()
    if low < 0.9:  # what came before the last 400 tokens is forgotten
        expected = linear_attend(*last, decay=now, normalize=True)
        assert error(out[:, :, -1:], expected[:, :, -1:]) < 1e-5
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_tokens_and_no_faster(kind: str) -> None:
    """Beyond its results a pass keeps a state per piece: no N x N, no N x D x E."""
    peaks = []
    for n in (8192, 16384):
        q, k, v = (torch.rand(1, 4, n, 16).requires_grad_() for _ in range(3))
        decay = {"H": (4,), "HD": (4, 16), "BHN": (1, 4, n), "BHND": (1, 4, n, 16)}.get(kind)
        decay = 0.9 if kind == "float" else None if decay is None else torch.rand(decay).requires_grad_()

        def step(q: Tensor = q, k: Tensor = k, v: Tensor = v, decay: object = decay) -> None:
            linear_attend(q, k, v, decay=decay).sum().backward()

        peaks.append(measure.peak_bytes(step))
    added = peaks[1] - peaks[0]
    token = 4 * 16 * 4  # bytes of a query
    assert added < 8192 * token * 12, added / (8192 * token)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_layouts(kind: str) -> None:
    torch.manual_seed(0)
    n = 70
    exact = [x.bfloat16() for x in qkv(n, heads=2)]
    decay = decay_of(kind, n, torch.float32)
    # (B, N, H, D) in memory, as projections leave it
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in exact]
    out, state = linear_attend(*inputs, decay=decay, normalize=True, return_state=True)
    expected = linear_attend_reference(*(x.float() for x in exact), decay=decay, normalize=True)
    assert out.dtype == torch.bfloat16 and state.kv.dtype == state.z.dtype == torch.float32
    assert error(out, expected) < 1e-2
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.float().sum(), inputs))


def test_left_padding_is_exact() -> None:
    torch.manual_seed(0)
    q, k, v = qkv(30)
    decay = decay_of("BHN", 30)
    padded = [torch.cat([torch.randn_like(x[:, :, :9]), x], 2) for x in (q, k, v)]
    padded[1][:, :, :9] = 0
    longer = torch.cat([torch.rand_like(decay[:, :, :9]), decay], 2)
    out = linear_attend(*padded, decay=longer, normalize=True)
    assert error(out[:, :, 9:], linear_attend(q, k, v, decay=decay, normalize=True)) < 1e-12
    assert not out[:, :, :9].any()  # rows that may attend to nothing


@pytest.mark.parametrize("kind", ["float", "BHN", "BHND"])
def test_compiles_whole(kind: str) -> None:
    torch.manual_seed(0)
    leaves = [*(x.requires_grad_() for x in qkv(20))]
    decay = decay_of(kind, 20)
    wrt = [*leaves, decay.requires_grad_()] if isinstance(decay, Tensor) else leaves

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attend(q, k, v, decay=decay, normalize=True, feature_map=torch.exp, chunk_size=8)

    torch._dynamo.reset()
    out, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(*leaves), function(*leaves)
    assert error(out, expected) < 1e-12
    grads, expected_grads = (torch.autograd.grad(x.square().sum(), wrt) for x in (out, expected))
    assert all(error(a, b) < 1e-12 for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("empty", [(0, 2, 5), (2, 2, 0)])
@pytest.mark.parametrize("kind", ["none", "float", "token", "channel"])
def test_empty(empty: tuple[int, int, int], kind: str) -> None:
    b, h, n = empty
    q, k, v = (torch.rand(b, h, n, 3, requires_grad=True) for _ in range(3))
    decay = {"none": None, "float": 0.5, "token": torch.rand(b, h, n), "channel": torch.rand(b, h, n, 3)}[kind]
    state = torch.rand(b, h, 3, 3)
    out, last = linear_attend(q, k, v, decay=decay, state=state, return_state=True)
    assert out.shape == (b, h, n, 3) and torch.equal(last, state)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_the_future_does_not_matter() -> None:
    torch.manual_seed(0)
    for kind in ("H", "BHN", "BHND"):
        q, k, v = qkv(33)
        decay = decay_of(kind, 33)
        before = linear_attend(q, k, v, decay=decay, chunk_size=8)
        for x in (q, k, v, *([decay] if kind != "H" else [])):
            x[:, :, 20:] *= 0.5
        assert torch.equal(linear_attend(q, k, v, decay=decay, chunk_size=8)[:, :, :20], before[:, :, :20])


def test_threads_and_inference_mode_share_no_buffers() -> None:
    inputs = [torch.rand(1, 2, 300, 8) for _ in range(4)]
    with torch.inference_mode():
        expected = [linear_attend(x, x, x, decay=0.9) for x in inputs]
    leaf = inputs[0].clone().requires_grad_()
    out = linear_attend(leaf, leaf, leaf, decay=0.9)
    out.sum().backward()
    torch.testing.assert_close(out, expected[0])
    assert leaf.grad.isfinite().all()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda x: linear_attend(x, x, x, decay=0.9), inputs)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_effective_weights() -> None:
    q, k, _ = qkv(6)
    weights = saccade.attention_map(linear_attend, q, k, decay=0.5)
    distance = torch.arange(6)[:, None] - torch.arange(6)
    assert error(weights, ((q @ k.mT) * 0.5 ** distance.clamp(min=0)).tril()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 40),
    chunk=st.sampled_from([1, 2, 5, 8, None]),
    kind=st.sampled_from(KINDS),
    normalize=st.booleans(),
    heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 100),
)
def test_any_shape(n: int, chunk: int | None, kind: str, normalize: bool, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs, decay, state = qkv(n, heads), decay_of(kind, n), state_of(normalize)
    options = {"decay": decay, "normalize": normalize, "state": state}
    out = linear_attend(*inputs, **options, chunk_size=chunk)
    assert error(out, linear_attend_reference(*inputs, **options)) < 1e-11


@pytest.mark.parametrize("tokens", [1, 64, 130, 700])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decayed", [False, True])
def test_inference_in_single_precision(tokens: int, normalize: bool, decayed: bool) -> None:
    """Where there is a compiler this is C: few heads are cut into segments, tokens into chunks."""
    torch.manual_seed(0)
    for heads, kv, width in ((1, 1, 3), (4, 2, 16)):
        q, k = torch.rand(1, heads, tokens, 20).mT.contiguous().mT, torch.rand(1, kv, tokens, 20)
        v = torch.randn(1, tokens, kv, width).transpose(1, 2)
        kv_state = torch.randn(1, heads, 20, width)
        state = LinearState(kv_state, torch.rand(1, heads, 20)) if normalize else kv_state
        decay = torch.rand(heads) / 2 + 0.5 if decayed else None
        given = {"normalize": normalize, "decay": decay, "scale": 0.3, "return_state": True}
        out, after = linear_attend(q, k, v, state=state, **given)
        expected, expected_after = linear_attend_reference(q, k, v, state=state, **given)
        for x, y in zip([out, *tensors(after)], [expected, *tensors(expected_after)], strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-5 * max(1.0, float(y.abs().max())))


def test_bad_arguments() -> None:
    q, k, v = (x.float() for x in qkv(8))
    wrong = [
        lambda: linear_attend(q[0], k, v),
        lambda: linear_attend(q, k.double(), v),
        lambda: linear_attend(q.long(), k.long(), v.long()),
        lambda: linear_attend(q, k[:, :3], v[:, :3]),
        lambda: linear_attend(q, k[:, :, :4], v[:, :, :4]),
        lambda: linear_attend(q, k, v[:, :, :4]),
        lambda: linear_attend(q, k[..., :2], v),
        lambda: linear_attend(q, k, v, decay=0.0),
        lambda: linear_attend(q, k, v, decay=1.5),
        lambda: linear_attend(q, k, v, decay=float("nan")),
        lambda: linear_attend(q, k, v, decay=torch.ones(H + 1)),
        lambda: linear_attend(q, k, v, decay=torch.ones(B, H, 7)),
        lambda: linear_attend(q, k, v, decay=torch.ones(H, dtype=torch.long)),
        lambda: linear_attend(q, k, v, decay=0.5, causal=False),
        lambda: linear_attend(q, k, v, state=torch.zeros(B, H, D, E + 1)),
        lambda: linear_attend(q, k, v, state=state_of(True)),
        lambda: linear_attend(q, k, v, state=state_of(False), normalize=True),
        lambda: linear_attend(q, k, v, chunk_size=0),
        lambda: linear_attend(q, k, v, feature_map=lambda x: x[:, :, :2]),
        lambda: linear_step(q, k, v),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"\S") as raised:
            call()
        assert "\n" not in str(raised.value)


def test_eps_is_added_to_the_sum_of_the_weights() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 2, n, 3, dtype=torch.float64) for n in (5, 7, 7))
    weights = q @ k.mT
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 0.3)
    torch.testing.assert_close(linear_attend(q, k, v, causal=False, normalize=True, eps=0.3), expected)
    for options in ({"causal": True, "normalize": True}, {"causal": False}):
        with pytest.raises(ValueError, match="eps needs"):
            linear_attend(q[:, :, :5], k[:, :, :5], v[:, :, :5], eps=1e-6, **options)
