"""Selective scan against a loop over the tokens: both forms, forward and backward, any step sizes and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from saccade.ops.native import build
from saccade.ops.selective_scan import operator, selective_scan, selective_scan_reference

CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "c"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each form of single precision; double is always computed in torch."""
    if request.param == "torch":
        monkeypatch.setattr(build, "_outcome", (None, "not in this test"))
    elif reason := build.refusal(CPU, torch.float32):
        pytest.skip(f"no native code: {reason}")
    yield request.param


def inputs(
    B: int, T: int, C: int, N: int, groups: int = 1, step: float = 0.5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """u, delta, a, b, c, skip; decays of a token are e^(-step n), roughly."""
    generator = torch.Generator().manual_seed(T)
    u, delta = (torch.randn(B, T, C, generator=generator, dtype=dtype) for _ in range(2))
    a = -torch.rand(C, N, generator=generator, dtype=dtype) * torch.arange(1, N + 1)
    b, c = (torch.randn(B, T, groups, N, generator=generator, dtype=dtype) for _ in range(2))
    return [u, step * delta.exp(), a, b, c, torch.randn(C, generator=generator, dtype=dtype)]


def values(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """Output, and the gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize(("T", "groups"), [(1, 1), (2, 3), (63, 1), (64, 2), (65, 6), (150, 3), (257, 1)])
def test_equals_the_loop_forward_and_backward(T: int, groups: int) -> None:
    given = inputs(2, T, 6, 3, groups)
    for ours, expected in zip(values(selective_scan, given), values(selective_scan_reference, given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("B", "T", "C", "N", "groups"),
    [
        (1, 1, 1, 1, 1),
        (2, 7, 3, 2, 3),
        (1, 64, 16, 16, 1),
        (2, 65, 34, 5, 2),
        (1, 200, 140, 16, 2),
        (3, 131, 300, 7, 1),
    ],
)
def test_single_precision_in_either_form(form: str, B: int, T: int, C: int, N: int, groups: int) -> None:
    given = inputs(B, T, C, N, groups)
    expected = values(selective_scan, given)
    for found, truth in zip(values(selective_scan, [x.float() for x in given]), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=2e-5 * max(1.0, truth.abs().max().item()))


def test_gradcheck() -> None:
    given = [x.requires_grad_() for x in inputs(2, 5, 4, 3, 2)]
    assert torch.autograd.gradcheck(selective_scan, given)


@pytest.mark.parametrize("step", [0.0, 1e-6, 50.0, 1e6])
def test_any_step_is_safe(form: str, step: float) -> None:
    """No decay at all, and decays that are 0 in single precision."""
    given = inputs(1, 300, 4, 3, step=step)
    expected = values(selective_scan_reference, given)
    for found, truth in zip(values(selective_scan, [x.float() for x in given]), expected, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5 * max(1.0, truth.abs().max().item()))


def test_states_may_grow(form: str) -> None:
    """By e^75 here; where they do not fit into a float any more, they are no number that looks like one."""
    u, one = torch.ones(1, 400, 2), torch.ones(1, 400, 1)
    grown = torch.full((2, 1), 0.5)
    y = selective_scan(u, u, grown, one, one)
    truth = selective_scan_reference(*(x.double() for x in (u, u, grown, one, one)))
    torch.testing.assert_close(y[:, :150].double(), truth[:, :150], rtol=1e-5, atol=0)
    assert not y[:, 190:].isfinite().any()


def test_what_the_equation_implies(form: str) -> None:
    u, step, a, b, c, skip = inputs(2, 90, 6, 3, 2, dtype=torch.float32)
    # without decay, a sum; with one that leaves nothing, a map of each token alone
    summed = (step * u)[..., None] * b.repeat_interleave(3, 2)
    read = c.repeat_interleave(3, 2)
    bound = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(selective_scan(u, step, 0 * a, b, c), (summed.cumsum(1) * read).sum(-1), **bound)
    alone = (summed * read).sum(-1) + skip * u
    torch.testing.assert_close(selective_scan(u, step, a - 1e6, b, c, skip), alone, **bound)
    # linear in u; causal; the same for each group alone
    y = selective_scan(u, step, a, b, c, skip)
    torch.testing.assert_close(selective_scan(3 * u, step, a, b, c, skip), 3 * y, **bound)
    torch.testing.assert_close(
        selective_scan(*(x[:, :31] for x in (u, step)), a, b[:, :31], c[:, :31], skip), y[:, :31]
    )
    first = selective_scan(u[..., :3], step[..., :3], a[:3], b[:, :, 0], c[:, :, 0], skip[:3])
    torch.testing.assert_close(first, y[..., :3])


def test_types_and_empty_inputs(form: str) -> None:
    given = inputs(2, 33, 6, 4, dtype=torch.float32)
    expected = selective_scan(*given)
    half = selective_scan(*(x.bfloat16() for x in given[:2]), *given[2:])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(selective_scan(*given), expected)
    for empty in (inputs(2, 0, 6, 4), inputs(0, 5, 6, 4)):
        assert selective_scan(*empty).shape == selective_scan_reference(*empty).shape == empty[0].shape


def test_nan_is_seen_from_there_on(form: str) -> None:
    u, step, a, b, c, _ = inputs(1, 100, 3, 2, dtype=torch.float32)
    u[0, 70, 1] = math.nan
    found = selective_scan(u, step, a, b, c).isnan()[0]
    assert found[70:, 1].all() and not found[:70].any() and not found[:, [0, 2]].any()
    step[0, 20, 2] = math.nan
    found = selective_scan(u, step, a, b, c).isnan()[0]
    assert found[20:, 2].all() and not found[:20].any() and not found[:, 0].any()


def test_backward_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, 300, 4, 3, 2)
    expected = values(selective_scan, given)
    monkeypatch.setattr(operator, "_PIECE", 2 * 64 * 24)
    for ours, whole in zip(values(selective_scan, given), expected, strict=True):
        torch.testing.assert_close(ours, whole)


def test_one_form_takes_what_the_other_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := build.refusal(CPU, torch.float32):
        pytest.skip(f"no native code: {reason}")
    given = inputs(2, 150, 10, 3, 2, dtype=torch.float32)
    expected = values(selective_scan, given)
    leaves = [x.requires_grad_() for x in given]
    out = selective_scan(*leaves)
    monkeypatch.setattr(build, "_outcome", (None, "not from here on"))
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).cos()
    for ours, truth in zip(torch.autograd.grad((out * weight).sum(), leaves), expected[1:], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


def test_compiles_and_says_what_it_lacks() -> None:
    given = [x.requires_grad_() for x in inputs(1, 9, 3, 2)]
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), selective_scan(*given))
    (slope,) = torch.autograd.grad(selective_scan(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        slope.sum().backward()


def test_exports_as_torch_operators() -> None:
    class Module(torch.nn.Module):
        def forward(self, u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return selective_scan(u, step, a, b, c)

    given = inputs(1, 70, 3, 2, dtype=torch.float32)[:5]
    program = torch.export.export(Module(), tuple(given))
    assert "saccade" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*given), selective_scan_reference(*given), rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    u, step, a, b, c, skip = inputs(1, 4, 6, 2, 2)
    for wrong, message in (
        ((u[0], step[0], a, b, c), "u and delta must be floating point"),
        ((u, step[:, 1:], a, b, c), "u and delta must be floating point"),
        ((u.long(), step, a, b, c), "u and delta must be floating point"),
        ((u, step, a[1:], b, c), r"a must be \(6, states\)"),
        ((u, step, a, b[..., :1], c), "b and c must be"),
        ((u, step, a, b[:, 1:], c[:, 1:]), "b and c must be"),
        ((u, step, a, b[:, :, :1], c), "b and c must be"),
        ((u, step, a, *[b[:, :, :1].expand(-1, -1, 4, -1)] * 2), "divide 6 channels"),
        ((u, step, a, b, c, skip[1:]), "skip must be"),
    ):
        for function in (selective_scan, selective_scan_reference):
            with pytest.raises(ValueError, match=message):
                function(*wrong)
