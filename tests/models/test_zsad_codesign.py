"""What ACD-CLIP implies: adapters and gates at their limits, a CLIP of transformers, losses, bad arguments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.zsad_codesign import (
    ACDCLIP,
    DOMAINS,
    ConvLoRA,
    ConvLoRABlock,
    DynamicFusionGateway,
    LoRA,
    anomaly_loss,
    blurred,
    cut,
    dice,
    focal,
    groups,
    mixed,
    sentences,
    state_maps,
    zsad,
)

_IDS = torch.tensor([[[1, 2, 3, 19, 0], [1, 4, 19, 0, 0]], [[1, 5, 3, 19, 0], [1, 6, 19, 0, 0]]])


def _network(**changes: Any) -> ACDCLIP:
    torch.manual_seed(0)
    model = catalogue.create("zsad-codesign", **{**catalogue.part("zsad-codesign").example, **changes})
    assert isinstance(model, ACDCLIP)
    return model.eval()


def _image(side: int = 28) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_weights_of_nothing_leave_clip_as_it_is() -> None:
    model, image = _network(weight=0.0), _image()
    states: list[Tensor] = []

    def adapt(block: int, x: Tensor) -> Tensor:
        states.append(model.image_side.adapt(block, x, (4, 4)))
        return states[-1]

    model.vision.states(image, adapt=adapt)
    assert all(map(torch.equal, states, model.vision.states(image)[1:]))
    changed = _network(weight=0.3)
    tokens = changed.vision.states(image)[1]
    adapted = changed.image_side.adapt(0, tokens, (4, 4))
    assert torch.equal(adapted[:, 0], tokens[:, 0]) and not torch.equal(adapted[:, 1:], tokens[:, 1:])


def test_an_adapted_token_has_its_token_s_length() -> None:
    x, adapter = torch.randn(2, 12, 8), ConvLoRA(8, rank=4, conv_rank=3)
    adapted = adapter(x, (3, 4))
    torch.testing.assert_close(mixed(x, adapted, torch.ones(8)).norm(dim=-1), x.norm(dim=-1))
    with torch.no_grad():
        for block in adapter.blocks:
            block.up.mul_(7.0)
    torch.testing.assert_close(
        mixed(x, adapter(x, (3, 4)), torch.full((8,), 0.3)), mixed(x, adapted, torch.full((8,), 0.3))
    )
    weight = torch.rand(8)
    torch.testing.assert_close(
        mixed(x, adapted, weight),
        (1 - weight) * x + weight * adapted * x.norm(dim=-1, keepdim=True) / adapted.norm(dim=-1, keepdim=True),
    )


def test_kernel_1_is_lora() -> None:
    block, plain = ConvLoRABlock(8, 1, rank=4, conv_rank=4, conv_alpha=2.0), LoRA(8, 4)
    plain.load_state_dict({"down": block.down, "up": block.up})
    for conv in (block.conv_down, block.conv_up):
        nn.init.dirac_(conv.weight)
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(block.on_grid(x, (3, 4)), plain(x) * 0.5)


@pytest.mark.parametrize("kernel", [3, 5])
def test_an_impulse_reaches_two_convolutions_far(kernel: int) -> None:
    torch.manual_seed(0)
    block, x = ConvLoRABlock(6, kernel, rank=4, conv_rank=3), torch.randn(1, 121, 6)
    changed = x.clone()
    changed[:, 60] += 1
    moved = (block.on_grid(changed, (11, 11)) - block.on_grid(x, (11, 11))).abs().amax(-1).view(11, 11) > 1e-7
    expected = torch.zeros(11, 11, dtype=torch.bool)
    reach = kernel - 1
    expected[5 - reach : 6 + reach, 5 - reach : 6 + reach] = True
    assert torch.equal(moved, expected)


def test_gates() -> None:
    torch.manual_seed(0)
    gateway = DynamicFusionGateway(8, 3, 5)
    patches, text = F.normalize(torch.randn(3, 2, 9, 8), dim=-1), F.normalize(torch.randn(3, 2, 8, 2), dim=2)
    weights = gateway.weights(patches)
    torch.testing.assert_close(weights.sum(2), torch.ones(3, 2, 2))
    mixture = torch.einsum("lek,lk->ek", text[:, 1], weights[2, 1])
    torch.testing.assert_close(gateway(patches, text)[2, 1], 10 * patches[2, 1] @ mixture)
    same = text[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(gateway(patches, same), 10 * patches @ same)
    torch.testing.assert_close(gateway(patches, text[:, :1]), gateway(patches, text[:, :1].expand(-1, 2, -1, -1)))
    shares = state_maps(gateway(patches, text), (7, 5)).softmax(1)
    assert shares.shape == (2, 2, 7, 5)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 7, 5))


def test_the_blur_is_of_evaluation_and_of_any_size() -> None:
    for side in (1, 2, 9):
        flat = torch.full((1, 2, side, side), 3.0)
        torch.testing.assert_close(blurred(flat, 7, 1.0), flat)
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    spread = blurred(point, 7, 1.0)
    torch.testing.assert_close(spread.sum(), torch.tensor(1.0))
    assert spread[0, 0, 4, 4] < 0.2 and not spread[0, 0, 0].any()
    model, image = _network(), _image()
    blunt = model(image, _IDS)
    sharp = model.train()(image, _IDS)
    assert torch.equal(blunt.score, sharp.score) and not torch.equal(blunt.logits, sharp.logits)
    assert not any(module.training for tower in (model.vision, model.text) for module in tower.modules())


def test_descriptors_are_made_once() -> None:
    model, image = _network(), _image()
    text = model.describe(_IDS)
    assert text.shape == (2, 12, 2)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2, 2))
    expected = model(image, _IDS)
    for said in (
        model(image, descriptors=text),
        model(image, descriptors=text[:, None].expand(-1, 2, -1, -1)),
        model.keep(_IDS)(image),
        model(image, [_IDS[0], _IDS[1]]),
    ):
        torch.testing.assert_close(said.logits, expected.logits)
    longer = F.pad(_IDS, (0, 3))  # what follows the end does not matter
    torch.testing.assert_close(model.describe(longer), text)
    torch.testing.assert_close(
        model.scores(expected), 0.9 * expected.score + 0.1 * expected.logits.sigmoid().amax((1, 2, 3))
    )
    medical = _network(domain="medical")
    assert medical.domain == DOMAINS["medical"] and medical.domain.peak == 0.5
    torch.testing.assert_close(medical(image, _IDS).score, expected.score)


def test_losses_are_their_formulas() -> None:
    torch.manual_seed(0)
    shares, mask = torch.rand(2, 2, 4, 5).softmax(1), (torch.rand(2, 4, 5) < 0.5).float()
    p = torch.where(
        mask > 0, shares[:, 1] * (1 - 1e-5) + shares[:, 0] * 1e-5, shares[:, 0] * (1 - 1e-5) + shares[:, 1] * 1e-5
    )
    p = p + 1e-5
    torch.testing.assert_close(focal(shares, mask), -((1 - p) ** 2 * p.log()).mean())
    each = [1 - (2 * (q * y).sum() + 1) / (q.sum() + y.sum() + 1) for q, y in zip(shares[:, 1], mask, strict=True)]
    torch.testing.assert_close(dice(shares[:, 1], mask), torch.stack(each).mean())
    model, image = _network().train(), _image()
    label, where = torch.tensor([0, 1]), torch.zeros(2, 28, 28)
    where[1, 3:9, 3:9] = 1
    said = model(image, _IDS)
    loss, terms = anomaly_loss(said, label, where)
    torch.testing.assert_close(loss, torch.stack(list(terms.values())).sum())
    torch.testing.assert_close(terms["image"], F.binary_cross_entropy(said.score, label.float()))
    loss.backward()
    trained = [p for group in groups(model) for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    kept = [p.grad.clone() for p in trained if p.ndim > 1]
    for weight in model.image_side.weights:
        weight.grad.fill_(9.0)
    cut(model)
    assert sum(weight.grad.square().sum() for weight in model.image_side.weights) <= 1.0001
    assert all(map(torch.equal, kept, (p.grad for p in trained if p.ndim > 1)))


def _clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {
        "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20,
        "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 19, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    return transformers.CLIPModel(config).eval()


class _Words:
    """A tokenizer of five words."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        rows = [[len(word) % 17 + 1 for word in text.split()][:7] for text in texts]
        longest = max(map(len, rows)) + 1
        return {"input_ids": torch.tensor([[*row, 19, *[19] * (longest - len(row) - 1)] for row in rows])}


def test_around_a_clip_of_transformers(tmp_path: Path) -> None:
    clip, image = _clip(), _image()
    state = {name: t.clone() for name, t in clip.state_dict().items()}
    torch.manual_seed(0)
    detector = zsad(clip, _Words(), levels=2, head_dim=6, rank=4, conv_rank=3, weight=0.0).eval()
    states = detector.vision.states(image)[-1]
    torch.testing.assert_close(states, clip.vision_model(image).last_hidden_state)
    ids = torch.tensor([[1, 2, 19], [3, 4, 19]])
    torch.testing.assert_close(
        detector.text.states(ids)[-1],
        clip.text_model(ids, output_hidden_states=True).hidden_states[-1],
    )
    hooks = [len(module._forward_hooks) for module in clip.modules()]
    shared = detector.vision.blocks[0].attention.q_proj.weight
    assert shared.data_ptr() == clip.vision_model.encoder.layers[0].self_attn.q_proj.weight.data_ptr()
    detector.keep(name="bottle")
    assert detector(image).logits.shape == (2, 1, 28, 28)
    optimizer = torch.optim.SGD(groups(detector.train()), lr=0.1, weight_decay=0.1)
    anomaly_loss(detector(image, [ids, ids + 0]), torch.tensor([0, 1]), torch.ones(2, 28, 28)).loss.backward()
    optimizer.step()
    assert all(torch.equal(t, state[name]) for name, t in clip.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in clip.parameters()) and not clip.training
    assert hooks == [len(module._forward_hooks) for module in clip.modules()]
    picture = pytest.importorskip("PIL.Image")
    picture.new("RGB", (40, 30), (200, 40, 40)).save(tmp_path / "a.png")
    detector.image_size = 28
    said = detector.predict(tmp_path / "a.png")
    assert said.logits.shape == (1, 1, 30, 40) and said.score.shape == (1,)
    assert detector.picture(said).size == (80, 30)


def test_sentences() -> None:
    normal, abnormal = sentences("cable")
    assert len(normal) == 6 and normal[0] == "cable." and normal[-1] == "a photo of the cable."
    assert len(abnormal) == 10 and "a photo of a cable with flaw." in abnormal


def test_refusals() -> None:
    model, image = _network(), _image()
    gateway, clip = DynamicFusionGateway(8, 2, 4), _clip()
    calls = (
        (partial(_network, levels=3), "levels must divide both depths"),
        (partial(_network, domain="space"), "domain must be one of industrial, medical"),
        (partial(_network, kernels=(2,)), "kernels odd"),
        (partial(_network, kernels=()), "kernels must be one at least"),
        (partial(LoRA, 8, 0), "rank must be positive"),
        (partial(ConvLoRA(8), torch.zeros(1, 5, 8), (2, 3)), "patches must be 2 x 3, got 5"),
        (partial(model, image), "needs input_ids, descriptors, or a class"),
        (partial(model, image, _IDS[:1]), "sentences of two states, got 1"),
        (partial(model, image[:, :1], _IDS), r"images \(batch, 3"),
        (partial(model, image, torch.zeros(2, 1, 10).long()), "between 1 and 9 tokens"),
        (model.keep, "keep must get input_ids or a name"),
        (partial(model.keep, name="cable"), "needs CLIP's tokenizer"),
        (partial(gateway, torch.zeros(3, 1, 4, 8), torch.zeros(2, 1, 8, 2)), "patches must be of 2 levels"),
        (partial(state_maps, torch.zeros(2, 1, 5, 2), (8, 8)), "patches must be 2 x 2, got 5"),
        (partial(DynamicFusionGateway, 0), "must be positive"),
        (partial(zsad, nn.Linear(2, 2)), "must be a CLIPModel of transformers, got Linear"),
        (partial(zsad, clip, levels=3), "levels must divide both depths"),
    )
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
