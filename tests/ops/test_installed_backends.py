"""Backends of other packages, `fla` and `natten`: neither runs without CUDA.

What they are called with is bound to the signatures of their functions, as they are written down here and as they are
installed, where they are; the rest is a stand-in. On a device that has them (`--device cuda`) they run themselves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
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


#: the signatures of fla-core 0.6.0 and NATTEN 0.21.7; earlier versions lack what is not ours: `state_v_first` and
#: `cu_seqlens_cpu`, `return_lse`
WRITTEN = {
    "chunk_gla": "q k v g scale= initial_state= output_final_state= state_v_first= cu_seqlens= cu_seqlens_cpu=",
    "chunk_simple_gla": "q k v g= g_gamma= scale= initial_state= output_final_state= state_v_first= cu_seqlens= "
    "cu_seqlens_cpu=",
} | dict.fromkeys(
    ("na1d", "na2d", "na3d"),
    "query key value kernel_size stride= dilation= is_causal= scale= additional_keys= additional_values= "
    "attention_kwargs= backend= q_tile_shape= kv_tile_shape= backward_q_tile_shape= backward_kv_tile_shape= "
    "backward_kv_splits= backward_use_pt_reduction= run_persistent_kernel= kernel_schedule= torch_compile= "
    "return_lse=",
)


def signature(name: str) -> inspect.Signature:
    """Of a function of `WRITTEN`: all arguments by place or name, those that end in = with a default."""
    kind, needed = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    words = WRITTEN[name].split()
    return inspect.Signature(
        [inspect.Parameter(x.rstrip("="), kind, default=None if "=" in x else needed) for x in words]
    )


@pytest.fixture(params=["written down here", "installed"])
def put(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a function of named arguments in the place of one of a package; what that is called with is bound to the
    signature of what was there, or of `WRITTEN`."""

    def put(module: str, name: str, computed: Callable[..., Any]) -> None:
        if request.param == "installed":
            home = pytest.importorskip(module, reason=f"{module} is not installed")
            bound = inspect.signature(getattr(home, name))
        else:
            home, bound = ModuleType(module), signature(name)
            monkeypatch.setitem(sys.modules, module, home)
        monkeypatch.setattr(home, name, lambda *a, **k: computed(**bound.bind(*a, **k).arguments), raising=False)

    if request.param != "installed":
        for parent in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    return put


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


def test_fla_is_chosen_where_it_is_installed_and_named_with_its_reason(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(LINEAR) == "triton"
    assert "not installed" in make_plan(LINEAR, None).refused["fla"]
    installed["fla-core"] = "0.3.1"
    extras.lacking.cache_clear()
    assert "older than 0.3.2" in make_plan(LINEAR, None).refused["fla"]
    installed["fla-core"] = "0.4.dev1"
    extras.lacking.cache_clear()
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    assert "cannot be imported" in make_plan(LINEAR, None).refused["fla"]
    for name in ("fla", "fla.ops", "fla.ops.gla"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
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


FORMS = ("none", "H", "HD", "BHN", "BHND")


def decay_of(form: str, B: int, H: int, N: int, D: int) -> Tensor | None:
    """Between 0 and 1, a fifth of them 0."""
    sizes = {"H": (H,), "HD": (H, D), "BHN": (B, H, N), "BHND": (B, H, N, D)}
    return torch.rand(sizes[form]) * (torch.rand(sizes[form]) > 0.2) if form in sizes else None


@pytest.mark.parametrize("form", FORMS)
def test_fla_is_called_in_its_own_words(put: Callable[..., None], form: str) -> None:
    called = []

    def stand_in(name: str) -> Any:
        def computed(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            scale: float,
            initial_state: Tensor,
            output_final_state: bool,
        ) -> tuple[Tensor, Tensor]:
            called.append(name)
            q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
            assert q.shape[:3] == k.shape[:3] == v.shape[:3] == g.shape[:3] and g.dtype == torch.float32
            assert output_final_state
            out, state = linear_attend_reference(
                q, k, v, decay=g.exp(), scale=scale, state=initial_state, return_state=True
            )
            return out.transpose(1, 2), state

        return computed

    for package in ("simple_gla", "gla"):
        put(f"fla.ops.{package}", f"chunk_{package}", stand_in(package))
    torch.manual_seed(0)
    B, H, N, D, E = 2, 4, 9, 5, 3
    decay = decay_of(form, B, H, N, D)
    if decay is not None:
        decay.requires_grad_()
    q, k, v = (torch.randn(B, h, N, w, requires_grad=True) for h, w in ((H, D), (2, D), (2, E)))
    state = torch.randn(B, H, D, E, requires_grad=True)
    factors = as_factors(decay, (B, H, N, D), q)
    found = fla.run(replace(LINEAR, form=form_of(factors)), q, k, v, state, factors)
    expected = linear_attend_reference(q, k, v, decay=decay, scale=0.3, state=state, return_state=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert called == ["gla" if form.endswith("D") else "simple_gla"]
    wrt = [q, k, v, state, *([] if decay is None else [decay])]
    grads = [torch.autograd.grad(x[0].sum() + x[1].square().sum(), wrt) for x in (found, expected)]
    if decay is not None:  # a factor 0 gets none
        grads = [(*x[:-1], torch.where(decay > 0, x[-1], 0.0)) for x in grads]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_fla_on_a_device_that_has_it(device: torch.device) -> None:
    if (why_not := fla.refusal(replace(LINEAR, device=device))) is not None:
        pytest.skip(why_not)
    B, H, N, D, E = 2, 4, 150, 32, 16
    for form in FORMS:
        torch.manual_seed(0)
        exact = [torch.randn(B, h, N, w).bfloat16() for h, w in ((H, D), (2, D), (2, E))]
        decay, state = decay_of(form, B, H, N, D), torch.randn(B, H, D, E).to(device)
        results = []
        for dtype, backend in ((torch.bfloat16, "fla"), (torch.float32, "torch")):
            given = [x.to(device, dtype).requires_grad_() for x in exact]
            there = None if decay is None else decay.to(device)
            how: dict[str, Any] = {"decay": there, "scale": D**-0.5, "backend": backend}
            out, last = saccade.linear_attend(*given, state=state, return_state=True, **how)
            results.append((out, last, *torch.autograd.grad(out.float().sum() + last.square().sum(), given)))
        alike(*results, form)


def alike(some: tuple[Tensor, ...], others: tuple[Tensor, ...], what: object) -> None:
    """Within what bfloat16 rounds."""
    for found, expected in zip(some, others):
        assert (found - expected).norm() < 2e-2 * expected.norm(), what


def problem(mask: masks.Mask | None, **changes: Any) -> Problem:
    given: dict[str, Any] = {"B": 2, "H": 4, "K": 2, "N": 96, "M": 96, "D": 8, "E": 8, "scale": 0.5}
    given.update(dtype=torch.bfloat16, device=CUDA, needs_grad=True, mask=mask)
    return Problem(**{**given, **changes})


def test_natten_is_chosen_for_neighbourhoods_where_it_is_installed(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = masks.neighborhood((32, 48), (5, 7))

    def weighed(**changes: Any) -> Problem:
        made = problem(near, N=1536, M=1536, **changes)
        made._states = near.block_map(1536, 1536, made.block_size)  # there is no device to look at the mask on
        return made

    assert "not installed" in (natten.refusal(weighed()) or "")
    assert choose_path(weighed()) != "natten"
    installed["natten"] = "0.21.0"
    extras.lacking.cache_clear()
    monkeypatch.setitem(sys.modules, "natten", None)
    assert "cannot be imported" in (natten.refusal(weighed()) or "")
    package: Any = ModuleType("natten")
    monkeypatch.setitem(sys.modules, "natten", package)
    package.HAS_LIBNATTEN = False
    extras.lacking.cache_clear()
    assert "without its kernels" in (natten.refusal(weighed()) or "")
    package.HAS_LIBNATTEN = True
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


GRIDS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((20,), {"kernel": 5, "causal": True}),
    ((6, 7), {"kernel": (3, 2), "dilation": (2, 1), "stride": (2, 1)}),
    ((3, 4, 5), {"kernel": 3, "causal": (True, False, False)}),
]


@pytest.mark.parametrize(("size", "options"), GRIDS)
def test_natten_is_called_in_its_own_words(
    put: Callable[..., None], size: tuple[int, ...], options: dict[str, Any]
) -> None:
    axes = len(size)

    def computed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        is_causal: tuple[bool, ...],
        scale: float,
    ) -> Tensor:
        assert query.ndim == axes + 3 and query.shape == key.shape == value.shape and query.is_contiguous()
        grid = query.shape[1:-2]
        mask = masks.neighborhood(grid, kernel_size, dilation, is_causal, stride=stride)
        flat = (x.flatten(1, axes).transpose(1, 2) for x in (query, key, value))
        return saccade.attend(*flat, mask=mask, scale=scale).transpose(1, 2).unflatten(1, grid)

    put("natten", f"na{axes}d", computed)
    torch.manual_seed(0)
    mask = masks.neighborhood(size, **options)
    n = prod(size)
    q, k, v = (torch.randn(2, heads, n, 8) for heads in (4, 2, 2))
    out, lse = natten.run(problem(mask, N=n, M=n), q, k, v)
    assert lse is None
    torch.testing.assert_close(out, saccade.attend(q, k, v, mask=mask, scale=0.5), atol=1e-5, rtol=1e-4)


def test_natten_on_a_device_that_has_it(device: torch.device) -> None:
    for size, options in GRIDS:
        mask, n = masks.neighborhood(size, **options), prod(size)
        if (why_not := natten.refusal(problem(mask, N=n, M=n, D=32, E=32, device=device))) is not None:
            pytest.skip(why_not)
        torch.manual_seed(0)
        exact = [torch.randn(2, heads, n, 32).bfloat16() for heads in (4, 2, 2)]
        results = []
        for dtype, backend in ((torch.bfloat16, "natten"), (torch.float32, "reference")):
            given = [x.to(device, dtype).requires_grad_() for x in exact]
            out = saccade.attend(*given, mask=mask.to(device), backend=backend)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), given)))
        alike(*results, (size, options))
