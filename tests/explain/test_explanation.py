"""`saccade.explain`: planted evidence is found, targets are what they are said to be, the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade

transformers = pytest.importorskip("transformers")

from saccade.explain.explanation import METHODS  # noqa: E402
from saccade.layers.wrapping import footprint  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 20, "max_position_embeddings": 16}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
FEW: dict[str, Any] = {"random": 2, "subsets": 8}


def bert(head: str = "BertForSequenceClassification", **more: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, head)(transformers.BertConfig(**SMALL, **WORDS, **more)).eval()


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **WORDS, num_key_value_heads=1)).eval()


def vit(head: str = "ViTForImageClassification") -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    return getattr(transformers, head)(config).eval()


@pytest.fixture(scope="module")
def finder() -> Any:
    """A classifier that says whether token 7 is in the text, wherever it stands."""
    model = bert(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        ids = torch.randint(8, 20, (64, 8), generator=generator)
        there = torch.arange(64) % 2
        ids[there.bool(), torch.randint(1, 8, (32,), generator=generator)] = 7
        loss = F.cross_entropy(model(input_ids=ids).logits, there)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model


def test_planted_evidence_is_found_and_believed(finder: Any) -> None:
    ids = torch.tensor([[12, 9, 15, 7, 10, 18, 13, 9]])
    before = footprint(finder)
    found = saccade.explain(finder, {"input_ids": ids}, 1)
    assert footprint(finder) == before
    assert set(found.maps) == set(METHODS) - {"gate"} and found.grid is None and found.target == (None, 1)
    assert found.top("occlusion", 1)[0][0] == "7" and "occlusion" in found.faithfulness.believed()
    assert found.best() is not None and found.agreement.shape == (7, 7)
    words = str(found)
    assert all(name in words for name in (*found.maps, "random", "believe it", "depends on weights"))
    logit = finder(input_ids=ids).logits[0, 1].item()
    assert found.sum is not None and found.sum.error < 1e-4 and found.sum.value == pytest.approx(logit)
    assert found.maps["tensorlens"].sum().item() + found.sum.offset == pytest.approx(logit, abs=1e-4)
    assert found.maps["tensorlens"].argmax() == 3 and str(found.sum) in words


def test_occlusion_and_gradients_are_what_they_say() -> None:
    model = bert()
    found = saccade.explain(model, {"input_ids": IDS}, methods=["occlusion", "input x gradient"], **FEW)
    assert found.target is not None and found.target[1] == int(model(input_ids=IDS).logits.argmax())
    whole = model(input_ids=IDS).logits.softmax(-1)[0, found.target[1]]
    kept = torch.ones_like(IDS)
    kept[0, 2] = 0
    gone = model(input_ids=IDS, attention_mask=kept).logits.softmax(-1)[0, found.target[1]]
    torch.testing.assert_close(found.maps["occlusion"][2], (whole - gone).detach(), atol=1e-6, rtol=1e-4)
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, found.target[1]].backward()
    expected = (embeds * embeds.grad).sum(-1)[0].abs().detach()
    torch.testing.assert_close(found.maps["input x gradient"], expected, atol=1e-6, rtol=1e-4)
    assert float(found.maps["occlusion"][0]) == 0  # the class token is what the head reads: it stays


def test_a_decoder_explains_the_next_token_or_any_other() -> None:
    model = llama()
    found = saccade.explain(model, {"input_ids": IDS}, methods=["rollout", "gradient x attention"], **FEW)
    said = model(input_ids=IDS).logits
    assert found.target == (5, int(said[0, -1].argmax()))
    earlier = saccade.explain(model, {"input_ids": IDS}, (2, 11), methods=["rollout", "raw"], **FEW)
    assert earlier.target == (2, 11)
    assert float(earlier.maps["rollout"][3:].abs().max()) == 0  # what comes later is not seen
    assert saccade.explain(model, {"input_ids": IDS}, 11, methods=["raw"], **FEW).target == (5, 11)


def test_padding_is_no_part_and_a_mask_is_what_is_explained() -> None:
    model = bert("BertForMaskedLM")
    model.config.mask_token_id = 5
    padded = {"input_ids": F.pad(IDS, (0, 3)), "attention_mask": F.pad(torch.ones_like(IDS), (0, 3))}
    found = saccade.explain(model, padded, methods=["raw"], **FEW)
    assert len(found.labels) == 6 and found.target is not None and found.target[0] == 2
    plain = saccade.explain(model, {"input_ids": IDS}, methods=["raw"], **FEW)
    torch.testing.assert_close(found.maps["raw"], plain.maps["raw"])


@pytest.mark.parametrize("head", ["ViTForImageClassification", "ViTModel"])
def test_images(head: str) -> None:
    model, image = vit(head), torch.rand(1, 3, 16, 16)
    found = saccade.explain(model, {"pixel_values": image}, **FEW)
    assert found.grid == (4, 4) and all(each.shape == (16,) for each in found.maps.values())
    assert (found.target is None) == (head == "ViTModel")
    if found.target is None:
        assert found.faithfulness.whole == pytest.approx(1.0)


def test_a_text_with_its_tokenizer() -> None:
    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> dict[str, Tensor]:
            return {"input_ids": torch.tensor([[3 + len(word) for word in text.split()]])}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"t{i}" for i in ids]

    found = saccade.explain(bert("BertModel"), "one three seven", tokenizer=Tokenizer(), **FEW)
    assert found.labels == ["t6", "t8", "t8"] and found.target is None


def test_maps_alone_call_the_model_for_the_target_and_the_run() -> None:
    model, calls = bert(num_labels=2), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = saccade.explain(model, {"input_ids": IDS}, faithful=False, methods=["raw", "rollout"])
    handle.remove()
    assert len(calls) == 2 and found.faithfulness is None and found.best() is None
    measured = saccade.explain(model, {"input_ids": IDS}, methods=["raw", "rollout"], **FEW)
    assert found.probability == pytest.approx(measured.probability) and "believe" not in str(found)
    torch.testing.assert_close(found.maps, measured.maps)


@pytest.mark.parametrize("family", ["mamba", "t5"])
def test_a_model_whose_attention_cannot_be_recorded_has_the_other_maps(family: str) -> None:
    torch.manual_seed(0)
    model: Any
    if family == "mamba":
        config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=20)
        model, why = transformers.MambaForCausalLM(config).eval(), "has no attention layers"
    else:
        config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
        model, why = transformers.T5EncoderModel(config).eval(), "position_bias"
    before = footprint(model)
    found = saccade.explain(model, {"input_ids": IDS}, **FEW)
    assert footprint(model) == before
    assert set(found.maps) == {"input x gradient", "occlusion"} and why in found.remark and why in str(found)
    assert not found.heads and found.probability == pytest.approx(found.faithfulness.whole, abs=1e-5)
    with pytest.raises(ValueError, match=why):
        saccade.explain(model, {"input_ids": IDS}, methods=["raw"])


def test_long_inputs_need_less_than_their_attention() -> None:
    from saccade.ops.measure import peak_bytes

    torch.manual_seed(0)
    length, heads = 3072, 4
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": heads, "intermediate_size": 8}
    config = transformers.LlamaConfig(**sizes, vocab_size=20, max_position_embeddings=length)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(20, (1, length))
    run: Any = lambda: saccade.explain(model, {"input_ids": ids}, faithful=False)  # noqa: E731
    assert set(run().maps) == {"raw", "rollout", "gradient x attention", "tensorlens", "input x gradient"}
    # the attention of one layer: what is made at a time is bounded by 64 MiB
    assert peak_bytes(run) < 0.7 * 4 * heads * length**2


def test_maps_are_drawn(finder: Any) -> None:
    pytest.importorskip("matplotlib")
    found = saccade.explain(finder, {"input_ids": IDS}, methods=["raw", "rollout"], **FEW)
    assert len(found.plot().axes) == 2
    image = saccade.explain(vit(), {"pixel_values": torch.rand(1, 3, 16, 16)}, methods=["raw"], **FEW)
    assert len(image.plot().axes) == 1


def test_refusals() -> None:
    model = bert()
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        ({"input_ids": IDS}, {"methods": ["magic"]}, "methods must be of raw"),
        ("a text", {}, "needs a tokenizer"),
        ({}, {}, "input_ids or pixel_values"),
        ({"input_ids": IDS.expand(2, -1)}, {}, "one example, got 2"),
        ({"input_ids": IDS}, {"target": 9}, "between 0 and 1"),
        ({"input_ids": IDS}, {"target": (0, 1)}, "a class of 2"),
    )
    for inputs, options, message in cases:
        with pytest.raises(ValueError, match=message):
            saccade.explain(model, inputs, **options)
    with pytest.raises(ValueError, match="no logits"):
        saccade.explain(bert("BertModel"), {"input_ids": IDS}, 1)
    with pytest.raises(ValueError, match="position"):
        saccade.explain(llama(), {"input_ids": IDS}, (9, 1))
    with pytest.raises(ValueError, match="not a transformers model"):
        saccade.explain(nn.Linear(2, 2), {"input_ids": IDS})
