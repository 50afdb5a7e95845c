"""Conditioned attention: forms that are plain attention, padding, what is pooled, lexicons, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saccade.fusion.attention_conditioning import (
    CONDITIONINGS,
    ConditionedClassifier,
    ConditionedPooling,
    FeatureTable,
)

KINDS = pytest.mark.parametrize("conditioning", CONDITIONINGS)


def pooling(conditioning: str | None, **options: Any) -> ConditionedPooling:
    torch.manual_seed(0)
    return ConditionedPooling(6, 3, conditioning, **options).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 5, 6), torch.randn(2, 5, 3)


@KINDS
def test_weights_sum_to_1_and_padding_of_any_length_has_none(conditioning: str) -> None:
    module, (h, c) = pooling(conditioning), inputs()
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    pooled = module(h, c, masks=(real, None))
    torch.testing.assert_close(pooled.weights.sum(1), torch.ones(2))
    assert pooled.weights[1, 3:].eq(0).all()
    short = module(h[1:, :3], c[1:, :3])
    torch.testing.assert_close(pooled.features[1:], short.features)
    torch.testing.assert_close(pooled.features, (pooled.weights[..., None] * h).sum(1))  # h, whatever the features
    nothing = module(h, c, masks=(torch.zeros(2, 5, dtype=torch.bool), None))
    assert nothing.features.eq(0).all() and nothing.weights.eq(0).all()


def test_what_is_plain_attention() -> None:
    h, c = inputs()
    plain = pooling(None)
    gate, affine, concat = (pooling(name) for name in ("gate", "affine", "concat"))
    with torch.no_grad():
        for module in (gate, affine):
            module.energy.load_state_dict(plain.energy.state_dict())
        concat.energy.weight.zero_()[:, :6] = plain.energy.weight
        gate.gate.bias.fill_(50.0)
        for linear, bias in ((affine.scale, 1.0), (affine.shift, 0.0)):
            linear.weight.zero_()
            linear.bias.fill_(bias)
    for module in (gate, affine, concat):
        torch.testing.assert_close(module(h, c).weights, plain(h).weights)


def test_concatenated_features_add_a_number_to_an_energy() -> None:
    module, (h, c) = pooling("concat"), inputs()
    a, b = module(h, c).weights, module(h, 2 * c).weights
    other = h.flip(2)
    ratio, theirs = (b / a), (module(other, 2 * c).weights / module(other, c).weights)
    torch.testing.assert_close(ratio / ratio[:, :1], theirs / theirs[:, :1], atol=1e-5, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("layers", [1, 2])
def test_nothing_known_is_a_row_of_zeros(conditioning: str, layers: int) -> None:
    module, (h, c) = pooling(conditioning, layers=layers), inputs()
    none = module(h)
    torch.testing.assert_close(none, module(h, torch.zeros_like(c)))
    known = torch.zeros(2, 5, dtype=torch.bool)
    torch.testing.assert_close(none, module(h, c, masks=(None, known)))


@pytest.mark.parametrize("options", [{}, {"layers": 0}, {"concat_embeddings": True}, {"concat_hidden": True}])
def test_the_classifier_does_not_see_padding(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ConditionedClassifier(11, 4, 3, embedding_dim=6, hidden=8, **options)
    ids, c = torch.randint(11, (2, 5)), torch.randn(2, 5, 3)
    model(ids, c).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    said = model(ids, c, torch.tensor([5, 3]))
    torch.testing.assert_close(said.logits[1:], model(ids[1:, :3], c[1:, :3]).logits)
    assert said.weights.shape == (2, 5) and said.weights[1, 3:].eq(0).all()
    assert not ConditionedClassifier(5, 2, 1, embedding_dim=2, hidden=2, frozen=True).embed.weight.requires_grad


def test_lexicons_lie_beside_each_other() -> None:
    table = FeatureTable(["good", "bad", "cat"], {"good": [1.0], "bad": [-1.0]}, {"cat": [0.5, 2.0]})
    expected = torch.tensor([[[0.0, 0.5, 2.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]])
    torch.testing.assert_close(table(torch.tensor([[2, 0, 1]])), expected)
    with pytest.raises(ValueError, match="one length"):
        FeatureTable(["a"], {"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(ValueError, match="some"):
        FeatureTable(["a"])


def test_refusals() -> None:
    for arguments, message in (
        ((6, 3, "magic"), "one of concat"),
        ((0, 3), "positive"),
        ((6, 0), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ConditionedPooling(*arguments)
    with pytest.raises(ValueError, match="layers 1 or 2"):
        ConditionedPooling(6, 3, layers=3)
    module, (h, c) = pooling("gate"), inputs()
    for call, message in (
        ((h[..., :5], c), "tokens must be"),
        ((h, c[..., :2]), "features must be"),
        ((h, c[:, :4]), "features must be"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*call)
    with pytest.raises(ValueError, match="mask of tokens must be bool"):
        module(h, c, masks=(torch.ones(2, 5), None))
    with pytest.raises(ValueError, match="words must be"):
        ConditionedClassifier(5, 2, 3, embedding_dim=2, hidden=2)(torch.zeros(2, 4, dtype=torch.long), c)
    with pytest.raises(ValueError, match="not negative"):
        ConditionedClassifier(5, 2, 3, layers=-1)
