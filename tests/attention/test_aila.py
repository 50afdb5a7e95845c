from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.attention.aila import (
    AILA,
    AILAStack,
    AttentionConnection,
    ConcatConnection,
    GatedConnection,
    Recurrent,
    ScalarConnection,
    depth_attend,
)
from saccade.layers.pre_norm import PreNormBlock

VARIANTS = [
    {"variant": "attention"},
    {"variant": "attention", "query": "learned", "residual": "connection"},
    {"variant": "attention", "shared": True},
    {"variant": "attention", "shared": True, "query": "learned"},
    {"variant": "gated"},
    {"variant": "gated", "residual": "connection"},
    {"variant": "concat"},
    {"variant": "scalar"},
    {"variant": "scalar", "project": True, "residual": "connection"},
    {"variant": "sum"},
    {"variant": "plain"},
]


def linear(dim: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU())


def shake(module: nn.Module) -> nn.Module:
    """Every parameter away from its start at 0 or 1."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def stack(layers: int = 4, **options: object) -> AILAStack:
    torch.manual_seed(0)
    return shake(AILAStack(8, [linear() for _ in range(layers)], num_heads=2, **options).double().eval())


def states(J: int, *leading: int, dim: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(J)
    return torch.randn(*(leading or (3, 5)), J, dim, dtype=torch.float64, generator=generator)


def naive(model: AILAStack, x: Tensor) -> Tensor:
    """The card's formulas, source by source and head by head."""
    H, hs = model.num_heads, [x]
    for l in range(1, len(model.hosts) + 1):
        connection = model.connections[0 if model.shared else l - 1]
        if model.variant == "attention":
            D, newest = 8 // H, hs[-1]
            heads = []
            for m in range(H):
                rows = slice(m * D, (m + 1) * D)
                if connection.query is None:
                    q = newest @ connection.q_proj.weight[rows].T
                else:
                    q = connection.query[l - 1 if model.shared else 0, m].expand(*x.shape[:-1], D)
                scores = [(q * (h @ connection.k_proj.weight[rows].T)).sum(-1) / D**0.5 for h in hs]
                a = torch.stack(scores, -1).softmax(-1)
                values = [h @ connection.v_proj.weight[rows].T for h in hs]
                heads.append(sum(a[..., j, None] * v for j, v in enumerate(values)))
            c = torch.cat(heads, -1) @ connection.out_proj.weight.T
        elif model.variant == "gated":
            heads = []
            for m in range(H):
                scores = [h @ connection.score[m] + connection.bias[m, j] for j, h in enumerate(hs)]
                a = torch.stack(scores, -1).softmax(-1)
                heads.append(sum(a[..., j, None] * h for j, h in enumerate(hs)))
            c = connection.out(torch.cat(heads, -1))
        elif model.variant == "concat":
            c = connection.out(torch.cat(hs, -1))
        elif model.variant == "scalar":
            a = connection.logits.softmax(0)
            maps = connection.maps or [nn.Identity()] * l
            c = sum(a[j] * maps[j](h) for j, h in enumerate(hs))
        else:
            c = sum(hs) if model.variant == "sum" else hs[-1]
        into = hs[-1] + c if model.variant == "attention" else c
        kept = hs[-1] if model.residual == "previous" else c
        hs.append(model.norms[l - 1](kept + model.hosts[l - 1](into)))
    return hs[-1]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_formulas_forward_and_backward(options: dict) -> None:
    model = stack(**options)
    for shape in ((5, 8), (2, 3, 8)):
        x = torch.randn(shape, dtype=torch.float64).requires_grad_()
        ours, theirs = model(x), naive(model, x)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        leaves = [x, *model.parameters()]
        pair = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (ours, theirs)]
        for a, b in zip(*pair, strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, atol=1e-10)


def test_one_earlier_output_has_all_the_weight() -> None:
    h = states(1)
    for connection in (GatedConnection(8, 2, 1), ScalarConnection(8, 1), AttentionConnection(8, 2)):
        assert (shake(connection.double()).weights(h) == 1).all()
    assert (stack(1).depth_weights(h[..., 0, :])[0] == 1).all()
    gated = GatedConnection(8, 2, 1).double()
    gated.out.weight.data = torch.cat([torch.eye(8), torch.zeros(8, 8)], 1).double()
    gated.out.bias.data.zero_()
    torch.testing.assert_close(gated(h), h[..., 0, :], atol=1e-15, rtol=0)


def identity_gate(sources: int) -> GatedConnection:
    gated = GatedConnection(8, 1, sources).double()
    gated.out.weight.data, gated.out.bias.data = torch.eye(8).double(), torch.zeros(8).double()
    return gated


def test_an_infinite_logit_on_the_newest_is_the_plain_stack() -> None:
    plain = stack(variant="plain")
    for variant in ("gated", "scalar"):
        model = stack(variant=variant)
        model.hosts, model.norms = plain.hosts, plain.norms
        for l, connection in enumerate(model.connections, start=1):
            if variant == "gated":
                connection = model.connections[l - 1] = identity_gate(l)
                connection.bias.data[:, -1] = 1e300
            else:
                connection.logits.data[-1] = 1e300
        torch.testing.assert_close(model(states(6)), plain(states(6)), atol=1e-13, rtol=0)


def test_the_start_is_the_mean_of_all_earlier_outputs() -> None:
    h = states(5)
    torch.testing.assert_close(identity_gate(5)(h), h.mean(-2), atol=1e-14, rtol=0)
    torch.testing.assert_close(ScalarConnection(8, 5).double()(h), h.mean(-2), atol=1e-14, rtol=0)
    learned = AttentionConnection(8, 2, query="learned").double()
    assert torch.allclose(learned.weights(h), torch.tensor(0.2).double())
    expected = learned.out_proj(learned.v_proj(h.mean(-2)))
    torch.testing.assert_close(learned(h), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("J", [1, 2, 7])
def test_weights_sum_to_one_and_are_those_applied(J: int) -> None:
    h = states(J)
    attention = shake(AttentionConnection(8, 2).double())
    weights = attention.weights(h)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, 2).double(), atol=1e-14, rtol=0)
    values = attention.v_proj(h).unflatten(-1, (2, 4))
    c = attention.out_proj((weights.mT[..., None] * values).sum(-3).flatten(-2))
    torch.testing.assert_close(c, attention(h), atol=1e-13, rtol=0)
    gated = shake(GatedConnection(8, 3, J).double())
    weights = gated.weights(h)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, 3).double(), atol=1e-14, rtol=0)
    torch.testing.assert_close(gated.out((weights @ h).flatten(-2)), gated(h), atol=1e-13, rtol=0)
    scalar = shake(ScalarConnection(8, J).double())
    assert scalar.weights(h).shape == (3, 5, 1, J)
    torch.testing.assert_close((scalar.weights(h) @ h)[..., 0, :], scalar(h), atol=1e-14, rtol=0)


def test_the_order_of_earlier_outputs_does_not_matter_to_a_fixed_query() -> None:
    h, order = states(5), torch.tensor([3, 0, 4, 1, 2])
    learned = shake(AttentionConnection(8, 2, query="learned").double())
    torch.testing.assert_close(learned(h[..., order, :]), learned(h), atol=1e-14, rtol=0)
    gated = shake(GatedConnection(8, 2, 5).double())
    assert not torch.allclose(gated(h[..., order, :]), gated(h))
    gated.bias.data[:] = gated.bias.data[:, :1]
    torch.testing.assert_close(gated(h[..., order, :]), gated(h), atol=1e-13, rtol=0)
    torch.testing.assert_close(gated.weights(h[..., order, :]), gated.weights(h)[..., order], atol=1e-13, rtol=0)
    newest = shake(AttentionConnection(8, 2).double())
    kept = torch.tensor([3, 0, 2, 1, 4])  # the newest stays where it is
    torch.testing.assert_close(newest(h[..., kept, :]), newest(h), atol=1e-13, rtol=0)


def test_concatenation_holds_the_plain_stack_and_the_sum() -> None:
    h = states(4)
    warm = ConcatConnection(8, 4, warm=True).double()
    torch.testing.assert_close(warm(h), h[..., -1, :], atol=1e-15, rtol=0)
    warm.out.weight.data = torch.eye(8).repeat(1, 4).double()
    torch.testing.assert_close(warm(h), h.sum(-2), atol=1e-14, rtol=0)
    plain, model = stack(variant="plain"), AILAStack(8, [linear()] * 4, variant="concat", warm=True).double().eval()
    model.hosts, model.norms = plain.hosts, plain.norms
    torch.testing.assert_close(model(h), plain(h), atol=1e-14, rtol=0)


def test_shared_projections_equal_separate_ones() -> None:
    for query in ("newest", "learned"):
        shared, apart = stack(shared=True, query=query), stack(query=query)
        apart.hosts, apart.norms = shared.hosts, shared.norms
        for layer, connection in enumerate(apart.connections):
            state = shared.connections[0].state_dict()
            if query == "learned":
                state["query"] = state["query"][layer : layer + 1]
            connection.load_state_dict(state)
        torch.testing.assert_close(shared(states(6)), apart(states(6)), atol=1e-13, rtol=0)


def test_parameters_are_as_many_as_the_card_says() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    C, H, l = 8, 2, 5
    assert count(GatedConnection(C, H, l)) == H * (C + l) + H * C * C + C
    assert count(ConcatConnection(C, l)) == l * C * C + C
    assert count(ScalarConnection(C, l)) == l and count(ScalarConnection(C, l, project=True)) == l + l * C * C
    assert count(AttentionConnection(C, H)) == 4 * C * C
    assert count(AttentionConnection(C, H, query="learned")) == 3 * C * C + C
    hosts = count(stack(6, variant="plain"))
    assert count(stack(6)) - hosts == 6 * 4 * C * C and count(stack(6, shared=True)) - hosts == 4 * C * C


@pytest.mark.parametrize("variant", ["attention", "gated", "concat", "scalar"])
def test_every_layer_passes_its_gradient_directly_to_the_input(variant: str) -> None:
    torch.manual_seed(0)
    model = AILAStack(8, [linear() for _ in range(20)], num_heads=2, variant=variant, residual="connection").double()
    reached = []
    for l, connection in enumerate(model.connections, start=1):
        h = states(l).requires_grad_()
        (gradient,) = torch.autograd.grad(connection(h).square().sum(), h)
        reached.append(gradient[..., 0, :].norm().item())
    assert min(reached) > 0
    x = states(6).requires_grad_()
    (gradient,) = torch.autograd.grad((model.eval()(x) * states(6).flip(0)).sum(), x)
    assert gradient.norm() > 1e-2


@pytest.mark.parametrize("options", [o for o in VARIANTS if o["variant"] in ("attention", "gated", "scalar")], ids=str)
def test_depth_weights_of_a_stack(options: dict) -> None:
    model, x = stack(**options), states(6)
    weights = model.depth_weights(x)
    heads = 1 if options["variant"] == "scalar" else 2
    assert [tuple(w.shape) for w in weights] == [(3, 5, 6, heads, l) for l in range(1, 5)]
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones(3, 5, 6, heads).double(), atol=1e-13, rtol=0)
    if not model.shared:  # the first two layers, step by step
        c = model.connections[0](x[..., None, :])
        h1 = (c if model.residual == "connection" else x) + model.hosts[0](x + c if "att" in model.variant else c)
        h = torch.stack([x, model.norms[0](h1)], -2)
        torch.testing.assert_close(weights[1], model.connections[1].weights(h), atol=1e-13, rtol=0)


@pytest.mark.parametrize("host", ["attention", "lstm", "gru", "mlp"])
@pytest.mark.parametrize("variant", ["attention", "gated"])
def test_decoding_and_the_past(host: str, variant: str) -> None:
    torch.manual_seed(0)
    model = shake(AILA(16, 4, True, layers=3, host=host, variant=variant).double().eval())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        expected, cache = model(x), model.new_cache(2)
        pieces = [model(x[:, :4], cache=cache)] + [model(x[:, i : i + 1], cache=cache) for i in range(4, 9)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-11, rtol=0)
        assert cache.length == 9 and (cache.nbytes > 0) == (host != "mlp")
        changed = x.clone()
        changed[:, 5:] += 1
        torch.testing.assert_close(model(changed)[:, :5], expected[:, :5], atol=1e-12, rtol=0)
        if host in ("lstm", "gru"):  # constant memory
            assert cache.nbytes == 3 * 2 * 16 * 8 * (2 if host == "lstm" else 1)


def test_hosts() -> None:
    torch.manual_seed(0)
    conv = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)]
    maps = AILAStack(8, conv, channel_axis=1, num_heads=2).double().eval()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    assert maps(x).shape == x.shape and maps.depth_weights(x)[-1].shape == (2, 5, 7, 2, 3)
    newest, c = x, maps.connections[0](x.movedim(1, -1)[..., None, :]).movedim(-1, 1)
    h1 = maps.norms[0]((newest + maps.hosts[0](newest + c)).movedim(1, -1))
    again = maps.connections[1].weights(torch.stack([x.movedim(1, -1), h1], -2))
    torch.testing.assert_close(maps.depth_weights(x)[1], again, atol=1e-13, rtol=0)
    given = AILAStack(8, [nn.LSTM(8, 8, batch_first=True), linear(), nn.GRU(8, 8, batch_first=True)], num_heads=2)
    assert isinstance(given.hosts[0], Recurrent) and given(torch.randn(2, 4, 8)).shape == (2, 4, 8)
    both = AILA(16, 4, host="gru").eval()
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(both(x)[:, 0], both(changed)[:, 0])
    other = AILA(16, 4, True, mechanism="moba", mechanism_options={"block_size": 4, "top_k": 2})
    assert isinstance(other.hosts[0], PreNormBlock) and type(other.hosts[0].attention).__name__ == "MoBA"


def test_padding_behind_changes_nothing_in_a_recurrence() -> None:
    model, x = AILA(16, 4, True, host="gru").eval(), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    torch.testing.assert_close(model(x, mask=mask)[:, :6], model(x[:, :6]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="padding at the end only"):
        model(x, mask=~mask)
    with pytest.raises(ValueError, match="neither a mask nor a cache"):
        AILA(16, 4, host="gru")(x, mask=mask)


def test_softmax_in_float32() -> None:
    q, k = torch.randn(3, 2, 4).bfloat16(), torch.randn(3, 5, 2, 4).bfloat16()
    out, weights = depth_attend(q, k, k)
    assert out.dtype == torch.bfloat16 and weights.dtype == torch.float32
    assert (weights.sum(-1) - 1).abs().max() < 1e-6


def test_bad_arguments() -> None:
    for bad, message in (
        ({"variant": "dense"}, "variant must be 'attention', 'gated'"),
        ({"residual": "none"}, "residual must be 'previous' or 'connection', got 'none'"),
        ({"query": "oldest"}, "query must be 'newest' or 'learned', got 'oldest'"),
        ({"variant": "gated", "shared": True}, "shared is an option of variant 'attention', got variant 'gated'"),
        ({"variant": "concat", "query": "learned"}, "query='learned' is an option of variant 'attention'"),
        ({"project": True}, "project is an option of variant 'scalar'"),
        ({"warm": True}, "warm is an option of variant 'concat'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_heads": 3}, r"num_heads must divide dim \(8\), got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            AILAStack(8, [linear()], **bad)
    with pytest.raises(ValueError, match="there must be at least 1 layer"):
        AILAStack(8, [])
    with pytest.raises(ValueError, match="there must be at least 1 layer, got 0"):
        AILA(8, layers=0)
    with pytest.raises(ValueError, match="host must be 'attention', 'lstm', 'gru' or 'mlp', got 'conv'"):
        AILA(8, host="conv")
    with pytest.raises(ValueError, match="two directions need an even dim, got 9"):
        AILA(9, 3, host="gru")
    with pytest.raises(ValueError, match="batch_first=True"):
        AILAStack(8, [nn.LSTM(8, 8)])
    with pytest.raises(ValueError, match="has no weights over earlier layers"):
        stack(variant="concat").depth_weights(states(4))
    with pytest.raises(ValueError, match="has no weights over earlier layers"):
        ConcatConnection(8, 4).double().weights(states(4))
    x = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="take no context"):
        AILA(8, 2)(x, x)
    with pytest.raises(ValueError, match="only causal layers decode"):
        AILA(8, 2)(x, cache=AILA(8, 2, True).new_cache(2))
    with pytest.raises(ValueError, match="x must have 8 channels on axis -1"):
        stack()(torch.randn(2, 7))
