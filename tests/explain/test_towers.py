"""Explanations of models with an image and a text: CLIP's two towers, and decoders that read images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade

transformers = pytest.importorskip("transformers")

from saccade.explain.explanation import subject  # noqa: E402
from saccade.layers.wrapping import footprint  # noqa: E402
from saccade.train.tiny import TINY, Prompted, tiny  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
FEW: dict[str, Any] = {"random": 2, "subsets": 4, "stages": 1}
#: the second is padded; 19 is the end
TEXTS = torch.tensor([[3, 4, 5, 6, 7, 19], [9, 1, 2, 19, 19, 19]])
REAL = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def clip(name: str = "CLIP") -> Any:
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": 19}
    vision = {**SMALL, "image_size": 16, "patch_size": 4}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, projection_dim=8)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():  # far from the start, so that image and text matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def pair(texts: int = 2) -> dict[str, Tensor]:
    image = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16).sin()
    return {"input_ids": TEXTS[:texts], "attention_mask": REAL[:texts], "pixel_values": image}


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
@pytest.mark.parametrize("target", [0, 1])
def test_both_towers_of_an_image_and_texts(name: str, target: int) -> None:
    model, inputs = clip(name), pair()
    before = footprint(model)
    found = saccade.explain(model, inputs, target, **FEW)
    assert footprint(model) == before and found.target == (None, target)
    image, text = found.segments
    tokens = int(REAL[target].sum())
    assert image.grid == (4, 4) and (text.start, text.stop) == (16, 16 + tokens) == (16, len(found.labels))
    assert all(each.shape == (16 + tokens,) and bool(each.isfinite().all()) for each in found.maps.values())
    assert [each.shape for each in found.heads] == [(2, 4, 16), (2, 4, tokens)]
    logits = model(**inputs).logits_per_image[0].detach()
    assert found.probability == pytest.approx(float(logits.softmax(0)[target]), abs=1e-5)
    assert float(found.maps["raw"][:16].sum()) <= 1 + 1e-5 and "probability" in found.score_is


def test_the_likeness_of_one_text_and_what_takes_a_part_away() -> None:
    model, inputs = clip(), pair(1)
    seen = subject(model, inputs)
    seen.run()
    said = model(**inputs)
    cosine = F.cosine_similarity(said.image_embeds, said.text_embeds)
    assert seen.score_is == "(1 + cosine) / 2"
    everything = torch.ones(3, seen.parts, dtype=torch.bool)
    everything[1, 16 + 2] = False  # a token of the text
    everything[2, 5] = False  # a patch
    scores = seen.score(everything)
    torch.testing.assert_close(scores[:1], (1 + cosine) / 2, atol=1e-6, rtol=1e-5)
    hidden = inputs | {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}
    said = model(**hidden)
    torch.testing.assert_close(scores[1], (1 + F.cosine_similarity(said.image_embeds, said.text_embeds)[0]) / 2)
    pixels = inputs["pixel_values"].clone()
    pixels[..., 4:8, 4:8] = pixels.mean((2, 3), keepdim=True)
    said = model(**(inputs | {"pixel_values": pixels}))
    torch.testing.assert_close(scores[2], (1 + F.cosine_similarity(said.image_embeds, said.text_embeds)[0]) / 2)


def test_a_text_is_read_at_its_end_and_a_gradient_is_the_chain_rule() -> None:
    model, inputs = clip(), pair()
    seen = subject(model, inputs, 1)
    run = seen.run()
    assert run.towers[1].reads.argmax() == 3 and run.towers[0].reads.argmax() == 0
    torch.testing.assert_close(run.towers[1].reads.sum(), torch.tensor(1.0))
    pixels = inputs["pixel_values"].clone().requires_grad_()
    model(**(inputs | {"pixel_values": pixels})).logits_per_image[0, 1].backward()
    assert pixels.grad is not None
    product = (pixels * pixels.grad).sum((0, 1)).detach()
    torch.testing.assert_close(run.gradient[0], product[:4, :4].sum(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run.gradient[5], product[4:8, 4:8].sum(), atol=1e-5, rtol=1e-4)


def one(name: str) -> tuple[Prompted, dict[str, Tensor]]:
    """A tiny model and the first of its prompts."""
    prompted = tiny(name)
    inputs = {}
    for key, x in prompted.inputs.items():
        inputs[key] = x[: len(x) // 2]
    return prompted, inputs


@pytest.mark.parametrize("name", TINY)
def test_a_decoder_that_reads_an_image(name: str) -> None:
    prompted, inputs = one(name)
    model, tokens = prompted.model, prompted.inputs["input_ids"].shape[1]
    model(**inputs)  # transformers puts hooks of its own on some models at the first call
    before = footprint(model)
    found = saccade.explain(
        model, inputs, methods=["raw", "rollout", "gradient x attention", "input x gradient"], **FEW
    )
    assert footprint(model) == before
    first, image, last = found.segments
    assert (first.kind, image.kind, last.kind) == ("text", "image", "text")
    assert image.grid == (4, 4) and image.stop - image.start == prompted.visual and last.stop == tokens
    said = model(**inputs).logits[0, -1].detach()
    assert found.target == (tokens - 1, int(said.argmax()))
    assert found.probability == pytest.approx(float(said.softmax(0).max()), abs=1e-5)
    assert all(bool(each.isfinite().all()) and each.abs().sum() > 0 for each in found.maps.values())
    assert found.heads[0].shape == (3, 4, tokens)


@pytest.mark.parametrize("name", TINY)
def test_what_is_taken_away_is_hidden_where_it_stands(name: str) -> None:
    prompted, inputs = one(name)
    seen = subject(prompted.model, inputs)
    kept = torch.ones(2, seen.parts, dtype=torch.bool)
    kept[1, 4], kept[1, 1] = False, False
    scores = seen.score(kept)
    assert seen.target is not None
    row, column = seen.target
    # by the language model alone, with the embeddings and positions of the whole
    decoder, head = prompted.model.get_decoder(), prompted.model.get_output_embeddings()
    given: dict[str, Any] = {}
    handle = decoder.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        prompted.model(**inputs)
        handle.remove()
        more = {"inputs_embeds": given["inputs_embeds"], "position_ids": given.get("position_ids")}
        hidden = decoder(**more, attention_mask=kept[1:].long()).last_hidden_state
    said = head(hidden)[0, row].detach()
    assert float(scores[1]) == pytest.approx(float(said.softmax(0)[column]), abs=1e-5)
    assert float(scores[1]) != pytest.approx(float(scores[0]), abs=1e-6)


def test_several_pictures_and_tokens_that_form_no_grid() -> None:
    prompted, inputs = one("llava")
    twice = torch.tensor([[5, *[3] * 16, 6, *[3] * 16, 7]])
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    seen = subject(prompted.model, {"input_ids": twice, "pixel_values": pixels})
    assert [each.grid for each in seen.segments] == [None, (4, 4), None, (4, 4), None]
    beside = torch.tensor([[5, *[3] * 32, 7]])
    seen = subject(prompted.model, {"input_ids": beside, "pixel_values": pixels})
    assert [each.grid for each in seen.segments] == [None] * 3 and seen.parts == 34


def test_refusals() -> None:
    model = clip()
    for change, target, message in (
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, None, "one image, got 2"),
        ({}, (0, 1), "number of a text"),
        ({}, 2, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            saccade.explain(model, pair() | change, target)


def test_patches_that_were_cut_before_are_refused() -> None:
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 16, "projection_size": 16}
    vision = {**SMALL, "num_patches": 16, "patch_size": 4}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision)).eval()
    inputs = {
        "input_ids": TEXTS,
        "pixel_values": torch.randn(1, 16, 3 * 4 * 4),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }
    with pytest.raises(ValueError, match=r"Siglip2Model takes patches that were cut before, \(1, 16, 48\)"):
        saccade.explain(model, inputs)
