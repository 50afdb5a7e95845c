from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saccade import masks
from saccade.ops.selection import block_causal, block_sparsity, own_blocks, pool_blocks, top_blocks


@pytest.mark.parametrize("N", [1, 7, 16, 21])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_pooling_follows_the_definition(N: int, mode: str) -> None:
    torch.manual_seed(N)
    x = torch.randn(2, 3, N, 5)
    pooled = pool_blocks(x, 8, mode=mode)
    for i, block in enumerate(x.split(8, 2)):
        torch.testing.assert_close(pooled[:, :, i], block.mean(2) if mode == "mean" else block.amax(2))
    assert pooled.shape[2] == -(-N // 8)


def test_a_short_block_counts_its_tokens_or_zeros() -> None:
    x = torch.ones(1, 1, 10, 2)
    assert pool_blocks(x, 8)[0, 0, :, 0].tolist() == [1.0, 1.0]
    assert pool_blocks(x, 8, tail="zeros")[0, 0, :, 0].tolist() == [1.0, 0.25]


def test_pooling_of_padded_rows_is_that_of_the_real_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 21, 4)
    valid = torch.zeros(2, 21, dtype=torch.bool)
    valid[0, :13], valid[1, 3:] = True, True
    for mode in ("mean", "max"):
        pooled = pool_blocks(x, 8, mode=mode, valid_BN=valid)
        torch.testing.assert_close(pooled[0, :, :2], pool_blocks(x[:1, :, :13], 8, mode=mode)[0])
        assert not pooled[0, :, 2].any()
        own = x[1, :, 3:8].mean(1) if mode == "mean" else x[1, :, 3:8].amax(1)
        torch.testing.assert_close(pooled[1, :, 0], own)
    zeros = pool_blocks(x, 8, tail="zeros", valid_BN=valid)
    torch.testing.assert_close(zeros[0, :, 1], x[0, :, 8:13].sum(1) / 8)


def test_pooling_is_done_in_float32_at_least() -> None:
    x = torch.randn(1, 1, 4096, 2)
    assert pool_blocks(x.bfloat16(), 4096).dtype == torch.float32
    torch.testing.assert_close(pool_blocks(x.bfloat16(), 4096)[:, :, 0], x.bfloat16().float().mean(2))
    assert pool_blocks(x.double(), 8).dtype == torch.float64
    assert pool_blocks(x[:, :, :0], 8).shape == (1, 1, 0, 2)


def one_by_one(share: Tensor, p: float, crossing: bool, at_least: int) -> list[bool]:
    keep, total = [False] * len(share), 0.0
    for count, j in enumerate(share.argsort(descending=True, stable=True).tolist()):
        before, total = total, total + float(share[j])
        keep[j] = count < at_least or (before <= p if crossing else total <= p)
    return keep


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.001, 1.1), st.booleans(), st.integers(1, 4))
def test_top_p_takes_blocks_one_by_one(seed: int, m: int, p: float, crossing: bool, at_least: int) -> None:
    share = torch.randn(2, 3, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    if ((share.sort(-1, descending=True).values.cumsum(-1) - p).abs() < 1e-9).any():
        return
    keep = top_blocks(share, p=p, crossing=crossing, at_least=at_least)
    for row, expected in zip(keep.flatten(0, 1), share.flatten(0, 1), strict=True):
        assert row.tolist() == one_by_one(expected, p, crossing, at_least)


def test_top_p_is_monotone_and_crosses_its_threshold() -> None:
    torch.manual_seed(0)
    share = (3 * torch.randn(2, 4, 9, 17)).softmax(-1)
    before = torch.zeros_like(share, dtype=torch.bool)
    for p in (0.0, 0.3, 0.7, 0.95, 1.1):
        keep, over = top_blocks(share, p=p), top_blocks(share, p=p, crossing=True)
        assert not (before & ~keep).any() and not (keep & ~over).any()
        one = keep.sum(-1) == 1
        assert (((share * keep).sum(-1) <= p + 1e-6) | one).all()
        assert ((share * over).sum(-1) > min(p, 0.999)).all()
        before = keep
    assert before.all()
    assert (top_blocks(share, p=0.0, crossing=True).sum(-1) == 1).all()


def test_thresholds_and_counts_per_head() -> None:
    share = torch.randn(2, 3, 5, 8).softmax(-1)
    p, count = torch.tensor([0.2, 0.5, 0.9])[:, None, None], torch.tensor([1, 3, 8])[:, None, None]
    both, counted = top_blocks(share, p=p), top_blocks(share, at_least=count)
    for h in range(3):
        assert torch.equal(both[:, h], top_blocks(share[:, h], p=float(p[h])))
        assert (counted[:, h].sum(-1) == int(count[h])).all()


def test_ties_go_to_the_earlier_block() -> None:
    assert top_blocks(torch.full((1, 4), 0.25), at_least=2).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("block_q", "block_k", "offset"), [(8, 8, 0), (8, 4, 0), (4, 8, 0), (8, 8, 16), (6, 4, 5)])
def test_block_causal_and_own_blocks_hold_what_tokens_say(block_q: int, block_k: int, offset: int) -> None:
    n, m = 4, 40 // block_k
    tokens = masks.causal(offset).dense(n * block_q, m * block_k)[0, 0]
    blocks = tokens.unflatten(1, (m, block_k)).unflatten(0, (n, block_q)).any(3).any(1)
    assert torch.equal(block_causal(n, m, block_q, block_k, offset=offset), blocks)
    same = masks.window(0, offset=offset).dense(n * block_q, m * block_k)[0, 0]
    blocks = same.unflatten(1, (m, block_k)).unflatten(0, (n, block_q)).any(3).any(1)
    assert torch.equal(own_blocks(n, m, block_q, block_k, offset=offset), blocks)


def test_sparsity_counts_candidates() -> None:
    past = block_causal(4, 4, 8, 8)
    assert block_sparsity(past[None, None], past).item() == 0
    assert block_sparsity(past[None, None]).item() == 1 - 10 / 16
    assert block_sparsity(own_blocks(4, 4, 8, 8)[None, None], past).item() == pytest.approx(0.6)


def test_bad_arguments() -> None:
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        pool_blocks(x, 0)
    with pytest.raises(ValueError, match="mode must be"):
        pool_blocks(x, 2, mode="median")
    with pytest.raises(ValueError, match="tail"):
        pool_blocks(x, 2, tail="drop")
