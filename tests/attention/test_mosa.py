"""MoSA against a slow form token by token, the card's invariants, its cache, padding, bad arguments."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import saccade
from saccade.attention.mosa import MoSA, budget
from saccade.ops import tokens
from saccade.ops.rope import rotate


def _layer(**arguments):
    torch.manual_seed(0)
    layer = MoSA(**{"dim": 16, "num_heads": 4, "num_other_heads": 0, "sparsity": 4, **arguments})
    if layer.sparse is not None and layer.sparse.router is not None:
        nn.init.normal_(layer.sparse.router.weight)
    return layer.eval()


def _input(length=20, batch=2, dim=16):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(length))


def _rows(layer, x_NC, kept, gate):
    """Sparse heads the slow way: kept(e, i) are the positions token i of head e sees, None where it is out."""
    heads = layer.sparse
    out_NC = torch.zeros_like(x_NC)
    for e in range(heads.num_heads):
        q, k, v = (x_NC @ heads.qkv[e]).chunk(3, -1)
        positions = torch.arange(len(x_NC))
        q, k = (rotate(t, positions, base=heads.rope_base, channels=heads.rotated) for t in (q, k))
        for i in range(len(x_NC)):
            seen = kept(e, i)
            if seen is not None:
                weight = torch.softmax(q[i] @ k[seen].T / heads.head_dim**0.5, -1)
                out_NC[i] += gate[e, i] * (weight @ v[seen]) @ heads.out[e]
    return out_NC


def _scores(layer, x_NC):
    return torch.sigmoid(x_NC @ layer.sparse.router.weight.T).T


@pytest.mark.parametrize("include_first", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotate_fraction", [0.0, 0.5, 1.0])
def test_equals_the_slow_form(include_first, causal, rotate_fraction):
    layer = _layer(include_first=include_first, causal=causal, rotate_fraction=rotate_fraction, sparsity=3)
    x = _input(17)
    for row in range(2):
        gate = _scores(layer, x[row])
        chosen = []
        for e in range(4):
            first = [0] if include_first else []
            rest = [i for i in gate[e].argsort(descending=True).tolist() if i not in first]
            chosen.append((first + rest)[: 17 // 3])

        def kept(e, i, chosen=chosen):
            return [j for j in chosen[e] if j <= i or not causal] if i in chosen[e] else None

        torch.testing.assert_close(layer(x)[row], _rows(layer, x[row], kept, gate), rtol=1e-4, atol=1e-5)


def test_sparsity_one_is_dense_attention_times_the_gate():
    layer, x = _layer(sparsity=1), _input()
    gate_BNH = torch.stack([_scores(layer, row).T for row in x])
    q, k, v = torch.einsum("bnc,ecd->bend", x, layer.sparse.qkv).chunk(3, -1)
    q, k = (rotate(t, torch.arange(20), channels=2) for t in (q, k))
    dense_BHND = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    want = torch.einsum("bend,edc,bne->bnc", dense_BHND, layer.sparse.out, gate_BNH)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    nn.init.zeros_(layer.sparse.router.weight)
    assert (layer.sparse.route(x)[1] == 0.5).all()


@pytest.mark.parametrize("include_first", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 7, 20])
def test_what_is_picked(length, include_first):
    layer, x = _layer(include_first=include_first), _input(length)
    position_EBS, gate_EBS, _ = layer.sparse.route(x)
    count = min(max(length // 4, 2), length)
    assert budget(length, 4) == count and position_EBS.shape == gate_EBS.shape == (4, 2, count)
    assert all(len(set(row)) == count for head in position_EBS.tolist() for row in head)
    if include_first:
        assert (position_EBS[..., 0] == 0).all()
        torch.testing.assert_close(gate_EBS[..., 0], layer.sparse.scores(x)[..., 0])
    nobody = torch.ones(2, length, dtype=torch.bool)
    nobody[torch.arange(2)[:, None], position_EBS.transpose(0, 1).flatten(1)] = False
    y = layer(x)
    assert (y[nobody] == 0).all() and (y[~nobody].abs().amax(-1) > 0).all()
    one_hot = torch.eye(length).expand(2, 4, -1, -1)
    assert (layer.mix(x, one_hot).abs().amax(-1) > 0).sum(-1).amax() <= count


def test_order_of_the_picked_does_not_matter(monkeypatch):
    layer, x = _layer(), _input()
    want = layer(x)
    route = layer.sparse.route

    def shuffled(*arguments):
        position, gate, kept = route(*arguments)
        order = torch.randperm(position.shape[-1], generator=torch.Generator().manual_seed(1))
        return position[..., order], gate[..., order], kept

    monkeypatch.setattr(layer.sparse, "route", shuffled)
    torch.testing.assert_close(layer(x), want)


def test_only_relative_positions_count():
    layer = _layer(rotate_fraction=1.0)
    x = _input(16)
    direction = layer.sparse.router.weight.sum(0)
    low = -50 * torch.linalg.pinv(layer.sparse.router.weight) @ torch.ones(4)
    assert (layer.sparse.router(low) < -40).all() and direction.isfinite().all()
    prepended = torch.cat([low.expand(2, 3, 16), x], 1)  # 19 // 4 = 16 // 4
    torch.testing.assert_close(layer(prepended)[:, 3:], layer(x), rtol=1e-4, atol=1e-5)


def test_gradients_go_to_the_router_and_to_the_picked():
    layer, x = _layer(), _input().requires_grad_()
    layer(x).square().sum().backward()
    assert layer.sparse.router.weight.grad.abs().sum() > 0
    picked = torch.zeros(2, 20, dtype=torch.bool)
    picked[torch.arange(2)[:, None], layer.sparse.route(x)[0].transpose(0, 1).flatten(1)] = True
    assert (~picked).any()
    assert (x.grad[~picked] == 0).all() and (x.grad[picked].abs().amax(-1) > 0).all()


def test_gradcheck():
    layer = _layer(dim=6, num_heads=2, num_other_heads=1, head_dim=4, sparsity=2).double()
    x = torch.randn(1, 6, 6, dtype=torch.double, requires_grad=True, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(layer, x)


def test_hybrid_is_the_sum_of_its_heads():
    layer, x = _layer(num_other_heads=1), _input()
    torch.testing.assert_close(layer(x), layer.sparse(x) + layer.other(x))
    dense = _layer(num_heads=2, num_other_heads=2, head_dim=8)
    q, k, v = dense.other.qkv(x).unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, -1)
    q, k = (rotate(t, torch.arange(20), channels=4) for t in (q, k))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(dense(x), dense.other.out(attended.transpose(1, 2).flatten(2)))
    assert saccade.create("mosa", dim=64, num_heads=8).num_other_heads == 4


@pytest.mark.parametrize("window", [1, 3, 4, 50])
def test_local_heads_see_their_bucket_and_the_one_before(window):
    layer, x = _layer(num_heads=2, num_other_heads=2, window=window), _input(18)
    weights = layer.mix(x, torch.eye(18).expand(2, 2, -1, -1))
    n = torch.arange(18)
    bucket = n // window
    allowed = (bucket[:, None] - bucket <= 1) & (n <= n[:, None])
    assert torch.equal(weights > 0, allowed.expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 18))


def test_fixed_routing_takes_every_rho_th_token():
    layer, x = _layer(routing="fixed"), _input(21)
    assert layer.sparse.router is None
    lit = layer(x).abs().amax(-1) > 0
    assert torch.equal(lit, (torch.arange(21) % 4 == 0).logical_and(torch.arange(21) < 20).expand(2, -1))
    torch.testing.assert_close(
        layer(x)[0],
        _rows(layer, x[0], lambda e, i: list(range(0, i + 1, 4)) if i % 4 == 0 and i < 20 else None, torch.ones(4, 21)),
        rtol=1e-4,
        atol=1e-5,
    )
    assert _layer(routing="fixed")(_input(3)).isfinite().all()


def test_mix_gives_the_layer():
    layer, x = _layer(num_other_heads=1), _input()
    value = torch.cat(
        [
            torch.einsum("bnc,ecd->bend", x, layer.sparse.qkv[..., 8:]),
            layer.other.qkv(x).unflatten(-1, (1, 12)).transpose(1, 2)[..., 8:],
        ],
        1,
    )
    mixed = layer.mix(x, value)
    want = torch.einsum("bend,edc->bnc", mixed[:, :3], layer.sparse.out) + layer.other.out(mixed[:, 3])
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"include_first": True}, {"routing": "fixed"}, {"causal": False}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(arguments, side):
    layer, x = _layer(num_other_heads=1, **arguments), _input(15)
    if side == "left" and arguments.get("routing") == "fixed":
        pytest.skip("fixed tokens are places, not contents")
    pads = 9 * torch.randn(2, 6, 16)
    real = torch.ones(2, 15, dtype=torch.bool)
    parts = [(x, real), (pads, ~torch.ones(2, 6, dtype=torch.bool))][:: -1 if side == "left" else 1]
    padded, mask = (torch.cat(p, 1) for p in zip(*parts, strict=True))
    got = layer(padded, mask=mask)
    assert got.isfinite().all()
    torch.testing.assert_close(got[mask].view_as(x), layer(x), rtol=1e-4, atol=1e-5)
    assert layer(padded, mask=torch.zeros_like(mask)).isfinite().all()


def test_padding_in_sparse_heads_gives_pads_nothing():
    layer, x = _layer(), _input()
    mask = torch.arange(20) < torch.tensor([[20], [3]])
    y = layer(x, mask=mask)
    assert (y[1, 3:] == 0).all() and (y[1, :3].abs().amax(-1) > 0).any()


@pytest.mark.parametrize("include_first", [False, True])
def test_decoding_keeps_the_best_so_far(include_first):
    layer, x = _layer(include_first=include_first, sparsity=5, max_length=20), _input()
    gate = [_scores(layer, row) for row in x]

    def best(row, e, i):
        first = [0] if include_first else []
        order = [j for j in gate[row][e, : i + 1].argsort(descending=True).tolist() if j not in first]
        seen = (first + order)[:4]
        return sorted(seen) if i in seen else None

    want = torch.stack([_rows(layer, x[b], lambda e, i, b=b: best(b, e, i), gate[b]) for b in range(2)])
    for pieces in ([20], [1] * 20, [7] + [1] * 13):
        cache = layer.new_cache(2)
        got = torch.cat([layer(piece, cache=cache) for piece in x.split(pieces, 1)], 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert cache.length == 20
    assert cache.nbytes == 4 * (2 * 4 * 4 * (2 * 4 + 1))
    assert not torch.allclose(want, layer(x), atol=1e-3)  # the parallel choice knows the future


@pytest.mark.parametrize("window", [None, 3])
def test_other_heads_decode_as_they_train(window):
    layer, x = _layer(num_heads=2, num_other_heads=2, window=window, max_length=20), _input()
    mask = torch.arange(20) >= torch.tensor([[0], [4]])
    for real in (None, mask):
        cache = layer.new_cache(2)
        got, start = [], 0
        for size in (5, 3, 1, 1, 4, 6):
            so_far = None if real is None else real[:, : start + size]
            got.append(layer(x[:, start : start + size], mask=so_far, cache=cache))
            start += size
        torch.testing.assert_close(torch.cat(got, 1), layer(x, mask=real), rtol=1e-4, atol=1e-5)
    if window is not None:
        assert cache.nbytes <= 4 * (2 * 2 * 2 * 8) * (2 * window + 6)


def test_decoding_with_padding_at_the_left():
    layer, x = _layer(num_other_heads=1, max_length=40), _input(12, batch=1)
    padded = torch.cat([torch.randn(1, 5, 16), x], 1)
    mask = torch.arange(17)[None] >= 5
    want = layer(x, cache=layer.new_cache(1))
    torch.testing.assert_close(layer(padded, mask=mask, cache=layer.new_cache(1))[:, 5:], want, rtol=1e-4, atol=1e-5)


def test_pairs_in_the_cache_and_flops_are_the_cards():
    layer = MoSA(64, 14, num_other_heads=2, head_dim=16, sparsity=16)
    assert layer.cached_pairs(256) == 12 * 16 + 2 * 256
    dense, sparse = 8 * 64 * 16 * 256 + 4 * 16 * 256**2, 8 * 64 * 16 * 16 + 4 * 16 * 16**2 + 2 * 64 * 256 + 64 * 0
    assert layer.flops(256) == 2 * dense + 12 * (sparse + 16 * 16)


def test_initialisation():
    heads = MoSA(32, 8, num_other_heads=0).sparse
    assert heads.qkv.abs().max() <= 12**-0.5 and heads.out.abs().max() <= (32 * 8) ** -0.5
    assert heads.qkv.abs().max() > 0.95 * 12**-0.5 and heads.out.abs().max() > 0.95 * (32 * 8) ** -0.5


def test_half_precision():
    layer, x = _layer(num_other_heads=1), _input()
    layer.bfloat16()
    got = layer(x.bfloat16())
    want = layer.float()(x.bfloat16().float())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()
    scores = _layer().bfloat16().sparse.scores(20 * x.bfloat16())
    assert scores.dtype == torch.float32
    cache = layer.bfloat16().new_cache(2, max_length=20)
    assert layer(x.bfloat16(), cache=cache).dtype == torch.bfloat16


def _reference_gather(x, position):
    return torch.stack([torch.stack([x[b, p] for b, p in enumerate(head)]) for head in position])


def test_gather_and_scatter():
    x = torch.randn(3, 7, 5)
    position = torch.stack([torch.stack([torch.randperm(7)[:4] for _ in range(3)]) for _ in range(2)])
    got = tokens.gather(x, position)
    assert torch.equal(got, _reference_gather(x, position))
    back = tokens.scatter_add(got, position, 7)
    times = torch.stack([torch.bincount(position[:, b].flatten(), minlength=7) for b in range(3)])
    torch.testing.assert_close(back, x * times[..., None])
    kept = torch.tensor([[True, True, False, False]]).expand(3, -1)
    ordered, slot = tokens.in_order(position, kept)
    assert torch.equal(position.gather(-1, slot), ordered)
    assert (ordered[..., 0] < ordered[..., 1]).all() and torch.equal(
        slot[..., 2:].sort().values, torch.tensor([2, 3]).expand(2, 3, 2)
    )


@pytest.mark.parametrize("module", ["pure_mosa", "mosa_hybrid"])
def test_equals_the_authors_code(module):
    from safetensors import safe_open

    path = f"tests/golden/mosa/{module}.a.safetensors"
    with safe_open(path, "pt") as file:
        args = json.loads(file.metadata()["args"])
    port, recorded = saccade.catalogue.port("mosa", module), load_file(path)
    group = {
        kind: {name[len(kind) + 1 :]: t for name, t in recorded.items() if name.startswith(kind + ".")}
        for kind in ("param", "input", "output")
    }
    layer = port.build(args).eval()
    layer.load_state_dict(port.convert(group["param"]))
    got = port.run(layer, group["input"], args)
    for name, want in group["output"].items():
        assert (got[name] - want).abs().max() <= 1e-5 * want.abs().max()


def test_port_takes_the_authors_other_arguments():
    port = saccade.catalogue.port("mosa", "mosa_hybrid")
    args = {"h": 16, "h_prim": 8, "num_mosa_heads": 2, "num_other_heads": 1, "max_seq_len": 24, "sparsity": 6}
    local = port.build({**args, "hybrid_type": "local", "rotate_fraction": 0})
    assert local.other.window == 4 and local.sparse.rotated == 0 and local(_input(24)).isfinite().all()
    assert port.build({**args, "num_mosa_heads": 0}).sparse is None
    assert port.build({**args, "num_other_heads": 0}).other is None
    state = {"other_heads.attn.rel_pos.inv_freq": torch.ones(2), "mosa_heads.O.W": torch.empty(0, 8, 16)}
    assert port.convert(state) == {}
    with pytest.raises(ValueError, match="hybrid_type must be 'dense' or 'local', got 'linear'"):
        port.build({**args, "hybrid_type": "linear"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim and num_heads must be positive, got 0 and 4"),
        ({"num_heads": 3}, r"num_heads must divide dim \(16\) where head_dim is not given, got 3"),
        ({"num_other_heads": 5}, r"num_other_heads must be between 0 and num_heads \(4\), got 5"),
        ({"sparsity": 0}, "head_dim and sparsity must be positive, got 4 and 0"),
        ({"rotate_fraction": 1.5}, "rotate_fraction must be between 0 and 1, got 1.5"),
        ({"routing": "random"}, "routing must be 'learned' or 'fixed', got 'random'"),
        ({"window": 4, "causal": False}, "window must be positive and the layer causal"),
        ({"max_length": 0}, "max_length must be positive, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _layer(**arguments)


def test_bad_calls():
    layer, x = _layer(), _input()
    with pytest.raises(ValueError, match="context must be None"):
        layer(x, x)
    with pytest.raises(
        ValueError, match=r"MoSA takes padding \(batch, keys\) as its mask, got any other pairs, dense\(2, 1, 20, 20\)"
    ):
        layer(x, mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"takes padding .* got a window"):
        layer(x, mask=saccade.masks.window(2))
    with pytest.raises(ValueError, match="decoding needs max_length"):
        layer.new_cache(2)
    with pytest.raises(ValueError, match="decoding needs routing='learned'"):
        _layer(routing="fixed").new_cache(2, max_length=20)
    with pytest.raises(ValueError, match="only a causal layer decodes"):
        bidirectional = _layer(causal=False)
        bidirectional(x, cache=bidirectional.new_cache(2, max_length=20))
    cache = layer.new_cache(2, max_length=20)
    layer(x, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 sequences, got 1"):
        layer(x[:1], cache=cache)
