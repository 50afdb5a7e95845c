"""The flex backend: refusals, block lists, and results with the eager form in the compiled one's place.

Compiling takes half a minute on a CPU, so the compiled kernels themselves run where there is CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import saccade
from saccade import masks
from saccade.ops.backends import flex
from saccade.ops.planning import Problem

flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")


def some_masks(N: int, M: int, device: str = "cpu") -> dict[str, masks.Mask | None]:
    generator = torch.Generator().manual_seed(N)
    random = torch.rand(2, 4, N, M, generator=generator)
    made: dict[str, masks.Mask | None] = {
        "none": None,
        "causal": masks.causal(),
        "window": masks.window(5, 3),
        "prefix": masks.prefix(torch.tensor([0, 20])),
        "documents": masks.documents(torch.arange(N)[None] // 9, torch.arange(M)[None] // 9),
        "padding": masks.padding(random[:, 0, 0] < 0.5),
        "dense": masks.dense(random < 0.3),
        "blocks": masks.blocks(random[:1, :, : -(-N // 64), : -(-M // 64)] < 0.5, 64),
        "both": masks.causal() & ~masks.window(3),
    }
    return {name: None if mask is None else mask.to(device) for name, mask in made.items()}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "refusal", lambda problem: None)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention.flex_attention)


def qkv(N: int, M: int, device: str = "cpu", **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, N, 12), (2, 2, M, 12), (2, 2, M, 7)
    return [torch.randn(s, generator=generator).to(device, **options) for s in shapes]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some_masks(150, 200))
def test_equals_the_reference(eager: None, name: str) -> None:
    mask = some_masks(150, 200)[name]
    results = [
        saccade.attend(*qkv(150, 200), mask=mask, return_lse=True, backend=backend) for backend in ("flex", "reference")
    ]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_score_mod_and_the_lse_by_the_old_name(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(4, 400)
    mod = lambda s, b, h, i, j: s + table[h, i - j + 200]  # noqa: E731
    options: dict[str, Any] = {"score_mod": mod, "mask": masks.causal(), "return_lse": True}
    expected = saccade.attend(*qkv(40, 60), **options, backend="reference")
    torch.testing.assert_close(saccade.attend(*qkv(40, 60), **options, backend="flex"), expected, atol=1e-5, rtol=1e-4)
    monkeypatch.delattr(flex_attention, "AuxRequest", raising=False)
    torch.testing.assert_close(saccade.attend(*qkv(40, 60), **options, backend="flex"), expected, atol=1e-5, rtol=1e-4)


def problem(mask: masks.Mask, N: int, M: int) -> Problem:
    return Problem(2, 4, 2, N, M, 12, 7, torch.float32, torch.device("cpu"), False, mask=mask)


@pytest.mark.parametrize("name", [name for name, mask in some_masks(300, 256).items() if mask is not None])
def test_block_lists_hold_every_allowed_pair(name: str) -> None:
    """Every allowed pair lies in a listed block, full blocks hold allowed pairs only, and the lists are disjoint."""
    mask = some_masks(300, 256)[name]
    assert mask is not None
    lists = flex.block_mask(problem(mask, 300, 256))
    count, area = torch.zeros(2, 4, 3, 2), torch.zeros(3, 2)
    dense = mask.dense(300, 256).expand(2, 4, -1, -1)
    for r in range(3):
        for c in range(2):
            block = dense[..., r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128]
            count[:, :, r, c] = block.sum((-1, -2))
            area[r, c] = 128 * 128
    partial = _listed(lists.kv_num_blocks, lists.kv_indices)
    full = _listed(lists.full_kv_num_blocks, lists.full_kv_indices)
    assert not (partial & full).any()
    assert (partial | full).expand_as(count)[count > 0].all()
    assert (count == area)[full.expand_as(count)].all()


def _listed(number: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    first = torch.arange(columns.shape[-1]) < number[..., None]
    return torch.zeros(columns.shape, dtype=torch.bool).scatter(-1, columns.long(), first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": lambda q, k: q @ k.mT}, "scores are dot products"),
        ({"normalize": "sigmoid"}, "softmax only, not 'sigmoid'"),
        ({"dropout": 0.1}, "no dropout"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=message):
        saccade.attend(q, q, q, backend="flex", **options)


def test_refuses_gradients_and_lse_on_the_cpu_and_double() -> None:
    q = torch.randn(1, 1, 4, 16, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass on the CPU"):
        saccade.attend(q, q, q, backend="flex")
    q = q.detach()
    with pytest.raises(ValueError, match="no LSE on the CPU"):
        saccade.attend(q, q, q, backend="flex", return_lse=True)
    q = q.double()
    with pytest.raises(ValueError, match="no double precision"):
        saccade.attend(q, q, q, backend="flex")


def test_chosen_on_cuda_only() -> None:
    mod = lambda s, *_: s.tanh()  # noqa: E731
    for device, expected in (("cpu", "stream"), ("cuda", "flex")):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        q = torch.randn(1, 1, 128, 16, device=device)
        assert saccade.plan(q, q, q, score_mod=mod, mask=masks.window(3)).backend == expected
    q = torch.randn(1, 1, 128, 16)
    assert "by name only" in saccade.plan(q, q, q, score_mod=mod).refused["flex"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("N", "M"), [(0, 4), (4, 0)])
def test_nothing_to_attend(eager: None, N: int, M: int) -> None:
    out, lse = saccade.attend(*qkv(N, M), backend="flex", return_lse=True, normalize="softmax")
    assert out.shape == (2, 4, N, 7) and not out.any() and (lse == -torch.inf).all()


@pytest.mark.cuda
@pytest.mark.parametrize("name", some_masks(150, 200))
def test_compiled_forward_and_backward(name: str) -> None:
    mask = some_masks(150, 200, "cuda")[name]
    results = []
    for backend in ("flex", "reference"):
        inputs = [x.requires_grad_() for x in qkv(150, 200, "cuda")]
        out, lse = saccade.attend(*inputs, mask=mask, return_lse=True, backend=backend)
        loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)
