"""What the card of efficient attention promises, and the causal form that is not in the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade
from saccade.attention import efficient_attention
from saccade.attention.efficient_attention import (
    EfficientAttention,
    EfficientAttention2d,
    efficient_attend,
)
from saccade.ops import masks


def heads(B: int, H: int, N: int, D: int, M: int | None = None, K: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(N)
    q = torch.randn(B, H, N, D, dtype=torch.float64)
    k = torch.randn(B, K or H, M or N, D, dtype=torch.float64)
    v = torch.randn(B, K or H, M or N, 5, dtype=torch.float64)
    return tuple(x.requires_grad_() for x in (q, k, v))


def pairs(q: Tensor, k: Tensor, valid: Tensor | None = None, causal: bool = False, scaling: bool = False) -> Tensor:
    """The implicit N x M weights, by the definition: for each query its own softmax over the keys that it sees."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    N, M = q.shape[2], k.shape[2]
    seen = torch.ones(q.shape[0], N, M, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if valid is not None:
        seen = seen & valid[:, None]
    if scaling:
        return (q @ k.mT) * seen[:, None] / seen.sum(-1).clamp(min=1)[:, None, :, None]
    logits = k[:, :, None].masked_fill(~seen[:, None, :, :, None], -torch.inf)  # (B, H, N, M, D)
    rho_k = logits.softmax(3).nan_to_num()
    return torch.einsum("bhnd,bhnmd->bhnm", q.softmax(-1), rho_k)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("N", [1, 7, 70])
def test_equals_its_definition_forward_and_backward(causal: bool, padded: bool, normalization: str, N: int) -> None:
    q, k, v = heads(2, 4, N, 4, K=2)
    valid = None
    if padded:
        valid = torch.rand(2, N) < 0.7
        valid[0, 0], valid[1] = False, False  # a row that begins with padding, a row of nothing else
    out = efficient_attend(q, k, v, mask=valid, causal=causal, normalization=normalization)
    expected = pairs(q, k, valid, causal, normalization == "scaling") @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.nan_to_num())


def test_scaling_is_dot_product_attention_over_n() -> None:
    q, k, v = heads(2, 3, 11, 4, M=17)
    expected = (q @ k.mT / 17) @ v
    torch.testing.assert_close(efficient_attend(q, k, v, normalization="scaling"), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_implicit_weights_are_row_stochastic(causal: bool) -> None:
    q, k, v = heads(1, 2, 19, 4)
    weights = saccade.attention_map(lambda q, k, v: efficient_attend(q, k, v, causal=causal), q, k)
    assert (weights >= 0).all() and bool(weights.triu(1).any()) != causal
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 19, dtype=torch.float64))
    torch.testing.assert_close(weights @ v, efficient_attend(q, k, v, causal=causal))
    constant = torch.tensor([1.0, -2.0], dtype=torch.float64).expand(1, 2, 19, 2)
    torch.testing.assert_close(efficient_attend(q, k, constant, causal=causal), constant)


def test_permuting_positions_permutes_the_output() -> None:
    q, k, v = heads(1, 2, 23, 4)
    order = torch.randperm(23)
    shuffled = efficient_attend(*(x[:, :, order] for x in (q, k, v)))
    torch.testing.assert_close(shuffled, efficient_attend(q, k, v)[:, :, order])


def test_one_key_channel_gives_all_positions_one_average() -> None:
    q, k, v = heads(2, 2, 9, 1)
    out = efficient_attend(q, k, v)
    torch.testing.assert_close(out, (k.softmax(2) * v).sum(2, keepdim=True).expand_as(out))


def test_causal_weights_sum_to_one_at_length_and_with_large_keys() -> None:
    torch.manual_seed(0)
    k = 30 * torch.randn(1, 1, 3000, 8)
    k[:, :, 1500:] += 500  # the early keys would vanish under one common maximum
    out = efficient_attend(torch.randn(1, 1, 3000, 8), k, torch.ones(1, 1, 3000, 2), causal=True)
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_padded_decoding_equals_the_sequence_alone(normalization: str) -> None:
    torch.manual_seed(0)
    layer = EfficientAttention(16, 2, True, normalization=normalization).eval()
    x = torch.randn(1, 33, 16)
    padded, mask = torch.cat([torch.randn(1, 6, 16), x], 1), (torch.arange(39) >= 6)[None]
    cache, sizes = layer.new_cache(1), []
    pieces = [layer(padded[:, :4], mask=mask[:, :4], cache=cache)]
    for stop in (*range(5, 31), 39):
        pieces.append(layer(padded[:, cache.length : stop], mask=mask[:, :stop], cache=cache))
        sizes.append(cache.nbytes)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 6:], layer(x), atol=1e-5, rtol=1e-5)
    assert len(set(sizes)) == 1 and cache.length == 39


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_long_sequences_in_pieces_equal_the_whole(normalization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(2, 2, 50, 4)
    valid = torch.rand(2, 50) < 0.8
    whole, last = efficient_attend(q, k, v, mask=valid, causal=True, normalization=normalization, return_state=True)
    monkeypatch.setattr(efficient_attention.operator, "_PIECE", 16)
    with torch.no_grad():
        out, state = efficient_attend(q, k, v, mask=valid, causal=True, normalization=normalization, return_state=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(state, last)


def test_maps_one_head_and_identity() -> None:
    torch.manual_seed(0)
    layer = EfficientAttention2d(6, key_channels=4, value_channels=8).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    q, k, v = (proj(x).flatten(2).mT for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    expected = (q.softmax(-1) @ (k.softmax(1).mT @ v)).mT.unflatten(-1, (3, 5))
    torch.testing.assert_close(layer(x), x + layer.out_proj(expected))
    torch.testing.assert_close(layer.maps(x).flatten(2).mT, k.softmax(1))
    torch.nn.init.zeros_(layer.out_proj.weight)
    torch.nn.init.zeros_(layer.out_proj.bias)
    assert torch.equal(layer(x), x)


def test_tokens_of_a_map_as_a_sequence() -> None:
    torch.manual_seed(0)
    layer = EfficientAttention(8, 2)
    gate = EfficientAttention2d(8, 2, key_channels=8, value_channels=8, residual=False)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(gate, name).weight.data = getattr(layer, name).weight.data[..., None, None]
        getattr(gate, name).bias.data = getattr(layer, name).bias.data
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(layer(x.flatten(2).mT), gate(x).flatten(2).mT)


def test_memory_is_linear_in_positions() -> None:
    from saccade.ops.measure import peak_bytes

    def peak(n: int) -> int:
        q, k, v = torch.randn(3, 1, 1, n, 16)
        return peak_bytes(lambda: efficient_attend(q, k, v))

    assert peak(4096) <= 2.2 * peak(2048)


def test_bad_arguments() -> None:
    q, k, v = heads(1, 2, 6, 4)
    for bad, message in (
        ({"normalization": "l1"}, "normalization must be 'softmax' or 'scaling', got 'l1'"),
        ({"mask": masks.causal()}, "takes padding .* as its mask, got"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"mask must be bool \(batch, keys\) = \(1, 6\)"),
        ({"return_state": True}, "a state needs causal=True"),
    ):
        with pytest.raises(ValueError, match=message):
            efficient_attend(q, k, v, **bad)
    with pytest.raises(ValueError, match="num_heads must divide key_channels"):
        EfficientAttention2d(6, 2, key_channels=3)
    with pytest.raises(ValueError, match="x must be"):
        EfficientAttention2d(6)(torch.randn(2, 5, 3, 3))
    with pytest.raises(ValueError, match="only a causal layer decodes"):
        EfficientAttention(8)(torch.randn(1, 2, 8), cache=EfficientAttention(8).new_cache(1))
    layer = EfficientAttention(8, causal=True)
    cache = layer.new_cache(1)
    layer(torch.randn(1, 2, 8), cache=cache)
    with pytest.raises(ValueError, match="the cache is for 1 sequences, got 2"):
        layer(torch.randn(2, 2, 8), cache=cache)
    with pytest.raises(ValueError, match="mask must be"):
        layer(torch.randn(1, 2, 8), mask=torch.ones(1, 2, dtype=torch.bool), cache=cache)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_of_a_long_sequence_are_the_whole(normalization, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 41, 8), torch.randn(2, 2, 41, 12)
    mask = torch.rand(2, 41) < 0.6 if padded else None
    if mask is not None:
        mask[1] = False
    expected = efficient_attend(q, k, v, mask=mask, normalization=normalization)
    monkeypatch.setattr("saccade.attention.efficient_attention.operator._PIECE", 16)
    with torch.no_grad():
        found = efficient_attend(q, k, v, mask=mask, normalization=normalization)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
