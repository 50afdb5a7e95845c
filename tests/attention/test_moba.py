from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import masks
from saccade.attention.moba import MoBA, MoBACache, moba_attend, moba_attend_reference, moba_route
from saccade.layers.softmax_attention import SoftmaxAttention


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


def test_covering_every_block_is_dense_and_one_block_is_block_diagonal() -> None:
    q, k, v = heads(2, 4, 50, 8, K=2)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for block_size, top_k in ((8, 7), (8, 100), (64, 1)):
        torch.testing.assert_close(moba_attend(q, k, v, block_size=block_size, top_k=top_k), dense)
    own = torch.arange(50) // 8
    diagonal = F.scaled_dot_product_attention(q, k, v, attn_mask=(own[:, None] == own).tril(), enable_gqa=True)
    torch.testing.assert_close(moba_attend(q, k, v, block_size=8, top_k=1), diagonal)


def test_the_past_is_unchanged_bit_for_bit() -> None:
    q, k, v = (x.detach() for x in heads(2, 4, 150, 16, K=2))
    out, chosen = moba_attend(q, k, v, block_size=16, top_k=3), route(q, k, 16, 3)
    for t in (0, 15, 16, 77, 148):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t + 1 :] = 3 * torch.randn_like(x[:, :, t + 1 :])
        assert torch.equal(moba_attend(*changed, block_size=16, top_k=3)[:, :, : t + 1], out[:, :, : t + 1])
        assert torch.equal(route(*changed[:2], 16, 3)[:, :, : t + 1], chosen[:, :, : t + 1])


def route(q: Tensor, k: Tensor, block_size: int, top_k: int) -> Tensor:
    pad = (0, 0, 0, -q.shape[2] % block_size)
    chosen = moba_route(F.pad(q, pad), F.pad(k, pad), block_size=block_size, top_k=top_k)
    return chosen[:, :, : q.shape[2]]


@pytest.mark.parametrize("top_k", [2, 4, 7])
def test_each_query_chooses_past_blocks_and_all_while_they_fit(top_k: int) -> None:
    q, k, _ = heads(2, 3, 83, 8)
    chosen, own = route(q, k, 8, top_k), torch.arange(83) // 8
    assert chosen.shape[-1] == top_k - 1
    assert (chosen < own[:, None]).all()
    made = (chosen >= 0).sum(-1)
    assert (made == own.clamp(max=top_k - 1)).all()
    ordered = chosen.sort(-1).values
    assert ((ordered.diff(dim=-1) != 0) | (ordered[..., 1:] < 0)).all()


def test_ties_take_exactly_as_many_blocks() -> None:
    q, k = torch.zeros(1, 1, 64, 8), torch.randn(1, 1, 64, 8)
    for top_k in (3, 6):
        assert ((route(q, k, 8, top_k) >= 0).sum(-1) == (torch.arange(64) // 8).clamp(max=top_k - 1)).all()
    weights = moba_attend(q, k, torch.eye(64)[None, None], block_size=8, top_k=3)
    assert (weights[0, 0, 40:] > 0).sum(-1).tolist() == [16 + i % 8 + 1 for i in range(24)]


def test_a_positive_factor_on_the_queries_leaves_the_choice() -> None:
    q, k, _ = heads(1, 2, 80, 8)
    assert torch.equal(route(q, k, 8, 3), route(4 * q, k, 8, 3))


def test_order_within_a_past_block_does_not_matter_later() -> None:
    q, k, v = heads(1, 2, 80, 8)
    order = torch.arange(80)
    order[16:24] = order[16:24].flip(0)
    out = moba_attend(q, k, v, block_size=8, top_k=3)
    shuffled = moba_attend(q, k[:, :, order], v[:, :, order], block_size=8, top_k=3)
    torch.testing.assert_close(shuffled[:, :, 24:], out[:, :, 24:])
    torch.testing.assert_close(shuffled[:, :, :16], out[:, :, :16])


def test_a_planted_block_is_found() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 256, 32), torch.randn(1, 1, 256, 32)
    q[:, :, -1] = k[:, :, 80:96].mean(2) * 50
    assert 5 in route(q, k, 16, 3)[0, 0, -1]


def test_recent_blocks_by_the_gate_are_a_sliding_window() -> None:
    q, k, v = heads(1, 1, 96, 8, dtype=torch.float64)
    # one channel grows with the block, so later blocks win
    position = torch.arange(96) // 8
    q, k = F.pad(q, (0, 1), value=1.0), torch.cat([k, 100.0 * position[None, None, :, None]], -1)
    out = moba_attend(q, k, v, block_size=8, top_k=3)
    near = (position[:, None] - position <= 2).tril()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=near))


def test_packed_sequences_equal_separate_runs_and_their_gradients() -> None:
    q, k, v = heads(2, 4, 61, 8, K=2, dtype=torch.float64)
    ids = torch.zeros(2, 61, dtype=torch.long)
    ids[0, 40:], ids[1, 7:] = 1, 5
    ids[1, 30:] = 9
    out = moba_attend(q, k, v, block_size=8, top_k=3, mask=masks.documents(ids))
    expected = torch.empty_like(out)
    for row, first, last in ((0, 0, 40), (0, 40, 61), (1, 0, 7), (1, 7, 30), (1, 30, 61)):
        part = slice(row, row + 1), slice(None), slice(first, last)
        expected[part] = moba_attend_reference(q[part], k[part], v[part], block_size=8, top_k=3)[0]
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("left", [False, True])
def test_padding_equals_the_sequence_alone(left: bool) -> None:
    q, k, v = (x.detach() for x in heads(2, 2, 60, 8))
    real = torch.ones(2, 60, dtype=torch.bool)
    kept = slice(11, None) if left else slice(0, 49)
    real[0] = False
    real[0, kept] = True
    for mask in (real, masks.padding(real), real[:, None, None], masks.padding(real) & masks.causal()):
        out = moba_attend(q, k, v, block_size=8, top_k=3, mask=mask)
        alone = moba_attend(q[:1, :, kept], k[:1, :, kept], v[:1, :, kept], block_size=8, top_k=3)
        torch.testing.assert_close(out[:1, :, kept], alone)
        torch.testing.assert_close(out[1:], moba_attend(q[1:], k[1:], v[1:], block_size=8, top_k=3))
        assert not out[0][:, ~real[0]].any()


def test_padding_and_documents_together() -> None:
    q, k, v = heads(1, 2, 40, 8)
    ids, real = (torch.arange(40) >= 18).long(), torch.arange(40) != 39
    out = moba_attend(q, k, v, block_size=4, top_k=2, mask=masks.documents(ids) & masks.padding(real[None]))
    second = moba_attend(*(x[:, :, 18:39] for x in (q, k, v)), block_size=4, top_k=2)
    torch.testing.assert_close(out[:, :, 18:39], second)


@pytest.mark.parametrize("prompt", [1, 5, 8, 20])
@pytest.mark.parametrize("sinks", [0, 5])
def test_decoding_equals_the_parallel_form(prompt: int, sinks: int) -> None:
    torch.manual_seed(0)
    layer = MoBA(32, 4, num_kv_heads=2, block_size=8, top_k=3, sinks=sinks).eval()
    x = torch.randn(2, 70, 32)
    cache = layer.new_cache(2)
    assert isinstance(cache, MoBACache)
    with torch.no_grad():
        expected = layer(x)
        pieces = [layer(x[:, :prompt], cache=cache)]
        pieces += [layer(x[:, t : t + 1], cache=cache) for t in range(prompt, 45)]
        pieces += [layer(x[:, 45:62], cache=cache), layer(x[:, 62:64], cache=cache), layer(x[:, 64:], cache=cache)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-5)
    keys = 2 * 2 * 70 * 8 * 4
    assert cache.length == 70 and cache.nbytes == 2 * keys + 2 * 2 * 8 * 8 * 4


def test_decoding_with_left_padding_equals_the_sequence_alone() -> None:
    torch.manual_seed(0)
    layer = MoBA(16, 2, block_size=4, top_k=3, sinks=3).eval()
    x = torch.randn(1, 33, 16)
    padded, mask = torch.cat([torch.randn(1, 6, 16), x], 1), (torch.arange(39) >= 6)[None]
    cache = layer.new_cache(1)
    with torch.no_grad():
        pieces = [layer(padded[:, :20], mask=mask[:, :20], cache=cache)]
        pieces += [layer(padded[:, t : t + 1], mask=mask[:, : t + 1], cache=cache) for t in range(20, 30)]
        pieces += [layer(padded[:, 30:], mask=mask, cache=cache)]
        torch.testing.assert_close(torch.cat(pieces, 1)[:, 6:], layer(x), atol=1e-5, rtol=1e-5)


def test_the_first_tokens_blocks_are_chosen_before_others() -> None:
    q, k, v = heads(2, 4, 40, 8, K=2)
    chosen = moba_route(q, k, block_size=4, top_k=4, first_blocks=2)
    for block in range(3, 10):
        picked = chosen[:, :, 4 * block : 4 * block + 4].sort(-1).values
        assert (picked[..., :2] == torch.tensor([0, 1])).all() and (picked[..., 2] > 1).all()
    mask = torch.tensor([[0] * 7 + [1] * 33, [1] * 40]).bool()  # counted from the first real token
    options = {"block_size": 4, "top_k": 3, "sinks": 4}
    alone = moba_attend(*(x[:1, :, 7:] for x in (q, k, v)), **options)
    torch.testing.assert_close(moba_attend(q, k, v, mask=mask, **options)[:1, :, 7:], alone, atol=1e-5, rtol=1e-5)


def test_one_query_after_many_keys_without_a_cache() -> None:
    q, k, v = heads(2, 4, 45, 8, K=2)
    out = moba_attend(q, k, v, block_size=8, top_k=3)
    for last in (1, 2, 9, 20):
        torch.testing.assert_close(
            moba_attend(q[:, :, -last:], k, v, block_size=8, top_k=3), out[:, :, -last:], atol=1e-5, rtol=1e-5
        )


def test_a_trained_dense_layer_becomes_moba_and_back() -> None:
    torch.manual_seed(0)
    dense, layer = SoftmaxAttention(32, 4, causal=True), MoBA(32, 4, block_size=8, top_k=100)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(2, 50, 32)
    torch.testing.assert_close(layer(x), dense(x))
    layer.top_k = 2
    assert not torch.allclose(layer(x), dense(x))


def test_given_values_are_mixed_with_the_layers_weights() -> None:
    torch.manual_seed(0)
    layer = MoBA(16, 2, block_size=4, top_k=2)
    x = torch.randn(1, 19, 16)
    weights = layer.mix(x, torch.eye(19).expand(1, 2, 19, 19))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 19))
    assert not weights.triu(1).any()
    assert ((weights > 0).sum(-1) <= 8).all()


def test_half_precision_is_near() -> None:
    q, k, v = (x.detach() for x in heads(1, 2, 130, 16))
    for dtype in (torch.bfloat16, torch.float16):
        q_, k_, v_ = (x.to(dtype).requires_grad_() for x in (q, k, v))
        out = moba_attend(q_, k_, v_, block_size=16, top_k=3)
        expected, _ = moba_attend_reference(q_.float(), k_.float(), v_.float(), block_size=16, top_k=3)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
        ours = torch.autograd.grad(out.float().square().sum(), (q_, k_, v_))
        theirs = torch.autograd.grad(expected.square().sum(), (q_, k_, v_))
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 0.05 * b.abs().max()


def test_bad_arguments() -> None:
    q, k, v = heads(1, 2, 16, 8)
    for bad, message in (
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"mask": masks.window(3)}, r"takes padding .* and packed sequences as its mask"),
        ({"mask": torch.ones(1, 9, dtype=torch.bool)}, "mask must be"),
        (
            {"mask": torch.ones(16, 16, dtype=torch.bool)[None, None]},
            "takes padding .* and packed sequences as its mask",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            moba_attend(q, k, v, **{"block_size": 4, "top_k": 2, **bad})
    with pytest.raises(ValueError, match="do not fit"):
        moba_attend(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="at most 5, got 16"):
        moba_attend(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ValueError, match="4 axes"):
        moba_attend(q[0], k, v)
    with pytest.raises(ValueError, match="must divide the query heads"):
        moba_attend(q, torch.cat([k, k[:, :1]], 1), torch.cat([v, v[:, :1]], 1))
    with pytest.raises(ValueError, match="MoBA is causal"):
        MoBA(16, 2, causal=False)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 3"):
        MoBA(16, 2, block_size=0)
    with pytest.raises(ValueError, match="takes no context"):
        MoBA(16, 2)(torch.randn(1, 4, 16), torch.randn(1, 4, 16))


@pytest.mark.parametrize("length", [3, 21])
def test_one_block_decodes(length: int) -> None:
    module = MoBA(16, 4, block_size=4, top_k=1).eval()
    x, cache = torch.randn(2, length, 16), module.new_cache(2)
    with torch.no_grad():
        steps = [module(x[:, i : i + 1], cache=cache) for i in range(length)]
        torch.testing.assert_close(torch.cat(steps, 1), module(x))
