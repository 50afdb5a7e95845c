from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import masks
from saccade.attention.moba import MoBA, MoBACache, moba_attend, moba_attend_reference, moba_route
from saccade.attention.softmax import SoftmaxAttention


def heads(
    B: int,
    H: int,
    N: int,
    D: int,
    *,
    K: int | None = None,
    E: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    torch.manual_seed(B + 10 * H + 100 * N)
    K, E = K or H, E or D
    shapes = (B, H, N, D), (B, K, N, D), (B, K, N, E)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("B", "H", "K", "N", "D", "E", "block_size", "top_k"),
    [
        (2, 4, 2, 61, 8, 8, 8, 3),  # grouped heads, short tail
        (1, 2, 2, 40, 16, 16, 8, 2),
        (2, 3, 1, 130, 4, 6, 16, 5),  # many choices (topk), E > D
        (1, 2, 2, 37, 8, 3, 5, 4),  # E < D, odd block
        (1, 2, 1, 64, 8, 8, 1, 3),  # blocks of one key
        (1, 1, 1, 70, 8, 8, 32, 2),
    ],
)
def test_equals_the_definition_forward_and_backward(
    B: int, H: int, K: int, N: int, D: int, E: int, block_size: int, top_k: int
) -> None:
    q, k, v = heads(B, H, N, D, K=K, E=E, dtype=torch.float64)
    out = moba_attend(q, k, v, block_size=block_size, top_k=top_k)
    expected, _ = moba_attend_reference(q, k, v, block_size=block_size, top_k=top_k)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    grad = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
