"""Bidirectional WKV against the weights of all pairs: both distances, both forms, forward and backward, any decay."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saccade.ops.native import build
from saccade.ops.wkv import DISTANCES, wkv, wkv_reference
from saccade.ops.wkv.scan import around

CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "c"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form of single precision; double is always computed in torch."""
    if request.param == "torch":
        with build.turned_off("not in this test"):
            yield request.param
    else:
        if reason := build.refusal(CPU, torch.float32):
            pytest.skip(f"no native code: {reason}")
        yield request.param


def inputs(B: int, T: int, C: int, decay: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """k, v, w, u; decay of either sign in turn."""
    torch.manual_seed(T)
    sign = torch.ones(C, dtype=dtype)
    sign[1::2] = -1
    w = decay * sign * torch.rand(C, dtype=dtype).clamp(min=0.1)
    return [2 * torch.randn(B, T, C, dtype=dtype), torch.randn(B, T, C, dtype=dtype), w, torch.randn(C, dtype=dtype)]


def values(function: object, given: list[Tensor], **options: object) -> list[Tensor]:
    """Output, and the gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = function(*leaves, **options)  # type: ignore[operator]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("T", "chunks"), [(1, 16), (2, 16), (3, 2), (16, 16), (17, 16), (40, 3), (75, 16), (101, 1)])
def test_equals_the_reference_forward_and_backward(distance: str, T: int, chunks: int) -> None:
    given = inputs(2, T, 5)
    options = {"distance": distance, "chunks": chunks}
    for ours, expected in zip(values(wkv, given, **options), values(wkv_reference, given, **options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("B", "T", "C"), [(1, 1, 1), (2, 7, 3), (1, 64, 16), (2, 65, 17), (1, 200, 70), (3, 131, 300)])
def test_single_precision_in_either_form(form: str, distance: str, B: int, T: int, C: int) -> None:
    given = inputs(B, T, C, 0.3)
    expected = values(wkv, given, distance=distance)
    ours = values(wkv, [x.float() for x in given], distance=distance)
    for found, truth in zip(ours, expected, strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5 * max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("decay", [1e-6, 5.0, 300.0, 1e6])
def test_any_decay_is_safe_and_exact_in_single_precision(form: str, distance: str, decay: float) -> None:
    """Exponents up to 4e8, of either sign, where neither the weights nor the exponents themselves fit into float32."""
    given = inputs(1, 400, 4, decay, torch.float32)
    expected = values(wkv_reference, [x.double() for x in given], distance=distance)
    # of what cancels in the gradients: of k sums of p g (v - y), of w these times distances
    cancel = (expected[2].abs().max() * given[1].abs().max()).item()
    scales = {"y": 1.0, "k": cancel, "v": cancel, "w": 400 * cancel, "u": cancel}
    for name, found, truth in zip("ykvwu", values(wkv, given, distance=distance), expected, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6 * scales[name])


def test_keys_that_do_not_fit_into_an_exponential(form: str) -> None:
    k, v, w, u = inputs(1, 50, 4, dtype=torch.float32)
    expected = wkv_reference(1e3 * k.double(), v.double(), w.double(), u.double())
    torch.testing.assert_close(wkv(1e3 * k, v, w, u).double(), expected, rtol=1e-4, atol=1e-5)
    k[:, 10:] = -math.inf  # such tokens are not seen
    padded = values(wkv, [k, v, w, 0 * u])
    cut = values(wkv, [k[:, :10], v[:, :10], w, 0 * u])
    torch.testing.assert_close(padded[0][:, :10], cut[0])
    assert all(x.isfinite().all() for x in padded)


def test_long_rows(form: str) -> None:
    """A decay of 1 over 20,000 tokens is that of their neighbourhood; of -1, that of the ends."""
    torch.manual_seed(0)
    k, v, u = torch.randn(1, 20_000, 2), torch.randn(1, 20_000, 2), torch.zeros(2)
    w = torch.tensor([1.0, -1.0])
    y = wkv(k, v, w, u)
    middle = wkv_reference(k[:, 9_900:10_101].double(), v[:, 9_900:10_101].double(), w.double(), u.double())
    torch.testing.assert_close(y[0, 10_000, 0].double(), middle[0, 100, 0], rtol=1e-5, atol=1e-5)
    # at t = 0 tokens weigh by e^(i - 1), so the last few are all that counts
    last = ((k[0, -60:, 1] + torch.arange(60)).softmax(0) * v[0, -60:, 1]).sum()
    torch.testing.assert_close(y[0, 0, 1], last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance: str) -> None:
    given = [x.requires_grad_() for x in inputs(2, 7, 3)]
    assert torch.autograd.gradcheck(lambda *x: wkv(*x, distance=distance, chunks=3), given)


def test_what_the_equation_implies(form: str) -> None:
    k, v, w, u = inputs(2, 33, 6, dtype=torch.float32)
    mean = (k.softmax(1) * v).sum(1, keepdim=True).expand_as(v)
    for distance in DISTANCES:
        torch.testing.assert_close(wkv(k, v, 0 * w, 0 * u, distance=distance), mean)
        torch.testing.assert_close(wkv(k, v, w, u + 1e4, distance=distance), v)
        torch.testing.assert_close(wkv(k, torch.full_like(v, 3.0), w, u, distance=distance), torch.full_like(v, 3.0))
    # published: the same from either end; the two distances differ by one for all but the own token
    turned = wkv(k.flip(1), v.flip(1), w, u).flip(1)
    torch.testing.assert_close(turned, wkv(k, v, w, u))
    torch.testing.assert_close(wkv(k[:, :16], v[:, :16], w, u, distance="kernel"), wkv(k[:, :16], v[:, :16], w, u + w))


def test_types(form: str) -> None:
    k, v, w, u = inputs(2, 33, 6, dtype=torch.float32)
    expected = wkv(k, v, w, u)
    half = wkv(k.bfloat16(), v.bfloat16(), w, u)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wkv(k, v, w, u), expected)
    assert wkv(k[:, :0], v[:, :0], w, u).shape == (2, 0, 6) and wkv(k[:0], v[:0], w, u).shape == (0, 33, 6)


def test_nan_is_seen_everywhere(form: str) -> None:
    k, v, w, u = inputs(1, 20, 3, dtype=torch.float32)
    k[0, 5, 1] = v[0, 7, 2] = math.nan
    found = wkv(k, v, w, u).isnan()[0]
    assert found[:, 1:].all() and not found[:, 0].any()


def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(3, 50, 7)
    expected = values(wkv, given)
    monkeypatch.setattr("saccade.ops.wkv.operator._PIECE", 100)
    for ours, whole in zip(values(wkv, given), expected, strict=True):
        torch.testing.assert_close(ours, whole)


def test_the_work_of_a_scan_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in sums that are joined: 2 T a scan, and one or two for each token in the end."""
    from saccade.ops.wkv import scan

    joined, join = [0], scan.join

    def counted(a: Tensor, b: Tensor, w: Tensor, moments: bool) -> Tensor:
        joined[0] += a.shape[1] * a.shape[2]
        return join(a, b, w, moments)

    monkeypatch.setattr(scan, "join", counted)
    for T in (64, 128, 257, 1024):
        joined[0] = 0
        around(torch.zeros(4, 1, T, 1), torch.ones(1), T, 1, False)
        assert 4 * T <= joined[0] <= 5 * T


def test_compiles_and_says_what_it_lacks() -> None:
    k, v, w, u = (x.requires_grad_() for x in inputs(1, 9, 3))
    compiled = torch.compile(lambda *x: wkv(*x, distance="kernel"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(k, v, w, u), wkv(k, v, w, u, distance="kernel"))
    (slope,) = torch.autograd.grad(wkv(k, v, w, u).square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        slope.sum().backward()


def test_exports_as_torch_operators() -> None:
    class Module(torch.nn.Module):
        def forward(self, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
            return wkv(k, v, w, u, distance="kernel", chunks=4)

    given = inputs(1, 21, 3, dtype=torch.float32)
    program = torch.export.export(Module(), tuple(given))
    assert "saccade" not in program.graph_module.code
    expected = wkv_reference(*given, distance="kernel", chunks=4)
    torch.testing.assert_close(program.module()(*given), expected, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    k, v, w, u = inputs(1, 4, 3)
    for wrong, message in (
        ((k[0], v[0], w, u), "k and v must be floating point"),
        ((k, v[:, 1:], w, u), "k and v must be floating point"),
        ((k.long(), v, w, u), "k and v must be floating point"),
        ((k, v, w[1:], u), "decay must be"),
        ((k, v, w, u[None]), "bonus must be"),
    ):
        for function in (wkv, wkv_reference):
            with pytest.raises(ValueError, match=message):
                function(*wrong)
    with pytest.raises(ValueError, match="distance must be one of published, kernel"):
        wkv(k, v, w, u, distance="euclid")
    with pytest.raises(ValueError, match="chunks"):
        wkv(k, v, w, u, distance="kernel", chunks=0)
