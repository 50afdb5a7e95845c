"""MoH: the invariants of its card, the gathered form against the masked one, presets, Llama models converted."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import saccade
from saccade import masks
from saccade.attention import moh
from saccade.attention.moh import (
    PRESETS,
    MoH,
    balance_loss,
    convert_llama,
    gated_attend,
    load_balance_loss,
    query_norm_routing,
    trained_routing,
)
from saccade.layers.softmax_attention import SoftmaxAttention


def layer(*arguments: object, **options: object) -> MoH:
    torch.manual_seed(0)
    return MoH(*arguments, **options).eval()


@pytest.mark.parametrize(
    ("shared", "router"), [(2, "trained"), (0, "trained"), (1, "trained"), (6, "trained"), (2, "query-norm")]
)
def test_every_head_active_and_zero_routers_is_the_softmax_layer(shared: int, router: str) -> None:
    torch.manual_seed(0)
    dense, x = SoftmaxAttention(24, 6, causal=True, num_kv_heads=3), torch.randn(2, 13, 24)
    ours = MoH.from_softmax(dense, shared_heads=shared, routed_heads=6 - shared, router=router)
    assert torch.equal(ours.route(x).gates, torch.ones(2, 13, 6))
    assert torch.equal(ours(x), dense(x))
    bidirectional, context = (
        MoH.from_softmax(dense, shared_heads=2, routed_heads=4, causal=False),
        torch.randn(2, 5, 24),
    )
    assert torch.equal(bidirectional(x, context), SoftmaxAttention.from_softmax(dense, causal=False)(x, context))


def test_fewer_active_heads_start_with_the_shared_heads_of_the_softmax_layer() -> None:
    torch.manual_seed(0)
    dense, x = SoftmaxAttention(16, 4, causal=True), torch.randn(1, 9, 16)
    ours = MoH.from_softmax(dense, shared_heads=2, routed_heads=1)
    gates = ours.route(x).gates
    assert torch.equal(gates[..., :2], torch.ones(1, 9, 2))
    assert (gates[..., 2:].sum(-1) - 1).abs().max() < 1e-6
    assert ours.routed_gate.weight.any()
    ours.routed_heads = 2
    torch.nn.init.zeros_(ours.routed_gate.weight)
    assert torch.equal(ours(x), dense(x))


def test_gates_sum_to_the_active_heads_and_the_rest_are_zero() -> None:
    x = torch.randn(3, 50, 16)
    for shared, routed in itertools.product((0, 1, 2, 5), (1, 2, 3)):
        module = layer(16, 8, shared_heads=shared, routed_heads=routed)
        gates = module.route(x).gates
        assert ((gates == 0).sum(-1) == 8 - shared - routed).all()
        assert (gates >= 0).all()
        a_1, a_2 = (2 * module.balance_gate(x).softmax(-1)).unbind(-1) if shared else (0.0, 1.0)
        torch.testing.assert_close(gates.sum(-1), a_1 * shared + a_2 * routed + torch.zeros(3, 50))
    torch.testing.assert_close(
        layer(16, 8, shared_heads=8, routed_heads=0).route(x).gates.sum(-1), torch.full((3, 50), 8.0)
    )


def test_routing_by_its_definition() -> None:
    torch.manual_seed(1)
    routed, shared, balance = torch.randn(1, 1, 4), torch.randn(1, 1, 2), torch.randn(1, 1, 2)
    gates, chances, active = trained_routing(routed, shared, balance, shared_heads=2, top_k=2)
    p = routed[0, 0].softmax(-1)
    best = p.sort(descending=True).indices[:2]
    expected = torch.zeros(4)
    expected[best] = 2 * p[best] / p[best].sum()
    a = 2 * balance[0, 0].softmax(-1)
    torch.testing.assert_close(gates[0, 0], torch.cat([a[0] * 2 * shared[0, 0].softmax(-1), a[1] * expected]))
    torch.testing.assert_close(chances[0, 0], p)
    assert active[0, 0].nonzero().flatten().tolist() == sorted(best.tolist())


def test_only_the_chosen_heads_learn_from_a_token() -> None:
    module = layer(16, 4, shared_heads=1, routed_heads=1, rope=False)
    x = torch.randn(1, 1, 16)
    module(x).sum().backward()
    used = module.v_proj.weight.grad.view(4, 4, 16).abs().sum((1, 2)) > 0
    assert torch.equal(used, torch.cat([torch.ones(1, dtype=torch.bool), module.route(x).active[0, 0]]))


def test_balance_loss_is_k_when_uniform_and_more_when_collapsed() -> None:
    uniform = torch.full((2, 8, 4), 0.25)
    taken = torch.eye(4, dtype=torch.bool)[torch.arange(8) % 4].expand(2, 8, 4)
    assert load_balance_loss(uniform, taken).item() == pytest.approx(1.0)
    assert load_balance_loss(uniform, torch.ones(2, 8, 4, dtype=torch.bool)).item() == pytest.approx(4.0)
    collapsed = torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(2, 8, 4)
    first = torch.tensor([True, False, False, False]).expand(2, 8, 4)
    assert load_balance_loss(collapsed, first).item() == pytest.approx(4 * 0.97)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1] = False
    mixed = torch.stack([uniform[0], collapsed[0]]), torch.stack([taken[0], first[0]])
    assert load_balance_loss(*mixed, real).item() == pytest.approx(1.0)


def test_aux_loss_comes_with_training_and_goes_with_eval_and_copies() -> None:
    model = torch.nn.Sequential(layer(16, 4), layer(16, 4, router="query-norm"))
    x = torch.randn(2, 9, 16)
    with pytest.raises(ValueError, match="has made a training call"):
        balance_loss(model)
    model.train()(x)
    for module in model:
        assert module.aux_loss is not None and module.aux_loss.requires_grad
        assert copy.deepcopy(module).aux_loss is None
    torch.testing.assert_close(balance_loss(model), (model[0].aux_loss + model[1].aux_loss) / 2)
    balance_loss(model).backward()
    assert model[0].routed_gate.weight.grad.any() and model[1].q_proj.weight.grad.any()
    padding = torch.arange(9) < torch.tensor([[9], [4]])
    model[0](x, mask=padding)
    routing = model[0].route(x)
    torch.testing.assert_close(model[0].aux_loss, load_balance_loss(routing.chances, routing.active, padding))
    model.eval()(x)
    assert model[0].aux_loss is None and model[1].aux_loss is None


def test_training_compiles_with_its_loss() -> None:
    module, x = layer(16, 4).train(), torch.randn(2, 9, 16)
    expected, loss = module(x), module.aux_loss
    torch._dynamo.reset()
    out = torch.compile(module, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(module.aux_loss, loss)


def test_query_norms_choose_whatever_their_scale() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 8, 30, 6)
    gates, chances, active = query_norm_routing(q, shared_heads=4, top_k=2)
    assert set(gates.unique().tolist()) == {0.0, 1.0} and (gates.sum(-1) == 6).all() and (gates[..., :4] == 1).all()
    norms = q[:, 4:].norm(dim=-1).transpose(1, 2)
    assert torch.equal(active, norms >= norms.topk(2).values[..., 1:])
    scaled = query_norm_routing(q * (0.1 + torch.rand(2, 1, 30, 1)), shared_heads=4, top_k=2)
    assert torch.equal(scaled.gates, gates)
    torch.testing.assert_close(scaled.chances, chances)
    torch.testing.assert_close(chances, (norms / norms.std(-1, keepdim=True)).softmax(-1))


@pytest.mark.parametrize("q", [torch.zeros(1, 4, 3, 2), torch.ones(1, 4, 3, 2)])
def test_equal_query_norms_are_harmless(q: Tensor) -> None:
    q = q.clone().requires_grad_()
    routing = query_norm_routing(q, shared_heads=1, top_k=1, straight_through=True)
    assert (routing.gates.sum(-1) == 2).all()
    routing.gates.square().sum().backward()
    assert q.grad.isfinite().all()


def test_straight_through_in_training_only() -> None:
    module, x = layer(16, 8, router="query-norm", rope=False), torch.randn(2, 9, 16)
    q = torch.randn(2, 8, 9, 2, requires_grad=True)
    hard, soft = (query_norm_routing(q, shared_heads=4, top_k=2, straight_through=on) for on in (False, True))
    torch.testing.assert_close(soft.gates, hard.gates)
    assert not hard.gates.requires_grad
    weights = torch.randn(2, 9, 4)
    (gradient,) = torch.autograd.grad((soft.gates[..., 4:] * weights).sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad((soft.chances * soft.active * weights).sum(), q)
    torch.testing.assert_close(gradient, expected)
    out = module(x)
    torch.testing.assert_close(module.train()(x), out)


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize(("N", "offset"), [(1, 0), (255, 0), (600, 0), (300, 41)])
def test_gathered_equals_masked_forward_and_backward(kv_heads: int, N: int, offset: int) -> None:
    torch.manual_seed(N)
    for causal, padded, shared in itertools.product((False, True), (False, True), (0, 3, 4)):
        M = N + offset
        q, k, v = (torch.randn(2, h, n, 4, requires_grad=True) for h, n in ((8, N), (kv_heads, M), (kv_heads, M)))
        routing = trained_routing(torch.randn(2, N, 8 - shared), None, None, shared_heads=0, top_k=2).gates
        gates = torch.cat([torch.rand(2, N, shared) + 0.1, routing], -1).requires_grad_()
        mask = (torch.arange(M) < torch.tensor([[M], [M - M // 3]])) if padded else None
        grad = torch.randn(2, 8, N, 4)
        outs, gradients = [], []
        for form in ("masked", "gathered"):
            out = gated_attend(
                q, k, v, gates, shared_heads=shared, mask=mask, causal=causal, offset=offset * causal, form=form
            )
            outs.append(out)
            gradients.append(torch.autograd.grad(out, (q, k, v, gates), grad))
        torch.testing.assert_close(outs[1], outs[0], atol=2e-6, rtol=1e-5)
        chosen = gates != 0
        for ours, expected in zip(gradients[1][:3], gradients[0][:3], strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
        # the masked form also tells what a gate of 0 would gain; routing has no gradient there
        torch.testing.assert_close(gradients[1][3] * chosen, gradients[0][3] * chosen, atol=2e-5, rtol=1e-4)


def test_a_long_layer_gathers_of_itself_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    both, context = layer(16, 8, shared_heads=0, routed_heads=2), torch.randn(1, 9, 16)
    x = torch.randn(1, 700, 16)
    lists, listed = [], moh.operator._listed
    monkeypatch.setattr(moh.operator, "_listed", lambda active: lists.append(active.shape) or listed(active))
    outs = both(x), both(x, context)
    assert lists == [(1, 8, 700)] * 2
    both.form = "masked"
    for out, expected in zip(outs, (both(x), both(x, context)), strict=True):
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    module = layer(16, 8, shared_heads=2, routed_heads=2, causal=True)
    x = torch.randn(1, 700, 16)
    out = module(x)
    module.form = "masked"
    torch.testing.assert_close(module(x), out, atol=1e-6, rtol=1e-5)
    module.form = "gathered"
    torch.testing.assert_close(module(x), out, atol=1e-6, rtol=1e-5)
    cache = module.new_cache(1)
    pieces = [module(x[:, :300], cache=cache), module(x[:, 300:699], cache=cache), module(x[:, 699:], cache=cache)]
    torch.testing.assert_close(torch.cat(pieces, 1), out, atol=1e-6, rtol=1e-5)


def test_the_effective_matrix_has_the_gates_in_it() -> None:
    module, x = layer(16, 4, causal=True), torch.randn(1, 9, 16)
    weights = saccade.attention_map(module, x)
    torch.testing.assert_close(weights.sum(-1), module.route(x).gates.transpose(1, 2))
    assert not weights.triu(1).any()


def test_presets_have_the_share_of_heads_in_their_names() -> None:
    for name, preset in PRESETS.items():
        if name != "llama3-8b":
            assert preset.active_share == pytest.approx(int(name[-2:]) / 100, abs=0.012), name
            assert len(preset.layers) == {"vit-b": 38, "vit-s": 37, "dit-x": 28, "dit-l": 24}.get(name[:5], 12)
        else:
            assert preset.active_share == 0.75 and len(preset.layers) == 32
        for row in set(preset.layers):
            with torch.device("meta"):
                MoH.from_preset(name, preset.layers.index(row))
    module = MoH.from_preset("dit-s/2-75", 4, routed_heads=2)
    assert (module.dim, module.num_heads, module.head_dim, module.shared_heads, module.routed_heads) == (
        384,
        6,
        64,
        3,
        2,
    )
    with pytest.raises(ValueError, match="preset must be one of"):
        MoH.from_preset("vit", 0)
    with pytest.raises(ValueError, match="layer must be between 0 and 11, got 12"):
        MoH.from_preset("dit-s/2-75", 12)


def llama(**options: object) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_converted_llama_layer_is_the_moh_of_its_weights() -> None:
    model = llama(attn_implementation="sdpa")
    tokens, seen = torch.randint(31, (2, 12)), []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = model(tokens).logits
    attention = model.model.layers[0].self_attn
    ours = MoH.from_softmax(attention, router="query-norm", shared_heads=4, routed_heads=2)
    assert convert_llama(model) is model
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    with torch.no_grad():
        assert not torch.allclose(model(tokens).logits, plain, atol=1e-4)
        torch.testing.assert_close(ours(seen[0][0]), seen[0][1], atol=1e-5, rtol=1e-5)


def test_a_converted_llama_with_all_heads_is_unchanged_and_decodes_and_trains() -> None:
    model = llama()
    tokens = torch.randint(31, (2, 10))
    whole = convert_llama(copy.deepcopy(model), shared=0.5, routed=0.5)
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).logits, model(tokens).logits)
        convert_llama(model)
        full, start = model(tokens).logits, model(tokens[:, :6], use_cache=True)
        rest = model(tokens[:, 6:], past_key_values=start.past_key_values).logits
        torch.testing.assert_close(torch.cat([start.logits, rest], 1), full, atol=1e-5, rtol=1e-5)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(tokens).logits, full)
    model.train()
    loss = model(tokens, labels=tokens).loss + 0.01 * balance_loss(model)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert all(module.aux_loss is None for module in twin.modules() if hasattr(module, "aux_loss"))
    with pytest.raises(ValueError, match="is MoH already"):
        convert_llama(model)


def test_a_converted_model_may_be_switched_too() -> None:
    model, tokens = convert_llama(llama()), torch.randint(31, (1, 9))
    with torch.no_grad():
        plain = model(tokens).logits
        with saccade.switch(model, "softmax"):
            torch.testing.assert_close(model(tokens).logits, plain, atol=1e-5, rtol=1e-5)
        with saccade.switch(model, "window", left=1):
            assert not torch.allclose(model(tokens).logits, plain, atol=1e-4)


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"shared_heads": 5}, r"shared_heads must be between 0 and num_heads \(4\), got 5"),
        ({"shared_heads": 2, "routed_heads": 3}, r"routed_heads must be between 1 and the other heads \(2\), got 3"),
        ({"shared_heads": 2, "routed_heads": 0}, "routed_heads must be between 1"),
        ({"shared_heads": 4, "routed_heads": 1}, "routed_heads must be between 0"),
        ({"shared_heads": 0, "routed_heads": 0, "router": "query-norm"}, "routed_heads must be between 1"),
        ({"router": "hash"}, "router must be 'trained' or 'query-norm', got 'hash'"),
        ({"form": "fast"}, "form must be 'auto', 'masked' or 'gathered', got 'fast'"),
        ({"router": "query-norm", "qk_norm": True}, "needs queries whose norms differ"),
    ):
        with pytest.raises(ValueError, match=message):
            MoH(16, 4, **arguments)
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="the gathered form takes padding alone"):
        gated_attend(q, q, q, torch.ones(1, 5, 2), mask=masks.window(2), form="gathered")
    with pytest.raises(ValueError, match="has no layers with q_proj"):
        convert_llama(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be shares of the heads"):
        convert_llama(torch.nn.Linear(2, 2), shared=0.9, routed=0.2)
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="normalises its queries"):
        convert_llama(transformers.Qwen3Model(config))
