"""What the functions of `ops` compute while a graph is taken is what their operators compute."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod
from typing import Any

import pytest
import torch

from saccade import attend, linear_attend, masks
from saccade.explain.efficient_attention_survey import operator as survey
from saccade.ops import backends, expansion, linear, partitions, routed, selection
from saccade.ops.backends import blocksparse


def heads(*lengths: int, width: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, number, lengths[-1], width) for number in lengths[:-1]]


def windows(size: Any, window: Any, shift: Any, masked: bool = False) -> Callable[[], Any]:
    grid, windows, shifts = partitions.attend.grid_of(size, window, shift)
    q, k, v = heads(4, 2, 2, prod(grid))
    bias = torch.randn(4, prod(windows), prod(windows))
    mask = torch.where(torch.rand(3, prod(windows), prod(windows)) < 0.3, -inf, torch.zeros(())) if masked else None
    return lambda: partitions.window_attend(
        q, k, v, grid, windows, shifts, bias, mask=mask, scale=0.3, return_lse=not masked
    )


def decayed(*shape: int, normalize: bool = False) -> Callable[[], Any]:
    q, k, v = heads(4, 2, 2, 19)
    decay = None if shape == () else torch.rand(*shape) * 0.5 + 0.5
    return lambda: linear_attend(q.abs(), k.abs(), v, decay=decay, normalize=normalize, scale=0.7)


def routes(own: bool) -> Callable[[], Any]:
    q, k, v = heads(4, 2, 2, 16)
    chosen = torch.randint(-1, 1, (2, 4, 16, 1)).where(torch.arange(16)[:, None] >= 4, -1)
    return lambda: routed.routed_attend(q, k, v, chosen, 4, own=own)


def blocks(bias: bool) -> Callable[[], Any]:
    q, k, v = heads(4, 2, 2, 18)
    keep = masks.blocks(torch.rand(2, 4, 5, 5) < 0.5, 4) & masks.causal()
    block_bias = torch.randn(2, 4, 5, 5) if bias else None
    return lambda: blocksparse.blocksparse_attend(q, k, v, keep, block_size=4, block_bias=block_bias, return_lse=True)


def expanded(causal: bool) -> Callable[[], Any]:
    q, k, v = heads(2, 2, 2, 21)
    return lambda: expansion.expanded_attend(q, k, v, expansion.Polynomial(), causal=causal, chunk_size=8)


def cases() -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    q, k, v = heads(4, 2, 2, 300)
    below, right = torch.rand(2, 17, 17).tril(-1), torch.randn(2, 17, 5)
    share = torch.rand(1, 2, 4, 9).softmax(-1)
    return {
        "windows": windows(7, 3, 0),
        "shifted windows": windows((5, 6), (2, 3), (1, 1)),
        "windows of a volume": windows((5, 7, 3), (2, 3, 2), (1, 0, 1)),
        "one window": windows((4, 4), 4, 0, masked=True),
        "linear": decayed(),
        "normalised": decayed(normalize=True),
        "decay of a head": decayed(4),
        "decay of a channel": decayed(4, 8),
        "decay of a token": decayed(2, 4, 19),
        "decay of a token's channels": decayed(2, 4, 19, 8),
        "routes": routes(False),
        "routes and own blocks": routes(True),
        "blocks": blocks(False),
        "blocks with a bias": blocks(True),
        "all to all expansion": expanded(False),
        "causal expansion": expanded(True),
        "attention": lambda: attend(q, k, v, mask=masks.window(9), return_lse=True),
        "triangular solve": lambda: survey._solve(below, right),
        "cumulative choice": lambda: selection.top_blocks(share, p=0.7),
    }


@pytest.mark.parametrize("name", cases())
def test_plain_torch_is_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cases()[name]
    expected = run()
    called = (blocksparse.attend, expansion.attend, linear.attend, partitions.attend, routed.attend)
    for module in (backends, selection, *called):
        monkeypatch.setattr(module, "exporting", lambda: True)
    monkeypatch.setattr(survey, "exporting", lambda: True)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
