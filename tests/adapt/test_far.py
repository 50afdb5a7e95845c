"""FaR: losses at their limits, composites, maps of a diffusion model, what is trained, bad arguments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from saccade.adapt.far import (
    Concept,
    ConceptFusion,
    FaR,
    add_words,
    balanced_l1,
    compose,
    cross_maps,
    cut_out,
    emptied,
    fit,
    grid_of,
    halves,
    only_rows,
    refinement,
    scattered,
    trainable,
    word_places,
)
from saccade.layers.wrapping import footprint


def _masks() -> Tensor:
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, 1:4, 1:4], masks[0, 1, 2:7, 5:8] = 1, 1
    return masks


def _map(masks: Tensor, scale: tuple[float, float] = (0.3, 0.2)) -> Tensor:
    """A cross attention whose words 1 and 2 lie on the masks."""
    map_BHPT = torch.zeros(1, 2, 64, 4)
    for j, factor in enumerate(scale):
        map_BHPT[..., j + 1] = factor * masks[:, j].flatten(1)[:, None]
    return map_BHPT


_WORDS = torch.tensor([[1, 2]])


def test_mse_at_its_limits() -> None:
    masks = _masks()
    assert refinement([_map(masks)], masks, _WORDS) == 0
    scaled, plain = (refinement([_map(masks.flip(3), (s, 0.2))], masks, _WORDS) for s in (0.01, 0.3))
    torch.testing.assert_close(scaled, plain)
    assert refinement([_map(masks)], masks, _WORDS.flip(1)) > 0.2
    valid = torch.tensor([[True, False]])
    one = refinement([_map(masks.flip(3))], masks, _WORDS, valid)
    torch.testing.assert_close(one, (masks[0, 0] - masks.flip(3)[0, 0]).square().mean())
    assert refinement([_map(masks.flip(3))], masks, _WORDS, torch.zeros(1, 2)) == 0


def test_balanced_l1_at_its_limits() -> None:
    masks, valid = _masks(), torch.ones(1, 2)
    uniform = balanced_l1(torch.full((1, 3, 64, 4), 0.25), masks, _WORDS, valid)
    assert uniform.abs() < 1e-5
    inside = balanced_l1(_map(masks), masks, _WORDS, valid)
    torch.testing.assert_close(inside, torch.tensor(-0.25), atol=1e-5, rtol=0)
    assert -1 <= balanced_l1(torch.rand(1, 3, 64, 4), masks, _WORDS, valid) <= 1
    torch.testing.assert_close(
        balanced_l1(_map(masks), masks, _WORDS, valid, normalise=True), torch.tensor(-1.0), atol=1e-4, rtol=0
    )


def test_leakage_is_what_lies_on_the_others() -> None:
    masks = _masks()
    assert refinement([_map(masks)], masks, _WORDS, form="leakage") == 0
    assert refinement([_map(masks)], masks, _WORDS.flip(1), form="leakage") == 2
    assert refinement([_map(masks)], masks, _WORDS.flip(1), torch.tensor([[1.0, 0.0]]), form="leakage") == 0


def test_several_words_of_a_subject_are_averaged() -> None:
    masks, map_BHPT = _masks(), torch.rand(1, 2, 64, 4)
    mean = torch.stack([(map_BHPT[..., 1] + map_BHPT[..., 3]) / 2, map_BHPT[..., 2]], 3)
    words = torch.tensor([[[1, 3], [2, -1]]])
    torch.testing.assert_close(refinement([map_BHPT], masks, words), refinement([mean], masks, torch.tensor([[0, 1]])))


def test_the_loss_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    masks, predicted, target = _masks().repeat(2, 1, 1, 1), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    maps, words = [torch.rand(2, 2, 64, 4)], _WORDS.repeat(2, 1)
    prior = torch.tensor([False, True])
    loss, terms = FaR(weight=0.5, prior_weight=3.0)(predicted, target, maps, masks, words, None, prior)
    error = (predicted - target).square().mean((1, 2, 3))
    torch.testing.assert_close(terms["diffusion"], error[0])
    torch.testing.assert_close(terms["prior"], error[1])
    torch.testing.assert_close(terms["refinement"], refinement([maps[0][:1]], masks[:1], words[:1]))
    torch.testing.assert_close(loss, error[0] + 3 * error[1] + 0.5 * terms["refinement"])
    masked = FaR(masked=True)(predicted, target, maps, masks, words, None, prior).terms
    covered = masks[0].amax(0)
    torch.testing.assert_close(masked["diffusion"], ((predicted - target).square()[0] * covered).mean())
    torch.testing.assert_close(masked["prior"], error[1])
    joint = FaR(weight=0.0)(predicted, target, maps, masks, words)
    torch.testing.assert_close(joint.loss, error.mean())


def _subject(height: int, width: int) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(20, 30)
    mask[3 : 3 + height, 4 : 4 + width] = 1
    return torch.rand(3, 20, 30), mask


@pytest.mark.parametrize("placement", [halves, scattered])
@pytest.mark.parametrize("prior", [False, True])
def test_composites(placement: object, prior: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ground = torch.rand(3, 24, 24, generator=generator)
        count = 2 if placement is halves else 3
        subjects = [_subject(9, 7), _subject(5, 12), _subject(8, 8)][:count]
        image, masks = compose(subjects, ground, generator, placement=placement, prior=prior)  # type: ignore[arg-type]
        assert masks.shape == (count, 24, 24) and masks.sum(0).max() == 1
        assert torch.equal(image[:, masks.sum(0) == 0], ground[:, masks.sum(0) == 0])
        assert masks.flatten(1).any(1)[0] and not torch.equal(image, ground)


def test_a_subject_fits_its_half() -> None:
    for height, width in ((10, 20), (40, 10), (3, 3)):
        factor = fit(height, width, (1024, 1024))
        assert factor * width <= 480 + 1e-9 and factor * height <= 992 + 1e-9
        assert max(factor * width / 480, factor * height / 992) == pytest.approx(1)
    places = halves([(10, 10), (10, 10)], (64, 64), torch.Generator().manual_seed(0), least=1.0)
    assert all(place.width == 30 and place.left >= 0 and place.left + place.width <= 64 for place in places)
    priors = halves([(10, 10), (10, 10)], (64, 64), torch.Generator().manual_seed(0), True, least=1.0)
    assert priors[0].top == priors[1].top


def _concepts() -> tuple[list[Concept], list[Concept]]:
    made = [[_subject(8, 6), _subject(5, 5)] for _ in range(4)]
    phrases = ("<a> cat", "<b> dog", "cat", "dog")
    concepts = [
        Concept(phrase, [image for image, _ in each], [mask for _, mask in each])
        for phrase, each in zip(phrases, made, strict=True)
    ]
    return concepts[:2], concepts[2:]


def test_samples() -> None:
    concepts, priors = _concepts()
    generator = torch.Generator().manual_seed(0)
    data = ConceptFusion(concepts, priors, p_fuse=0.5, size=(24, 24))
    drawn = [data.draw(generator, prior=bool(i % 2)) for i in range(100)]
    assert 35 <= sum(sample.fused for sample in drawn) <= 65
    for i, sample in enumerate(drawn):
        assert sample.prior == bool(i % 2) and len(sample.masks) == len(sample.phrases) == 1 + sample.fused
        assert all(("<" in phrase) != sample.prior for phrase in sample.phrases)
        assert sample.prompt == "a photo of " + " and ".join(f"a {phrase}" for phrase in sample.phrases)
        assert sample.image.shape == ((3, 24, 24) if sample.fused else (3, 20, 30))
    assert len({sample.prompt for sample in drawn if sample.fused}) == 4  # either order
    assert not any(ConceptFusion(concepts, p_fuse=0.0).draw(generator).fused for _ in range(10))
    white = ConceptFusion(concepts, priors, p_fuse=1.0, grounds=(0, 0, 1)).draw(generator)
    assert white.image[:, white.masks.sum(0) == 0].eq(1).all()
    image, mask = _subject(8, 6)
    assert torch.equal(emptied(image, mask)[:, mask == 0], image[:, mask == 0])
    assert emptied(image, mask)[:, mask > 0].std(1).max() < 1e-6
    assert cut_out(image, mask)[1].shape == (8, 6)


class _Diffusion(nn.Module):
    """Two layers of attention with diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        attention = pytest.importorskip("diffusers.models.attention_processor").Attention
        torch.manual_seed(0)
        self.words = nn.Embedding(6, 6)
        self.attn1 = attention(8, heads=2, dim_head=4)
        self.attn2 = attention(8, cross_attention_dim=6, heads=2, dim_head=4)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        pixels = pixels + self.attn1(pixels)
        return pixels + self.attn2(pixels, encoder_hidden_states=self.words(ids))


def test_maps_of_a_diffusion_model() -> None:
    model, pixels, ids = _Diffusion(), torch.randn(1, 64, 8), torch.tensor([[0, 4, 2, 5]])
    words, processor = word_places(ids, torch.tensor([[4, 5]])), model.attn2.processor
    assert words.tolist() == [[1, 3]]
    before = footprint(model)
    with cross_maps(model, ("*attn2",)) as maps:
        plain = model(pixels, ids)
        assert torch.equal(model(pixels, ids), plain) and len(maps) == 1
        (map_BHPT,) = maps
        refinement(maps, _masks(), words).backward()
    torch.testing.assert_close(map_BHPT.sum(-1), torch.ones(1, 2, 64))
    attn, hidden = model.attn2, pixels + model.attn1(pixels)
    values = attn.to_v(model.words(ids)).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(
        plain, hidden + attn.to_out[1](attn.to_out[0]((map_BHPT @ values).transpose(1, 2).flatten(2)))
    )
    assert attn.to_v.weight.grad is None and attn.to_k.weight.grad.any() and attn.to_q.weight.grad.any()
    assert model.words.weight.grad[4].any() and attn.processor is processor
    with pytest.raises(RuntimeError, match="meanwhile"), cross_maps(model, ("*attn2",)):
        raise RuntimeError("meanwhile")
    assert footprint(model) == before
    assert torch.equal(model(pixels, ids), plain)


def test_what_is_trained() -> None:
    for form, count in (("kv", 2), ("lora", 16), ("full", None)):
        model, ids, pixels = _Diffusion(), torch.tensor([[0, 4]]), torch.randn(1, 4, 8)
        plain = model(pixels, ids)
        trained = trainable(model, form, rank=2, alpha=2.0)
        named = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == (count or len(list(model.parameters()))) == len(named)
        assert torch.equal(model(pixels, ids), plain)
        model(pixels, ids).square().sum().backward()
        assert all(p.grad is not None for p in trained)
        if form == "kv":
            assert named == {"attn2.to_k.weight", "attn2.to_v.weight"}
        if form == "lora":
            with torch.no_grad():
                trained[1].fill_(1.0)
            assert not torch.equal(model(pixels, ids), plain)
            for module in model.modules():
                if parametrize.is_parametrized(module):
                    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            assert torch.equal(model(pixels, ids), plain)
    embedding = nn.Embedding(5, 3)
    handle = only_rows(embedding, [3])
    embedding(torch.tensor([1, 3])).sum().backward()
    assert embedding.weight.grad[3].eq(1).all() and not embedding.weight.grad[:3].any()
    handle.remove()


def test_new_words() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def tokenizer() -> object:
        words = {word: i for i, word in enumerate(["<unk>", "a", "cat", "dog"])}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")

    config = transformers.CLIPTextConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    encoder, known = transformers.CLIPTextModel(config), tokenizer()
    numbers = add_words(known, encoder, {"<a>": "cat", "<b>": "dog"})
    weight = encoder.get_input_embeddings().weight
    assert numbers == [4, 5] and torch.equal(weight[4:], weight[2:4]) and len(weight) == 6
    assert known.encode("a <b> dog", add_special_tokens=False) == [1, 5, 3]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must be new to the tokenizer"):
        add_words(known, encoder, {"<a>": "cat"})
    with pytest.raises(ValueError, match="makes several of 'a cat'"):
        add_words(tokenizer(), encoder, {"<c>": "a cat"})
    with pytest.raises(ValueError, match="lacks number 4: see add_words"):
        word_places(torch.tensor([[1, 2, 3]]), torch.tensor([[4, -1]]))


def test_refusals() -> None:
    masks, maps, concepts = _masks(), [torch.rand(1, 2, 64, 4)], _concepts()[0]
    assert grid_of(24, 10, 15) == (4, 6) and grid_of(1, 7, 9) == (1, 1)
    calls = (
        (partial(FaR, "l2"), "form must be one of mse"),
        (partial(FaR, weight=-1.0), "weights must not be negative"),
        (partial(refinement, [], masks, _WORDS), "of a layer at least"),
        (partial(refinement, maps, masks[:, :1], _WORDS), "masks must be"),
        (partial(refinement, [torch.rand(1, 2, 63, 4)], masks, _WORDS), "proportions of its masks"),
        (partial(refinement, [*maps, torch.rand(1, 2, 16, 4)], masks, _WORDS), "must have one size"),
        (partial(FaR(), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8), maps, masks, _WORDS), "predicted must be"),
        (partial(ConceptFusion, []), "concepts must be one at least"),
        (partial(ConceptFusion, concepts, p_fuse=2.0), "must be probabilities"),
        (partial(ConceptFusion(concepts).draw, torch.Generator(), prior=True), "there are none"),
        (partial(cut_out, torch.rand(3, 2, 2), torch.zeros(2, 2)), "must cover a pixel"),
        (partial(halves, [(1, 1)], (8, 8), torch.Generator()), "must get two subjects, got 1"),
        (partial(trainable, nn.Linear(2, 2), "all"), "form must be one of kv"),
        (partial(trainable, nn.Linear(2, 2)), "has no layer that is named like"),
        (cross_maps(nn.Linear(2, 2)).__enter__, "has no layer that is named like"),
    )
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    model = _Diffusion()
    with pytest.raises(ValueError, match="gets no encoder_hidden_states"), cross_maps(model, ("attn1",)):
        model(torch.randn(1, 4, 8), torch.tensor([[0]]))
