"""CAFace: shares and weights, orders, batches, padding, sets of any size, its losses and its files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import load_authors
from saccade.models.caface import (
    CAFace,
    ClusterAggregate,
    centre_loss,
    memory_loss,
    style_statistics,
    training_loss,
)
from saccade.models.images import to_picture

GOLDEN = Path(__file__).parent.parent / "golden" / "caface" / "caface_aggregator.a.safetensors"
SMALL = {"dim": 12, "width": 4, "style_dim": 6, "norm_dim": 6, "num_heads": 3}


def aggregator(**changes: object) -> ClusterAggregate:
    torch.manual_seed(0)
    sizes = {"style_dim": 6, "norm_dim": 6, "num_heads": 3, **changes}
    model = ClusterAggregate(10, 5, **sizes).eval()
    for name, parameter in model.named_parameters():  # the statistics' weight starts at zero, the others small
        if parameter.ndim > 1 and "centres" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def images(count: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return 3 * torch.randn(2, count, 10), torch.randn(2, count, 5, 2)


def near(ours: Tensor, expected: Tensor, bound: float = 1e-5) -> bool:
    return bool((ours - expected).abs().max() <= bound * expected.abs().max())


def test_shares_and_weights_sum_to_one() -> None:
    model, (features, statistics) = aggregator(), images()
    share, unit, _ = model.assign(features, model.style(statistics))
    torch.testing.assert_close(share.sum(1), torch.ones(2, 9))
    torch.testing.assert_close(torch.linalg.vector_norm(unit, dim=-1), torch.ones(2, 9), atol=1e-4, rtol=0)
    assert share.argmax(1).unique().numel() > 1 and share.amax(1).max() > share.amax(1).min() + 0.1
    weights = model.weights(model.summarise(features, statistics))
    assert weights.shape == (2, 4, 10)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 10))
    assert aggregator(per_channel=False).weights(model.summarise(features, statistics)).shape == (2, 4, 1)


def test_neither_the_order_of_images_nor_that_of_batches_matters() -> None:
    model, (features, statistics) = aggregator(), images()
    order = torch.randperm(9)
    assert near(model(features[:, order], statistics[:, order]), model(features, statistics))
    batches = [(features[:, rows], statistics[:, rows]) for rows in (slice(4), slice(4, 5), slice(5, 9))]
    templates = []
    for numbers in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        summary = None
        for number in numbers:
            summary = model.summarise(*batches[number], summary=summary)
        templates.append(model.template(summary))
    assert near(templates[1], templates[0]) and near(templates[2], templates[0])
    assert not near(templates[0], model(features, statistics), 1e-4)  # other neighbours in a batch


def test_without_blocks_batches_make_the_whole() -> None:
    model, (features, statistics) = aggregator(depth=0, num_centres=2), images(40)
    summary = None
    for part in range(2):
        rows = slice(20 * part, 20 * part + 20)
        new = model.summarise(features[:, rows], statistics[:, rows])
        assert (new.mass >= 1).all()
        summary = model.summarise(features[:, rows], statistics[:, rows], summary=summary)
    assert near(model.template(summary), model(features, statistics))


def test_one_image_and_one_centre() -> None:
    model, (features, statistics) = aggregator(), images(1)
    share, unit, _ = model.assign(features, model.style(statistics))
    torch.testing.assert_close(model.summarise(features, statistics).means[0], share * unit)
    single, (features, statistics) = aggregator(num_centres=1), images(7)
    expected = (features / (torch.linalg.vector_norm(features, dim=-1, keepdim=True) + 1e-5)).mean(1)
    assert near(single(features, statistics), expected)


def test_padding_changes_nothing() -> None:
    model, (features, statistics) = aggregator(), images()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, [0, 5]] = False
    found = model(features.masked_fill(~mask[..., None], 40.0), statistics, mask=mask)
    kept = mask[1].nonzero()[:, 0]
    assert near(found[1:], model(features[1:, kept], statistics[1:, kept]))
    assert near(found[:1], model(features[:1], statistics[:1]))


def test_ten_thousand_images_in_a_state_of_one_size() -> None:
    model, summary = aggregator(), None
    features, statistics = images(100)
    for part in range(100):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(part))
        summary = model.summarise(features[:, order], statistics[:, order], summary=summary)
        assert [tuple(x.shape) for x in (summary.mass, *summary.means)] == [(2, 4, 1), (2, 4, 10), (2, 4, 12)]
    torch.testing.assert_close(summary.mass.sum(1), torch.full((2, 1), 1e4))
    assert near(model.template(summary), model.template(model.summarise(features, statistics)))


def test_statistics_of_maps() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(3, 4, 5, 6), torch.randn(3, 2, 1, 1)]
    found = style_statistics(maps)
    assert found.shape == (3, 6, 2)
    torch.testing.assert_close(found[:, :4, 1], maps[0].flatten(2).std(2))
    torch.testing.assert_close(found[:, 4:, 0], maps[1][..., 0, 0])
    assert (found[:, 4:, 1] < 1e-5).all()


def test_images_in_batches_in_any_order() -> None:
    torch.manual_seed(0)
    model = CAFace(**SMALL).eval()
    torch.nn.init.normal_(model.aggregator.style.statistic_weight)
    views = torch.rand(2, 7, 3, 20, 18)
    whole = model(views)
    assert whole.embedding.shape == (2, 12) and whole.views.shape == (2, 7, 12)
    torch.testing.assert_close(torch.linalg.vector_norm(whole.embedding, dim=1), torch.ones(2))
    first, again = (model.fold([views[:, rows] for rows in order]) for order in _orders())
    assert near(again.embedding, first.embedding)
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    assert near(model(views, mask=mask).embedding[1:], model(views[1:, :5]).embedding)
    assert near(model(views[:, 0]).embedding, model(views[:, :1]).embedding)


def _orders() -> tuple[list[slice], list[slice]]:
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    return parts, parts[::-1]


def test_files_are_one_person_and_seen_in_chunks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path in paths:
        to_picture(torch.rand(3, 12, 10)).save(path)
    model = CAFace(**SMALL, image_size=16)
    output = model.predict(paths)
    assert output.embedding.shape == (1, 12) and output.views.shape == (1, 5, 12)
    said = model.answer(output)
    assert len(said) == 5 and all(-1 <= each["like all together"] <= 1 for each in said)
    model.chunk = 2
    chunked = model.predict(paths)
    assert torch.allclose(chunked.views, output.views, atol=1e-6) and len(chunked.images) == 5
    assert near(chunked.embedding, output.embedding, 0.5) and not near(chunked.embedding, output.embedding, 1e-7)


def test_a_frozen_encoder_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = CAFace(**SMALL, frozen=True).train()
    before = copy.deepcopy(model.encoder.state_dict())
    model(torch.rand(2, 3, 3, 20, 18)).embedding.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert not any(p.requires_grad for p in model.encoder.parameters()) and not model.encoder.training
    assert all(p.grad is not None for p in model.aggregator.parameters())


def test_losses() -> None:
    template, centre = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 0]], requires_grad=True)
    assert centre_loss(template, centre).item() == pytest.approx(0.5)
    assert not centre_loss(template, centre).requires_grad
    assert memory_loss(template, centre, by_batch=True).item() == pytest.approx(0.25)
    model, (features, statistics) = aggregator(drop_path=0.0).train(), images(8)
    loss = training_loss(model, features, statistics, F.normalize(torch.randn(2, 10), dim=-1))
    loss.backward()
    assert loss > 0 and all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="4 images of a person at least, got 3"):
        training_loss(model, features[:, :3], statistics[:, :3], features[:, 0])


def test_the_aggregator_of_a_training_checkpoint_loads(tmp_path: Path) -> None:
    state = {name[6:]: tensor for name, tensor in load_file(GOLDEN).items() if name.startswith("param.")}
    torch.save({"state_dict": {f"aggregator.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.ckpt")
    sizes = {"style_dim": 8, "norm_dim": 8, "num_heads": 4}
    fusion = {"embed_dim": 16, "value_dim": 10, "depths": [2], "num_heads": [4], "num_group_tokens": [4]}
    arguments = {"style_channels": 14, "style_dim": 8, "normemb_dim": 8, "fusion_net": {**fusion, "confidence_dim": 10}}
    ours = load_authors("caface", tmp_path / "a.ckpt", "caface_aggregator", **arguments)
    assert torch.equal(ours.style.statistic_weight, state["style_maker.cfcs.0"])
    model = CAFace.from_authors(tmp_path / "a.ckpt", dim=10, width=7, stages=(0, 0), **sizes)
    assert torch.equal(model.aggregator.style.statistic_weight, state["style_maker.cfcs.0"])
    with pytest.raises(ValueError, match="does not fit the aggregator"):
        CAFace.from_authors(tmp_path / "a.ckpt", **SMALL)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    assert torch.equal(model.load(tmp_path / "own.safetensors").feature.weight, model.feature.weight)


def test_bad_arguments() -> None:
    model, (features, statistics) = aggregator(), images()
    network = CAFace(**SMALL)
    mask = torch.ones(2, 9, dtype=torch.bool)
    for bad, message in (
        (lambda: model(features[..., :9], statistics), r"features must be \(batch, images, 10\)"),
        (lambda: model(features[:, :0], statistics[:, :0]), "of one image at least"),
        (lambda: model(features, statistics[:, :8]), r"statistics must be \(2, 9, 5, 2\), got \(2, 8, 5, 2\)"),
        (lambda: model(features, statistics, mask=mask[:, 1:]), r"mask must be bool \(2, 9\)"),
        (lambda: model(features, statistics, mask=mask.float()), "mask must be bool"),
        (lambda: ClusterAggregate(10, 5, num_centres=0), "must be positive"),
        (lambda: network(torch.rand(2, 0, 3, 9, 9)), "one view at least"),
        (lambda: network(torch.rand(2, 3, 4, 9, 9)), r"images \(batch, 3, height, width\)"),
        (lambda: network.fold([]), "one at least, got none"),
        (lambda: CAFace(**SMALL, stages=(1, 4)), r"stages must be numbers of the encoder's maps \(4\), got \(1, 4\)"),
        (lambda: CAFace(**SMALL, encoder=torch.nn.Identity()), "stages must be numbers"),
        (lambda: CAFace(**SMALL, chunk=0), "chunk must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
