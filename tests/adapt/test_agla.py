"""What the paper implies, bad arguments, the matcher on a tiny BLIP, and the wrapper on tiny models of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.adapt.agla import AGLA, BlipMatcher, agla, calibrated, heat_map, keep_mask, relevance, token_relevance
from saccade.adapt.agla.relevance import blur_matrix, spline_matrix
from saccade.layers.wrapping import footprint
from saccade.train.tiny import Prompted, tiny

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def attended(tokens: int = 6, side: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    attention = torch.rand(2, 3, tokens, side * side + 1).softmax(-1)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, -2:] = 0
    return attention, torch.randn(attention.shape), mask


def test_relevance_is_the_papers_sum() -> None:
    attention, gradient, mask = attended()
    found = relevance(attention, gradient, mask)
    grown = attention * gradient.clamp_min(0)
    expected = torch.stack([grown[0, :, 1:5], grown[1, :, 1:3].repeat(1, 2, 1)]).mean(1).mean(1)[:, 1:]
    torch.testing.assert_close(found.flatten(1), expected)
    assert not token_relevance(attention, gradient, mask)[1, -2:].any()
    torch.testing.assert_close(relevance(attention, gradient.clamp_min(0), mask), found)
    torch.testing.assert_close(relevance(attention[:, [2, 0, 1]], gradient[:, [2, 0, 1]], mask), found)
    larger = heat_map(relevance(attention, 7 * gradient, mask), 16)
    torch.testing.assert_close(larger, heat_map(found, 16), atol=1e-5, rtol=1e-5)  # in double, of what was float32
    with pytest.raises(ValueError, match=r"1 \+ side\^2"):
        relevance(attention[..., 1:], gradient[..., 1:], mask)


def test_splines_and_blur_are_scipys() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    x = torch.rand(5, 5, dtype=torch.float64)
    grow = spline_matrix(5, 40)
    expected = ndimage.zoom(x.numpy(), 8, order=3, mode="grid-constant", grid_mode=True)
    torch.testing.assert_close(grow @ x @ grow.T, torch.tensor(expected), atol=1e-6, rtol=0)
    y = torch.rand(9, 9, dtype=torch.float64)
    for sigma in (0.1, 0.9):
        blur = blur_matrix(9, sigma)
        expected = ndimage.gaussian_filter(y.numpy(), 9 * sigma, mode="reflect", truncate=4)
        torch.testing.assert_close(blur @ y @ blur.T, torch.tensor(expected))


def test_a_uniform_map_stays_finite_and_hides_nothing() -> None:
    heat = heat_map(torch.ones(1, 4, 4), 16)
    assert heat.isfinite().all() and not heat.any()
    assert (keep_mask(heat, torch.ones(1)) == 1).all()
    with pytest.raises(ValueError, match="size must be at least"):
        heat_map(torch.ones(1, 4, 4), 3)


@pytest.mark.parametrize(("similarity", "kept"), [(0.0, 0.99999), (1.0, 0.5), (0.5, 0.75), (-0.3, 0.99999), (2.0, 0.0)])
def test_the_better_the_match_the_more_is_hidden(similarity: float, kept: float) -> None:
    heat = torch.rand(1, 32, 32, dtype=torch.float64)
    mask = keep_mask(heat, torch.tensor([similarity]))
    assert int(mask.sum()) == int(32 * 32 * kept) + 1
    assert heat[mask == 1].min() > heat[mask == 0].max() if (mask == 0).any() else True


def test_calibrated_logits() -> None:
    first, second = torch.randn(2, 4, 20)
    torch.testing.assert_close(calibrated(first, second, 0.0, 1e-30), first)
    only = calibrated(first, second, 3.0, 1.0)
    assert torch.equal(only.argmax(-1), first.argmax(-1)) and (only.isfinite().sum(-1) == 1).all()
    same = calibrated(first, first, 2.0, 0.1)
    kept = first >= first.amax(-1, keepdim=True) + math.log(0.1)
    torch.testing.assert_close(same.softmax(-1), (3 * first).masked_fill(~kept, -torch.inf).softmax(-1))
    half = calibrated(first, second, 0.0, 0.5).isfinite()
    assert torch.equal(half, first.softmax(-1) >= 0.5 * first.softmax(-1).amax(-1, keepdim=True))


def test_refusals() -> None:
    for arguments, said in (
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": 1.5}, "beta must be above 0"),
        ({"divisor": 0.5}, "divisor and size must be at least 1"),
        ({"sigma": 0.0}, "sigma above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            AGLA(**arguments)


# ---------------------------------------------------------------------------- the matching model


@pytest.fixture(scope="module")
def blip() -> BlipMatcher:
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BlipConfig(
        text_config={**layers, "vocab_size": 66, "encoder_hidden_size": 16, "max_position_embeddings": 64},
        vision_config={**layers, "image_size": 24, "patch_size": 4},
        image_text_hidden_size=8,
    )
    torch.manual_seed(0)
    model = transformers.BlipForImageTextRetrieval(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return BlipMatcher(model.requires_grad_(False), tiny("llava").processor, block=1)


def test_the_matchers_gradient_is_that_of_the_whole_model(blip: BlipMatcher) -> None:
    images, prompts = torch.rand(2, 3, 24, 24), ["what is this one", "what is"]
    before = footprint(blip.model)
    with torch.no_grad():
        cor, similarity = blip(images, prompts)
    assert footprint(blip.model) == before and blip.first_token == 65 and blip.size == 24
    text = blip.processor.tokenizer(prompts)
    mean, std = ((torch.tensor(v)[:, None, None]) for v in ((0.5, 0.4, 0.3), (0.3, 0.3, 0.4)))
    pixels = (images - mean) / std
    call = {"pixel_values": pixels, "attention_mask": text["attention_mask"]}
    cosine = blip.model(input_ids=text["input_ids"], use_itm_head=False, **call).itm_score
    torch.testing.assert_close(similarity, cosine.diagonal())
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output[1])
        output[1].retain_grad()

    ids = text["input_ids"].clone()
    ids[:, 0] = 65
    handle = blip.attention.register_forward_hook(keep)
    try:
        blip.model.text_encoder.embeddings.requires_grad_(True)
        blip.model(input_ids=ids, **call).itm_score[:, 1].sum().backward()
    finally:
        handle.remove()
        blip.model.requires_grad_(False)
        blip.model.zero_grad()
    torch.testing.assert_close(cor, relevance(seen[0].detach(), seen[0].grad, text["attention_mask"]))


def test_refusals_of_the_matcher(blip: BlipMatcher) -> None:
    with pytest.raises(ValueError, match="block must be a layer of the matching model, 0 to 2, got 6"):
        BlipMatcher(blip.model, blip.processor)
    with pytest.raises(ValueError, match="must have a tokenizer"):
        BlipMatcher(blip.model, None, block=0)
    with pytest.raises(ValueError, match="the matching model '/no/such/folder' cannot be had"):
        BlipMatcher.load("/no/such/folder")


# ---------------------------------------------------------------------------- around a model


def darkest(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """A matcher that also depends on the prompt."""
    cor = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 4)[:, 0]
    asks = torch.tensor(["one" in prompt for prompt in prompts])[:, None, None]
    return torch.where(asks, cor, 1 - cor), torch.ones(len(images))


def new_tokens(prompted: Prompted, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    found = prompted.model.generate(**inputs, **{**GREEDY, **options})
    return found[:, inputs["input_ids"].shape[1] :]


def row(prompted: Prompted, number: int) -> dict[str, Tensor]:
    """One of the prompts, without its padding; of Qwen2-VL too."""
    real = prompted.inputs["attention_mask"][number].bool()
    found = {}
    for name, x in prompted.inputs.items():
        part = x.chunk(2)[number]
        found[name] = part[:, real] if part.shape[1:] == real.shape else part
    return found


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "smolvlm"])
def test_without_a_second_view_it_is_the_model_and_it_is_as_before(name: str) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    expected = new_tokens(prompted, prompted.inputs)
    before = footprint(prompted.model)
    with agla(prompted.model, prompted.processor, darkest, alpha=0.0, beta=1e-30, size=16) as report:
        assert torch.equal(new_tokens(prompted, prompted.inputs), expected)
    assert report.calls == 5 and report.changed == 0 and report.positions == 10
    assert len(report.masks) == 2 and report.prompts == [
        "USER: what is this one ASSISTANT:",
        "USER: what is ASSISTANT:",
    ]
    with agla(prompted.model, prompted.processor, darkest, size=16) as report:
        new_tokens(prompted, prompted.inputs)
    assert report.kept[0] < 0.6 and "best token changed" in str(report)
    with pytest.raises(RuntimeError), agla(prompted.model, prompted.processor, darkest):
        raise RuntimeError
    after = footprint(prompted.model)
    for found in (before, after):
        found.pop("model:rope_deltas", None)
    assert before == after


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "smolvlm"])
def test_each_view_has_its_own_cache(name: str) -> None:
    """The same as without caches: both views from the start, at every step."""
    pytest.importorskip("transformers")
    prompted = tiny(name)
    model, inputs = prompted.model, row(prompted, 0)
    with agla(model, prompted.processor, darkest, size=16, question="what is this one"):
        found = new_tokens(prompted, inputs)
        logits = model(**inputs).logits[:, -1]
        assert int(logits.argmax()) == int(found[0, 0])
        now, expected = dict(inputs), []
        for _ in range(5):
            best = model(**now).logits[:, -1:].argmax(-1)
            expected.append(best)
            now["input_ids"] = torch.cat([now["input_ids"], best], 1)
            now["attention_mask"] = torch.ones_like(now["input_ids"])
            if "mm_token_type_ids" in now:
                now["mm_token_type_ids"] = torch.cat([now["mm_token_type_ids"], torch.zeros_like(best).int()], 1)
    allowed = torch.cat(expected, 1)
    eos = (allowed == 2).int().cumsum(1) > 0  # which generate was told not to choose
    assert torch.equal(found[~eos], allowed[~eos])


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "smolvlm"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_a_batch_and_beams_decode_as_alone(name: str, beams: int) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    model, inputs = prompted.model, prompted.inputs
    with torch.no_grad():
        bare = model(**inputs).logits[:, -1]
    with agla(model, prompted.processor, darkest, alpha=20.0, beta=1e-30, size=16):
        together = new_tokens(prompted, inputs, num_beams=beams)
        alone = [new_tokens(prompted, row(prompted, number), num_beams=beams) for number in range(2)]
        with torch.no_grad():
            both = model(**inputs).logits[:, -1]
    assert torch.equal(together, torch.cat(alone))
    assert (both / 21 - bare).abs().max() > 1e-2  # the views differ


def test_questions_and_refusals_around_a_model() -> None:
    pytest.importorskip("transformers")
    prompted = tiny("llava")
    model, inputs = prompted.model, prompted.inputs
    with agla(model, prompted.processor, darkest, size=16, question=["one", "two"]) as report:
        new_tokens(prompted, inputs, num_beams=2)
        assert report.prompts == ["one", "two"]
        with pytest.raises(ValueError, match="agla needs images: the call has no pixel_values"):
            model(input_ids=inputs["input_ids"])
        with pytest.raises(ValueError, match="question must be one for each of the 1 rows, got 2"):
            new_tokens(prompted, row(prompted, 0))
    refused = pytest.raises(ValueError, match="agla must read the prompt: give the model's processor")
    with agla(model, None, darkest, size=16), refused:
        model(**inputs)
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        other = transformers.BlipForConditionalGeneration(transformers.BlipConfig())
    with pytest.raises(ValueError, match="BlipForConditionalGeneration has a generate of its own"), agla(other):
        pass
