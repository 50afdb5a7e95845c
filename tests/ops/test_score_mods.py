"""Modifications by name, against their definitions written out, on every path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade import masks, score_mods
from saccade.ops.merge import add_sink
from saccade.ops.native import build
from saccade.ops.score_mods import ScoreMod

B, H, K, N, M, D, E = 2, 4, 2, 70, 85, 8, 6
I, J = torch.arange(N)[:, None], torch.arange(M)
PAPER = torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)])[:, None, None]


def parameter(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


#: name: (parameter, modification made of it, scores and parameter -> scores)
Case = tuple[Tensor, Callable[[Tensor], ScoreMod], Callable[[Tensor, Tensor], Tensor]]
CASES: dict[str, Case] = {
    "alibi": (parameter(H), score_mods.alibi, lambda s, p: s + p[:, None, None] * (J - I)),
    "alibi, symmetric": (
        parameter(H),
        lambda p: score_mods.alibi(p, symmetric=True),
        lambda s, p: s - p[:, None, None] * (J - I).abs(),
    ),
    "alibi of the paper": (parameter(1), lambda p: score_mods.alibi(H), lambda s, p: s + PAPER * (J - I)),
    "soft cap": (parameter(1), lambda p: score_mods.soft_cap(1.5), lambda s, p: 1.5 * (s / 1.5).tanh()),
    "relative": (
        parameter(H, 41), score_mods.relative_bias, lambda s, p: s + p[:, (J - I + 20).clamp(0, 40)]
    ),
    "relative for all heads": (
        parameter(1, 3), score_mods.relative_bias, lambda s, p: s + p[:, (J - I + 1).clamp(0, 2)]
    ),
    "bias": (parameter(B, H, N, M), score_mods.bias, lambda s, p: s + p),
    "bias of heads": (parameter(H, N + 3, M + 5), score_mods.bias, lambda s, p: s + p[:, :N, :M]),
    "bias of batch rows": (parameter(B, 1, N, M), score_mods.bias, lambda s, p: s + p),
    "bias for all": (parameter(N, M), score_mods.bias, lambda s, p: s + p),
    "bias of keys": (parameter(B, 1, 1, M), score_mods.bias, lambda s, p: s + p),
    "alibi, then cap": (
        parameter(H),
        lambda p: score_mods.compose(score_mods.alibi(p), score_mods.soft_cap(2.0)),
        lambda s, p: 2 * ((s + p[:, None, None] * (J - I)) / 2).tanh(),
    ),
    "cap, then bias, cap, then bias": (
        parameter(H, N, M),
        lambda p: score_mods.compose(
            score_mods.compose(score_mods.soft_cap(2.0), score_mods.bias(p)),
            score_mods.soft_cap(1.0),
            score_mods.bias(p[:1]),
        ),
        lambda s, p: (2 * (s / 2).tanh() + p).tanh() + p[:1],
    ),
    "composed with a function": (
        parameter(H),
        lambda p: score_mods.compose(score_mods.alibi(p), lambda s, b, h, i, j: s * (1 + h)),
        lambda s, p: (s + p[:, None, None] * (J - I)) * (1 + torch.arange(H)[:, None, None]),
    ),
}  # fmt: skip

MASKS: dict[str, masks.Mask | None] = {
    "none": None,
    "causal": masks.causal(),
    "late": masks.causal(-9),  # the first rows see nothing
    "blocks": masks.blocks(parameter(1, H, 5, 6, seed=4) > 0, 16) & masks.causal(15),
    "documents": masks.documents(torch.arange(N)[None] // 20, torch.arange(M)[None] // 20),
    "padding": masks.padding(parameter(B, M, seed=5) > 0),
}


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (B, H, N, D), (B, K, M, D), (B, K, M, E)
    return [parameter(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes, 1)]


def definition(q: Tensor, k: Tensor, v: Tensor, p: Tensor, mask: masks.Mask | None, change: Any) -> Any:
    k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    scores = change(q @ k.mT * D**-0.5, p)
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(N, M), float("-inf"))
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    return weights @ v, scores.logsumexp(-1)


def with_gradients(function: Callable[..., Any], *given: Tensor) -> list[Tensor]:
    given = tuple(x.detach().clone().requires_grad_() for x in given)
    out, lse = function(*given)
    loss = (out * out.sin().detach()).sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
    grads = torch.autograd.grad(loss, given, allow_unused=True)
    return [out, lse, *(torch.zeros_like(x) if g is None else g for x, g in zip(given, grads))]


@pytest.mark.parametrize("backend", [None, "reference", "stream"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name: str, mask: str, backend: str | None) -> None:
    p, make, change = CASES[name]
    dtypes = (torch.float32, torch.float64) if backend is None else (torch.float64,)
    for dtype in dtypes:
        given = [*inputs(dtype), p.to(dtype)]

        def ours(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Any:
            options: dict[str, Any] = {"mask": MASKS[mask], "score_mod": make(p), "backend": backend}
            plain = saccade.attend(q.detach(), k, v, **options)
            out, lse = saccade.attend(q, k, v, return_lse=True, **options)
            assert torch.equal(plain, out)
            return out, lse

        found = with_gradients(ours, *given)
        expected = with_gradients(lambda *x: definition(*x, MASKS[mask], change), *(x.double() for x in given))
        # of the tensor's scale: gradients of slopes are sums over all pairs that cancel
        tolerance = 1e-10 if dtype == torch.float64 else 3e-5
        for got, truth in zip(found, expected, strict=True):
            scale = max(1.0, float(truth[truth.isfinite()].abs().max()))
            torch.testing.assert_close(got.double(), truth, atol=tolerance * scale, rtol=0.0)


def test_buckets_are_those_of_t5() -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = J - I * 4
    for bidirectional in (True, False):
        table = parameter(3, 32).double()
        buckets = modeling.T5Attention._relative_position_bucket(distance, bidirectional, 32, 50)
        mod = score_mods.bucketed_bias(table, max_distance=50, bidirectional=bidirectional)
        zero, heads = torch.tensor(0), torch.arange(3)[:, None, None]
        found = mod(torch.zeros(3, N, M).double(), zero, heads, I * 4, J)
        assert torch.equal(found, table[:, buckets])


@pytest.mark.parametrize("name", CASES)
def test_a_shift_is_a_later_start(name: str) -> None:
    p, make, _ = CASES[name]
    q, k, v = inputs()
    whole = saccade.attend(q, k, v, score_mod=make(p), mask=masks.causal())
    last = saccade.attend(
        q[:, :, N - 3 :], k, v, score_mod=score_mods.shifted(make(p), N - 3), mask=masks.causal(N - 3)
    )
    torch.testing.assert_close(last, whole[:, :, N - 3 :])


@pytest.mark.parametrize("name", [name for name in CASES if "function" not in name])
def test_pickles_and_copies(name: str) -> None:
    p, make, _ = CASES[name]
    given = parameter(B, H, N, M), torch.arange(B)[:, None, None, None], torch.arange(H)[:, None, None], I, J
    mod = make(p)
    for twin in (pickle.loads(pickle.dumps(mod)), copy.deepcopy(mod)):
        assert torch.equal(mod(*given), twin(*given)) and repr(twin) == repr(mod)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: score_mods.soft_cap(0.0), "cap must be positive, got 0"),
        (lambda: score_mods.soft_cap(float("nan")), "cap must be positive"),
        (lambda: score_mods.alibi(0), "at least one head"),
        (lambda: score_mods.alibi(torch.ones(2, 2)), r"slopes must be floating point \(H,\)"),
        (lambda: score_mods.alibi(torch.ones(2).long()), "slopes must be floating point"),
        (lambda: score_mods.relative_bias(torch.ones(2, 4)), "odd number of distances, got 4"),
        (lambda: score_mods.relative_bias(torch.ones(5)), "table must be floating point"),
        (lambda: score_mods.bucketed_bias(torch.ones(2, 3)), "at least 4, got 3"),
        (lambda: score_mods.bucketed_bias(torch.ones(2, 32), max_distance=8), "above the 8 exact distances"),
        (lambda: score_mods.bias(torch.ones(3)), "table must be floating point"),
        (lambda: score_mods.compose(), "at least one"),
    ],
)
def test_refusals_at_making(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mod", "message"),
    [
        (score_mods.alibi(3), r"alibi\(3 heads\) is for 3 heads, got 4"),
        (score_mods.relative_bias(torch.ones(2, 3)), "is for 2 heads, got 4"),
        (score_mods.bias(torch.ones(N - 1, M)), "does not cover 2 batch rows, 4 heads, queries 0 to 70 and 85 keys"),
        (score_mods.bias(torch.ones(N, M - 1)), "does not cover"),
        (score_mods.shifted(score_mods.bias(torch.ones(N, M)), 1), "queries 1 to 71"),
        (score_mods.compose(score_mods.soft_cap(1.0), score_mods.alibi(3)), "is for 3 heads"),
        (score_mods.alibi(torch.ones(H, device="meta")), "is on meta, but query is on cpu"),
    ],
)
def test_refusals_at_use(mod: ScoreMod, message: str) -> None:
    for call in (saccade.attend, saccade.plan):
        with pytest.raises(ValueError, match=message):
            call(*inputs(), score_mod=mod)
        with pytest.raises(TypeError, match="or a function, got 'alibi'"):
            call(*inputs(), score_mod="alibi")


def test_a_sink_is_one_more_key() -> None:
    """Of a score of its own, and of value 0."""

    def ours(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Any:
        return add_sink(*saccade.attend(q, k, v, mask=masks.causal(-9), return_lse=True), sink)

    def plainly(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Any:
        k, v = (torch.cat([x, x.new_zeros(B, K, 1, x.shape[3])], 2) for x in (k, v))
        mask = masks.dense(torch.cat([masks.causal(-9).dense(N, M)[0, 0], torch.ones(N, 1).bool()], 1))
        mod = lambda s, b, h, i, j: torch.where(j == M, sink[h], s)  # noqa: E731
        return saccade.attend(q, k, v, mask=mask, score_mod=mod, return_lse=True, backend="reference")

    given = [*inputs(), parameter(H).double()]
    for got, truth in zip(with_gradients(ours, *given), with_gradients(plainly, *given), strict=True):
        torch.testing.assert_close(got, truth)
    with pytest.raises(ValueError, match="a logit per head"):
        add_sink(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3), torch.zeros(3))


def test_named_modifications_run_in_c_where_there_is_c(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.refusal(torch.device("cpu"), torch.float32):
        pytest.skip("no compiler")
    q = torch.randn(1, H, 300, 16)
    for mask in (None, masks.causal(), masks.window(40)):
        for mod in (score_mods.alibi(H), score_mods.compose(score_mods.soft_cap(2.0), score_mods.alibi(H))):
            plan = saccade.plan(q, q, q, mask=mask, score_mod=mod)
            assert plan.backend == "blocksparse" and "in C" in plan.reason
    assert saccade.plan(q, q, q, score_mod=lambda s, *_: s).backend == "stream"
    assert saccade.plan(q.double(), q.double(), q.double(), score_mod=mod).backend == "stream"
    # without C, and where it fails although it was expected, the same in torch
    expected = saccade.attend(q, q, q, score_mod=mod, backend="reference")
    monkeypatch.setattr(build, "_loaded", lambda: (None, "no"))
    torch.testing.assert_close(saccade.attend(q, q, q, score_mod=mod), expected)
    monkeypatch.setattr(build, "_outcome", (None, "no"))
    assert saccade.plan(q, q, q, score_mod=mod).backend == "stream"
    torch.testing.assert_close(saccade.attend(q, q, q, score_mod=mod), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs())
    mod = score_mods.compose(score_mods.soft_cap(3.0), score_mods.alibi(PAPER.flatten().to(dtype)))
    found = saccade.attend(q, k, v, mask=masks.causal(), score_mod=mod)
    expected = saccade.attend(*(x.double() for x in (q, k, v)), mask=masks.causal(), score_mod=mod, backend="reference")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


def test_half_precision_slopes_times_large_distances() -> None:
    slopes, zero, j = torch.tensor([0.7, 0.3], dtype=torch.bfloat16), torch.tensor(0), torch.arange(1000, 1010)
    found = score_mods.alibi(slopes)(torch.zeros(10), zero, zero, zero, j)
    torch.testing.assert_close(found, slopes[0].float() * j)


def test_without_keys_a_table_has_a_gradient_of_zero() -> None:
    table = torch.zeros(H, 5, requires_grad=True)
    q, k = torch.randn(1, H, 3, 4), torch.randn(1, H, 0, 4)
    out = saccade.attend(q, k, k, score_mod=saccade.score_mods.relative_bias(table))
    (grad,) = torch.autograd.grad(out.sum(), [table])
    assert not grad.any() and not out.any()
