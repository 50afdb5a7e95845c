"""Every modification of the card, expressed with `attend` and tested against its definition."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from saccade import attend, masks, score_mods
from saccade.attention import flex_attention as flex
from saccade.attention.flex_attention import FlexAttention, PagedCache, attend_jagged, create_block_mask
from saccade.ops.score_mods import ScoreMod

N = 37


def tensors(heads: int = 4, kv_heads: int = 2, n: int = N, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(batch, heads, n, 8, dtype=torch.float64),
        torch.randn(batch, kv_heads, n, 8, dtype=torch.float64),
        torch.randn(batch, kv_heads, n, 6, dtype=torch.float64),
    )


def plainly(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = change(q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1).nan_to_num() @ v


I, J = torch.arange(N)[:, None], torch.arange(N)
CAUSAL = I >= J
SLOPES = torch.tensor([2.0 ** (-8 * (h + 1) / 4) for h in range(4)], dtype=torch.float64)[:, None, None]
TABLE = torch.randn(4, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DISTANCES = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", [None, "reference", "stream"])
@pytest.mark.parametrize(
    ("mod", "change"),
    [
        (score_mods.alibi(4), lambda s: s + SLOPES * (J - I)),
        (score_mods.soft_cap(2.0), lambda s: 2 * (s / 2).tanh()),
        (flex.relative(), lambda s: s + (I - J)),
        (score_mods.bias(TABLE), lambda s: s + TABLE),
        (score_mods.bias(TABLE[0]), lambda s: s + TABLE[0]),
        (score_mods.relative_bias(DISTANCES), lambda s: s + DISTANCES[:, (J - I + 3).clamp(0, 6)]),
        (
            score_mods.compose(score_mods.alibi(4), score_mods.soft_cap(3.0)),
            lambda s: 3 * ((s + SLOPES * (J - I)) / 3).tanh(),
        ),
    ],
    ids=["alibi", "soft-cap", "relative", "bias", "bias for all heads", "distances", "alibi then cap"],
)
def test_score_modifications(mod: ScoreMod, change: Callable[[Tensor], Tensor], backend: str | None) -> None:
    q, k, v = tensors()
    out = attend(q, k, v, mask=masks.causal(), score_mod=mod, backend=backend)
    torch.testing.assert_close(out, plainly(q, k, v, CAUSAL, change))


IDS = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 20, 12]))
START = torch.tensor([0] * 5 + [5] * 20 + [25] * 12)
SAME = IDS[:, None] == IDS


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        (masks.causal(), CAUSAL),
        (masks.window(6), CAUSAL & (I - J <= 6)),
        (masks.prefix(11) | masks.causal(), CAUSAL | (J < 11)),
        (masks.documents(IDS), SAME),
        (masks.documents(IDS) & masks.window(3, 2), SAME & (I - J <= 3) & (J - I <= 2)),
        (
            masks.per_document(IDS, masks.prefix(2) | masks.causal()),
            SAME & (((J - START)[None] < 2) | CAUSAL),
        ),
        (flex.dilated_window(9, 3), ((I - J).abs() <= 9) & ((I - J) % 3 == 0)),
        (flex.global_window(2, 4, 1), (J < 2) | ((I - J <= 4) & (J - I <= 1))),
        (
            masks.function(lambda b, h, q, k: (q + k) % 2 == 0) & ~masks.window(2, 2),
            ((I + J) % 2 == 0) & ((I - J).abs() > 2),
        ),
        (masks.neighborhood((N,), (5,)), (J - (I - 2).clamp(0, N - 5) >= 0) & (J - (I - 2).clamp(0, N - 5) < 5)),
    ],
    ids=str,
)  # fmt: skip
def test_masks(mask: masks.Mask, allowed: Tensor) -> None:
    q, k, v = tensors()
    expected = plainly(q, k, v, allowed, lambda s: s)
    for backend in (None, "blocksparse", "stream"):
        torch.testing.assert_close(attend(q, k, v, mask=mask, backend=backend), expected)
    # a score modification of -inf says the same
    table = torch.zeros(N, N, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(attend(q, k, v, score_mod=score_mods.bias(table)), expected)


def test_rotary_part_of_mla_is_a_longer_dot_product() -> None:
    q, k, v = tensors()
    q_rope, k_rope = torch.randn(2, 4, N, 3, dtype=torch.float64), torch.randn(2, 1, N, 3, dtype=torch.float64)
    scale = 11**-0.5
    out = attend(q, k, v, scale=scale, score_mod=flex.rope_part(q_rope, k_rope, scale), mask=masks.causal())
    k_long = torch.cat([k.repeat_interleave(2, 1), k_rope.expand(-1, 4, -1, -1)], -1)
    whole = F.scaled_dot_product_attention(
        torch.cat([q, q_rope], -1), k_long, v.repeat_interleave(2, 1), is_causal=True, scale=scale
    )
    torch.testing.assert_close(out, whole)


def test_a_captured_bias_gets_the_gradient_of_the_dense_form() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    table = TABLE.clone().requires_grad_()
    weight = torch.randn(2, 4, N, 6, dtype=torch.float64)
    out = attend(q, k, v, mask=masks.causal(), score_mod=score_mods.bias(table), backend="stream", memory_mb=0.01)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v, table))
    dense = plainly(q, k, v, CAUSAL, lambda s: s + table)
    for got, expected in zip(ours, torch.autograd.grad((dense * weight).sum(), (q, k, v, table)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("block", [8, (16, 4), 64])
@pytest.mark.parametrize("mask", [masks.causal(), masks.window(9), masks.documents(IDS) & masks.causal()], ids=str)
def test_block_lists(mask: masks.Mask, block: int | tuple[int, int]) -> None:
    lists = create_block_mask(mask, N, N, block)
    expected = theirs.create_block_mask(
        lambda b, h, q, k: mask.allowed(b, h, q, k), None, None, N, N, device="cpu", BLOCK_SIZE=block
    )
    assert torch.equal(lists.to_dense(), expected.to_dense().to(torch.int32))
    assert torch.equal(lists.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(lists.full_kv_num_blocks, expected.full_kv_num_blocks)
    # torch counts the tokens that it pads with
    rows, columns = lists.to_dense().shape[-2:]
    side = (block, block) if isinstance(block, int) else block
    assert lists.sparsity() == pytest.approx(100 * (1 - lists.to_dense().sum().item() * side[0] * side[1] / N**2))
    by_column = torch.zeros(rows, columns, dtype=torch.int32)
    for count, index in ((lists.q_num_blocks, lists.q_indices), (lists.full_q_num_blocks, lists.full_q_indices)):
        for column in range(columns):
            by_column[index[0, 0, column, : count[0, 0, column]].long(), column] += 1
    assert torch.equal(by_column, lists.to_dense()[0, 0])


def test_other_activations() -> None:
    q, k, v = tensors()
    out = flex.activation_attend(q, k, v, torch.tanh, 2.0, mask=masks.causal())
    group = (k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    direct = (q @ group[0].mT * 8**-0.5).tanh() * CAUSAL @ group[1]
    torch.testing.assert_close(out, direct)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.prefix(3) | masks.causal()], ids=str)
def test_jagged_sequences_equal_each_alone(mask: masks.Mask | None) -> None:
    torch.manual_seed(0)
    lengths = [4, 1, 0, 11]
    rows = [[torch.randn(n, heads, 8, dtype=torch.float64) for n in lengths] for heads in (4, 2, 2)]
    nested = [torch.nested.nested_tensor(each, layout=torch.jagged).requires_grad_() for each in rows]
    out = attend_jagged(*nested, mask=mask, score_mod=score_mods.alibi(4))
    assert out.is_nested and out.requires_grad
    for row, got in enumerate(out.unbind()):
        q, k, v = (each[row].transpose(0, 1)[None] for each in rows)
        expected = attend(q, k, v, mask=mask, score_mod=score_mods.alibi(4))[0].transpose(0, 1)
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="nested"):
        attend_jagged(*tensors())
    with pytest.raises(ValueError, match="vary"):
        attend_jagged(*nested, mask=masks.padding(torch.ones(4, 3, dtype=torch.bool)))


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("backend", ["blocksparse", "stream", None])
def test_pages_in_any_order_equal_a_contiguous_cache(page_size: int, backend: str | None) -> None:
    q, k, v = tensors(n=40, batch=3)
    cache = PagedCache(pages=64 // page_size * 3, page_size=page_size, batch=3, num_kv_heads=2, head_dim=8, value_dim=6,
                       dtype=torch.float64)  # fmt: skip
    lengths, seen = [40, 7, 23], [0, 0, 0]
    for turn in range(3):  # grown in turns, so that the pages lie mixed
        for row, length in enumerate(lengths):
            end = min(length, (turn + 1) * 14)
            cache.append(row, k[row, :, seen[row] : end], v[row, :, seen[row] : end])
            seen[row] = end
    assert cache.lengths.tolist() == lengths
    out = cache.attend(q, mask=masks.causal(), score_mod=None if backend == "blocksparse" else score_mods.alibi(4),
                       backend=backend)  # fmt: skip
    for row, length in enumerate(lengths):
        mod = None if backend == "blocksparse" else score_mods.alibi(4)
        alone = attend(
            q[row : row + 1], k[row : row + 1, :, :length], v[row : row + 1, :, :length], mask=masks.causal(),
            score_mod=mod,
        )  # fmt: skip
        torch.testing.assert_close(out[row : row + 1], alone)
    check = masks.function(
        flex.PagedMask(masks.causal(), cache.logical_page, cache.lengths, page_size).allowed, batch=3
    )
    paged = flex.PagedMask(masks.causal(), cache.logical_page, cache.lengths, page_size)
    check = masks.function(paged.allowed, batch=3)
    for block in (page_size, 2 * page_size, max(1, page_size // 2), 5):
        cautious, exact = (each.block_map(40, cache.keys.shape[2], (8, block)) for each in (paged, check))
        assert ((cautious == masks.PARTIAL) | (cautious == exact)).all()


def test_freed_pages_leak_nothing() -> None:
    cache = PagedCache(pages=4, page_size=4, batch=2, num_kv_heads=1, head_dim=8)
    k, v = torch.randn(1, 9, 8), torch.randn(1, 9, 8)
    cache.append(0, k * 100, v * 100)
    assert cache.free_pages == 1 and cache.nbytes > 0
    with pytest.raises(ValueError, match="needs 3 more pages, but 1 are free"):
        cache.append(1, k, v)
    cache.erase(0)
    cache.append(1, k, v)
    q = torch.randn(2, 1, 1, 8)
    out = cache.attend(q, mask=None)
    torch.testing.assert_close(out[1:], attend(q[1:], k[None], v[None]))
    assert not out[0].any()
    with pytest.raises(ValueError, match="2 sequences"):
        cache.attend(q[:1])


def test_limits_and_refusals() -> None:
    q, k, v = tensors()
    plain = attend(q, k, v, mask=masks.causal())
    torch.testing.assert_close(attend(q, k, v, mask=masks.causal(), score_mod=score_mods.soft_cap(1e6)), plain)
    torch.testing.assert_close(attend(q, k, v, mask=masks.causal(), score_mod=score_mods.bias(TABLE * 0)), plain)
    one, other = score_mods.alibi(4), score_mods.bias(TABLE)
    torch.testing.assert_close(
        attend(q, k, v, score_mod=score_mods.compose(one, other)),
        attend(q, k, v, score_mod=score_mods.compose(other, one)),
    )
    layer = FlexAttention(16, 4, causal=True, rope=False)
    assert layer.distances is None
    for arguments in ({"window": -1}, {"cap": 0.0}, {"reach": 0}, {"global_tokens": 1}):
        with pytest.raises(ValueError):
            FlexAttention(16, 4, **arguments)
    with pytest.raises(ValueError, match="dilation"):
        flex.dilated_window(3, 0)


def test_a_layer_can_be_pickled() -> None:
    layer = FlexAttention(16, 4, causal=True, use_alibi=True, cap=5.0, reach=2, window=3)
    x = torch.randn(1, 9, 16)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
