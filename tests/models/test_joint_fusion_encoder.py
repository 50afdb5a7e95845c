"""JFE: padding, early beside late fusion, several images, chunks, real backbones, baselines, bad arguments."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.joint_fusion_encoder import (
    JointFusionEncoder,
    LateFusion,
    ScoreFusion,
    by_category,
    cached_backward,
    headline,
    last_state,
    late_fusion_loss,
    mean_state,
    packed,
    retrieval_loss,
    templated,
)

EXAMPLE = dict(catalogue.part("joint-fusion-encoder").example)
LATE = {
    "vocabulary": 12, "context": 9, "dim": 12, "depth": 1, "num_heads": 3, "image_size": 16, "patch": 8,
    "vision_dim": 8, "vision_depth": 1, "vision_heads": 2, "embed_dim": 12,
}  # fmt: skip


def joint(**changes: object) -> JointFusionEncoder:
    torch.manual_seed(0)
    return JointFusionEncoder(**{**EXAMPLE, **changes}).eval()


def late(fusion: str) -> LateFusion:
    torch.manual_seed(0)
    return LateFusion(fusion, **LATE).eval()


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 16, 16, generator=generator), torch.randint(1, 11, (3, 5), generator=generator)


@pytest.mark.parametrize("changes", [{}, {"pooling": "mean"}, {"attention": "bidirectional"}])
def test_neither_padding_nor_the_batch_matters(changes: dict[str, str]) -> None:
    model, (image, ids) = joint(**changes), given()
    expected = model(image, ids).embedding
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    for left, right in ((2, 0), (0, 3), (1, 2)):
        mask = F.pad(torch.ones(3, 5), (left, right))
        torch.testing.assert_close(model(image, F.pad(ids, (left, right), value=7), mask).embedding, expected)
    for row in range(3):
        torch.testing.assert_close(model(image[row : row + 1], ids[row : row + 1]).embedding, expected[row : row + 1])
    there = torch.tensor([True, False, True])
    mixed = model(image, ids, None, there).embedding
    torch.testing.assert_close(mixed[there], expected[there])
    torch.testing.assert_close(mixed[1:2], model(None, ids[1:2]).embedding)


def test_instruction_images_and_text_are_one_sequence_in_order() -> None:
    model, (image, ids) = joint(), given()
    asked = model(image, ids, None, None, ids[:, :2])
    assert not torch.allclose(asked.embedding, model(image, ids).embedding)
    padded = model(image, ids, None, None, F.pad(ids[:, :2], (0, 2)), torch.tensor([[1, 1, 0, 0]] * 3))
    torch.testing.assert_close(padded.embedding, asked.embedding)
    two = torch.stack([image, image.flip(0)], 1)
    assert not torch.allclose(model(two, ids).embedding, model(two.flip(1), ids).embedding)
    one = model(two, ids, None, torch.tensor([[True, False]] * 3))
    torch.testing.assert_close(one.embedding, model(image, ids).embedding)
    torch.testing.assert_close(model(image[:, None]).embedding, model(image).embedding)


def test_what_is_causal() -> None:
    states: list[Tensor] = []
    model, (image, ids) = joint(), given()
    model.tower.register_forward_hook(lambda *found: states.append(found[2]))
    for words in (ids, torch.cat([(ids[:, :1] + 1) % 11, ids[:, 1:]], 1), torch.cat([ids[:, :-1], ids[:, -1:] * 0], 1)):
        model(image, words)
    first, earlier, later = states
    assert not torch.allclose(first[:, -1], earlier[:, -1])
    torch.testing.assert_close(first[:, :-1], later[:, :-1])
    assert not torch.allclose(first[:, -1], later[:, -1])


def test_only_early_fusion_mixes() -> None:
    image, ids = given()
    for model, mixes in ((joint(), True), (late("score"), False), (late("feature"), True)):
        f = [[model(i, t).features for t in (ids, ids.flip(1))] for i in (image, image.flip(3))]
        second = f[0][0] - f[1][0] - f[0][1] + f[1][1]
        assert (second.abs().max() > 1e-4) == mixes, model


def test_late_fusion_of_one_modality_is_its_tower() -> None:
    image, ids = given()
    for fusion in ("score", "feature"):
        model = late(fusion)
        padded = model(image, F.pad(ids, (0, 3)), F.pad(torch.ones(3, 5), (0, 3)))
        torch.testing.assert_close(padded.embedding, model(image, ids).embedding)
    model = late("score")
    said = model.text.proj(model.text.tokens(ids)[:, -1])
    torch.testing.assert_close(model(None, ids).features, said)
    torch.testing.assert_close(model(image).features, model.vision(image))
    torch.testing.assert_close(model(image, ids).features, said + model.vision(image))
    module = ScoreFusion(nn.Linear(4, 6), nn.Linear(5, 6))
    text, picture, there = torch.randn(3, 4), torch.randn(3, 5), torch.tensor([1.0, 0.0, 1.0])
    fused = module(text, picture, None, there)
    torch.testing.assert_close(fused[1], module.text(text)[1])
    torch.testing.assert_close(fused[0], module(text, picture)[0])


def test_pooling_finds_the_last_real_token_wherever_padding_lies() -> None:
    states = torch.arange(24.0).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    assert last_state(states, mask).tolist() == [[2.0, 3.0], [14.0, 15.0], [0.0, 0.0]]
    assert mean_state(states, mask)[0].tolist() == [1.0, 2.0] and mean_state(states, mask)[2].tolist() == [0.0, 0.0]
    tokens, real = packed(states, torch.tensor([[False, True, False, True]] * 3))
    assert real.tolist() == [[True, True, False, False]] * 3
    torch.testing.assert_close(tokens[:, :2], states[:, 1::2])


def test_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    query, target = (F.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (4, 8))
    score = query @ target.T / 0.02
    torch.testing.assert_close(retrieval_loss(query, target), F.cross_entropy(score, torch.tensor([0, 2, 4, 6])))
    both = retrieval_loss(query, target[:4], symmetric=True)
    half = F.cross_entropy(query @ target[:4].T / 0.02, torch.arange(4))
    torch.testing.assert_close(2 * both - half, F.cross_entropy(target[:4] @ query.T / 0.02, torch.arange(4)))
    assert retrieval_loss(query[:1], target[:1]) == 0
    order = torch.tensor([2, 0, 3, 1])
    permuted = retrieval_loss(query[order], target.view(4, 2, 6)[order].flatten(0, 1))
    hard = target.view(4, 2, 6)[:, 1:] @ query.mean(0)
    assert hard.shape == (4, 1) and permuted > 0
    own = retrieval_loss(query[order], target[:4][order])
    torch.testing.assert_close(own, retrieval_loss(query, target[:4]))

    scale, negative = torch.tensor(1.2), torch.randn(4, 3, 6, generator=generator)
    raw = 3 * query
    torch.testing.assert_close(
        late_fusion_loss(raw, target[:4], scale), F.cross_entropy(scale.exp() * query @ target[:4].T, torch.arange(4))
    )
    for others, own_positive in ((0, False), (2, False), (9, False), (2, True)):
        expected = torch.zeros(())
        for i in range(4):
            rows = [target[i], *F.normalize(negative[i], dim=1)]
            rows += [target[i if own_positive else (i + j) % 4] for j in range(1, min(others, 3) + 1)]
            logits = scale.exp() * torch.stack(rows) @ query[i]
            expected = expected + F.cross_entropy(logits, torch.tensor(0)) / 4
        found = late_fusion_loss(raw, target[:4], scale, negative, others=others, own_positive=own_positive)
        torch.testing.assert_close(found, expected)


def test_gradients_by_chunks_are_those_of_the_whole() -> None:
    model, (image, ids) = joint(drop=0.3).train(), given()
    whole = copy.deepcopy(model)
    chunks = [(image[:2], ids[:2]), (image[2:], ids[2:])]
    targets = [(image[:1], None), (image[1:], None)]
    torch.manual_seed(3)
    encoded = [[whole(*chunk).embedding for chunk in side] for side in (chunks, targets)]
    loss = retrieval_loss(torch.cat(encoded[0]), torch.cat(encoded[1]), temperature=0.2)
    loss.backward()
    torch.manual_seed(3)
    found = cached_backward(
        lambda chunk: model(*chunk).embedding,
        {"query_ND": chunks, "target_MD": targets},
        lambda query_ND, target_MD: retrieval_loss(query_ND, target_MD, temperature=0.2),
    )
    torch.testing.assert_close(found, loss.detach())
    after = torch.rand(1)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.manual_seed(3)
    [[whole(*chunk) for chunk in side] for side in (chunks, targets)]
    assert torch.equal(after, torch.rand(1))  # random numbers went on as after one pass
    with pytest.raises(ValueError, match="a chunk at least"):
        cached_backward(lambda chunk: chunk, {"query_ND": []}, retrieval_loss)


def test_a_vision_language_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 20,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "projection_dim": 8,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_id=19, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = transformers.LlavaForConditionalGeneration(config).eval()
    model = JointFusionEncoder(backbone=backbone, embed_dim=5).eval()
    image, ids = torch.rand(2, 3, 16, 16), torch.tensor([[3, 19, 19, 19, 19, 5, 6], [3, 19, 19, 19, 19, 7, 8]])
    with torch.no_grad():
        expected = model(image, ids)
        assert expected.embedding.shape == (2, 5)
        for side in ((2, 0), (0, 2)):
            mask = F.pad(torch.ones(2, 7, dtype=torch.long), side)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            found = model(image, F.pad(ids, side), mask, position_ids=positions)
            torch.testing.assert_close(found.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
        headless = JointFusionEncoder(backbone=backbone.model, embed_dim=5).eval()
        headless.head.load_state_dict(model.head.state_dict())
        torch.testing.assert_close(headless(image, ids).embedding, expected.embedding)
        other = model(image.flip(0), ids).embedding
        assert not torch.allclose(other, expected.embedding)
        assert model(None, ids[:, 5:]).embedding.shape == (2, 5)
    for bad, message in (
        (lambda: model(image), "a backbone takes input_ids, in which its processor put instruction and images"),
        (lambda: model(image, ids, None, torch.ones(2)), "a backbone takes input_ids"),
        (lambda: JointFusionEncoder(backbone=backbone, attention="bidirectional"), "keeps its own attention"),
        (lambda: JointFusionEncoder(backbone=nn.Linear(1, 1)), "this Linear has no hidden_size"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_the_benchmark_is_read_by_category() -> None:
    assert by_category({("oven", 6): 0.2, ("oven", 8): 0.4, ("nights", 4): 0.5}) == pytest.approx(
        {"single-modal": 0.5, "multi-modal": 0.3}
    )
    assert headline("fashioniq") == 10 and headline("cirr") == 5
    for bad, message in (
        (lambda: by_category({("oven", 7): 0.1}), "no test set 'oven' of kind 7"),
        (lambda: headline("imagenet"), "data_set must be one of visualnews"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_bad_arguments() -> None:
    model, (image, ids) = joint(), given()
    scale = torch.tensor(0.0)
    for bad, message in (
        (lambda: model(), "must have an image or a text"),
        (lambda: model(image[:2], ids), "an image for each text, got 2 and 3"),
        (lambda: model(image, ids, pixels=image), "pixels: only a backbone takes these"),
        (lambda: model(None, ids, None, torch.ones(3)), "image_mask is given without pixel_values"),
        (lambda: model(image, ids, None, torch.ones(2, 1)), r"image_mask must be \(3, 1\)"),
        (lambda: model(image, ids, torch.ones(3, 4)), "attention_mask must be"),
        (lambda: model(image, ids, None, None, ids[:2]), "got batches of 2, 3, 3"),
        (lambda: joint(pooling="max"), "pooling must be one of last, mean"),
        (lambda: joint(attention="full"), "attention must be causal or bidirectional"),
        (lambda: LateFusion("sum"), "fusion must be score or feature, got 'sum'"),
        (lambda: LateFusion("feature", **{**LATE, "embed_dim": 6}), r"dim must be embed_dim \(6\), got 12"),
        (lambda: last_state(torch.rand(2, 3, 4), torch.ones(2, 2)), "the mask of its first two"),
        (lambda: retrieval_loss(torch.rand(2, 3), torch.rand(3, 3)), "as many for each query"),
        (lambda: retrieval_loss(torch.rand(2, 3), torch.rand(2, 3), temperature=0.0), "temperature must be positive"),
        (lambda: late_fusion_loss(torch.rand(2, 3), torch.rand(3, 3), scale), "of one shape"),
        (lambda: late_fusion_loss(torch.rand(2, 3), torch.rand(2, 3), scale, torch.rand(2, 3)), "negatives must be"),
        (lambda: templated("find"), "an image or a text, got neither"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
