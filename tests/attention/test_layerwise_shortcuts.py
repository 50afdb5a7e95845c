from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade import attention_map, masks
from saccade.attention import layerwise_shortcuts
from saccade.attention.layerwise_shortcuts import (
    DepthMask,
    ShortcutAttention,
    ShortcutDecoder,
    ShortcutStack,
    depth_shares,
    shortcut_attend,
)
from saccade.ops.attend import attend, plan
from saccade.ops.masks import EMPTY, FULL
from saccade.ops.rope import rotate

READINGS = [
    {},
    {"depths": (0, 2)},
    {"depths": (1, 2), "include_below": False},
    {"last_layer": "add"},
    {"combine": "features"},
    {"tied_mlp": True, "depth_embedding": True},
    {"residual_mlp": True, "num_kv_heads": 2},
    {"mlp_hidden": 0, "rope": False},
    {"mlp_hidden": 24},
    {"depths": None},
]


def stack(layers: int = 4, causal: bool = True, **options: object) -> ShortcutStack:
    torch.manual_seed(0)
    made = ShortcutStack(16, 4, causal, layers=layers, **options).double()
    for parameter in made.parameters():  # far from the small start, where every layer is nearly the identity
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def tokens(N: int, B: int = 2) -> Tensor:
    return torch.randn(B, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(N))


def naive(model: ShortcutStack, x: Tensor) -> Tensor:
    """The card's definition, keys depth after depth, with full matrices."""
    N = x.shape[1]
    seen = torch.ones(N, N, dtype=torch.bool).tril() if model.causal else torch.ones(N, N, dtype=torch.bool)

    def split(module: nn.Module, y: Tensor, heads: int, rope: bool) -> Tensor:
        y = y.unflatten(-1, (heads, -1)).transpose(1, 2)
        y = rotate(y, torch.arange(N)) if rope else y
        return y.repeat_interleave(module.num_heads // heads, 1)

    def attention(module: nn.Module, query: Tensor, depths: list[Tensor]) -> Tensor:
        q = split(module, module.q_proj(query), module.num_heads, module.rope)
        k = torch.cat([split(module, module.k_proj(f), module.num_kv_heads, module.rope) for f in depths], 2)
        v = torch.cat([split(module, module.v_proj(f), module.num_kv_heads, False) for f in depths], 2)
        scores = (q @ k.mT * module.head_dim**-0.5).masked_fill(~seen.repeat(1, len(depths)), -torch.inf)
        return module.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    states = [x]
    for number, block in enumerate(model.blocks, start=1):
        h = states[-1]
        if number < len(model.blocks) or model.depths is None:
            u = h + attention(block.attention, block.norm1(h), [block.norm1(h)])
        else:
            if block.before is not None:
                h = h + attention(block.before, block.norm0(h), [block.norm0(h)])
            cross, features = block.attention, []
            for i, depth in enumerate(model.depths):
                part = cross.feature_of[i % len(cross.feature_of)]
                f = part.norm(states[depth])
                if part.mlp is not None:
                    out = part.mlp.fc2(nn.functional.gelu(part.mlp.fc1(f)))
                    f = f + out if part.residual else out
                features.append(f if cross.embedding is None else f + cross.embedding[i])
            if cross.join is not None:
                features = [cross.join(torch.cat(features, -1))]
            u = h + attention(cross, block.norm1(h), features)
        states.append(u + block.mlp(block.norm2(u)))
    return states[-1]


@pytest.mark.parametrize("options", READINGS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition_forward_and_backward(options: dict, causal: bool) -> None:
    model, x = stack(causal=causal, **options), tokens(9).requires_grad_()
    ours, theirs = model(x), naive(model, x)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)
    leaves = [x, *model.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("options", READINGS, ids=str)
def test_decoding_and_the_past(options: dict) -> None:
    model, x = stack(**options), tokens(13)
    with torch.no_grad():
        expected, cache = model(x), model.new_cache(2)
        pieces = [model(x[:, :5], cache=cache), model(x[:, 5:8], cache=cache)]
        pieces += [model(x[:, i : i + 1], cache=cache) for i in range(8, 13)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-11, rtol=1e-11)
        assert cache.length == 13
        changed = x.clone()
        changed[:, 7:] += 1
        torch.testing.assert_close(model(changed)[:, :7], expected[:, :7], atol=1e-12, rtol=0)
        assert not torch.allclose(model(changed)[:, 7:], expected[:, 7:])


def test_the_last_layer_caches_its_depths_times_as_much() -> None:
    x, size = tokens(6), {}
    for depths in (None, (3,), (1, 2, 3)):
        model = stack(depths=depths)
        cache = model.new_cache(2)
        model(x, cache=cache)
        size[depths] = cache.nbytes
    layer = 2 * 2 * 6 * 16 * 8  # keys and values of 2 x 6 tokens of 16 doubles
    assert size[None] == 4 * layer and size[(3,)] == 4 * layer and size[(1, 2, 3)] == (3 + 3) * layer


@pytest.mark.parametrize("options", [{"mlp_hidden": 0}, {"residual_mlp": True}], ids=str)
def test_the_layer_below_alone_is_the_plain_decoder(options: dict) -> None:
    plain, ours = stack(depths=None), stack(depths=(3,), **options)
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert all("feature_of" in name for name in missing) and not unexpected
    last = ours.blocks[-1]
    feature = last.attention.feature_of[0]
    feature.norm = last.norm1  # the one LayerNorm
    feature.start()
    torch.testing.assert_close(ours(tokens(11)), plain(tokens(11)), atol=1e-13, rtol=1e-13)


def test_residual_features_start_at_the_layers_themselves() -> None:
    model = ShortcutStack(16, 4, layers=3, residual_mlp=True)
    x = torch.randn(2, 5, 16)
    for feature in model.blocks[-1].attention.feature_of:
        assert torch.equal(feature(x), nn.functional.layer_norm(x, (16,)))


def heads(N: int, S: int = 3, H: int = 2, K: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(N)
    q = torch.randn(2, H, N, 8, dtype=torch.float64)
    return q, *torch.randn(2, 2, K, N, S, 8, dtype=torch.float64).unbind()


def test_masking_a_depth_is_leaving_it_out() -> None:
    q, k, v = heads(10)
    kept = DepthMask(masks.causal(), 3) & masks.function(lambda b, h, q, k: k % 3 != 1)
    masked = attend(q, k.flatten(2, 3), v.flatten(2, 3), mask=kept)
    torch.testing.assert_close(masked, shortcut_attend(q, k[:, :, :, ::2], v[:, :, :, ::2]), atol=1e-13, rtol=0)


def test_one_depth_is_causal_attention() -> None:
    q, k, v = heads(10, S=1)
    assert torch.equal(shortcut_attend(q, k, v), attend(q, k[:, :, :, 0], v[:, :, :, 0], mask=masks.causal()))
    assert (depth_shares(q, k) == 1).all()


def test_long_sequences_go_depth_by_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.requires_grad_() for x in heads(33, H=4))
    expected = shortcut_attend(q, k, v)
    monkeypatch.setattr(layerwise_shortcuts, "LONG", 33)
    ours = shortcut_attend(q, k, v)
    torch.testing.assert_close(ours, expected, atol=1e-13, rtol=0)
    gradients = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_order_of_the_depths_does_not_matter() -> None:
    torch.manual_seed(0)
    module = ShortcutAttention(16, 4, depths=3, depth_embedding=True).double()
    hidden, x = list(torch.randn(3, 2, 7, 16, dtype=torch.float64)), tokens(7)
    expected, shares = module(x, hidden), module.shares(x, hidden)
    order = [2, 0, 1]
    module.feature_of = nn.ModuleList(module.feature_of[i] for i in order)
    module.embedding.data = module.embedding.data[order]
    hidden = [hidden[i] for i in order]
    torch.testing.assert_close(module(x, hidden), expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(module.shares(x, hidden), shares[..., order], atol=1e-13, rtol=0)


@pytest.mark.parametrize("options", [{}, {"last_layer": "add"}, {"num_kv_heads": 2}], ids=str)
def test_shares_are_sums_of_the_weights(options: dict) -> None:
    model, x = stack(**options), tokens(9)
    shares = model.depth_shares(x)
    assert shares.shape == (2, 4, 9, 3) and shares.std(2).min() > 1e-3
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 4, 9).double(), atol=1e-12, rtol=0)
    weights = attention_map(model, x, values=(2, 4, 9 * 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9).double(), atol=1e-12, rtol=0)
    by_depth = weights.unflatten(-1, (9, 3))
    torch.testing.assert_close(by_depth.sum(-2), shares, atol=1e-12, rtol=0)
    torch.testing.assert_close(by_depth.sum(-1), attention_map(model, x), atol=1e-12, rtol=0)
    assert not by_depth.sum(-1).triu(1).any()


def test_map_times_values_is_the_output() -> None:
    torch.manual_seed(0)
    module, x = ShortcutAttention(16, 4, depths=2).double(), tokens(7)
    hidden = list(torch.randn(2, 2, 7, 16, dtype=torch.float64))
    weights = attention_map(module, x, hidden=hidden, values=(2, 4, 14))
    v = module.v_proj(module.features(hidden)).unflatten(-1, (4, 4)).flatten(1, 2).transpose(1, 2)
    out = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, module(x, hidden), atol=1e-12, rtol=0)


def test_tied_features_of_equal_states_share_evenly() -> None:
    torch.manual_seed(0)
    module = ShortcutAttention(16, 4, depths=5, tied_mlp=True).double()
    shares = module.shares(tokens(8), [tokens(8) + 1] * 5)
    torch.testing.assert_close(shares, torch.full_like(shares, 0.2), atol=1e-13, rtol=0)


def test_one_token_attends_to_depths_only() -> None:
    module = stack()
    x = tokens(1)
    weights = attention_map(module, x, values=(2, 4, 3))
    torch.testing.assert_close(weights, module.depth_shares(x), atol=1e-13, rtol=0)


def test_padding_and_pairs() -> None:
    for causal in (True, False):
        model, x = stack(causal=causal), tokens(12)
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[1, 8:] = False
        torch.testing.assert_close(model(x, mask=mask)[1:, :8], model(x[1:, :8]), atol=1e-11, rtol=1e-11)
        shares = model.depth_shares(x, mask=torch.zeros(2, 12, dtype=torch.bool))
        assert (shares == 0).all()
    model, ids = stack(rope=False), torch.tensor([[0] * 5 + [1] * 7] * 2)
    apart = torch.cat([model(x[:, :5]), model(x[:, 5:])], 1)
    torch.testing.assert_close(model(x, mask=masks.documents(ids)), apart, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("inner", [masks.causal(), masks.causal(7), masks.window(5) | masks.prefix(3)], ids=repr)
@pytest.mark.parametrize("depths", [2, 3, 7])
def test_depth_mask_knows_its_blocks(inner: masks.Mask, depths: int) -> None:
    mask, n, m = DepthMask(inner, depths), 23, 30 * depths
    dense = mask.dense(n, m)
    assert torch.equal(dense, inner.dense(n, 30).repeat_interleave(depths, -1))
    for block_q, block_k in ((4, 4), (8, 16), (16, 6), (1, 1), (5, 64)):
        states = mask.block_map(n, m, (block_q, block_k))
        for i in range(states.shape[2]):
            for j in range(states.shape[3]):
                block = dense[0, 0, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
                assert states[0, 0, i, j] != EMPTY or not block.any()
                assert states[0, 0, i, j] != FULL or block.all()


def test_blocks_of_the_future_are_skipped() -> None:
    q, k = torch.empty(1, 8, 4096, 64, device="meta"), torch.empty(1, 8, 3 * 4096, 64, device="meta")
    forecast = plan(q, k, k, mask=DepthMask(masks.causal(), 3))
    assert forecast.backend == "blocksparse" and forecast.density < 0.52
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 300, 16), *torch.randn(2, 1, 2, 300, 3, 16)
    flat = k.flatten(2, 3), v.flatten(2, 3)
    fast = attend(q, *flat, mask=DepthMask(masks.causal(), 3), backend="blocksparse")
    slow = attend(q, *flat, mask=masks.causal().dense(300, 300).repeat_interleave(3, -1), backend="reference")
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
def test_decoder(positions: str) -> None:
    torch.manual_seed(0)
    model = ShortcutDecoder(20, 16, 4, layers=4, depths=(1, 2), positions=positions, max_length=12).double().eval()
    ids = torch.randint(20, (2, 12))
    with torch.no_grad():
        expected, cache = model(ids), model.new_cache(2)
        pieces = [model(ids[:, :4], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(4, 12)]
    assert expected.shape == (2, 12, 20)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-12, rtol=0)
    assert model.stack.depths == (1, 2, 3) and model.depth_shares(ids).shape == (2, 4, 12, 3)
    if positions == "learned":
        with pytest.raises(ValueError, match="there are 12 positions, got 13"):
            model(ids[:, :1], cache=cache)


def test_the_papers_depths_are_the_default() -> None:
    model = ShortcutDecoder(20, 16, 4, include_below=False)
    assert model.stack.depths == (2, 4, 8) and len(model.stack.blocks) == 10
    assert ShortcutStack(16, 4, layers=5).depths == (1, 2, 3, 4)
    features = sum(p.numel() for p in model.stack.blocks[-1].attention.feature_of.parameters())
    assert features == 3 * (2 * 16 * 16 + 2 * 16 + 2 * 16)  # weights, biases, norm


def test_another_mechanism_below() -> None:
    model = ShortcutStack(16, 4, host="moba", host_options={"block_size": 4, "top_k": 2}).eval()
    x = torch.randn(2, 11, 16)
    with torch.no_grad():
        cache = model.new_cache(2)
        pieces = [model(x[:, :5], cache=cache)] + [model(x[:, i : i + 1], cache=cache) for i in range(5, 11)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(x), atol=1e-5, rtol=1e-5)


def test_bad_arguments() -> None:
    for bad, message in (
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"depths": (3,)}, "depths must be different numbers from 0 to 2, 'all' or None"),
        ({"depths": (1, 1)}, "depths must be different numbers"),
        ({"depths": (), "include_below": False}, "depths must name at least one layer"),
        ({"last_layer": "twice"}, "last_layer must be 'replace' or 'add', got 'twice'"),
        ({"combine": "sum"}, "combine must be 'keys' or 'features', got 'sum'"),
        ({"mlp_hidden": -1}, "mlp_hidden must not be negative"),
        ({"host": "nobody"}, "no part is called 'nobody'"),
    ):
        with pytest.raises(ValueError, match=message):
            ShortcutStack(16, 4, **bad)
    with pytest.raises(ValueError, match="positions must be"):
        ShortcutDecoder(20, 16, 4, positions="alibi")
    x = tokens(4)
    with pytest.raises(ValueError, match="take no context"):
        stack()(x, x)
    with pytest.raises(ValueError, match="only causal layers decode"):
        stack(causal=False)(x, cache=stack().new_cache(2))
    with pytest.raises(ValueError, match="has no attention over depths"):
        stack(combine="features").depth_shares(x)
    with pytest.raises(ValueError, match="no shortcuts to look at"):
        stack(depths=None).depth_shares(x)
    with pytest.raises(ValueError, match="hidden must be 3 tensors"):
        ShortcutAttention(16, 4).double()(x, [x, x])
    with pytest.raises(ValueError, match="keys must hold 3 depths"):
        DepthMask(masks.causal(), 3).check(4, 10)
