"""Starting from a softmax layer of torch, transformers or diffusers: equal outputs, or a refusal that says why."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from saccade.attention.moba import MoBA
from saccade.layers.pretrained import read_softmax
from saccade.layers.softmax_attention import SoftmaxAttention


@pytest.mark.parametrize("bias", [True, False])
def test_from_multihead_attention(bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True).double().eval()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    ours = SoftmaxAttention.from_softmax(theirs)
    assert not ours.rope and not ours.causal and not ours.training
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_from_llama_and_its_grouped_heads() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=8,
        vocab_size=11, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    theirs = model.layers[0].self_attn
    x = torch.randn(2, 9, 24)
    positions = model.rotary_emb(x, torch.arange(9)[None])
    future = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    ours = SoftmaxAttention.from_softmax(theirs)
    assert ours.causal and ours.rope and ours.rope_base == 500.0 and ours.num_kv_heads == 2
    torch.testing.assert_close(ours(x), theirs(x, positions, future)[0], atol=1e-5, rtol=1e-5)
    all_blocks = MoBA.from_softmax(theirs, block_size=3, top_k=3)
    torch.testing.assert_close(all_blocks(x), ours(x), atol=1e-5, rtol=1e-5)


def test_from_bert_gpt2_and_vit() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, intermediate_size=8)
    ).eval()
    attention = bert.encoder.layer[0].attention
    ours = SoftmaxAttention.from_softmax(attention)
    torch.testing.assert_close(attention.output.LayerNorm(ours(x) + x), attention(x)[0], atol=1e-5, rtol=1e-5)

    gpt = transformers.GPT2Model(transformers.GPT2Config(n_embd=12, n_head=3, n_layer=1, vocab_size=7)).eval()
    ours = SoftmaxAttention.from_softmax(gpt.h[0].attn, causal=True)
    future = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    torch.testing.assert_close(ours(x), gpt.h[0].attn(x, attention_mask=future)[0], atol=1e-5, rtol=1e-5)

    vit = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, intermediate_size=8)
    ).eval()
    theirs = next(m for n, m in vit.named_modules() if type(m).__name__ == "ViTAttention")
    torch.testing.assert_close(SoftmaxAttention.from_softmax(theirs)(x), theirs(x)[0], atol=1e-5, rtol=1e-5)


def test_from_diffusers() -> None:
    processor = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    theirs = processor.Attention(query_dim=12, heads=3, dim_head=4, bias=True).eval()
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(SoftmaxAttention.from_softmax(theirs)(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bias_k"):
        read_softmax(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    with pytest.raises(ValueError, match="kdim"):
        read_softmax(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(ValueError, match="number of heads"):
        read_softmax(nn.Linear(3, 3))
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    config = transformers.Qwen3Config(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="q_norm"):
        read_softmax(Qwen3Attention(config, 0))
    normed = SoftmaxAttention(8, 2)
    normed.q_norm = nn.RMSNorm(4, elementwise_affine=False)
    with pytest.raises(ValueError, match="it has q_norm"):
        read_softmax(normed)
    rotary = SoftmaxAttention(8, 2)
    with pytest.raises(ValueError, match="rotary"):
        SoftmaxAttention.from_softmax(rotary, rope=False)


TEXT = dict(
    vocab_size=11, hidden_size=32, intermediate_size=8, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0,
)  # fmt: skip


def attention_layer(name: str, number: int, **changes: Any) -> nn.Module:
    """The layer of that number of a small transformers model, which its `whole` gives."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TEXT | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model", None)
    model = (model or getattr(transformers, f"{name}TextModel"))(config).eval()
    named = [m for _, m in model.named_modules() if type(m).__name__.endswith("Attention")]
    layer: Any = named[number]
    layer.whole = lambda: model  # not a submodule
    return layer


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Cohere", "pair other channels"),
        ("Ernie4_5", "pair other channels"),
        ("Helium", "pair other channels"),
        ("GPTJ", "its configuration does not tell"),
        ("Bloom", "known by name"),
        ("DiffLlama", "it has lambda_q1"),
        ("BitNet", "it has attn_sub_norm"),
        ("HunYuanDenseV1", "it has query_layernorm"),
        ("Gemma2", "it has attn_logit_softcapping"),
        ("Qwen3", "it has q_norm"),
    ],
)
def test_what_computes_something_else_is_refused(name: str, reason: str) -> None:
    more = {"GPTJ": dict(n_embd=32, n_head=4, n_layer=4, rotary_dim=8), "Bloom": dict(n_head=4, n_layer=4)}
    with pytest.raises(ValueError, match=reason):
        SoftmaxAttention.from_softmax(attention_layer(name, 0, **more.get(name, {})), causal=True)
    transformers = pytest.importorskip("transformers")
    clipped = transformers.OlmoModel(transformers.OlmoConfig(**TEXT, clip_qkv=1.0)).layers[0].self_attn
    with pytest.raises(ValueError, match="it has clip_qkv"):
        SoftmaxAttention.from_softmax(clipped)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", ["SmolLM3", "Mistral", "Qwen2"])
def test_layers_that_are_not_all_alike(name: str, number: int) -> None:
    """Some without positions, or with a window."""
    changes = {
        "SmolLM3": {},
        "Mistral": {"sliding_window": 5},
        "Qwen2": dict(use_sliding_window=True, sliding_window=5),
    }
    more = {"layer_types": ["full_attention", "sliding_attention"] * 2} if name == "Qwen2" else {}
    layer: Any = attention_layer(name, number, **changes[name], **more)
    model, seen = layer.whole(), []
    hook = layer.register_forward_hook(lambda _, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True)
    with torch.no_grad():
        model(torch.arange(9)[None])
    hook.remove()
    (call, out), slides = seen[0], name == "Mistral" or (name == "Qwen2" and number % 2)
    with pytest.warns(UserWarning, match="sees 5 tokens") if slides else nullcontext():
        ours = SoftmaxAttention.from_softmax(layer)
    assert ours.rope == (name != "SmolLM3" or number != 3)
    same = torch.isclose(ours(call["hidden_states"]), out, atol=1e-4, rtol=1e-3).all(-1)[0]
    assert same.tolist() == [not slides or at < 5 for at in range(9)]
