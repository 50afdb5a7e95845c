"""Models of transformers as affine maps: what they say is the sum, products are adjoint, nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from saccade.explain.linearised import GATED, LinearModel, attribution, blocks, held, held_slope  # noqa: E402
from saccade.layers.wrapping import footprint  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
WORDS = {"vocab_size": 20, "max_position_embeddings": 16}
IMAGES = {"image_size": 8, "patch_size": 4, "num_labels": 3}
GROUPED = {"num_key_value_heads": 2, "pad_token_id": 0}
#: of each the class, and its configuration: RoPE and learned positions, RMSNorm and LayerNorm, grouped heads, gates
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", SMALL | WORDS | GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", SMALL | WORDS | GROUPED | {"head_dim": 6}),
    "Gemma2ForCausalLM": ("Gemma2Config", SMALL | WORDS | GROUPED | {"head_dim": 6}),
    "Phi3ForCausalLM": ("Phi3Config", SMALL | WORDS | GROUPED),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 20, "n_positions": 16}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL | WORDS),
    "OPTForCausalLM": (
        "OPTConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "word_embed_proj_dim": 16}
        | WORDS,
    ),
    "BertForMaskedLM": ("BertConfig", SMALL | WORDS),
    "BertForSequenceClassification": ("BertConfig", SMALL | WORDS),
    "RobertaForSequenceClassification": ("RobertaConfig", SMALL | WORDS),
    "AlbertForSequenceClassification": ("AlbertConfig", SMALL | WORDS | {"embedding_size": 8}),
    "ViTForImageClassification": ("ViTConfig", SMALL | IMAGES),
    "Dinov2ForImageClassification": ("Dinov2Config", SMALL | IMAGES),
}


def made(name: str, **more: Any) -> Any:
    """The model, its zeros and ones disturbed."""
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, kind)(**config | more)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.double)}
    return {"input_ids": torch.tensor([[3, 14, 15, 9, 2, 6, 5]])}


def bound(name: str) -> float:
    """Of errors: transformers' RMSNorms compute in float32, whatever the model's type."""
    return 5e-6 if MODELS[name][1].items() >= GROUPED.items() else 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_a_logit_is_the_sum_of_what_tokens_add(name: str) -> None:
    model = made(name)
    inputs, before = inputs_of(model), footprint(model)
    for column in (0, 1):
        found = attribution(model, inputs, lambda said: said.logits.flatten(0, -2)[-1, column])  # noqa: B023
        assert found.value == float(model(**inputs).logits.flatten(0, -2)[-1, column].detach())
        assert found.error < bound(name) and float(found.relevance_L.abs().sum()) > 1e-3
    assert footprint(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_the_operator_of_the_tokens(name: str) -> None:
    """Y = T X + b; and products with T and with its transpose are of one T."""
    model = made(name)
    operator, before = LinearModel(model, inputs_of(model)), footprint(model)
    y = operator.linear(operator.x_BLD[None])[0] + operator.offset_BLV
    torch.testing.assert_close(y, operator.y_BLV, atol=bound(name), rtol=0)
    torch.testing.assert_close(operator.y_BLV, model.base_model(**operator.inputs).last_hidden_state)
    v, w = torch.randn(2, *operator.x_BLD.shape).double(), torch.randn(2, *operator.y_BLV.shape).double()
    torch.testing.assert_close((operator.linear(v) * w).sum(), (operator.transposed(w) * v).sum())
    assert footprint(model) == before


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_each_way_to_hold_a_gate_is_exact_and_the_half_is_their_mean(name: str) -> None:
    model = made(name)
    inputs = inputs_of(model)
    one = {way: LinearModel(model, inputs, layers=(0, 0), gated=way) for way in GATED}
    w = torch.randn(1, 1, 7, 16).double()
    pulled = {way: each.transposed(w) for way, each in one.items()}
    assert not torch.allclose(pulled["gate"], pulled["up"])
    # attention is the same in all three, and a block has one gated layer: the half is the mean of the whole block
    torch.testing.assert_close(pulled["half"], (pulled["gate"] + pulled["up"]) / 2)
    for each in one.values():
        said = each.linear(each.x_BLD[None])[0] + each.offset_BLV
        torch.testing.assert_close(said, each.y_BLV, atol=bound(name), rtol=0)
    errors = [attribution(model, inputs, lambda said: said.logits[0, -1, 3], gated=way).error for way in GATED]
    assert max(errors) < bound(name)


def test_layers_compose() -> None:
    model = made("GPTNeoXForCausalLM")
    inputs = inputs_of(model)
    first, second, whole = (LinearModel(model, inputs, layers=each) for each in ((0, 0), (1, 1), (0, -1)))
    v = torch.randn(2, 1, 7, 16).double()
    torch.testing.assert_close(first.y_BLV, second.x_BLD)
    assert second.whole and not first.whole
    torch.testing.assert_close(second.linear(first.linear(v)), whole.linear(v))
    offset = second.linear(first.offset_BLV[None])[0] + second.offset_BLV
    torch.testing.assert_close(offset, whole.offset_BLV)


def test_later_tokens_add_nothing_and_hidden_ones_neither() -> None:
    causal = LinearModel(made("LlamaForCausalLM"), {"input_ids": torch.arange(1, 8)[None]})
    w = torch.zeros(1, 1, 7, 16).double()
    w[..., 3, :] = 1
    pulled = causal.transposed(w)
    assert pulled[0, 0, 4:].eq(0).all() and pulled[0, 0, :4].abs().sum(-1).gt(0).all()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    padded = LinearModel(made("BertForMaskedLM"), {"input_ids": torch.arange(1, 8)[None], "attention_mask": mask})
    pulled = padded.transposed(w)
    assert pulled[0, 0, 5:].eq(0).all() and pulled[0, 0, :5].abs().sum(-1).gt(0).all()


def test_a_change_under_held_factors_is_the_operator_of_it() -> None:
    """And the model itself, that is not affine, says something else."""
    model = made("BertForMaskedLM")
    operator = LinearModel(model, inputs_of(model))
    change = 0.3 * torch.randn_like(operator.x_BLD)

    def put(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((args[0] + change, *args[1:]), kwargs)

    handle = blocks(model)[0].register_forward_pre_hook(put, with_kwargs=True)
    moved = model.base_model(**inputs_of(model)).last_hidden_state
    handle.remove()
    by_operator = operator.y_BLV + operator.linear(change[None])[0]
    assert (moved - by_operator).abs().max() > 1e-2
    both = operator.linear((operator.x_BLD + change)[None])[0] + operator.offset_BLV
    torch.testing.assert_close(both, by_operator)


def test_single_precision_sums_to_the_logit() -> None:
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "ViTForImageClassification"):
        model = made(name).float()
        inputs = {key: each.float() if each.is_floating_point() else each for key, each in inputs_of(model).items()}
        assert attribution(model, inputs, lambda said: said.logits.flatten(0, -2)[-1, 1]).error < 1e-5


@pytest.mark.parametrize(("function", "at_0"), [(F.relu, 0.0), (F.gelu, 0.5), (F.silu, 0.5), (torch.tanh, 1.0)])
def test_the_slope_at_nothing(function: Callable[[Tensor], Tensor], at_0: float) -> None:
    u = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 3.0], dtype=torch.double)
    slope = held_slope(function, u)
    torch.testing.assert_close(slope[1:4], torch.full((3,), at_0, dtype=torch.double), atol=1e-6, rtol=0)
    torch.testing.assert_close(slope * u, function(u), atol=1e-6, rtol=0)


def test_what_is_not_known_shows_in_the_sum() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.square()

    model = made("GPT2LMHeadModel")
    model.transformer.h[0].mlp.act = Squared()
    assert attribution(model, inputs_of(model), lambda said: said.logits[0, -1, 1]).error > 1e-4


def test_refusals() -> None:
    model = made("LlamaForCausalLM")
    inputs = inputs_of(model)
    with pytest.raises(ValueError, match="gated must be one of"):
        LinearModel(model, inputs, gated="neither")
    with pytest.raises(ValueError, match="two of 2 blocks"):
        LinearModel(model, inputs, layers=(1, 0))
    with pytest.raises(ValueError, match="must end with the last"):
        LinearModel(model, inputs, layers=(0, 0), read=lambda said: said.logits)
    with pytest.raises(ValueError, match="both branches in one layer"), held(made("Phi3ForCausalLM"), gated="up"):
        pass
    towers = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    )
    with pytest.raises(ValueError, match="one list of blocks"):
        blocks(towers)
    with pytest.raises(ValueError, match="not a transformers model"):
        blocks(nn.Linear(2, 2))
