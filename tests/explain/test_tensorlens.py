"""TensorLens: the rules against the blocks they stand for, dense and by products; relevance; models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.tensorlens import (
    Attention,
    Chain,
    FeedForward,
    LensBlock,
    LensTransformer,
    RelationOperator,
    Sum,
    neighbour_bound,
    perturbation,
    relevance,
    slices,
    tensorlens,
)

L, D = 5, 8
#: blocks of all wirings: norms, gates, grouped heads, masks
FORMS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"order": "post", "activation": "relu"},
    "parallel": {"order": "parallel", "causal": True},
    "llama": {"norm": "rms", "gated": "gate", "activation": "silu", "causal": True, "num_kv_heads": 1},
    "up": {"norm": "rms", "gated": "up", "activation": "silu"},
    "half": {"gated": "half", "activation": "gelu", "order": "parallel"},
    "attention alone": {"hidden": 0, "norm": None},
}


def network(depth: int = 2, **options: Any) -> LensTransformer:
    torch.manual_seed(0)
    module = LensTransformer(D, 2, depth, **{"hidden": 12} | options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.requires_grad_(False)


def tokens(batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, L, D, dtype=torch.double)


def plain(block: LensBlock, x: Tensor) -> Tensor:
    """The block as it is usually written."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, D // 2)).transpose(1, 2)
                   for proj in (block.q_proj, block.k_proj, block.v_proj))  # fmt: skip
        out = F.scaled_dot_product_attention(q, k, v, is_causal=block.causal, enable_gqa=True)
        return block.o_proj(out.transpose(1, 2).flatten(2))

    def mlp(x: Tensor) -> Tensor:
        return block.mlp(x)

    if block.order == "parallel":
        return x + attend(block.norm1(x)) + mlp(block.norm2(x))
    for norm, sublayer in ((block.norm1, attend), (block.norm2, mlp)):
        if norm is not None:
            x = x + sublayer(norm(x)) if block.order == "pre" else norm(x + sublayer(x))
    return x


@pytest.mark.parametrize("form", FORMS)
def test_the_operator_is_the_network(form: str) -> None:
    module, x = network(**FORMS[form]), tokens()
    said = x
    for block in module.blocks:
        said = plain(block, said)
    said = module.norm(said)
    operator = module.operator(x)
    torch.testing.assert_close(operator.affine(x), said)
    torch.testing.assert_close(module.hidden(x), said)
    dense = operator.dense()
    linear = torch.einsum("bidje,bje->bid", dense, x)
    torch.testing.assert_close(linear + operator.affine(torch.zeros_like(x)), said)
    v = torch.randn(3, *x.shape, dtype=torch.double)
    torch.testing.assert_close(operator.linear(v), torch.einsum("bidje,sbje->sbid", dense, v))
    torch.testing.assert_close(operator.transposed(v), torch.einsum("bidje,sbid->sbje", dense, v))
    torch.testing.assert_close(slices(operator, 3, said), dense[:, 3])
    if FORMS[form].get("causal"):
        assert all(dense[:, i, :, i + 1 :].eq(0).all() for i in range(L))
    parts = [module.operator(x, (0, 0)), module.operator(x, (1, 1)), Chain(operator.steps[-1:])]
    by_parts = Chain(parts if form != "attention alone" else parts[:2])
    torch.testing.assert_close(by_parts.dense(), dense)


def test_a_block_of_torch_has_the_same_operator() -> None:
    """torch's encoder layer with our block's weights; and its Jacobian with held factors is the dense T's row."""
    block = network(1).blocks[0]
    theirs = nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    theirs = theirs.double()
    state = block.state_dict()
    packed = {
        f"self_attn.in_proj_{leaf}": torch.cat([state[f"{n}_proj.{leaf}"] for n in "qkv"])
        for leaf in ("weight", "bias")
    }
    names = {
        "self_attn.out_proj": "o_proj",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "norm1": "norm1",
        "norm2": "norm2",
    }
    renamed = {f"{a}.{leaf}": state[f"{b}.{leaf}"] for a, b in names.items() for leaf in ("weight", "bias")}
    theirs.load_state_dict(packed | renamed)
    x = tokens()
    torch.testing.assert_close(block(x), theirs.train()(x))


@pytest.mark.parametrize("form", ["pre", "llama", "half"])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_relevance_is_that_of_the_dense_operator(form: str, chunk: int) -> None:
    module, x = network(**FORMS[form]), tokens()
    operator, w = module.operator(x), torch.randn_like(x)
    dense = operator.dense()
    expected = {
        "norm": dense.square().sum((2, 4)).sqrt(),
        "input": torch.einsum("bidje,bje->bijd", dense, x).norm(dim=-1),
        "output": torch.einsum("bid,bidje->bije", w, dense).norm(dim=-1),
        "input_output": torch.einsum("bid,bidje,bje->bij", w, dense, x),
    }
    for how, matrix in expected.items():
        torch.testing.assert_close(relevance(operator, x, w, how, chunk=chunk), matrix)
        some = relevance(operator, x, w, how, rows=[-1, 2], chunk=chunk)
        torch.testing.assert_close(some, matrix[:, [-1, 2]])


def test_random_directions_estimate_the_norm() -> None:
    module, x = network(), tokens()
    operator = module.operator(x)
    generator = torch.Generator().manual_seed(0)
    guess = relevance(operator, x, x, "norm", probes=3000, generator=generator, chunk=500)
    torch.testing.assert_close(guess, relevance(operator, x, x, "norm"), rtol=0.1, atol=0)


def test_relevance_and_bias_sum_to_what_is_asked() -> None:
    x, w = tokens(), torch.randn(2, L, D, dtype=torch.double)
    for form in FORMS:
        found = network(**FORMS[form])(x, w)
        assert found.error < 1e-11
        torch.testing.assert_close(found.relevance.sum(-1) + found.offset, (w * found.y).sum(-1))
    some = network()(x, w, rows=[-1])
    assert some.relevance.shape == (2, 1, L) and some.error < 1e-11
    words = some.table()
    assert "no token" in words and "sum" in words and len(words.splitlines()) == 2 + 5 + 2
    with pytest.raises(ValueError, match="sums to nothing"):
        _ = network(aggregation="norm")(x).error
    pytest.importorskip("matplotlib")
    some.labels = list("abcde")
    assert len(some.plot().axes) == 2


def test_attention_alone_is_the_rollout() -> None:
    """W_V W_O = I, no norms, no feed-forward: T = prod (I + A) on each number; halved, the rollout itself."""
    torch.manual_seed(0)
    weights = [torch.randn(1, 1, L, L, dtype=torch.double).softmax(-1) for _ in range(2)]
    eye = torch.eye(D, dtype=torch.double)[None]
    x = tokens(1)
    chain = Chain([Sum([Attention(each, eye, eye)]) for each in weights])
    plain_ = torch.eye(L, dtype=torch.double)
    first, second = (plain_ + each[0, 0] for each in weights)
    torch.testing.assert_close(relevance(chain, x, x, "norm")[0], D**0.5 * second @ first)
    dense = chain.dense()[0]
    torch.testing.assert_close(dense, torch.einsum("ij,de->idje", second @ first, eye[0]))
    halved = Chain([Sum([Attention(each)], scale=0.5) for each in weights])
    torch.testing.assert_close(relevance(halved, x, x, "norm")[0], D**0.5 * second @ first / 4)


def test_parts_that_are_left_out_are_the_identity() -> None:
    x = tokens()
    bare = network(parts=("residual",))
    matrix, given = torch.eye(L, dtype=torch.double).expand(2, L, L), x
    for block in bare.blocks:
        attention = F.softmax(
            (block.q_proj(block.norm1(given)).unflatten(-1, (2, 4)).transpose(1, 2) / 2)
            @ block.k_proj(block.norm1(given)).unflatten(-1, (2, 4)).transpose(1, 2).mT,
            -1,
        ).mean(1)
        matrix = (torch.eye(L, dtype=torch.double) + attention) @ matrix
        given = block(given)
    torch.testing.assert_close(bare.operator(x).linear(x), matrix @ x)
    torch.testing.assert_close(relevance(bare.operator(x), x, x, "norm"), D**0.5 * matrix)
    torch.testing.assert_close(bare.rollout(x), matrix / 4)
    torch.testing.assert_close(network().rollout(x), matrix / 4)
    for parts in (("norm", "ffn", "values"), ("norm", "ffn", "residual"), ("ffn", "residual", "values"), ()):
        for order in ("pre", "post", "parallel"):
            said = network(parts=parts, order=order).operator(x).linear(x)
            assert said.isfinite().all() and not torch.allclose(said, network(order=order).operator(x).linear(x))


def test_of_relu_alone_the_operator_is_the_jacobian() -> None:
    torch.manual_seed(0)
    w1, w2 = torch.randn(D, 12, dtype=torch.double), torch.randn(12, D, dtype=torch.double)
    b1, x = torch.randn(12, dtype=torch.double), tokens(1)
    gain = (x @ w1 + b1 > 0).double()
    dense = Sum([FeedForward(gain, w1, w2, b1)]).dense()
    jacobian = torch.autograd.functional.jacobian(lambda x: x + (x @ w1 + b1).relu() @ w2, x)
    torch.testing.assert_close(dense[0], jacobian[0, :, :, 0])


def test_neighbours_are_within_the_bound() -> None:
    """And permuted tokens have a permuted operator, there being no positions."""
    module, x = network(), tokens(1)
    operator = module.operator(x)
    for size in (1e-3, 0.1, 1.0):
        change = size * torch.randn_like(x)
        true = module.hidden(x + change) - module.hidden(x)
        away = (module.hidden(x + change) - operator.affine(x + change)).norm()
        assert away <= neighbour_bound(operator, change, true, steps=100)
    order = torch.randperm(L)
    permuted = relevance(module.operator(x[:, order]), x[:, order], x[:, order])
    torch.testing.assert_close(permuted, relevance(operator, x, x)[:, order][:, :, order])


def test_perturbation_masks_the_top_and_the_bottom() -> None:
    worth = torch.tensor([0.5, 0.1, 0.3, 0.06, 0.04])
    found = perturbation(lambda kept: kept.float() @ worth, worth, fractions=(0.0, 0.2, 0.4))
    torch.testing.assert_close(found.positive, torch.tensor([1.0, 0.5, 0.2]))
    torch.testing.assert_close(found.negative, torch.tensor([1.0, 0.96, 0.9]))
    assert found.areas == pytest.approx((0.55, 0.955)) and "40%" in found.table()
    with pytest.raises(ValueError, match="must rise from 0"):
        perturbation(lambda kept: kept.float() @ worth, worth, fractions=(0.1, 0.2))
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 1


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=12,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_a_model_of_transformers_has_the_operator_of_the_rules() -> None:
    """LLaMA without its rotation (one token, position 0) is our block with the same weights."""
    model = llama()
    ours = LensTransformer(
        D, 2, 2, hidden=12, num_kv_heads=1, norm="rms", gated="gate", activation="silu", causal=True
    ).double()  # fmt: skip
    state = model.model.state_dict()
    names = {"self_attn.": "", "input_layernorm": "norm1", "post_attention_layernorm": "norm2", "layers.": "blocks."}
    renamed = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    renamed.pop("embed_tokens.weight")
    biases = {name: torch.zeros_like(each) for name, each in ours.state_dict().items() if name.endswith("proj.bias")}
    ours.load_state_dict(biases | renamed)
    from saccade.explain.linearised import LinearModel

    theirs = LinearModel(model, {"input_ids": torch.tensor([[7]])})
    operator = ours.operator(theirs.x_BLD)
    torch.testing.assert_close(operator.dense()[0, 0], slices(theirs, 0, theirs.y_BLV)[0], atol=1e-5, rtol=1e-5)


def test_lens_of_a_model_sums_to_its_logits() -> None:
    model, ids = llama(), torch.tensor([[3, 14, 15, 9, 2, 6]])
    logits = model(input_ids=ids).logits[0]
    found = tensorlens(model, {"input_ids": ids})
    assert found.error < 1e-6 and found.relevance.shape == (1, 6, 6)  # transformers' RMSNorm is in float32
    torch.testing.assert_close(found.value[0], logits.amax(-1))
    assert found.relevance[0].triu(1).eq(0).all()
    some = tensorlens(model, {"input_ids": ids}, rows=[-1], gated="up")
    torch.testing.assert_close(some.value[0], logits[-1:].amax(-1))
    assert some.error < 1e-6 and not torch.allclose(some.relevance, found.relevance[:, -1:])
    for how in ("norm", "input", "output"):
        other = tensorlens(model, {"input_ids": ids}, aggregation=how, rows=[-2])
        assert other.relevance.shape == (1, 1, 6) and other.relevance[0, 0, :5].gt(0).all()
    of_one = tensorlens(model, {"input_ids": ids}, direction=torch.ones(6, D), layers=(1, 1))
    assert of_one.error < 1e-6


def test_relations_are_read_from_a_few_prompts() -> None:
    """One prompt is reproduced exactly; of several the bias is the mean of what is left."""
    model = llama()
    prompts = [{"input_ids": torch.randint(20, (1, 5), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    states = [model.model(**each, output_hidden_states=True).hidden_states for each in prompts]
    one = RelationOperator.of(model, prompts[:1], [2], layers=(0, 0), chunk=3)
    torch.testing.assert_close(one(states[0][0][:, 2]), states[0][1][:, -1])
    from saccade.explain.linearised import LinearModel

    block = slices(LinearModel(model, prompts[0], layers=(0, 0)), -1, states[0][1])[0, :, 2]
    torch.testing.assert_close(one.weight_DD, block)
    three = RelationOperator.of(model, prompts, [2, 1, 2], layers=(0, 0))
    h = torch.cat([state[0][:, place] for state, place in zip(states, (2, 1, 2), strict=True)])
    z = torch.cat([state[1][:, -1] for state in states])
    torch.testing.assert_close((three(h) - z).mean(0), torch.zeros(D, dtype=torch.double))
    with pytest.raises(ValueError, match="a subject each"):
        RelationOperator.of(model, prompts, [1])


def test_a_prompt_of_smollm2_sums_to_its_logits() -> None:
    from saccade.train.models import installed, load

    if not installed("smollm2-135m"):
        pytest.skip("SmolLM2 is not installed")
    model, tokenizer = load("smollm2-135m")
    text = "When Mary and John went to the store, John gave a drink to Mary. "
    text += "Later that day Anna and Paul met, and Paul gave a book to"
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :32]
    assert ids.shape[1] >= 30
    found = tensorlens(model, {"input_ids": ids}, rows=[-1, 8])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, [-1, 8]]
    torch.testing.assert_close(found.value[0], logits.amax(-1), atol=1e-3, rtol=1e-5)
    assert found.error < 1e-4


def test_refusals() -> None:
    x = tokens()
    with pytest.raises(ValueError, match="heads must divide"):
        LensTransformer(D, 3)
    with pytest.raises(ValueError, match="norm, order and gated"):
        LensTransformer(D, 2, order="sideways")
    with pytest.raises(ValueError, match="parts must be of"):
        LensTransformer(D, 2, parts=("norms",))
    with pytest.raises(ValueError, match="aggregation must be one of"):
        LensTransformer(D, 2, aggregation="mean")
    with pytest.raises(ValueError, match="aggregation must be one of"):
        relevance(network().operator(x), x, x, "mean")
    with pytest.raises(ValueError, match="of the same tokens"):
        relevance(network().operator(x), x, x[:, :2])
    with pytest.raises(ValueError, match="two of 2 blocks"):
        network().operator(x, (1, 2))
    with pytest.raises(ValueError, match="values are left out"):
        Attention(torch.ones(1, 1, 2, 2)).dense()
