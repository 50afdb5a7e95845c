from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saccade.attention.fast import FastmaxAttention, fastmax_attend, fastmax_normalize
from saccade.layers.softmax_attention import SoftmaxAttention

STREAMING = [
    {"normalization": "plain"},
    {"normalization": "standardized"},
    {"normalization": "limited", "norm_bound": 3.0},
]
EVERY = [*STREAMING, {"normalization": "centered"}, {"normalization": "limited", "limit": 0.8}]


def heads(
    B: int = 2, H: int = 3, N: int = 50, D: int = 5, E: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(N)
    return [torch.randn(B, H, N, width, dtype=dtype, requires_grad=True) for width in (D, D, E)]


def explicit(
    q: Tensor, k: Tensor, v: Tensor, degree: int, causal: bool, normalization: str, **options: float
) -> Tensor:
    """The matrix A, written out from the card."""
    D = q.shape[-1]

    def norm(x: Tensor) -> Tensor:
        if normalization == "standardized":
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        if normalization == "centered":
            x = x - x.mean(2, keepdim=True)
            return x / x.norm(dim=-1).amax(2)[..., None, None]
        if normalization == "limited":
            largest = options.get("norm_bound") or x.norm(dim=-1).amax(2)[..., None, None]
            return options.get("limit", 1.0) * x / largest
        return x / math.sqrt(8 * math.sqrt(D))

    x = norm(q) @ norm(k).mT
    A = 1 + x + (x**2 / 2 if degree == 2 else 0)
    if causal:
        A = A.tril()
    return (A / A.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [1, 2])
def test_factorised_equals_explicit_forward_and_backward(degree: int, causal: bool, options: dict) -> None:
    tensors = heads()
    if degree == 1 and options["normalization"] == "standardized":
        options = {"normalization": "plain"}  # with x < -1 a denominator of degree 1 may pass through 0
    ours = fastmax_attend(*tensors, degree=degree, causal=causal, chunk_size=8, **options)
    expected = explicit(*tensors, degree, causal, **options)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, tensors, grad) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one_and_weights_are_positive(causal: bool) -> None:
    q, k, _ = heads()
    weights = fastmax_attend(
        5 * q,
        5 * k,
        torch.eye(50, dtype=torch.float64).expand(2, 3, 50, 50),
        causal=causal,
        normalization="plain",
        temperature=0.5,
    )
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 50, dtype=torch.float64))
    seen = torch.ones(50, 50, dtype=torch.bool).tril() if causal else torch.ones(50, 50, dtype=torch.bool)
    assert (weights[..., seen] > 0).all() and (weights[..., ~seen] == 0).all()


@pytest.mark.parametrize(("degree", "order"), [(1, 2), (2, 3)])
def test_error_against_softmax_falls_with_the_temperature(degree: int, order: int) -> None:
    q, k, v = heads()
    errors = []
    for temperature in (64.0, 128.0, 256.0):
        ours = fastmax_attend(q, k, v, degree=degree, normalization="plain", temperature=temperature, causal=True)
        scores = (q @ k.mT / (temperature * math.sqrt(5))).masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf)
        errors.append((ours - scores.softmax(-1) @ v).abs().max().item())
    for earlier, later in zip(errors, errors[1:], strict=False):
        assert earlier / later == pytest.approx(2**order, rel=0.1)
    mean = fastmax_attend(q, k, v, normalization="plain", temperature=1e12)
    torch.testing.assert_close(mean, v.mean(2, keepdim=True).expand_as(mean))
    running = fastmax_attend(q, k, v, normalization="plain", temperature=1e12, causal=True)
    torch.testing.assert_close(running, v.cumsum(2) / torch.arange(1, 51)[:, None])


@pytest.mark.parametrize("options", STREAMING, ids=str)
def test_causal_state_and_future(options: dict) -> None:
    module = FastmaxAttention(12, 3, causal=True, num_kv_heads=1, head_dim=6, **options).double()
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    expected = module(x)
    changed = x.clone()
    changed[:, 20:] += 1
    torch.testing.assert_close(module(changed)[:, :20], expected[:, :20])
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 3:9] = False
    padded, cache, sizes = module(x, mask=mask), module.new_cache(2), set()
    parts = [module(x[:, :11], cache=cache, mask=mask[:, :11])]
    for i in range(11, 30):
        parts.append(module(x[:, i : i + 1], cache=cache, mask=mask[:, : i + 1]))
        sizes.add(cache.nbytes)
    torch.testing.assert_close(torch.cat(parts, 1), padded)
    # half of the products of channels, and the memory does not grow
    assert sizes == {8 * 2 * 3 * (1 + 6 + 21) * 7}


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_padded_tokens_do_not_count(options: dict) -> None:
    module = FastmaxAttention(12, 3, **options).double()
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 19:] = False
    torch.testing.assert_close(module(x, mask=mask)[:, :19], module(x[:, :19]))
    x[:, 19:] *= 100
    torch.testing.assert_close(module(x, mask=mask)[:, :19], module(x[:, :19]))
    module = FastmaxAttention(12, 3, rope=False, **options).double()
    context = torch.randn(2, 30, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x[:, :7], context, mask=mask), module(x[:, :7], context[:, :19]))


def test_statistics_of_all_tokens_leak_the_future() -> None:
    q, k, v = heads()
    later = k.detach().clone()
    later[:, :, 40:] *= 10
    ours = [fastmax_attend(q, key, v, causal=True, normalization="centered")[:, :, :40] for key in (k, later)]
    assert not torch.allclose(*ours)
    for name in ("centered", "limited"):
        with pytest.raises(ValueError, match="cannot decode"):
            FastmaxAttention(12, 3, causal=True, normalization=name).new_cache(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [1, 2])
def test_dropout_is_on_features_and_right_on_average(degree: int, causal: bool) -> None:
    q, k, v = (x.detach() for x in heads(1, 1, 300, 4, 2))
    q.requires_grad_()
    options = {"degree": degree, "causal": causal, "normalization": "limited"}
    torch.manual_seed(0)
    drawn = fastmax_attend(q, k, v, dropout=0.3, **options)
    grad = torch.autograd.grad(drawn.sum(), q)[0]
    assert not torch.allclose(drawn, fastmax_attend(q, k, v, **options)) and grad.isfinite().all()
    # the gradient belongs to the features that were drawn
    step, direction = 1e-6, torch.randn_like(q)
    values = []
    for sign in (1, -1):
        torch.manual_seed(0)
        values.append(fastmax_attend(q.detach() + sign * step * direction, k, v, dropout=0.3, **options).sum())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), (grad * direction).sum(), rtol=1e-5, atol=1e-6)
    # dropped at rate 0 the path is the plain one
    torch.testing.assert_close(fastmax_attend(q, k, v, dropout=1e-12, **options), fastmax_attend(q, k, v, **options))


def test_normalisations() -> None:
    q, _, _ = heads()
    assert fastmax_normalize(q, "centered").norm(dim=-1).amax(2).allclose(torch.ones(2, 3, dtype=torch.float64))
    assert fastmax_normalize(q, "centered").mean(2).abs().max() < 1e-12
    assert fastmax_normalize(q, "limited", limit=0.5).norm(dim=-1).amax(2).allclose(torch.full((2, 3), 0.5).double())
    assert fastmax_normalize(q, "standardized").mean(-1).abs().max() < 1e-12
    assert fastmax_normalize(torch.zeros(1, 1, 4, 3), "centered").isfinite().all()


def test_from_softmax_takes_the_projections() -> None:
    softmax = SoftmaxAttention(16, 4, causal=True, num_kv_heads=2)
    fast = FastmaxAttention.from_softmax(softmax, normalization="plain", temperature=1.0)
    assert fast.causal and torch.equal(fast.k_proj.weight, softmax.k_proj.weight)
    x = 0.1 * torch.randn(1, 9, 16)  # scores so small that the Taylor series has converged
    torch.testing.assert_close(fast(x), softmax(x), atol=1e-6, rtol=0)


def test_bad_arguments() -> None:
    q, k, v = heads()
    with pytest.raises(ValueError, match=r"degree must be 1 or 2, got 3"):
        fastmax_attend(q, k, v, degree=3)
    with pytest.raises(ValueError, match=r"normalization must be one of .*, got 'none'"):
        FastmaxAttention(12, 3, normalization="none")
    with pytest.raises(ValueError, match=r"a1\^2 <= 4 a0 a2"):
        FastmaxAttention(12, 3, coefficients=(0.1, 1.0, 0.5))
    with pytest.raises(ValueError, match=r"temperature must be positive"):
        FastmaxAttention(12, 3, temperature=0.0)
    with pytest.raises(ValueError, match=r"dropout must be in"):
        FastmaxAttention(12, 3, dropout=1.0)
    with pytest.raises(ValueError, match=r"takes padding .* as its mask, got any other pairs"):
        FastmaxAttention(12, 3)(torch.randn(1, 4, 12), mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the cache is for 2 sequences, got 1"):
        module = FastmaxAttention(12, 3, causal=True, rope=False)
        module(torch.randn(1, 4, 12), cache=module.new_cache(2))
