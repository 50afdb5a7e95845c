"""Linear attention's Triton kernels against the slow reference, on odd shapes: outputs, states and all gradients.

On the CPU they run under Triton's interpreter, a tile at a time in numpy, so sizes are small.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.ops.linear import LinearState, linear_attend, linear_attend_reference, linear_plan
from saccade.ops.linear.inputs import as_factors
from saccade.ops.triton import linear as triton_linear

pytest.importorskip("triton", reason="triton is not installed")

FORMS = ("none", "H", "HD", "BHN", "BHND")


def inputs_of(form: str, n: int, normalize: bool = False, B: int = 1, H: int = 2, D: int = 5, E: int = 3) -> list[Any]:
    """q, k, v of half as many heads, state (kv and z where normalised) and decay, in double precision."""
    torch.manual_seed(n)
    q, k, v = torch.rand(B, H, n, D), torch.rand(B, H // 2, n, D), torch.randn(B, H // 2, n, E)
    state = [torch.randn(B, H, D, E), *([torch.rand(B, H, D)] if normalize else [])]
    sizes = {"H": (H,), "HD": (H, D), "BHN": (B, H, n), "BHND": (B, H, n, D)}
    return [x.double() for x in (q, k, v, *state, *([torch.rand(sizes[form])] if form in sizes else []))]


@pytest.fixture
def small(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter short chunks and narrow tiles, which a device would not multiply."""
    if kernel_device.type == "cpu":
        monkeypatch.setattr(triton_linear, "CHUNK", 8)
        monkeypatch.setattr(triton_linear, "HALF", 4)
    # half as many for float32
    monkeypatch.setattr(triton_linear, "COLUMNS", 16 if kernel_device.type == "cpu" else 32)


def results(function: Any, leaves: list[Tensor], form: str, normalize: bool, **options: Any) -> list[Tensor]:
    """Output, state, and the gradients of all leaves for weights that differ everywhere."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, k, v, *rest = leaves
    decay = rest.pop() if form != "none" else None
    state = LinearState(*rest) if normalize else rest[0]
    out, last = function(
        q, k, v, state=state, decay=decay, normalize=normalize, scale=0.3, return_state=True, **options
    )
    found = [out, *(last if normalize else [last])]
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)).sum() for x in found)
    return [*found, *torch.autograd.grad(loss, leaves)]


def error(ours: Tensor, expected: Tensor) -> float:
    return float(
        (ours.detach().cpu().double() - expected.detach()).abs().max() / expected.detach().abs().max().clamp(min=1)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "normalize"), [(1, False), (10, True)])
def test_equals_the_reference(kernel_device: torch.device, small: None, form: str, n: int, normalize: bool) -> None:
    """One token, and more than one chunk with a rest; odd widths, shared heads, a state in and out."""
    leaves = [x.float().double() for x in inputs_of(form, n, normalize)]
    expected = results(linear_attend_reference, leaves, form, normalize)
    on_device = [x.float().to(kernel_device) for x in leaves]
    for ours, wanted in zip(
        results(linear_attend, on_device, form, normalize, backend="triton"), expected, strict=True
    ):
        assert ours.shape == wanted.shape and ours.dtype == torch.float32 and error(ours, wanted) < 2e-6


@pytest.mark.parametrize("form", ["H", "BHND"])
def test_tiles_beside_each_other(kernel_device: torch.device, small: None, form: str) -> None:
    """More features and values than a tile has columns, in batch rows of their own."""
    leaves = [x.float().double() for x in inputs_of(form, 4, B=2, D=17, E=18)]
    expected = results(linear_attend_reference, leaves, form, False)
    on_device = [x.float().to(kernel_device) for x in leaves]
    for ours, wanted in zip(results(linear_attend, on_device, form, False, backend="triton"), expected, strict=True):
        assert ours.shape == wanted.shape and error(ours, wanted) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["none", "BHN"])
def test_half_precision_and_layouts(kernel_device: torch.device, form: str, dtype: torch.dtype) -> None:
    q, k, v, *rest = inputs_of(form, 33)
    # (B, N, H, D) in memory, as projections leave it
    halves = [x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = results(linear_attend_reference, [x.double() for x in halves] + rest, form, False)
    on_device = [x.to(kernel_device) for x in halves] + [x.float().to(kernel_device) for x in rest]
    found = results(linear_attend, on_device, form, False, backend="triton")
    assert found[0].dtype == found[2].dtype == dtype and found[1].dtype == torch.float32
    # tiles are rounded to bfloat16 (8 bits) before they are multiplied, and terms of both signs are added
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-3
    errors = [error(ours, wanted) for ours, wanted in zip(found, expected, strict=True)]
    assert max(errors) < bound, errors


@pytest.mark.parametrize("form", ["H", "BHN", "BHND"])
def test_strong_decays_and_documents(kernel_device: torch.device, form: str) -> None:
    """Factors of 1e-30 and 1, and of 0, which ends a document: it gets no gradient, and nothing is infinite."""
    leaves = inputs_of(form, 35 if form == "BHND" else 67)
    drawn = leaves[-1]
    leaves[-1] = torch.where(drawn < 0.3, 1e-30, torch.where(drawn < 0.6, 1.0, torch.where(drawn < 0.8, 0.0, drawn)))
    leaves = [x.float().double() for x in leaves]
    expected = results(linear_attend_reference, leaves, form, False)
    expected[-1] = torch.where(leaves[-1] > 0, expected[-1], 0.0)
    on_device = [x.float().to(kernel_device) for x in leaves]
    found = results(linear_attend, on_device, form, False, backend="triton")
    assert all(
        ours.isfinite().all() and error(ours, wanted) < 2e-5 for ours, wanted in zip(found, expected, strict=True)
    )


def test_pieces_are_one_pass(kernel_device: torch.device, small: None) -> None:
    q, k, v = (x.float().to(kernel_device) for x in inputs_of("none", 30)[:3])
    expected, last = linear_attend(q, k, v, decay=0.9, return_state=True, backend="triton")
    first, state = linear_attend(*(x[:, :, :13] for x in (q, k, v)), decay=0.9, return_state=True, backend="triton")
    second, state = linear_attend(
        *(x[:, :, 13:] for x in (q, k, v)), decay=0.9, state=state, return_state=True, backend="triton"
    )
    torch.testing.assert_close(torch.cat([first, second], 2), expected)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)])
def test_empty(kernel_device: torch.device, shape: tuple[int, int, int]) -> None:
    q, k, v = (torch.rand(*shape, 3, device=kernel_device, requires_grad=True) for _ in range(3))
    state = torch.rand(*shape[:2], 3, 3, device=kernel_device)
    out, last = linear_attend(
        q, k, v, decay=torch.rand(shape, device=kernel_device), state=state, return_state=True, backend="triton"
    )
    assert out.shape == q.shape and torch.equal(last, state)
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_compiles_whole_and_has_first_derivatives_only(kernel_device: torch.device, small: None) -> None:
    q, k, v, state, decay = (x.float().to(kernel_device).requires_grad_() for x in inputs_of("H", 9))

    def function(q: Tensor) -> Tensor:
        return linear_attend(q, k, v, decay=decay, state=state, backend="triton")

    torch._dynamo.reset()
    out, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(q), function(q)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(expected.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("form", "of_decay"), [("none", False), *((form, of) for form in ("H", "BHN", "BHND") for of in (True, False))]
)
def test_compiled_graphs_are_promised_what_comes(kernel_device: torch.device, form: str, of_decay: bool) -> None:
    """Shapes, types and strides, however inputs lie in memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v, state, *decay = (x.float().to(kernel_device) for x in inputs_of(form, 3, B=2))
    q, k, v, *decay = (x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x for x in (q, k, v, *decay))
    factors = as_factors(decay[0] if decay else None, (*q.shape[:3], q.shape[3]), q)
    given: list[Any] = [*(x.bfloat16() for x in (q, k, v)), state, factors]
    mode = FakeTensorMode()
    promised = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]

    def called(q: Tensor, k: Tensor, v: Tensor, state: Tensor, factors: Tensor | None) -> list[Any]:
        out, last = torch.ops.saccade.linear_triton(q, k, v, state, factors, 1.0, False)
        back = torch.ops.saccade.linear_triton_backward(q, k, v, state, factors, out, last, 1.0, of_decay)
        return [(x.shape, x.dtype, x.stride()) for x in (out, last, *back)]

    with mode:
        fakes = called(*promised)
    assert called(*given) == fakes


def test_plan_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.rand(1, 2, 8, 4)
    plan = linear_plan(q, q, q, decay=0.5)
    assert plan.backend == "torch" and "by name only" in plan.refused["triton"] and "cpu" in plan.refused["fla"]
    assert plan.flops > 0 and plan.bytes > 4 * 4 * q.numel() and "not triton" in str(plan)
    assert linear_plan(q, q, q, backend="triton").reason == "asked for"
    wide = torch.rand(1, 1, 2, triton_linear.MOST_CHANNELS + 1)
    refused: list[tuple[Any, str]] = [
        (lambda: linear_attend(q.double(), q.double(), q.double(), backend="triton"), "double"),
        (lambda: linear_attend(q, q, q, causal=False, backend="triton"), "causal only"),
        (lambda: linear_attend(wide, wide, wide, decay=torch.rand(wide.shape), backend="triton"), "256 features"),
        (lambda: linear_attend(q, q, q, backend="fla"), "no kernels for cpu"),
        (lambda: linear_attend(q, q, q, backend="cuda"), "one of fla, triton, torch"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in linear_plan(q, q, q).refused["triton"]
