"""What the card of Mega promises: limit cases, chunks, attention functions, biases, decoding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import saccade
from saccade.attention.mega import (
    DampedEMA,
    MegaAttention,
    MegaBlock,
    MegaCrossAttention,
    NormalizedFeedForward,
    RotaryBias,
    SimpleBias,
    attention,
    laplace,
    mega_attend,
)
from saccade.ops import masks
from saccade.ops.rope import rotate


def heads(B: int, H: int, N: int, M: int, Z: int = 4, V: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(N)
    shapes = ((B, H, N, Z), (B, H, M, Z), (B, H, M, V))
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def definition(
    q: Tensor, k: Tensor, v: Tensor, kind: str, bias: nn.Module | None, seen: Tensor, offset: int = 0
) -> Tensor:
    """A V by the card's formulas, with the N x M bias and `seen` (B, 1, N, M) written out."""
    (N, Z), M = q.shape[2:], k.shape[2]
    i, j = torch.arange(offset, offset + N), torch.arange(M)
    B: Tensor | float = 0.0
    if isinstance(bias, SimpleBias):
        B = bias.weight[bias.max_positions - 1 + j - i[:, None]]
    elif bias is not None:
        alpha, beta = (x.view(q.shape[1], 1, Z) for x in (bias.alpha, bias.beta))
        B = rotate(alpha.expand(-1, N, -1), i) @ rotate(beta.expand(-1, M, -1), j).mT
    if kind == "softmax":
        return (q @ k.mT / math.sqrt(Z) + B).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ v
    s = q @ k.mT / seen.sum(-1, keepdim=True).clamp(min=1) + B
    mu, sigma = 0.707107, 0.282095
    weights = 0.5 * (1 + torch.erf((s - mu) / (sigma * math.sqrt(2)))) if kind == "laplace" else s.relu() ** 2
    return (weights * seen) @ v


@pytest.mark.parametrize("kind", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("position", ["simple", "rotary", None])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_its_definition(kind: str, position: str | None, causal: bool) -> None:
    H, N, offset = 2, 9, 4
    M = N + offset
    q, k, v = heads(2, H, N, M)
    bias = {"simple": SimpleBias(M + 3), "rotary": RotaryBias(H * 4), None: None}[position]
    if bias is not None:
        bias = bias.double()
        for parameter in bias.parameters():
            nn.init.normal_(parameter)
    valid = torch.ones(2, M, dtype=torch.bool)
    valid[0, :6], valid[1, 11:] = False, False
    seen = valid[:, None, None] & torch.ones(N, M, dtype=torch.bool).tril(offset if causal else M)
    out = mega_attend(q, k, v, attention=kind, bias=bias, mask=valid, causal=causal, offset=offset)
    expected = definition(q, k, v, kind, bias, seen, offset)
    close = {"atol": 1e-5, "rtol": 1e-5} if kind == "laplace" or position == "rotary" else {}
    torch.testing.assert_close(out, expected, **close)  # the card's mu and sigma have six digits, angles are float32
    leaves = [q, k, v, *([] if bias is None else bias.parameters())]
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "relu2"])
def test_masks_of_pairs(kind: str) -> None:
    q, k, v = heads(2, 1, 6, 6)
    seen = torch.rand(2, 1, 6, 6) < 0.5
    for causal in (False, True):
        both = seen & torch.ones(6, 6, dtype=torch.bool).tril() if causal else seen
        out = mega_attend(q, k, v, attention=kind, mask=seen, causal=causal)
        torch.testing.assert_close(out, definition(q, k, v, kind, None, both))


def test_simple_bias_takes_the_reach_of_a_checkpoint() -> None:
    full, chunked = (MegaAttention(8, ema_dim=2, position="simple", chunk_size=c, max_positions=30) for c in (None, 12))
    chunked.load_state_dict(full.state_dict())
    x = torch.randn(1, 12, 8)
    torch.testing.assert_close(chunked(x), full(x))


def test_each_querys_keys_are_counted_under_any_mask() -> None:
    q = torch.randn(2, 2, 9, 4)
    for mask in (masks.window(2), masks.documents(torch.arange(9) // 4) & masks.padding(torch.ones(2, 9).bool())):
        out = mega_attend(q, q, q, attention="laplace", mask=mask)
        dense = mask.dense(9, 9).expand(2, 1, 9, 9)
        torch.testing.assert_close(out, mega_attend(q, q, q, attention="laplace", mask=dense))


def test_laplace_and_squared_relu_touch_at_mu() -> None:
    mu = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
    for function in (laplace, lambda x: x.relu().square()):
        value = function(mu)
        (slope,) = torch.autograd.grad(value, mu)
        assert abs(value.item() - 0.5) < 1e-12 and abs(slope.item() - math.sqrt(2)) < 1e-12


def test_rotary_bias_depends_on_the_distance() -> None:
    bias, x = RotaryBias(8), torch.zeros(1, 1, 40, 8)
    nn.init.normal_(bias.alpha), nn.init.normal_(bias.beta)
    weights = saccade.attention_map(lambda q, k, v: mega_attend(q, k, v, attention="relu2", bias=bias), x, x)[0, 0]
    assert weights.any()
    torch.testing.assert_close(weights[1:, 1:], weights[:-1, :-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_average_equals_its_toeplitz_matrix(bidirectional: bool) -> None:
    torch.manual_seed(0)
    module = DampedEMA(3, 4, bidirectional=bidirectional).double()
    x = torch.randn(2, 70, 3, dtype=torch.float64)
    p, a = module.delta.sigmoid()[..., 0], module.alpha.sigmoid()[..., 0]
    q = 1 - p * a
    taps = torch.stack([(module.gamma * p * module.beta[..., 0] * q**t).sum(-1) / 2 for t in range(70)], 1)
    distance = torch.arange(70)[:, None] - torch.arange(70)
    matrix = taps[:3, distance.clamp(min=0)] * (distance >= 0)
    if bidirectional:
        matrix = matrix + taps[3:, (-distance).clamp(min=0)] * (distance <= 0)
    expected = torch.nn.functional.silu(torch.einsum("cij,bjc->bic", matrix, x) + module.omega * x)
    torch.testing.assert_close(module(x), expected)
    module.truncation = 70
    torch.testing.assert_close(module(x), expected)


def test_average_at_its_limits() -> None:
    torch.manual_seed(0)
    module, x = DampedEMA(3, 4), torch.randn(2, 20, 3)
    nn.init.constant_(module.alpha, -torch.inf)  # no damping: a cumulative sum
    scale = (module.gamma * module.delta.sigmoid()[..., 0] * module.beta[..., 0]).sum(-1) / 2
    expected = torch.nn.functional.silu(scale * x.cumsum(1) + module.omega * x)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    nn.init.constant_(module.delta, -torch.inf)
    assert torch.equal(module(x), torch.nn.functional.silu(module.omega * x))


def test_update_gate_zero_is_the_identity() -> None:
    torch.manual_seed(0)
    layer, x = MegaAttention(8, ema_dim=2), torch.randn(2, 11, 8)
    with torch.no_grad():
        layer.mx_proj.bias[:8] = -1e9
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("kind", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_long_chunk_is_full_attention_and_short_ones_are_apart(kind: str, causal: bool) -> None:
    torch.manual_seed(0)
    full, chunked = (MegaAttention(8, causal=causal, ema_dim=2, attention=kind, chunk_size=c) for c in (None, 23))
    chunked.load_state_dict(full.state_dict())
    x = torch.randn(2, 23, 8)
    torch.testing.assert_close(chunked(x), full(x))
    chunked.chunk_size = 5
    weights = saccade.attention_map(chunked, x)[:, 0]
    block = torch.arange(23) // 5
    assert not weights[:, block[:, None] != block].any()
    if causal:
        assert not weights.triu(1).any()


def test_information_crosses_chunks_through_the_average_only() -> None:
    torch.manual_seed(0)
    layer = MegaAttention(8, causal=True, ema_dim=2, chunk_size=4)
    x = torch.randn(1, 12, 8, requires_grad=True)

    def reach() -> Tensor:
        (gradient,) = torch.autograd.grad(layer(x)[:, 9].sum(), x)
        return gradient[0].abs().sum(-1) > 0

    assert reach()[:10].all() and not reach()[10:].any()
    nn.init.zeros_(layer.ema.gamma)
    assert not reach()[:8].any() and reach()[8:10].all()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"chunk_size": 6},
        {"chunk_size": 6, "attention": "laplace", "position": "simple", "norm": "scale", "prenorm": False},
        {"chunk_size": 6, "truncation": 5, "norm": "rms"},
        {"attention": "relu2", "norm": "batch", "position": None},
        {"num_heads": 2, "position": "simple", "max_positions": 64, "norm": None},
    ],
)
def test_padded_decoding_equals_the_parallel_form(arguments: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = MegaAttention(16, causal=True, ema_dim=3, **arguments).eval()
    x, mask = torch.randn(2, 45, 16), torch.ones(2, 45, dtype=torch.bool)
    mask[0, :4], mask[1, 17:20] = False, False
    cache, sizes, pieces = layer.new_cache(2), [], []
    with torch.no_grad():
        for stop in (3, 4, 5, *range(6, 22), 35, 36, 36, 45):
            pieces.append(layer(x[:, cache.length : stop], mask=mask[:, :stop], cache=cache))
            sizes.append(cache.nbytes)
        torch.testing.assert_close(torch.cat(pieces, 1)[mask], layer(x, mask=mask)[mask], atol=1e-5, rtol=1e-5)
    assert cache.length == 45
    if "chunk_size" in arguments:  # constant memory: nothing held is longer than a chunk (or the kernel)
        assert max(sizes) == max(sizes[:12])


def test_long_sequences_in_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = MegaAttention(8, causal=True, ema_dim=2, chunk_size=4).eval()
    x, mask = torch.randn(2, 50, 8), torch.rand(2, 50) < 0.8
    whole = layer(x, mask=mask)
    monkeypatch.setattr(attention, "_STREAM", 10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask=mask)[mask], whole[mask])


def test_cross_attention_in_pieces_and_padding() -> None:
    torch.manual_seed(0)
    layer = MegaCrossAttention(12, position="simple", max_positions=20)
    x, context, mask = torch.randn(2, 9, 12), torch.randn(2, 13, 12), torch.ones(2, 13, dtype=torch.bool)
    mask[1, 7:] = False
    y = layer(x, context, mask=mask)
    torch.testing.assert_close(y[1:], layer(x[1:], context[1:, :7]))
    torch.testing.assert_close(layer(x[:, 5:], context, mask=mask, start=5), y[:, 5:])
    with torch.no_grad():
        layer.q_proj.bias[:12] = -1e9
    assert torch.equal(layer(x, context), x)


def test_block_of_a_decoder_decodes() -> None:
    torch.manual_seed(0)
    block = MegaBlock(12, causal=True, cross=True, ema_dim=2, chunk_size=4, norm="scale", prenorm=False).eval()
    x, context = torch.randn(2, 10, 12), torch.randn(2, 7, 12)
    cache = block.new_cache(2)
    with torch.no_grad():
        pieces = [block(x[:, t : t + 1], context, cache=cache) for t in range(10)]
        torch.testing.assert_close(torch.cat(pieces, 1), block(x, context), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="if and only if cross=True"):
        block(x)


def test_published_sizes() -> None:
    for name, expected in MegaBlock.CONFIGS.items():
        with torch.device("meta"):
            block = MegaBlock.from_config(name)
        assert block.attention.dim == expected["dim"] and block.ffn.fc1.out_features == 2 * expected["dim"]
    with pytest.raises(ValueError, match="config must be one of"):
        MegaBlock.from_config("small")


def test_feature_dropout_drops_whole_channels() -> None:
    torch.manual_seed(0)
    layer = NormalizedFeedForward(64, 8, dropout=0.5, feature_dropout=True)
    y = layer.dropout(torch.ones(2, 6, 64))
    assert torch.equal(y, y[:, :1].expand_as(y)) and {0.0, 2.0} == set(y.unique().tolist())


@pytest.mark.parametrize("module", ["mega_attention0", "gated_cross_attention", "nffn"])
@pytest.mark.parametrize("norm", ["layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm"])
def test_ports_build_from_any_norm(module: str, norm: str) -> None:
    port = saccade.catalogue.port("mega", module)
    sizes = {"nffn": {"ffn_hidden_dim": 16}, "gated_cross_attention": {"zdim": 4, "ndim": 2, "rel_pos_bias": "rotary"}}
    default = {"zdim": 4, "hdim": 8, "ndim": 2, "attention_activation": "relu2", "truncation": 8}
    built = port.build({"embed_dim": 8, "norm_type": norm, "dropout": 0.1, **sizes.get(module, default)})
    assert sum(p.numel() for p in built.norm.parameters()) == {"scalenorm": 1, "rmsnorm": 8}.get(norm, 16)
    with pytest.raises(ValueError, match=r"arguments must be among .* got 'unheard_of'"):
        port.build({"embed_dim": 8, "unheard_of": 1})


def test_bad_arguments() -> None:
    x = torch.randn(1, 9, 8)
    for arguments, message in (
        ({"attention": "max"}, "attention must be one of softmax, laplace, relu2, got 'max'"),
        ({"activation": "swoosh"}, "activation must be one of"),
        ({"norm": "group"}, "norm must be"),
        ({"position": "alibi"}, "position must be"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"truncation": 0}, "truncation must be at least 1"),
        ({"key_dim": 5}, "needs an even key_dim per head"),
        ({"num_heads": 3, "value_dim": 16}, "num_heads must divide"),
        ({"position": "simple", "max_positions": 0}, "max_positions must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            MegaAttention(8, **arguments)
    layer = MegaAttention(8, causal=True, chunk_size=4)
    with pytest.raises(ValueError, match="MegaCrossAttention takes a context"):
        layer(x, x)
    with pytest.raises(ValueError, match="needs all tokens in one chunk"):
        layer(x, mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool \(batch, keys\) = \(1, 9\), got .* \(1, 8\)"):
        layer(x, mask=torch.ones(1, 8, dtype=torch.bool))
    cache = layer.new_cache(1)
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="the cache is for 1 sequences, got 2"):
        layer(torch.randn(2, 1, 8), cache=cache)
    with pytest.raises(ValueError, match="only a causal layer decodes"):
        MegaAttention(8)(x, cache=cache)
    with pytest.raises(ValueError, match="reaches 4 positions, got 9"):
        MegaAttention(8, position="simple", max_positions=4)(x)
    q = torch.randn(1, 1, 9, 4)
    with pytest.raises(ValueError, match="the mask is for 2 heads, got 1"):
        mega_attend(q, q, q, attention="laplace", mask=torch.ones(1, 2, 9, 9, dtype=torch.bool))
