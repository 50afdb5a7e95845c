from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import masks
from saccade.attention.slay import (
    VARIANTS,
    SLAYAttention,
    YatAttention,
    positive_features,
    quadrature,
    yat_attend,
    yat_kernel,
)
from saccade.layers.softmax_attention import SoftmaxAttention

POSITIVE = ("anchor", "hadamard", "laplace")


def layer(variant: str = "anchor", **options: object) -> SLAYAttention:
    torch.manual_seed(0)
    sizes = {"num_nodes": 2, "num_features": 6, "epsilon": 0.01, **options}
    if variant not in ("hadamard", "laplace"):
        sizes.setdefault("num_anchors", 5)
    return SLAYAttention(12, 3, **{"variant": variant, "ridge": 0.5, **sizes}).double()


def unit(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


def features(module: SLAYAttention, x_BHND: Tensor) -> Tensor:
    """All features of a token, written out: psi (x) sqrt(w) phi."""
    factors = module.factors(x_BHND)
    if module.variant in ("hadamard", "laplace"):
        return factors
    psi, phi = factors.split([factors.shape[-1] - module.width, module.width], -1)
    return torch.einsum("bhnp,bhnm->bhnpm", psi, phi).flatten(-2)


def explicit(module: SLAYAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = features(module, q) @ features(module, k).mT
    if causal:
        scores = scores.tril()
    total = scores.sum(-1, keepdim=True)
    small = module.variant in ("hadamard", "laplace")
    return scores @ v / (total.clamp(min=1e-6) if small else total + 1e-6)


def test_quadrature_tends_to_the_kernel() -> None:
    x, epsilon = torch.linspace(-0.9, 0.9, 37, dtype=torch.float64), 0.01
    errors = []
    for nodes in (1, 2, 3, 5, 8):
        s, w = quadrature(nodes, epsilon)
        ours = (w * x[:, None].square() * (2 * s * x[:, None]).exp()).sum(-1)
        errors.append(((ours - yat_kernel(x, epsilon)).norm() / yat_kernel(x, epsilon).norm()).item())
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.2
    s, w = quadrature(1, epsilon)
    assert s.item() == pytest.approx(1 / 2.01) and w.item() == pytest.approx(1 / 2.01)
    s, w = quadrature(2, epsilon)
    assert s.tolist() == pytest.approx([0.2914, 1.6986], abs=1e-4)
    assert w.tolist() == pytest.approx([0.4247, 0.0729], abs=1e-4)
    # laplace: C^2 / 4 / (C - 2 x)
    s, w = quadrature(40, epsilon, "laplace")
    ours = (w * (2 * s * x[:, None]).exp()).sum(-1)
    torch.testing.assert_close(ours, 2.01**2 / 4 / (2.01 - 2 * x), rtol=1e-3, atol=0)


def test_error_falls_with_the_number_of_positive_features() -> None:
    q, k = unit(40, 8), unit(40, 8, seed=1)
    s, w = quadrature(1, 0.01)  # a second node, s = 1.7, has a tail too heavy for so few draws
    exact = (w * (2 * s * (q @ k.mT)[..., None]).exp()).sum(-1)
    errors = []
    for M in (8, 64, 512, 4096):
        squares = []
        for seed in range(8):
            omega = torch.randn(1, 1, 8, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            a, b = (positive_features(u[None, None], omega, s, w) for u in (q, k))
            squares.append(((a @ b.mT)[0, 0] - exact).square().mean() / exact.square().mean())
        errors.append(torch.stack(squares).mean().sqrt().item())
    # Monte Carlo: each eightfold number divides the error by about sqrt(8)
    for earlier, later in zip(errors, errors[1:], strict=False):
        assert 1.7 < earlier / later < 5.0
    assert errors[-1] < 0.1


@pytest.mark.parametrize("variant", ["anchor", "maclaurin", "tensorsketch"])
def test_polynomial_features_on_average(variant: str) -> None:
    q, k = unit(6, 4), unit(6, 4, seed=1)
    x = q @ k.mT
    # the scale cancels: for anchors (1 + 2 x^2) / (d (d + 2)), for random projections x^2 / d^2
    expected = {"anchor": (1 + 2 * x**2) / 24, "maclaurin": x**2 / 16, "tensorsketch": x**2}[variant]
    torch.manual_seed(0)
    many = 40000 if variant != "tensorsketch" else 4096
    module = SLAYAttention(4, 1, variant=variant, num_anchors=many).double()
    a, b = (module.polynomial_features(u[None, None])[0, 0] for u in (q, k))
    torch.testing.assert_close(a @ b.mT, expected, atol=0.03 * expected.abs().max().item() + 1e-3, rtol=0)


def test_nystrom_is_exact_on_its_anchors() -> None:
    module = SLAYAttention(8, 1, variant="nystrom", num_anchors=4, ridge=1e-5).double()
    psi = module.polynomial_features(module.anchors[None, None])[0, 0]
    squares = (module.anchors @ module.anchors.mT).square()
    torch.testing.assert_close(4 * psi @ psi.mT, squares, atol=1e-3, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_matrix_of_feature_products(variant: str, causal: bool) -> None:
    module = layer(variant, chunk_size=8)
    q, k, v = (torch.randn(2, 3, 45, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    call = {"query_mask_BN": None, "mask_BM": None, "causal": causal}
    ours, expected = module.aggregate(q, k, v, **call), explicit(module, q, k, v, causal)
    scale = expected.abs().max().item()
    torch.testing.assert_close(ours, expected, atol=1e-9 * scale, rtol=1e-9)
    for size in (1, 16, 128):
        module.chunk_size = size
        torch.testing.assert_close(module.aggregate(q, k, v, **call), ours, atol=1e-9 * scale, rtol=1e-9)
    if variant in POSITIVE:
        grad = torch.randn_like(ours)
        for a, b in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("variant", POSITIVE)
def test_scores_are_never_negative_and_constants_stay(variant: str) -> None:
    module = layer(variant)
    x = 10 * torch.randn(2, 3, 60, 4, dtype=torch.float64)
    assert (features(module, x) >= 0).all()
    v = torch.full((2, 3, 60, 2), 7.0, dtype=torch.float64)
    call = {"query_mask_BN": None, "mask_BM": None, "causal": True}
    torch.testing.assert_close(module.aggregate(x, x, v, **call), v, atol=1e-2, rtol=0)
    # the scale of a token does not matter
    scaled = x * torch.rand(2, 3, 60, 1, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(module.factors(scaled), module.factors(x))


@pytest.mark.parametrize("variant", POSITIVE)
def test_causal_state_padding_and_future(variant: str) -> None:
    module = SLAYAttention(12, 3, num_kv_heads=1, variant=variant, num_nodes=2, num_features=4, num_anchors=5).double()
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 20:] += 1
    torch.testing.assert_close(module(changed)[:, :20], module(x)[:, :20])
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 3:9] = False
    padded, cache, sizes = module(x, mask=mask), module.new_cache(2), set()
    parts = [module(x[:, :11], cache=cache, mask=mask[:, :11])]
    for i in range(11, 30):
        parts.append(module(x[:, i : i + 1], cache=cache, mask=mask[:, : i + 1]))
        sizes.add(cache.nbytes)
    torch.testing.assert_close(torch.cat(parts, 1), padded)
    assert sizes == {8 * 2 * 3 * (8 * (5 if variant == "anchor" else 1)) * 5}
    # leaving tokens out is as if they had not been there
    kept = module(x[:1, mask[0]])
    torch.testing.assert_close(padded[:1, mask[0]], kept)


def test_exact_form() -> None:
    q, k, v = (torch.randn(2, 3, 33, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    x = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    scores = yat_kernel(x, 0.01).tril()
    expected = scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)
    grad = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, (q, k, v), grad)
    for backend in ("stream", "reference"):
        ours = yat_attend(q, k, v, mask=masks.causal(), backend=backend)
        torch.testing.assert_close(ours, expected)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), theirs, strict=True):
            torch.testing.assert_close(a, b)
    ours = yat_attend(q, k, v)
    torch.testing.assert_close(yat_attend(-3 * q, -0.5 * k, v), ours)
    assert not torch.allclose(yat_attend(-q, k, v), ours)
    # the kernel's largest value is 1 / epsilon, at x = 1
    assert yat_kernel(torch.tensor(1.0, dtype=torch.float64), 0.01).item() == pytest.approx(100)


def test_anchors_come_near_their_own_limit_as_features_are_added() -> None:
    """Relative error of the layer's output against the kernel that its features have on average."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 1, 64, 8, dtype=torch.float64) for _ in range(3))
    x = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    s, w = quadrature(2, 0.01)
    scores = ((1 + 2 * x**2) * (w * (2 * s * x[..., None]).exp()).sum(-1)).tril()
    expected = scores @ v / scores.sum(-1, keepdim=True)
    errors = []
    for M, P in ((4, 4), (32, 32), (256, 256)):
        draws = []
        for seed in range(4):
            torch.manual_seed(seed)
            module = SLAYAttention(8, 1, num_nodes=2, num_features=M, num_anchors=P, epsilon=0.01).double()
            out = module.aggregate(q, k, v, query_mask_BN=None, mask_BM=None, causal=True)
            draws.append((out - expected).norm() / expected.norm())
        errors.append(torch.stack(draws).mean().item())
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


def test_exact_layer_decodes_and_takes_masks() -> None:
    module = YatAttention(12, 3, num_kv_heads=1).double()
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[1, 2:5] = False
    expected, cache = module(x, mask=mask), module.new_cache(2)
    parts = [module(x[:, :6], cache=cache, mask=mask[:, :6])]
    parts += [module(x[:, i : i + 1], cache=cache, mask=mask[:, : i + 1]) for i in range(6, 15)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    torch.testing.assert_close(expected[1:, mask[1]], module(x[1:, mask[1]]))


def test_buffers_are_saved_and_from_softmax_takes_the_projections() -> None:
    for variant in VARIANTS:
        first, second = layer(variant), layer(variant)
        torch.manual_seed(5)
        second.load_state_dict(
            SLAYAttention(12, 3, variant=variant, num_nodes=2, num_features=6, num_anchors=5).state_dict()
        )
        x = torch.randn(1, 7, 12, dtype=torch.float64)
        assert not torch.allclose(first(x), second(x))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x), second(x))
    softmax = SoftmaxAttention(16, 4, causal=True, rope=False)
    converted = SLAYAttention.from_softmax(softmax)
    assert converted.causal and not converted.rope and torch.equal(converted.q_proj.weight, softmax.q_proj.weight)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"variant must be one of .*, got 'yat'"):
        SLAYAttention(12, 3, variant="yat")
    with pytest.raises(ValueError, match=r"num_features must be positive, got 0"):
        SLAYAttention(12, 3, num_features=0)
    with pytest.raises(ValueError, match=r"epsilon must be positive, got -1"):
        YatAttention(12, 3, epsilon=-1)
    with pytest.raises(ValueError, match=r"takes padding .* as its mask, got a window"):
        layer()(torch.randn(1, 4, 12, dtype=torch.float64), mask=masks.window(2))
    with pytest.raises(ValueError, match=r"a causal layer takes no context"):
        layer()(*torch.randn(2, 1, 4, 12, dtype=torch.float64))
    assert math.isfinite(layer()(torch.zeros(1, 3, 12, dtype=torch.float64)).sum().item())
