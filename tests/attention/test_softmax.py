from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.rope import rotate


def test_equals_torch_on_the_same_projections() -> None:
    torch.manual_seed(0)
    layer = SoftmaxAttention(24, 3, causal=True)
    x = torch.randn(2, 13, 24)
    q, k, v = (proj(x).unflatten(-1, (3, 8)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotate(q, torch.arange(13)), rotate(k, torch.arange(13))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.out_proj(out))


def test_grouped_heads_equal_repeated_keys() -> None:
    torch.manual_seed(0)
    grouped, full = SoftmaxAttention(16, 4, num_kv_heads=2), SoftmaxAttention(16, 4)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(1, 9, 16)
    torch.testing.assert_close(grouped(x), full(x))


def test_rotation_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    here, there = torch.arange(6), torch.arange(6) + 100
    scores = [rotate(q, p) @ rotate(k, p).mT for p in (here, there)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(rotate(q, here, channels=4)[..., 4:], q[..., 4:])


def test_a_mask_object_reaches_the_scores() -> None:
    from saccade import masks

    torch.manual_seed(0)
    layer = SoftmaxAttention(16, 2, causal=True)
    x = torch.randn(1, 20, 16)
    near = layer(x, mask=masks.window(3))
    torch.testing.assert_close(near[:, :4], layer(x)[:, :4])
    changed = x.clone()
    changed[:, 0] = 0
    torch.testing.assert_close(layer(changed, mask=masks.window(3))[:, 4:], near[:, 4:])


def test_left_padding_with_a_cache_equals_the_sequence_alone() -> None:
    torch.manual_seed(0)
    layer = SoftmaxAttention(16, 2, causal=True).eval()
    x = torch.randn(1, 8, 16)
    padded, mask = torch.cat([torch.randn(1, 3, 16), x], 1), torch.arange(11)[None] >= 3
    cache = layer.new_cache(1)
    with torch.no_grad():
        first = layer(padded[:, :6], mask=mask[:, :6], cache=cache)
        rest = layer(padded[:, 6:], mask=mask, cache=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1)[:, 3:], layer(x))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        SoftmaxAttention(10, 3)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads"):
        SoftmaxAttention(16, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="even head_dim"):
        SoftmaxAttention(9, 3)
    layer = SoftmaxAttention(16, 4, causal=True)
    x = torch.randn(2, 5, 16)
    for wrong in (x.numpy(), x.tolist()):
        with pytest.raises(ValueError, match="x must be a tensor, got"):
            layer(wrong)
    with pytest.raises(ValueError, match="causal layer takes no context"):
        layer(x, x)
    with pytest.raises(ValueError, match="padding mask must be"):
        layer(x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="decodes"):
        SoftmaxAttention(16, 4)(x, cache=layer.new_cache(2))
