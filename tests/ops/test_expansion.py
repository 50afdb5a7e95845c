from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.ops.expansion import (
    Expansion,
    Outer,
    Polynomial,
    expanded_attend,
    expanded_attend_reference,
    in_segments,
)
from saccade.ops.scratch import Scratch

EXPANSIONS = [Polynomial(), Polynomial(0.3, -1.5, 0.7), Polynomial(1.0, 0.5, 0.0), Outer(2)]


def inputs(B: int, H: int, N: int, M: int, D: int, E: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(N + M)
    shapes = (B, H, N, D), (B, H, M, D), (B, H, M, E)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("channels", [3, 4, 5, 8])
def test_scores_are_products_of_features(expansion: Expansion, channels: int) -> None:
    q, k = torch.randn(2, 2, 7, channels, dtype=torch.float64)
    a, b = (expansion.features(x, query, Scratch(x.dtype, x.device)) for x, query in ((q, True), (k, False)))
    assert a.shape == b.shape == (2, 7, expansion.width(channels))
    torch.testing.assert_close(a @ b.mT, expansion.scores(q, k), atol=1e-12, rtol=0)


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize(
    ("causal", "N", "M", "D", "E", "chunk_size"),
    [
        (True, 61, 61, 4, 5, 8),  # short tail, states kept at some of the chunks
        (True, 13, 13, 5, 3, 16),  # one chunk: no features at all
        (True, 9, 9, 3, 2, 1),
        (False, 70, 90, 4, 3, 8),  # features
        (False, 6, 5, 6, 7, 4),  # all pairs
    ],
)
def test_equals_the_matrix_of_scores_forward_and_backward(
    expansion: Expansion, causal: bool, N: int, M: int, D: int, E: int, chunk_size: int
) -> None:
    tensors = inputs(2, 3, N, M, D, E)
    out = expanded_attend(*tensors, expansion, causal=causal, chunk_size=chunk_size)
    expected = expanded_attend_reference(*tensors, expansion, causal=causal)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, tensors, grad) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_a_sequence_in_two_parts_is_the_sequence(expansion: Expansion) -> None:
    tensors = inputs(2, 2, 40, 40, 4, 3)
    expected, last = expanded_attend(*tensors, expansion, return_state=True)
    early, state = expanded_attend(*(x[:, :, :23] for x in tensors), expansion, return_state=True, chunk_size=4)
    late, end = expanded_attend(
        *(x[:, :, 23:] for x in tensors), expansion, state=state, return_state=True, chunk_size=8
    )
    torch.testing.assert_close(torch.cat([early, late], 2), expected)
    torch.testing.assert_close(end, last)
    # gradients pass through the state, in both directions
    weights = torch.randn_like(end)
    ours, theirs = (
        torch.autograd.grad((s * weights).sum() + o, tensors)
        for s, o in ((end, late.sum()), (last, expected[:, :, 23:].sum()))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(3, 2, 20, 20, 4, 3)
    for causal in (True, False):
        expected = expanded_attend_reference(*tensors, Polynomial(), causal=causal)
        monkeypatch.setattr("saccade.ops.expansion.operator._CPU_ELEMENTS", 1)
        out = expanded_attend(*tensors, Polynomial(), causal=causal, chunk_size=4)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        for a, b in zip(*(torch.autograd.grad(x, tensors, grad) for x in (out, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_compiles_and_passes_the_operator_checks() -> None:
    tensors = inputs(1, 2, 21, 21, 4, 3, torch.float32)
    for causal in (True, False):
        compiled = torch.compile(
            lambda q, k, v, causal=causal: expanded_attend(q, k, v, Polynomial(), causal=causal, chunk_size=4),
            backend="aot_eager",
            fullgraph=True,
        )
        torch.testing.assert_close(compiled(*tensors), expanded_attend(*tensors, Polynomial(), causal=causal))
        flat = [x.detach().flatten(0, 1).requires_grad_() for x in tensors]
        state = torch.zeros(2, Polynomial().width(4) if causal else 0, 3)
        settings = Polynomial().code, causal, 4, True, False, True
        torch.library.opcheck(torch.ops.saccade.expanded, (*flat, state, *settings), test_utils="test_schema")
        torch.library.opcheck(torch.ops.saccade.expanded, (*flat, state, *settings), test_utils="test_faketensor")


def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in inputs(1, 2, 1100, 1100, 3, 2))
    lengths = []

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert mask is not None
        lengths.append(q.shape[2])
        v = v * mask[:, None, :, None]
        out = expanded_attend(q, k, v, Polynomial(), state=state, return_state=return_state)
        return out if return_state else (out, None)

    mask = torch.rand(1, 1100) > 0.5
    whole, last = in_segments(attend, q, k, v, mask, None, True)
    monkeypatch.setattr("saccade.ops.expansion.attend._SEGMENT_ELEMENTS", 1)
    parts, end = in_segments(attend, q, k, v, mask, None, True)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(end, last)
    assert in_segments(attend, q, k, v, mask, None, False)[1] is None
    in_segments(attend, q.requires_grad_(), k, v, mask, None, False)
    assert lengths == [1100, 512, 512, 76, 512, 512, 76, 1100]


def test_half_precision_and_empty_inputs() -> None:
    tensors = inputs(1, 2, 300, 300, 8, 4, torch.bfloat16)
    out = expanded_attend(*tensors, Polynomial())
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in tensors)
    for B, N in ((0, 5), (2, 0)):
        for causal in (True, False):
            empty = inputs(B, 2, N, N, 4, 3)
            assert expanded_attend(*empty, Polynomial(), causal=causal).shape == (B, 2, N, 3)


def test_bad_arguments() -> None:
    q, k, v = inputs(1, 2, 5, 6, 4, 3)
    with pytest.raises(ValueError, match="as many keys as queries"):
        expanded_attend(q, k, v, Polynomial())
    with pytest.raises(ValueError, match=r"query, key and value must be"):
        expanded_attend(q, k[:, :1], v, Polynomial(), causal=False)
    with pytest.raises(ValueError, match="needs causal=True"):
        expanded_attend(q, k, v, Polynomial(), causal=False, return_state=True)
    with pytest.raises(ValueError, match=r"state must be"):
        expanded_attend(k, k, v, Polynomial(), state=torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="chunk_size"):
        expanded_attend(k, k, v, Polynomial(), chunk_size=0)
