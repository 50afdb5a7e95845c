from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from saccade import attention_map, masks
from saccade.attention.nexus import Nexus, nested, nexus_attend
from saccade.attention.nexus.claim import two_hops
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.pattern import Pattern
from saccade.ops.rope import rotate

READINGS = [
    {"sharing": "S"},
    {"sharing": "S", "order": 3},
    {"sharing": "S", "order": 4, "recurse_values": True},
    {"sharing": "S", "branches": "query", "order": 3},
    {"sharing": "S", "branches": "key", "norm_inner": True},
    {"sharing": "S", "inner_positions": False},
    {"sharing": "S", "rope_channels": 2, "order": 3},
    {"sharing": "R"},
    {"sharing": "R", "order": 3},
    {"sharing": "R", "branches": "key", "inner_positions": False},
    {"sharing": "U"},
    {"sharing": "U", "order": 3, "gate": True},
    {"sharing": "U", "branches": "query", "order": 3, "recurse_values": True},
    {"order": 1},
]


def layer(causal: bool = True, **options: object) -> Nexus:
    torch.manual_seed(0)
    made = Nexus(16, 4, causal, **options).double()
    for gate in (made.q_gate, made.k_gate):
        if gate is not None:
            nn.init.constant_(gate, 0.4)
    return made.eval()


def tokens(N: int, B: int = 2) -> Tensor:
    return torch.randn(B, N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(N))


def softmax_like(module: Nexus) -> SoftmaxAttention:
    theirs = SoftmaxAttention(16, 4, module.causal, num_kv_heads=module.num_kv_heads, rope=module.rope).double()
    theirs.load_state_dict({k: v for k, v in module.state_dict().items() if "inner" not in k and "gate" not in k})
    return theirs


def naive(module: Nexus, x: Tensor) -> Tensor:
    """The formulas of the module's docstring, with full matrices and full heads."""
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if module.causal else None
    group = module.num_heads // module.num_kv_heads

    def split(projected: Tensor) -> Tensor:
        heads = projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        return heads if heads.shape[1] == module.num_heads else heads.repeat_interleave(group, 1)

    def attention(q: Tensor, k: Tensor, v: Tensor, positions: bool) -> Tensor:
        if module.rope and positions:
            place = torch.arange(x.shape[1])
            q, k = (rotate(t, place, base=module.rope_base, channels=module.rope_channels) for t in (q, k))
        scores = q @ k.mT * module.head_dim**-0.5
        return (scores if causal is None else scores.masked_fill(~causal, -torch.inf)).softmax(-1) @ v

    inside = module.inner_positions
    q, k, v = split(module.q_proj(x)), split(module.k_proj(x)), split(module.v_proj(x))
    q2, k2 = q, k
    if module.sharing == "R":
        for _ in range(module.order - 1):
            refined = attention(q2, k2, v, inside).transpose(1, 2).flatten(2)
            q2, k2 = split(module.q_proj(refined)), split(module.k_proj(refined))
    else:
        nested_heads = []
        for name, z in (("q_inner", q), ("k_inner", k)):
            keys, values = z, z
            if module.sharing == "U" and hasattr(module, name):
                keys, values = (split(p(x)) for p in getattr(module, name).values())
            phi = z
            for level in range(module.order - 1):
                first = level == 0
                phi = attention(
                    phi, keys if first else phi, phi if module.recurse_values and not first else values, inside
                )
            nested_heads.append(phi)
        q2, k2 = nested_heads
    q2, k2 = q2 if module.nests_queries else q, k2 if module.nests_keys else k
    if module.norm_inner:
        k2 = k2 * (k2.square().mean(-1, keepdim=True) + torch.finfo(k2.dtype).eps).rsqrt()
    q2 = q2 if module.q_gate is None else q + module.q_gate * (q2 - q)
    k2 = k2 if module.k_gate is None else k + module.k_gate * (k2 - k)
    return module.out_proj(attention(q2, k2, v, True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", READINGS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_formulas_forward_and_backward(options: dict, causal: bool) -> None:
    module, x = layer(causal, num_kv_heads=2, **options), tokens(13).requires_grad_()
    ours, theirs = module(x), naive(module, x)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    leaves = [x, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", READINGS, ids=str)
def test_decoding_and_the_past(options: dict) -> None:
    module, x = layer(num_kv_heads=2, **options), tokens(15)
    with torch.no_grad():
        expected, cache = module(x), module.new_cache(2)
        pieces = [module(x[:, :6], cache=cache), module(x[:, 6:8], cache=cache)]
        pieces += [module(x[:, i : i + 1], cache=cache) for i in range(8, 15)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-12, rtol=0)
        assert cache.length == 15
        changed = x.clone()
        changed[:, 9:] += 1
        torch.testing.assert_close(module(changed)[:, :9], expected[:, :9], atol=1e-13, rtol=0)


def test_caches_are_as_large_as_the_card_says() -> None:
    x, plain = tokens(10), SoftmaxAttention(16, 4, True).double()
    reference = plain.new_cache(2)
    plain(x, cache=reference)
    for options, factor in (({"order": 1}, 1.0), ({"sharing": "S"}, 2.0), ({"sharing": "R"}, 1.5)):
        cache = (module := layer(**options)).new_cache(2)
        module(x, cache=cache)
        assert cache.nbytes == factor * reference.nbytes


@pytest.mark.parametrize("sharing", ["S", "R", "U"])
def test_order_one_is_standard_attention(sharing: str) -> None:
    for causal in (True, False):
        module = layer(causal, order=1, sharing=sharing)
        assert torch.equal(module(tokens(9)), softmax_like(module)(tokens(9)))


def test_one_visible_token_is_standard_attention() -> None:
    for order in (2, 3):
        module = layer(order=order)
        expected = softmax_like(module)(tokens(9))
        torch.testing.assert_close(module(tokens(9))[:, 0], expected[:, 0], atol=1e-14, rtol=0)
        torch.testing.assert_close(module(tokens(1)), softmax_like(module)(tokens(1)), atol=1e-14, rtol=0)


def test_equal_tokens_are_their_own_nesting() -> None:
    q = torch.randn(1, 2, 1, 8, dtype=torch.float64).expand(-1, -1, 7, -1)
    out = nested(q, 3, lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    torch.testing.assert_close(out, q, atol=1e-14, rtol=0)
    module, x = layer(False, rope=False), tokens(1).expand(-1, 7, -1)
    torch.testing.assert_close(module(x), softmax_like(module)(x), atol=1e-13, rtol=0)


def test_nested_queries_lie_in_the_hull_of_the_visible_queries() -> None:
    q = torch.randn(1, 2, 12, 6, dtype=torch.float64)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    for depth in (1, 2):
        nested_q = nested(q, depth, lambda q, k, v: (q @ k.mT).masked_fill(~visible, -torch.inf).softmax(-1) @ v)
        # a point is in the hull where it is nowhere beyond all of its corners
        directions = torch.randn(6, 500, dtype=torch.float64)
        farthest = (q @ directions).cummax(2).values
        assert ((nested_q @ directions) <= farthest + 1e-12).all()
        assert not torch.allclose(nested_q[:, :, 1:], q[:, :, 1:])


def test_strong_self_similarity_tends_to_standard_attention() -> None:
    q, k = (torch.nn.functional.normalize(torch.randn(1, 2, 9, 8, dtype=torch.float64), dim=-1) for _ in range(2))

    def scaled(factor: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (factor * q @ k.mT).softmax(-1) @ v

    errors = []
    for factor in (1.0, 10.0, 1000.0):
        nested_q, nested_k = (nested(z, 1, partial(scaled, factor)) for z in (q, k))
        errors.append(((nested_q @ nested_k.mT).softmax(-1) - (q @ k.mT).softmax(-1)).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_number_of_parameters() -> None:
    plain = sum(p.numel() for p in SoftmaxAttention(16, 4).parameters())
    count = {s: sum(p.numel() for p in Nexus(16, 4, sharing=s).parameters()) for s in ("S", "R", "U")}
    assert count == {"S": plain, "R": plain, "U": plain + 4 * 16 * 16}


def test_no_linear_map_of_the_tokens_gives_the_nested_queries() -> None:
    x = tokens(60, B=1)

    def residual(module: Nexus) -> float:
        raw = module.project(x, None, None)
        q, k = module._nested(*raw[:3], Pattern.of(None, 1, 60, 60), *raw[3:], lambda _, t: t)
        assert torch.linalg.matrix_rank(q @ k.mT).max() <= module.head_dim
        flat = q[0].transpose(0, 1).flatten(1)
        return (x[0] @ torch.linalg.lstsq(x[0], flat).solution - flat).norm().item() / flat.norm().item()

    assert residual(layer(False, rope=False, order=1)) < 1e-12
    assert residual(layer(False, rope=False, order=2)) > 0.05


def test_function_equals_the_layer() -> None:
    module, x = layer(rope=False, order=3, num_kv_heads=2), tokens(11)
    q, k, v, *_ = module.project(x, None, None)
    out = nexus_attend(q, k, v, order=3, causal=True)
    torch.testing.assert_close(module.out_proj(out.transpose(1, 2).flatten(2)), module(x), atol=1e-13, rtol=0)


def test_grouped_heads_equal_repeated_ones() -> None:
    for options in ({}, {"sharing": "R"}, {"sharing": "U"}):
        grouped, full = layer(num_kv_heads=2, **options), layer(**options)
        state = grouped.state_dict()
        for key in state:
            if key.startswith(("k_", "v_")):
                state[key] = state[key].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
        full.load_state_dict(state)
        torch.testing.assert_close(grouped(tokens(9)), full(tokens(9)), atol=1e-13, rtol=0)


@pytest.mark.parametrize("sharing", ["S", "R", "U"])
def test_starts_as_the_softmax_layer_with_a_gate(sharing: str) -> None:
    torch.manual_seed(1)
    theirs = SoftmaxAttention(16, 4, True, num_kv_heads=2).double()
    gentle = Nexus.from_softmax(theirs, sharing=sharing, gate=True)
    torch.testing.assert_close(gentle(tokens(9)), theirs(tokens(9)), atol=1e-13, rtol=0)
    sudden = Nexus.from_softmax(theirs, sharing=sharing)
    assert not torch.allclose(sudden(tokens(9)), theirs(tokens(9)))
    if sharing == "U":
        torch.testing.assert_close(sudden(tokens(9)), Nexus.from_softmax(theirs)(tokens(9)), atol=1e-13, rtol=0)


@pytest.mark.parametrize("sharing", ["S", "R", "U"])
def test_padding_is_kept_out_of_the_inner_attention(sharing: str) -> None:
    module, x = layer(False, sharing=sharing), tokens(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    torch.testing.assert_close(module(x, mask=mask)[1, :7], module(x[1:, :7])[0], atol=1e-12, rtol=0)
    ids = torch.tensor([[0] * 5 + [1] * 7] * 2)
    packed = layer(True, sharing=sharing, rope=False)
    apart = torch.cat([packed(x[:, :5]), packed(x[:, 5:])], 1)
    torch.testing.assert_close(packed(x, mask=masks.documents(ids)), apart, atol=1e-12, rtol=0)


def test_context() -> None:
    for sharing in ("S", "U"):
        module, x, context = layer(False, sharing=sharing), tokens(5), tokens(8)
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[:, 6:] = False
        torch.testing.assert_close(module(x, context, mask=mask), module(x, context[:, :6]), atol=1e-12, rtol=0)


def test_map_shows_the_outer_weights() -> None:
    module = layer(num_kv_heads=2)
    weights = attention_map(module, tokens(9))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9).double())
    v = module.split_heads(module.v_proj(tokens(9)), 2).repeat_interleave(2, 1)
    out = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, module(tokens(9)), atol=1e-12, rtol=0)


def test_two_hops_are_what_they_say() -> None:
    x, labels, twice = two_hops(3, 3, 16, torch.Generator().manual_seed(0))
    for row in range(3):
        facts = dict(x[row, :12].view(6, 2).tolist())
        for place in range(12, 18):
            asked = facts[x[row, place].item()]
            assert labels[row, place] == (facts[asked] if twice[row, place] else asked)
    assert twice.sum() == 9 and (labels[:, :12] == -100).all()


def test_bad_arguments() -> None:
    for bad, message in (
        ({"order": 0}, "order must be an integer of at least 1, got 0"),
        ({"branches": "value"}, "branches must be"),
        ({"sharing": "T"}, "sharing must be"),
        ({"sharing": "R", "recurse_values": True}, "recurse_values is for"),
        ({"sharing": "R", "head_dim": 8}, r"needs num_heads \* head_dim = dim"),
        ({"rope_channels": 3}, "rope_channels must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            Nexus(16, 4, **bad)
    x = tokens(4)
    with pytest.raises(ValueError, match="takes no context"):
        layer(False, sharing="R")(x, x)
    with pytest.raises(ValueError, match="Nexus with a context takes padding"):
        layer(False)(x, x, mask=masks.window(2))
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="must be the same tokens"):
        nexus_attend(q, k, k, causal=True)
    assert nexus_attend(q, k, k).shape == q.shape
