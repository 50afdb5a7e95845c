"""Backends of other packages, `fla` and `natten`, with stand-ins of the same signatures: neither runs without CUDA."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade import extras, masks
from saccade.ops.backends import BACKENDS, natten
from saccade.ops.backends import choose as choose_path
from saccade.ops.backends import make_plan as plan_path
from saccade.ops.linear import linear_attend_reference
from saccade.ops.linear.backends import choose, fla, kernels, make_plan
from saccade.ops.linear.inputs import as_factors
from saccade.ops.linear.planning import LinearProblem, form_of
from saccade.ops.planning import Problem

CUDA = torch.device("cuda")
LINEAR = LinearProblem(
    B=2, H=4, K=2, N=9, M=9, D=5, E=3, dtype=torch.bfloat16, device=CUDA, causal=True, normalize=False, form="token",
    scale=0.3, chunk_size=64,
)  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are found as if installed."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise extras.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(extras, "version", version)
    extras.lacking.cache_clear()
    monkeypatch.setattr(kernels.device_kernels, "refusal", lambda device, dtype: None)
    return versions


@pytest.fixture(autouse=True)
def forgets() -> Any:
    yield
    extras.lacking.cache_clear()


def modules(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Modules by dotted name (a double underscore for the dot), each with functions."""
    for name, given in functions.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(given)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_fla_is_chosen_where_it_is_installed_and_named_with_its_reason(installed: dict[str, str]) -> None:
    assert choose(LINEAR) == "triton"
    assert "not installed" in make_plan(LINEAR, None).refused["fla"]
    installed["flash-linear-attention"] = "0.2.1"
    extras.lacking.cache_clear()
    assert "older than 0.3" in make_plan(LINEAR, None).refused["fla"]
    installed["flash-linear-attention"] = "0.4.dev1"
    extras.lacking.cache_clear()
    plan = make_plan(LINEAR, None)
    assert plan.backend == "fla" and "installed" in plan.reason and plan.refused["triton"] == "fla comes before it"
    for change, why in (
        ({"dtype": torch.float32}, "half precision"),
        ({"normalize": True}, "rounded"),
        ({"causal": False}, "causal"),
        ({"D": 300}, "256 features"),
    ):
        refused = replace(LINEAR, **change)
        assert why in (fla.refusal(refused) or "")
        with pytest.raises(ValueError, match=why):
            choose(refused, "fla")
        assert choose(refused) == ("torch" if change == {"causal": False} else "triton")


@pytest.mark.parametrize("form", ["none", "H", "HD", "BHN", "BHND"])
def test_fla_is_called_in_its_own_words(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    called = []

    def stand_in(name: str) -> Any:
        def function(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            scale: float | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
        ) -> tuple[Tensor, Tensor]:
            called.append(name)
            q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
            assert q.shape[:3] == k.shape[:3] == v.shape[:3] == g.shape[:3] and g.dtype == torch.float32
            assert output_final_state
            out, state = linear_attend_reference(
                q, k, v, decay=g.exp(), scale=scale, state=initial_state, return_state=True
            )
            return out.transpose(1, 2), state

        return function

    simple, channels = {"chunk_simple_gla": stand_in("simple")}, {"chunk_gla": stand_in("channels")}
    modules(monkeypatch, fla={}, fla__ops={}, fla__ops__simple_gla=simple, fla__ops__gla=channels)
    torch.manual_seed(0)
    B, H, N, D, E = 2, 4, 9, 5, 3
    sizes = {"H": (H,), "HD": (H, D), "BHN": (B, H, N), "BHND": (B, H, N, D)}
    decay = (torch.rand(sizes[form]) * (torch.rand(sizes[form]) > 0.2)).requires_grad_() if form in sizes else None
    q, k, v = (torch.randn(B, h, N, w, requires_grad=True) for h, w in ((H, D), (2, D), (2, E)))
    state = torch.randn(B, H, D, E, requires_grad=True)
    factors = as_factors(decay, (B, H, N, D), q)
    found = fla.run(replace(LINEAR, form=form_of(factors)), q, k, v, state, factors)
    expected = linear_attend_reference(q, k, v, decay=decay, scale=0.3, state=state, return_state=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert called == ["channels" if form.endswith("D") else "simple"]
    wrt = [q, k, v, state, *([] if decay is None else [decay])]
    grads = [torch.autograd.grad(x[0].sum() + x[1].square().sum(), wrt) for x in (found, expected)]
    if decay is not None:  # a factor 0 gets none
        grads = [(*x[:-1], torch.where(decay > 0, x[-1], 0.0)) for x in grads]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def problem(mask: masks.Mask | None, **changes: Any) -> Problem:
    given: dict[str, Any] = {"B": 2, "H": 4, "K": 2, "N": 96, "M": 96, "D": 8, "E": 8, "scale": 0.5}
    given.update(dtype=torch.bfloat16, device=CUDA, needs_grad=True, mask=mask)
    return Problem(**{**given, **changes})


def test_natten_is_chosen_for_neighbourhoods_where_it_is_installed(installed: dict[str, str]) -> None:
    near = masks.neighborhood((32, 48), (5, 7))

    def weighed(**changes: Any) -> Problem:
        made = problem(near, N=1536, M=1536, **changes)
        made._states = near.block_map(1536, 1536, made.block_size)  # there is no device to look at the mask on
        return made

    assert "not installed" in (natten.refusal(weighed()) or "")
    assert choose_path(weighed()) != "natten"
    installed["natten"] = "0.21.0"
    extras.lacking.cache_clear()
    plan = plan_path(weighed(), None)
    assert plan.backend == "natten" and "natten" in plan.reason
    refused: list[tuple[Problem, str]] = [
        (problem(masks.window(3)), "neighbourhoods alone"),
        (problem(near, device=torch.device("cpu")), "no kernels for cpu"),
        (problem(near, D=7, E=7), "multiple of 8"),
        (problem(near, E=16), "one width"),
        (problem(near, dropout=0.1), "dropout"),
        (problem(near, return_lse=True), "LSE"),
        (problem(near, normalize="relu"), "softmax only"),
        (problem(near, dtype=torch.float64), "double"),
        (problem(near, score_mod=lambda s, b, h, i, j: s), "not modified"),
    ]
    for one, why in refused:
        assert why in (natten.refusal(one) or "")
        with pytest.raises(ValueError, match=why):
            choose_path(one, "natten")
    installed["natten"] = "0.17.5"
    extras.lacking.cache_clear()
    assert "older than 0.20" in (BACKENDS["natten"].refusal(weighed()) or "")


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((20,), {"kernel": 5, "causal": True}),
        ((6, 7), {"kernel": (3, 2), "dilation": (2, 1), "stride": (2, 1)}),
        ((3, 4, 5), {"kernel": 3, "causal": (True, False, False)}),
    ],
)
def test_natten_is_called_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], options: dict[str, Any]
) -> None:
    def stand_in(axes: int) -> Any:
        def function(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kernel_size: tuple[int, ...],
            stride: tuple[int, ...] = (1,),
            dilation: tuple[int, ...] = (1,),
            is_causal: tuple[bool, ...] = (False,),
            scale: float | None = None,
        ) -> Tensor:
            assert query.ndim == axes + 3 and query.shape == key.shape == value.shape and query.is_contiguous()
            grid = query.shape[1:-2]
            mask = masks.neighborhood(grid, kernel_size, dilation, is_causal, stride=stride)
            flat = (x.flatten(1, axes).transpose(1, 2) for x in (query, key, value))
            return saccade.attend(*flat, mask=mask, scale=scale).transpose(1, 2).unflatten(1, grid)

        return function

    modules(monkeypatch, natten={f"na{axes}d": stand_in(axes) for axes in (1, 2, 3)})
    torch.manual_seed(0)
    mask = masks.neighborhood(size, **options)
    n = int(torch.tensor(size).prod())
    q, k, v = (torch.randn(2, heads, n, 8) for heads in (4, 2, 2))
    out, lse = natten.run(problem(mask, N=n, M=n), q, k, v)
    assert lse is None
    torch.testing.assert_close(out, saccade.attend(q, k, v, mask=mask, scale=0.5), atol=1e-5, rtol=1e-4)
