"""SupER: its maps, its halves, its terms at their limits, CLIP as the teacher, other encoders, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.adapt.superclass_disentanglement import (
    LatentClassifier,
    SupER,
    clip_maps,
    grad_cam,
    quantile_stretched,
    spread_penalty,
    stretched,
)
from saccade.layers.watching import as_map, evaluating


def _objective(**changes: object) -> SupER:
    torch.manual_seed(0)
    objective = catalogue.create(
        "superclass-disentanglement", **{**catalogue.part("superclass-disentanglement").example, **changes}
    )
    assert isinstance(objective, SupER)
    return objective.eval()


def _batch(size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, size, size), torch.tensor([0, 2, 1, 0]), torch.rand(4, 2, 2)


def test_maps_run_from_0_to_1() -> None:
    maps = torch.randn(5, 4, 6)
    maps[2] = 3.0
    for found in (stretched(maps), quantile_stretched(maps), quantile_stretched(maps, (0.01, 1.0))):
        low, high = found.amin((1, 2)), found.amax((1, 2))
        assert torch.equal(low, torch.zeros(5)) and high[[0, 1, 3, 4]].eq(1).all() and not found[2].any()
    sorted_24 = maps[0].flatten().sort().values
    low = sorted_24[0] + 0.23 * (sorted_24[1] - sorted_24[0])  # the 1st percentile of 24: place 0.23
    assert quantile_stretched(maps)[0].eq(0).sum() == maps[0].le(low).sum() == 1


def test_the_student_s_map_is_grad_cam_with_a_gradient() -> None:
    objective, (image, label, _) = _objective(), _batch(96)
    said = objective.say(image, label)
    features = objective.features(image).detach().requires_grad_()
    mean = objective.latent(features)[0]
    score = objective.relevant(mean[:, :3]).gather(1, label[:, None]).sum()
    (slope,) = torch.autograd.grad(score, features)
    weights = slope.mean((2, 3))
    expected = torch.einsum("bc,bchw->bhw", weights, features).relu()
    torch.testing.assert_close(said.relevant_map, stretched(expected))
    score = objective.relevant(objective.latent(features)[0][:, :3]).gather(1, label[:, None]).sum()
    torch.testing.assert_close(grad_cam(3.5 * score, features), 3.5 * expected)
    assert said.relevant_map.amax() == 1 and said.relevant_map.amin() == 0
    said.relevant_map.square().sum().backward()
    assert objective.encoder.stem[0].weight.grad.any() and objective.relevant[0].weight.grad.any()
    with torch.no_grad():
        silent = objective.say(image, label)
    assert torch.equal(silent.relevant_map, said.relevant_map) and not silent.relevant_map.requires_grad
    assert torch.equal(objective.classify(image), said.relevant)  # deterministic, without noise


def test_the_halves_do_not_meet() -> None:
    objective, (image, label, _) = _objective(), _batch()
    said = objective.say(image, label)
    for logits, other in ((said.relevant, slice(3, 6)), (said.irrelevant, slice(0, 3))):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, label), objective.mean.weight, retain_graph=True)
        own = slice(3 - other.start, 6 - other.start)
        assert not gradient[other].any() and gradient[own].any()


def test_terms_at_their_limits() -> None:
    objective, (image, label, _) = _objective(), _batch(96)
    said = objective.say(image, label)
    terms = objective.terms(said, label, said.relevant_map, image)
    assert terms["alignment"] == 0 and terms["anti_alignment"] > 0
    assert objective.terms(said, label, 1 - said.irrelevant_map, image)["anti_alignment"] < 1e-12
    said.mean, said.log_variance = torch.zeros(4, 6), torch.zeros(4, 6)
    assert objective.terms(said, label, said.relevant_map, image)["kl"] == 0
    assert terms["penalty"] == spread_penalty(objective.relevant)
    for parameter in objective.relevant.parameters():
        nn.init.ones_(parameter)
    assert spread_penalty(objective.relevant) == 1
    nn.init.constant_(objective.relevant[0].weight, 3.0)  # of 15 numbers among 15 + 5 + 20 + 4 + 12
    assert spread_penalty(objective.relevant).item() == pytest.approx((9 * 15 + 41) / 56)


def test_the_loss_is_the_weighted_sum() -> None:
    weights = {"reconstruction": 2.0, "beta": 3.0, "classes": 5.0, "attention": 7.0, "penalty": 11.0}
    objective, batch = _objective(**weights), _batch()
    loss, terms = objective(*batch)
    expected = 2 * terms["reconstruction"] + 3 * terms["kl"] + 5 * (terms["relevant"] + terms["irrelevant"])
    expected = expected + 7 * (terms["alignment"] + terms["anti_alignment"]) + 11 * terms["penalty"]
    torch.testing.assert_close(loss, expected)
    assert torch.equal(objective(*batch).loss, loss)
    noisy = objective(*batch, noise=torch.randn(4, 6)).terms
    assert noisy["reconstruction"] != terms["reconstruction"] and noisy["relevant"] == terms["relevant"]
    target = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(
        objective(*batch, target=target).terms["reconstruction"],
        F.mse_loss(objective.say(*batch[:2]).reconstruction, target),
    )


def test_threshold() -> None:
    objective, (image, label, _) = _objective(threshold=0.5), _batch(96)
    said = objective.say(image, label)
    maps = torch.rand_like(said.relevant_map).detach()
    terms = objective.terms(said, label, maps, image)
    torch.testing.assert_close(terms["alignment"], said.relevant_map[maps < 0.5].square().mean())
    torch.testing.assert_close(terms["anti_alignment"], said.irrelevant_map[maps > 0.5].square().mean())
    assert objective.terms(said, label, torch.ones_like(maps), image)["alignment"] == 0
    assert objective.terms(said, label, torch.zeros_like(maps), image)["anti_alignment"] == 0


def _clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
        "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 19, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
        "patch_size": 4,
    }  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))


def test_clip_of_transformers_teaches_and_is_left_as_it_was() -> None:
    clip = _clip()
    clip.train()
    clip.visual_projection.eval()
    for frozen in (False, True):
        clip.requires_grad_(not frozen)
        phrases = {"input_ids": torch.tensor([[2, 3, 19], [4, 5, 19]]), "attention_mask": torch.ones(2, 3).long()}
        image = torch.randn(3, 3, 12, 12)
        state = {name: t.clone() for name, t in clip.state_dict().items()}
        modes = [module.training for module in clip.modules()]
        maps = clip_maps(clip, image, phrases)
        assert maps.shape == (3, 3, 3) and not maps.requires_grad and maps.min() >= 0 and maps.max() <= 1
        assert [module.training for module in clip.modules()] == modes and True in modes and False in modes
        assert all(p.grad is None for p in clip.parameters())
        assert not any(module._forward_hooks for module in clip.modules())
        assert all(torch.equal(t, state[name]) for name, t in clip.state_dict().items())
        each = [clip_maps(clip, image, {"input_ids": phrases["input_ids"][i : i + 1]}) for i in range(2)]
        torch.testing.assert_close(maps, (each[0] + each[1]) / 2)
        torch.testing.assert_close(clip_maps(clip, image[1:2], phrases), maps[1:2])
    with evaluating(clip), torch.no_grad():  # the slope by differences, along one channel of one position
        text = F.normalize(clip.get_text_features(**phrases).pooler_output, dim=-1)[0]
    name = "vision_model.encoder.layers.1.layer_norm1"
    norm, moved = dict(clip.named_modules())[name], torch.zeros(3, 10, 8)

    def score(change: Tensor) -> Tensor:
        hook = norm.register_forward_hook(lambda module, inputs, said: seen.append(said) or said + change)
        try:
            with evaluating(clip), torch.no_grad():
                vector = clip.get_image_features(pixel_values=image.double()).pooler_output
                return 100 * (F.normalize(vector, dim=-1) @ text).sum()
        finally:
            hook.remove()

    clip, text, seen = clip.double(), text.double(), []
    slopes = torch.zeros(3, 9, 8, dtype=torch.float64)
    for b in range(1):
        for n in range(9):
            for c in range(8):
                moved = torch.zeros(3, 10, 8, dtype=torch.float64)
                moved[b, n + 1, c] = 1e-5
                slopes[b, n, c] = (score(moved) - score(-moved)) / 2e-5
    tokens = seen[0][:, 1:]
    found = (slopes.mean(1, keepdim=True) * tokens).sum(2).relu().view(3, 3, 3)[:1]
    one = clip_maps(clip, image.double(), {"input_ids": phrases["input_ids"][:1]})[:1]
    torch.testing.assert_close(one, quantile_stretched(found), rtol=1e-4, atol=1e-4)


def test_encoders_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    )
    swin = transformers.SwinModel(
        transformers.SwinConfig(image_size=32, embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2)
    )
    vit = transformers.CLIPVisionModel(_clip().config.vision_config)
    image, label, maps = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2]), torch.rand(3, 4, 4)
    for encoder, channels in ((resnet, 6), (swin, 8), (vit, 8)):
        names = set(encoder.state_dict())
        objective = SupER(3, encoder, latent=6, widths=(4,), decoder_channels=(4,), grid=2)
        assert objective.mean.in_features == channels
        given = image[..., :12, :12] if encoder is vit else image
        objective(given, label, maps).terms["alignment"].backward()
        assert next(p for p in encoder.parameters()).grad.any()
        assert set(encoder.state_dict()) == names
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


def test_tokens_as_maps() -> None:
    tokens = torch.arange(20.0).view(1, 10, 2)
    assert torch.equal(as_map(tokens)[0, 0], tokens[0, 1:, 0].view(3, 3))
    assert torch.equal(as_map((tokens[:, 1:],))[0, 1], tokens[0, 1:, 1].view(3, 3))
    with pytest.raises(ValueError, match=r"the model must give a map .* got \(1, 8, 2\)"):
        as_map(tokens[:, 2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent": 5}, "latent must be positive and even, got 5"),
        ({"num_classes": 0}, "must be positive"),
        ({"encoder": nn.Conv2d(3, 4, 1)}, "channels must be given for an encoder that does not say them, got Conv2d"),
        ({"depth": 7}, "depth must be one of"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupER(**arguments)


def test_bad_calls() -> None:
    objective, (image, label, maps) = _objective(), _batch()
    for call, message in (
        ((image, label[:2], maps), "labels and maps must be"),
        ((image, label, maps[:, None]), "labels and maps must be"),
        ((image[:, :2], label, maps), r"x must be \(batch, 3, height, width\)"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(*call)
    with pytest.raises(ValueError, match=r"x must be \(batch, 5, height, width\)"):
        SupER(2, nn.Conv2d(3, 4, 1), 5).classify(image)
    clip, phrases = _clip(), {"input_ids": torch.tensor([[2, 3, 19]])}
    with pytest.raises(ValueError, match="clip has no module 'layer4'"):
        clip_maps(clip, torch.zeros(1, 3, 12, 12), phrases, layer="layer4")
    with pytest.raises(ValueError, match="must be part of what sees images"):
        clip_maps(clip, torch.zeros(1, 3, 12, 12), phrases, layer="text_model.final_layer_norm")
    with pytest.raises(ValueError, match="layer must be named"):
        clip_maps(nn.Linear(1, 1), torch.zeros(1, 3, 12, 12), phrases)


def test_classifier() -> None:
    assert [type(layer).__name__ for layer in LatentClassifier(4, (3, 2), 5)] == [
        "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear",
    ]  # fmt: skip
