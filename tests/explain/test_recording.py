"""Recorded attention: equal to what transformers gives, without being kept, on models of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from saccade.explain.recording import recorded  # noqa: E402
from saccade.layers.wrapping import footprint  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
WORDS = {"vocab_size": 20, "max_position_embeddings": 16}


def llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**SMALL, **WORDS, num_key_value_heads=2))


def gpt2() -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    )


def gemma2() -> nn.Module:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            **SMALL, **WORDS, num_key_value_heads=2, head_dim=4, attn_logit_softcapping=1.0, sliding_window=3
        )
    )


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL, **WORDS))


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))


def clip() -> nn.Module:
    text, vision = {**SMALL, **WORDS, "eos_token_id": 2}, {**SMALL, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


TEXT: dict[str, Tensor] = {
    "input_ids": torch.tensor([[3, 4, 5, 6, 7, 8], [9, 1, 2, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "llama": (llama, TEXT),
    "gpt2": (gpt2, TEXT),
    "gemma2": (gemma2, TEXT),
    "bert": (bert, TEXT),
    "vit": (vit, IMAGE),
    "clip": (clip, TEXT | IMAGE),
}


def attentions(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    """What transformers says of its attention, eagerly."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    said = model(**inputs, output_attentions=True)
    if hasattr(said, "text_model_output"):
        return said, [*said.text_model_output.attentions, *said.vision_model_output.attentions]
    return said, list(said.attentions)


def last(said: Any) -> Tensor:
    return said.logits_per_image if hasattr(said, "logits_per_image") else said.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_model(family: str) -> None:
    torch.manual_seed(0)
    make, inputs = FAMILIES[family]
    model = make().eval()
    before = footprint(model)
    with recorded(model) as recording:
        found = model(**inputs)
    assert footprint(model) == before
    expected, weights = attentions(model, inputs)
    # padding that sees no token at all gets nothing here, and the mean of everything there
    shown = inputs["attention_mask"].bool() if family == "gemma2" else slice(None)
    torch.testing.assert_close(last(found)[shown], last(expected)[shown], atol=1e-5, rtol=1e-4)
    # the order of CLIP's towers is the model's own
    records = sorted(recording.layers, key=lambda record: ("vision" in record.name, record.number))
    assert len(records) == len(weights)
    real = inputs.get("attention_mask", torch.ones(2, 1)).bool()
    for record, weight in zip(records, weights, strict=True):
        rows = real if record.q_BHND.shape[2] == real.shape[1] else torch.ones(2, record.q_BHND.shape[2]).bool()
        at = rows[:, None, :, None]
        torch.testing.assert_close(record.weights() * at, weight.detach() * at, atol=1e-5, rtol=1e-4)
        part = record.weights(heads=[3, 0], rows=[-1, 1])
        torch.testing.assert_close(part, record.weights()[:, [3, 0]][:, :, [-1, 1]])
        assert record.x_BNC is not None and record.x_BNC.shape == (2, record.q_BHND.shape[2], 16)


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_gradients_of_weights_without_weights(family: str) -> None:
    torch.manual_seed(0)
    make, inputs = FAMILIES[family]
    model = make().eval()
    direction = torch.randn(16)
    with recorded(model) as recording:
        (model(**inputs).last_hidden_state[:, 0] @ direction).sum().backward()
    found = [record.gradients() for record in recording.layers]
    said, weights = attentions(model, inputs)
    expected = torch.autograd.grad((said.last_hidden_state[:, 0] @ direction).sum(), weights)
    for record, mine, theirs in zip(recording.layers, found, expected, strict=True):
        shown = record.weights() > 0
        torch.testing.assert_close(mine * shown, theirs * shown, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(record.gradients(heads=[2], rows=[1]), mine[:, [2]][:, :, [1]])


def test_a_long_causal_input_is_kept_without_a_mask() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    ids = torch.randint(20, (1, 12))
    with recorded(model) as recording, torch.no_grad():
        model(ids)
    assert all(record.mask is None and record.causal for record in recording.layers)
    with recorded(model) as masked, torch.no_grad():
        model(ids, attention_mask=torch.tensor([[0] + [1] * 11]))
    (first, _), (hidden, _) = recording.layers, masked.layers
    assert not first.weights().triu(1).any() and hidden.mask is not None
    assert not hidden.weights()[..., 0].any() and not hidden.weights(rows=[0]).any()
    later = first.weights(rows=[4])[..., 1:]
    torch.testing.assert_close(hidden.weights(rows=[4])[..., 1:], later / later.sum(-1, keepdim=True))


def test_some_layers_and_what_is_refused() -> None:
    model = bert().eval()
    with recorded(model, layers=[-1]) as recording, torch.no_grad():
        model(**TEXT)
    (record,) = recording.layers
    assert record.number == 1 and recording.of("layer.1") == [record] and not recording.of("layer.0")
    with pytest.raises(RuntimeError, match="backward"):
        record.gradients()
    recording.clear()
    assert not recording.layers
    for bad, message in ((nn.Linear(2, 2), "not a transformers model"), (model, "between 0 and 1, got .7.")):
        with pytest.raises(ValueError, match=message), recorded(bad, layers=[7]):
            pass
    before = footprint(model)
    with pytest.raises(KeyError, match="stop"), recorded(model):
        raise KeyError("stop")
    assert footprint(model) == before
    with pytest.raises(ValueError, match="position_bias"), recorded(t5 := tiny_t5()):
        t5(input_ids=TEXT["input_ids"])


def tiny_t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    return transformers.T5EncoderModel(config).eval()
