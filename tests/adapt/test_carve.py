"""What the paper implies, bad arguments, and the wrapper on tiny models of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.adapt.carve import (
    CARVE,
    attention_entropy,
    carve,
    colour_complexity,
    contrasted,
    fused,
    grid_of,
    lanczos,
    refine,
    region_mask,
    texture_complexity,
)
from saccade.layers.wrapping import footprint
from saccade.train.tiny import Prompted, tiny

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def test_the_closed_form_is_the_minimum() -> None:
    question, general = torch.rand(2, 20, dtype=torch.float64)
    damping = 0.05
    a = torch.zeros(20, dtype=torch.float64, requires_grad=True)

    def objective() -> Tensor:
        return ((a * general - question) ** 2).sum() + damping * (a**2 * general).sum()

    found = contrasted(question, general, damping)
    with torch.no_grad():
        a.copy_(found)
    (gradient,) = torch.autograd.grad(objective(), a)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    hessian = torch.autograd.functional.hessian(
        lambda a: ((a * general - question) ** 2).sum() + damping * (a**2 * general).sum(), found
    )
    torch.testing.assert_close(hessian, torch.diag(2 * general * (general + damping)))
    assert torch.equal(contrasted(question, general, 1e9).argsort(), question.argsort())


def test_noise_that_both_see_cancels() -> None:
    noise = torch.randn(1, 1, 64, dtype=torch.float64).exp()
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:5, 3:7] = True
    S = fused(noise * (1 + 9 * region.flatten()), noise, (8, 8), (8, 8), damping=1e-12)
    torch.testing.assert_close(S, 1 + 9.0 * region.double())
    assert torch.equal(region_mask(S[None], 12 / 64)[0], region)
    flat = fused(noise, noise, (8, 8), (16, 16))
    assert region_mask(flat[None]).all()


def test_steps_count_by_their_number() -> None:
    maps = torch.rand(1, 2, 12).expand(4, -1, -1)
    one = fused(maps[:1], maps[:1] + 1, (3, 4), (6, 9))
    torch.testing.assert_close(fused(maps, maps[:3] + 1, (3, 4), (6, 9)), 6 * one)
    for temporal in ("first", "last"):
        torch.testing.assert_close(fused(maps, maps + 1, (3, 4), (6, 9), temporal=temporal), one)
    more = torch.cat([maps, torch.rand(4, 2, 3)], -1)
    torch.testing.assert_close(fused(more, more + 1, (3, 4), (6, 9), temporal="first"), one)


def test_regions() -> None:
    S = torch.zeros(1, 9, 9)
    S[0, :2, :2], S[0, 4:8, 4:8], S[0, 0, 8] = 9.0, 3.0, 50.0  # sums 36, 48 and 50; 4, 16 and 1 pixels
    share = 21 / 81
    everything = region_mask(S, share, regions=9)
    assert torch.equal(everything, S > 0)
    best = region_mask(S, share, regions=2)
    assert best[0, 0, 8] and best[0, 5, 5] and not best[0, 0, 0]
    largest = region_mask(S, share, strategy="size", regions=1)
    assert largest.sum() == 16 and largest[0, 5, 5]
    assert torch.equal(region_mask(S, share, strategy="remove-small", outliers=15), (S > 0) & (S < 50))
    assert torch.equal(region_mask(7 * S, share, regions=2), best) and region_mask(S, 1.0, regions=99).all()
    both = region_mask(torch.cat([S, S.flip(1)]), share, regions=2)
    assert torch.equal(both[0], best[0]) and torch.equal(both[1], best[0].flip(0))


def test_lanczos_is_pillows() -> None:
    images, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    image = torch.randint(256, (17, 23, 3), dtype=torch.uint8)
    # where rows shrink and columns grow, some versions take rows first; a refined image only grows, by one factor
    for size in ((40, 29), (51, 69), (9, 11), (17, 11)):
        expected = images.fromarray(image.numpy()).resize(size[::-1], images.Resampling.LANCZOS)
        expected = torch.tensor(numpy.array(expected))
        assert torch.equal(lanczos(image.permute(2, 0, 1), size).permute(1, 2, 0), expected)
    torch.testing.assert_close(lanczos(torch.ones(1, 5, 5), (9, 12)), torch.ones(1, 9, 12))


def test_refined_images() -> None:
    image = torch.rand(3, 20, 30)
    whole = refine(image, torch.ones(20, 30, dtype=torch.bool))
    assert torch.equal(whole.image, image) and whole.box == (0, 0, 30, 20)
    none = refine(image, torch.zeros(20, 30, dtype=torch.bool))
    assert none.box == whole.box and not none.image.any()
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:9, 10:15] = True
    found = refine(image, mask)
    assert found.box == (10, 5, 15, 9) and found.image.shape == (3, 24, 30)
    assert torch.equal(found.masked[:, mask], image[:, mask]) and not found.masked[:, ~mask].any()


def test_diagnostics() -> None:
    assert float(attention_entropy(torch.full((3, 16), 0.01))) == pytest.approx(math.log(16))
    assert float(attention_entropy(torch.eye(4)[:1])) == 0
    assert colour_complexity(torch.full((3, 4, 4), 0.5)) == 0
    assert colour_complexity(torch.tensor([0.2, 0.5, 0.1])[:, None, None]) == 0
    sixths = torch.arange(180) / 30
    third = (sixths[:, None] - torch.tensor([0.0, 2.0, 4.0]) + 3).remainder(6) - 3
    hues = (2 - third.abs()).clamp(0, 1).T[:, None]
    assert colour_complexity(hues) == pytest.approx(1)
    pytest.importorskip("skimage")
    stripes = (torch.arange(20) % 10 > 4).float().expand(3, 20, 20)
    assert texture_complexity(torch.full((3, 20, 20), 0.3)) == 0 < texture_complexity(stripes)


def test_refusals() -> None:
    for arguments, said in (
        ({"damping": 0.0}, "damping must be above 0"),
        ({"share": 0.0}, "share must be above 0"),
        ({"regions": 0}, "regions and max_new_tokens must be at least 1"),
        ({"outliers": 101.0}, "outliers must be percents"),
        ({"strategy": "best"}, "strategy must be attention-sum, size or remove-small"),
        ({"temporal": "middle"}, "temporal must be all, first or last"),
        ({"final": "none"}, "final must be refined or both"),
    ):
        with pytest.raises(ValueError, match=said):
            CARVE(**arguments)
    with pytest.raises(ValueError, match="grid must be the rows and columns of 12 image tokens"):
        grid_of(12)
    assert grid_of(576) == (24, 24) and grid_of(12, (3, 4)) == (3, 4)
    assert CARVE().chosen(28) == CARVE().chosen(40) == [20, 21, 22, 23, 24, 25]
    assert CARVE().chosen(3) == [2] and CARVE().chosen(1) == [0] and CARVE().chosen(10) == [7, 8, 9]
    assert CARVE([1, 9]).chosen(3) == [1]
    with pytest.raises(ValueError, match="layers must be among 0 to 2"):
        CARVE([7]).chosen(3)
    with pytest.raises(ValueError, match="carve needs a model that generates"), carve(torch.nn.Linear(2, 2)):
        pass


# ---------------------------------------------------------------------------- around a model


def new_tokens(prompted: Prompted, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    found = prompted.model.generate(**inputs, **{**GREEDY, **options})
    assert torch.equal(found[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
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
def test_all_pixels_kept_is_the_model_and_it_is_as_before(name: str) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    inputs = prompted.inputs
    if name == "qwen2-vl":  # both of a patch's times hold the image
        x = inputs["pixel_values"].view(-1, 3, 2, 16)
        x[:, :, 1] = x[:, :, 0]
    mean, std = ((torch.tensor(v)[:, None, None]) for v in ((0.5, 0.4, 0.3), (0.3, 0.3, 0.4)))
    if name != "qwen2-vl":  # within what pixels can be
        inputs["pixel_values"] = (inputs["pixel_values"] - mean) / std
    else:
        x -= x.mean()
    expected = new_tokens(prompted, inputs)
    before = footprint(prompted.model)
    with carve(prompted.model, prompted.processor, share=1.0, regions=10**6, max_new_tokens=3) as report:
        assert torch.equal(new_tokens(prompted, inputs), expected)
    assert report.kept == [1.0, 1.0] and report.calls == 1 and len(report.first_answers) == 2
    with carve(prompted.model, prompted.processor, max_new_tokens=3, regions=1) as report:
        new_tokens(prompted, inputs, num_beams=2)
        new_tokens(prompted, inputs, do_sample=True)
    assert report.kept[0] <= 0.21 and report.maps[0].shape == report.refined[0].mask.shape
    assert "entropy of attention" in str(report) and all(0 < h < math.log(16) for h in report.entropy)
    with pytest.raises(RuntimeError), carve(prompted.model, prompted.processor):
        raise RuntimeError
    after = footprint(prompted.model)
    for found in (before, after):
        found.pop("model:rope_deltas", None)
    assert before == after and "generate" not in vars(prompted.model)


def test_it_looks_with_the_weights_that_the_model_has() -> None:
    """Against attention that the model is asked for, of the whole sequence without a cache."""
    pytest.importorskip("transformers")
    prompted = tiny("llava")
    model, inputs = prompted.model, row(prompted, 0)
    ids = inputs["input_ids"]
    with carve(model, prompted.processor, layers=[1, 2], max_new_tokens=3) as report:
        new_tokens(prompted, inputs)
    model.set_attn_implementation("eager")
    try:
        image = (ids[0] == 3).nonzero()[:, 0]
        tokenizer = prompted.processor.tokenizer
        behind = int(image[-1]) + 2
        words = tokenizer.encode("Write a general description of the image.")
        general = torch.cat([ids[0, :behind], torch.tensor(words)])
        maps = []
        for prompt in (ids, general[None]):
            said = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                pixel_values=inputs["pixel_values"],
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
            ).sequences
            steps = []
            for length in range(prompt.shape[1], said.shape[1]):
                weights = model(
                    input_ids=said[:, :length], pixel_values=inputs["pixel_values"], output_attentions=True
                ).attentions
                steps.append(torch.stack([weights[layer][0, :, -1, image].mean(0) for layer in (1, 2)]))
            maps.append(torch.stack(steps))
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(report.maps[0], fused(maps[0], maps[1], (4, 4), (16, 16)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("final", ["refined", "both"])
@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "smolvlm"])
def test_rows_of_a_batch_are_as_alone(name: str, final: str) -> None:
    pytest.importorskip("transformers")
    prompted = tiny(name)
    bare = new_tokens(prompted, prompted.inputs)
    with carve(prompted.model, prompted.processor, max_new_tokens=3, final=final) as report:
        together = new_tokens(prompted, prompted.inputs, num_beams=2)
        maps = report.maps
        for number in range(2):
            alone = new_tokens(prompted, row(prompted, number), num_beams=2)
            torch.testing.assert_close(report.maps[0], maps[number], rtol=1e-3, atol=1e-3)
            assert torch.equal(alone[0], together[number])
    assert together.shape == bare.shape


def test_the_general_pass_is_kept_and_the_question_is_found() -> None:
    pytest.importorskip("transformers")
    prompted = tiny("llava")
    inputs, passes = prompted.inputs, []
    former = prompted.model.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["input_ids"])
        return former(*args, **kwargs)

    prompted.model.generate = counting
    with carve(prompted.model, prompted.processor, max_new_tokens=2, question=["what is this one", "what is"]):
        new_tokens(prompted, inputs)
        new_tokens(prompted, inputs)
        assert len(passes) == 3 + 2
        said = prompted.processor.tokenizer.decode(passes[1][0])
        assert said.endswith("<end> w63 a general description of the image. ASSISTANT:")
    refused = pytest.raises(ValueError, match="'who' is not in the prompt of row 0")
    with carve(prompted.model, prompted.processor, question="who"), refused:
        new_tokens(prompted, inputs)
    assert prompted.model.generate is counting


def test_refusals_around_a_model() -> None:
    pytest.importorskip("transformers")
    prompted = tiny("llava")
    ids = prompted.inputs["input_ids"]
    imageless = ids.masked_fill(torch.tensor([[False], [True]]), 9)
    with carve(prompted.model, prompted.processor):
        with pytest.raises(ValueError, match="carve needs images: the call has no pixel_values"):
            prompted.model.generate(input_ids=ids)
        with pytest.raises(ValueError, match="row 1 of the batch has no image token"):
            prompted.model.generate(**{**prompted.inputs, "input_ids": imageless})
    refused = pytest.raises(ValueError, match="carve must read the prompt: give the model's processor")
    with carve(prompted.model), refused:
        prompted.model.generate(**prompted.inputs)
