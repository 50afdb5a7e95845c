"""KAFA: the frozen model at the start, masks, order, forms beside each other, brands, figures, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.fusion.kafa import (
    BrandUnderstanding,
    CLIPAdapter,
    FeatureAdapter,
    matching_logits,
    matching_loss,
    statement_figures,
)


def adapter(started: bool = False, **changes: object) -> FeatureAdapter:
    torch.manual_seed(0)
    model = FeatureAdapter(16, **{"num_heads": 4, **changes}).eval()
    if not started:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def features(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 16, generator=generator) for _ in range(3)]


FORMS = [{}, {"form": "query"}, {"form": "weights"}, {"pool": "mean"}, {"bottleneck": 4, "depth": 3}]


@pytest.mark.parametrize("changes", FORMS)
def test_at_the_start_and_without_a_share_it_is_the_frozen_model(changes: dict[str, object]) -> None:
    given = features()
    frozen = F.normalize(given[0], dim=-1)
    if "pool" not in changes:
        torch.testing.assert_close(adapter(started=True, **changes)(*given), frozen)
    torch.testing.assert_close(adapter(mix=0.0, learn_mix=False, **changes)(*given), frozen)
    adapted = adapter(**changes)(*given)
    torch.testing.assert_close(adapted.norm(dim=1), torch.ones(3))
    assert not torch.allclose(adapted, frozen)


@pytest.mark.parametrize("changes", FORMS)
def test_what_is_masked_is_not_there(changes: dict[str, object]) -> None:
    model, (image, words, brand) = adapter(**changes), features()
    objects = torch.randn(3, 2, 16)
    there = torch.tensor([True, False, True])
    none = torch.zeros(3, dtype=torch.bool)
    alone = model(image)
    torch.testing.assert_close(model(image, words, brand, masks=[none, none]), alone)
    torch.testing.assert_close(model(image, words.fill_(float("nan")), masks=[none]), alone)
    _, words, _ = features()
    found = model(image, words, brand, masks=[there, None])
    torch.testing.assert_close(found[1:2], model(image, None, brand)[1:2])
    torch.testing.assert_close(found[there], model(image, words, brand)[there])
    some = model(image, words, None, objects, masks=[None, None, torch.tensor([[True, False]] * 3)])
    torch.testing.assert_close(some, model(image, words, None, objects[:, :1]))


@pytest.mark.parametrize("changes", FORMS)
def test_the_order_of_objects_does_not_matter(changes: dict[str, object]) -> None:
    model, (image, words, _) = adapter(**changes), features()
    objects = torch.randn(3, 4, 16)
    torch.testing.assert_close(model(image, words, None, objects.flip(1)), model(image, words, None, objects))


def test_alone_the_image_has_a_linear_map() -> None:
    model, (image, *_) = adapter(depth=1), features()
    v = F.normalize(image, dim=-1)
    x = v + model.types[0]
    attention = model.layers[0].attention
    u = x + attention.out_proj(attention.v_proj(model.layers[0].norm(x)))
    alpha = model.mix.sigmoid()
    torch.testing.assert_close(model(image), F.normalize(alpha * u + (1 - alpha) * v, dim=-1))


def test_query_is_one_layer_of_which_the_image_is_taken() -> None:
    query, encoder, given = adapter(form="query"), adapter(depth=1), features()
    encoder.load_state_dict(query.state_dict())
    torch.testing.assert_close(query(*given), encoder(*given))
    assert not torch.allclose(adapter(depth=2)(*given), query(*given))


def test_tokens_are_dropped_in_training_and_the_image_is_not() -> None:
    model, (image, words, brand) = adapter(drop_tokens=0.5).train(), features(64)
    image, words, brand = (x[:1].expand(64, -1) for x in (image, words, brand))
    found = model(image, words, brand)
    likely = torch.cat(
        [adapter()(image[:1], *some) for some in ((words[:1], brand[:1]), (words[:1],), (None, brand[:1]), ())]
    )
    distance = torch.cdist(found, likely, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distance.amin(1) < 1e-4).all() and len(set(distance.argmin(1).tolist())) == 4


def test_the_compared_adapter() -> None:
    model, (image, *_) = CLIPAdapter(16), features()
    assert ((model(image) - 0.8 * image) >= 0).all()
    torch.testing.assert_close(CLIPAdapter(16, ratio=0.0)(image), image)


def test_scores_and_losses() -> None:
    image, text, _ = features()
    logits = matching_logits(image, text, torch.tensor(9.0))
    assert logits.abs().max() <= 100.001
    assert matching_logits(image, text, torch.tensor(9.0), largest=None).abs().max() > 100
    of_each = matching_logits(image, torch.stack([text, text.flip(0)], 1), 1.0)
    torch.testing.assert_close(of_each[:, 0], matching_logits(image, text, 1.0).diagonal())
    own = torch.arange(3)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(matching_loss(image, text, 9.0), expected)
    true = torch.tensor([[True, False, True, False, False], [False, True, False, False, False]])
    ranked = torch.tensor([[5.0, 4, 3, 2, 1], [5.0, 1, 4, 3, 2]])
    assert statement_figures(ranked, true) == {"top1": 0.5, "best_rank": 3.0, "recall3": 0.5}


NAMES = ("Acme", "Blue Bird", "Cola")


def brands(**changes: object) -> BrandUnderstanding:
    eye = torch.eye(8)
    logos = {"templates": eye[3:6], "template_brands": torch.tensor([0, 1, 1])}
    return BrandUnderstanding(NAMES, eye[:3], **{**logos, **changes})


def test_brands_by_words_and_by_logos() -> None:
    module, eye = brands(), torch.eye(8)
    assert module.read(["drink", "COLA", "with", "blue", "bird"]) == {1, 2}
    assert brands(longest=1).read(["blue", "bird"]) == set()
    read = module(["ice", "cola"])
    assert read.name == "Cola" and read.terms == {"Cola": {"text": 1.0}} and read.scores == {"Cola": 1.0}
    seen = module(regions=eye[4:5] + 0.1)
    assert seen.name == "Blue Bird" and seen.terms["Blue Bird"]["logo"] > 0.9
    assert module().name is None and module(["nothing"], eye[7]).name is None
    far = module(regions=eye[6:7])  # like no logo: candidates without evidence
    assert far.name is None and set(far.scores) == {"Acme", "Blue Bird"}
    both = {"words": ["cola"], "regions": eye[3:4]}
    assert brands(text_weight=9.0)(**both).name == "Cola" and brands(logo_weight=9.0)(**both).name == "Acme"
    assert module(["acme"], eye[0]).scores["Acme"] == pytest.approx(2)  # the image is like the name, and it is read
    assert set(brands(top=1)(regions=eye[4:6]).scores) == {"Blue Bird"}
    assert brands(templates=None, template_brands=None)(["cola"], eye[7]).name == "Cola"


def test_bad_arguments() -> None:
    model, (image, words, _), eye = adapter(), features(), torch.eye(8)
    flags = torch.ones(3, dtype=torch.bool)
    for bad, message in (
        (lambda: model(image[:, :9]), r"image must be \(batch, 16\)"),
        (lambda: model(image, words[:2]), r"scene_text must be \(3, 16\), got \(2, 16\)"),
        (lambda: model(image, None, None, words), r"objects must be \(3, objects, 16\)"),
        (
            lambda: model(image, words, masks=[flags.float()]),
            r"mask of scene_text must be bool \(3,\), got torch.float32",
        ),
        (lambda: model(image, words, masks=[flags] * 4), "masks must be of scene_text, knowledge, objects, got 4"),
        (lambda: FeatureAdapter(16, form="sum"), "form must be one of encoder, query, weights"),
        (lambda: FeatureAdapter(16, pool="max"), "pool must be image or mean"),
        (lambda: FeatureAdapter(16, mix=0.0), r"mix must be in \[0, 1\]"),
        (lambda: FeatureAdapter(16, depth=0), "depth must be positive"),
        (lambda: FeatureAdapter(16, num_heads=3), "num_heads must divide dim"),
        (lambda: matching_logits(image, words[:, :3], 1.0), "image must be"),
        (lambda: matching_logits(image, words[:2, None], 1.0), "statements for each image, got 2 and 3"),
        (lambda: matching_loss(image, words[:2], 1.0), "a text for each image"),
        (
            lambda: statement_figures(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool)),
            "must have a true statement",
        ),
        (lambda: statement_figures(torch.rand(2, 3), torch.zeros(2, 3)), "true bool"),
        (lambda: brands(template_brands=None), "must be given together"),
        (lambda: brands(template_brands=torch.tensor([0, 1, 3])), "a number below 3 for each of 3"),
        (lambda: brands(templates=eye[:3, :4]), r"templates must be \(logos, 8\)"),
        (lambda: BrandUnderstanding(NAMES, eye[:2]), r"name_features must be \(3, width\)"),
        (lambda: brands(top=0), "top and longest must be positive"),
        (lambda: brands()(["a"], eye[0, :4]), r"image must be \(8,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
