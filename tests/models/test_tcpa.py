"""What TCPA implies: masks, choices, gradients, its limits, other transformers, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.layers.vision_transformer import VisionTransformer
from saccade.layers.wrapping import footprint
from saccade.models.tcpa import (
    TCPA,
    Prompts,
    match,
    prompted,
    prompted_attention,
    schedule,
    simam,
    tuned,
    tuning_loss,
)

_NONE = {"class_pool": 0, "image_pool": 0, "class_top_k": 0, "image_top_k": 0}


def _network(**changes: Any) -> TCPA:
    torch.manual_seed(0)
    example = {**catalogue.part("tcpa").example, "image_prompter": False, "attentive": False, "modulation": False}
    model = catalogue.create("tcpa", **{**example, **changes})
    assert isinstance(model, TCPA)
    return model.eval()


def _image() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def _qkv(prompts: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, 3, n, 4, generator=generator).double() for n in (7, 7, 7, prompts, prompts))


@pytest.mark.parametrize("renormalise", [False, True])
def test_attention_is_masked_after_the_softmax(renormalise: bool) -> None:
    q, k, v, prompt_k, prompt_v = _qkv()
    visible = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    visible[0, 0] = False
    score = q @ torch.cat([k, prompt_k], 2).mT / 2
    mask = torch.cat([torch.ones(2, 7, 7).bool(), visible], 2)[:, None]
    if renormalise:
        weight = score.masked_fill(~mask, -torch.inf).softmax(-1)
    else:
        weight = score.softmax(-1) * mask
    found = prompted_attention(q, k, v, prompt_k, prompt_v, visible, renormalise=renormalise)
    torch.testing.assert_close(found, weight @ torch.cat([v, prompt_v], 2))
    ones = [torch.ones_like(x) for x in (v, prompt_v)]
    sums = prompted_attention(q, k, ones[0], prompt_k, ones[1], visible, renormalise=renormalise)
    hidden = (score.softmax(-1) * ~mask).sum(-1, keepdim=True)
    torch.testing.assert_close(sums, (1 - (0 * hidden if renormalise else hidden)).expand_as(sums))


def test_a_token_sees_its_own_and_nothing_of_the_other_role() -> None:
    model = _network(class_pool=5, class_top_k=2, image_pool=6, image_top_k=3, image_length=4)
    for layer in model.tokens(_image())[1]:
        of_class, of_image = layer.visible.split([10, 24], 2)
        assert of_class[:, 0].sum(1).eq(2 * 2).all() and not of_class[:, 1:].any()
        assert of_image[:, 1:].sum(2).eq(3 * 4).all() and not of_image[:, 0].any()
        assert layer.distance is not None and 0 <= layer.distance <= 4


def test_choices_go_by_direction_alone() -> None:
    x, keys = torch.randn(2, 5, 8), torch.randn(6, 8)
    chosen, distance = match(x, keys, 2)
    again, same = match(x * torch.rand(2, 5, 1).add(0.1), keys * torch.rand(6, 1).add(0.1), 2)
    assert torch.equal(chosen, again) and 0 <= distance <= 2
    torch.testing.assert_close(distance, same)
    near = F.normalize(x, dim=-1) @ F.normalize(keys, dim=-1).T
    assert near[chosen].view(2, 5, 2).amin(-1).ge(near.masked_fill(chosen, -2).amax(-1)).all()
    torch.testing.assert_close(distance, (1 - near[chosen]).mean())
    torch.manual_seed(0)
    counts = torch.stack([match(x, keys, 2, random=True)[0].sum((0, 1)) for _ in range(300)]).sum(0)
    assert counts.sum() == 300 * 20 and counts.min() > 900  # 1000 each


def test_limits() -> None:
    image = _image()
    bare = _network(**_NONE)
    tokens = bare.vit(image)
    torch.testing.assert_close(bare.tokens(image)[0], bare.norm(tokens), rtol=0, atol=0)
    whole = {"class_pool": 4, "image_pool": 3, "class_top_k": 4, "image_top_k": 3}
    chosen, roles = _network(**whole), _network(**whole, matched=False)
    roles.load_state_dict(chosen.state_dict())
    assert torch.equal(chosen(image).logits, roles(image).logits)
    assert chosen(image).penalty is not None and roles(image).penalty is None
    shared = _network(roles=False, matched=False)
    assert all(layer.visible.all() for layer in shared.tokens(image)[1])


def test_gradients() -> None:
    model, image = _network(fourier=False), _image()
    loss, terms = tuning_loss(model(image), torch.tensor([0, 3]), 0.5)
    torch.testing.assert_close(loss, terms["classes"] + 0.5 * terms["distance"])
    keys = [model.prompts.of_class.keys, model.prompts.of_image.keys]
    assert all(g is None for g in torch.autograd.grad(terms["classes"], keys, retain_graph=True, allow_unused=True))
    layers = model.tokens(image)[1]
    gradients = torch.autograd.grad(model(image).penalty, keys)
    for i, layer in enumerate(layers):
        parts = layer.visible[:, 0, :8:2], layer.visible[:, 1:, 8:]
        for gradient, chosen in zip(gradients, parts, strict=True):
            assert torch.equal(gradient[i].abs().sum(-1) > 0, chosen.flatten(0, -2).any(0))
    trained = {id(p) for p in tuned(model)}
    assert trained == {id(p) for name, p in model.named_parameters() if name.startswith(("prompts.", "head."))}
    assert not any(module.training for module in model.train().vit.modules())


def test_the_transform_of_what_is_constant_is_one_number() -> None:
    prompts = Prompts(6, 1, class_pool=2, image_pool=3, class_top_k=1, image_top_k=1).eval()
    for pool in (prompts.of_class, prompts.of_image):
        nn.init.constant_(pool.prompts, 0.5)
    found = prompts(0, torch.randn(2, 4, 6)).prompts
    assert found[:, 0, 0].allclose(torch.tensor(0.5 * 5 * 6))
    assert found.flatten(1)[:, 1:].abs().max() < 1e-5


def test_random_choices_and_dropout_are_training_s() -> None:
    model, image = _network(drop=0.0), _image()
    model.prompts.random = True
    assert torch.equal(model(image).logits, model(image).logits)
    model.train()
    assert not torch.equal(model(image).logits, model(image).logits)
    model.prompts.random = False
    assert torch.equal(model(image).logits, model(image).logits)
    dropped = _network(drop=0.5).train()
    assert not torch.equal(dropped(image).logits, dropped(image).logits)


def test_simam_is_its_formula() -> None:
    x = torch.randn(1, 1, 3, 4)
    square = (x - x.mean()).square()
    torch.testing.assert_close(simam(x), x * torch.sigmoid(square / (4 * (square.sum() / 11 + 1e-4)) + 0.5))


def test_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates, plan = [], schedule(optimizer, 20)
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)


def test_around_a_transformer_of_this_library() -> None:
    model, image = _network(), _image()
    vit = VisionTransformer(image_size=24, patch=8, dim=16, depth=2, num_heads=2, hidden=24).eval()
    vit.load_state_dict(model.vit.state_dict())
    plain = vit(image)
    with prompted(vit, model.prompts) as seen:
        found = vit(image)
        torch.testing.assert_close(model.norm(found), model.tokens(image)[0])
        torch.testing.assert_close(seen.distance, model(image).penalty)
        assert len(seen.layers) == 2
    assert torch.equal(vit(image), plain)


@pytest.mark.parametrize("family", ["ViT", "Dinov2", "CLIPVision"])
def test_around_a_transformer_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "image_size": 24, "patch_size": 8,
    }  # fmt: skip
    vit = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    image = _image()
    plain, before = vit(image).last_hidden_state, footprint(vit)
    with prompted(vit, Prompts(16, 2, **_NONE).eval()):
        torch.testing.assert_close(vit(image).last_hidden_state, plain)
    prompts = Prompts(16, 2, class_pool=3, image_pool=3, class_top_k=1, image_top_k=2)
    with prompted(vit, prompts) as seen:
        vit(image)
        said = vit(pixel_values=image).last_hidden_state
        assert len(seen.layers) == 2 and not torch.allclose(said, plain, atol=1e-3)
        (said.square().sum() + seen.distance).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prompts.parameters())
    with pytest.raises(RuntimeError, match="meanwhile"), prompted(vit, prompts):
        raise RuntimeError("meanwhile")
    assert torch.equal(vit(image).last_hidden_state, plain)
    assert footprint(vit) == before
    assert seen.calls == 2 and seen.figures()["prompts a layer"] == "6" and seen.figures()["seen by a token"] == "32%"
    with pytest.raises(ValueError, match=r"are of 3 layers, and .* has 2 blocks"), prompted(vit, Prompts(16, 3)):
        pass
    with pytest.raises(ValueError, match=r"prompts must be as wide .* \(16\), got 8"), prompted(vit, Prompts(8, 2)):
        pass


def test_refusals() -> None:
    with pytest.raises(ValueError, match="roles must be True"):
        Prompts(8, 1, roles=False)
    with pytest.raises(ValueError, match="0 <= top_k <= size"):
        Prompts(8, 1, class_top_k=19)
    with pytest.raises(ValueError, match="num_classes and noise must not be negative"):
        _network(num_classes=-1)
    with pytest.raises(ValueError, match=r"images \(batch, 3, height, width\)"):
        _network()(torch.randn(1, 1, 24, 24))
    with pytest.raises(ValueError, match="output must have logits"):
        tuning_loss(_network(num_classes=0)(_image()), torch.zeros(2).long())
    with pytest.raises(ValueError, match="no row of blocks"), prompted(nn.Linear(2, 2), Prompts(8, 1)):
        pass
    with pytest.raises(ValueError, match="IPrompt adds are not known"):
        catalogue.port("tcpa", "model_vfpt_tcpa").build({"embed_dim": 32, "IPrompt": True})
