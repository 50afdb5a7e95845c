"""PREMISE: scores at their limits, copies, order, filters, kernels, padding, missing fields, losses, bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade import catalogue
from saccade.models.premise import (
    PREMISE,
    ConvKNRM,
    MatchingScores,
    greedy,
    grouped,
    kernel_centres,
    kernel_features,
    rank_hinge,
    relevance,
    top_features,
)

EXAMPLE = dict(catalogue.part("premise").example)


def premise(**changes: object) -> PREMISE:
    torch.manual_seed(0)
    return PREMISE(**{**EXAMPLE, **changes}).eval()


def given(words: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "product_text": rows(3, words, 6), "review_text": rows(3, words + 2, 6), "product_regions": rows(3, 4, 5),
        "review_regions": rows(3, 5, 5),
    }  # fmt: skip


def unit_rows(*shape: int) -> tuple[Tensor, Tensor]:
    return F.normalize(torch.randn(*shape), dim=-1), torch.ones(shape[:2], dtype=torch.bool)


def test_equal_fields_have_one_and_orthogonal_none() -> None:
    rows, there = unit_rows(2, 3, 8)
    matching = MatchingScores(8, 2, [(0, 1)], keep=3, top_k=4)
    found, penalty = matching([(rows, there), (rows, there)])
    assert penalty is None and found.shape == (2, 6) and found.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(found[:, [0, 1, 2, 4, 5]], torch.ones(2, 5))
    eye = torch.eye(8)[None].expand(2, -1, -1)
    apart, _ = matching([(eye[:, :3], there), (eye[:, 3:6], there)])
    assert not apart.any()


def test_top_features_by_hand() -> None:
    score = torch.tensor([[[0.9, 0.1], [0.3, 0.8], [0.7, 0.7]]])
    there = torch.tensor([[[True, True], [True, True], [False, False]]])
    torch.testing.assert_close(top_features(score, there, 3), torch.tensor([[0.9, 0.8, 0.3, 0.85, 0.85]]))
    assert top_features(score, torch.zeros_like(there), 2).tolist() == [[0.0] * 4]
    torch.testing.assert_close(
        top_features(score[:, :1, :1], there[:, :1, :1], 3)[0], torch.tensor([0.9, 0, 0, 0.9, 0.9])
    )


def test_copies_and_order_change_nothing() -> None:
    torch.manual_seed(0)
    (x, there_x), (y, there_y) = unit_rows(2, 5, 8), unit_rows(2, 6, 8)
    matching, plain = (MatchingScores(8, 2, [(0, 1)], filter=name, keep=3) for name in ("greedy", "none"))
    expected, _ = matching([(x, there_x), (y, there_y)])

    def twice(rows: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([rows, rows[:, 1:3], rows[:, 1:2]], 1), F.pad(there, (0, 3), value=True)

    for sets in (
        [twice(x, there_x), (y, there_y)],
        [(x, there_x), twice(y, there_y)],
        [(x.flip(1), there_x), (y[:, torch.randperm(6)], there_y)],
        [(torch.cat([x, -x], 1), F.pad(there_x, (0, 5))), (y, there_y)],
    ):
        torch.testing.assert_close(matching(sets)[0], expected)
    assert not torch.allclose(plain([twice(x, there_x), (y, there_y)])[0], plain([(x, there_x), (y, there_y)])[0])


def test_greedy_takes_what_concerns_the_other_side_most() -> None:
    angle = torch.tensor([0.0, 0.1, 1.0, 2.0])
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    all_there, other = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[[0.995004, 0.0998334]]])
    r = relevance(x, other, all_there[:, :1])
    torch.testing.assert_close(r, (angle - 0.1).cos()[None])
    places, found = greedy(x, all_there, r[:, None], 3, 0.9)
    assert places[0, 0].tolist() == [1, 2, 3] and found.all()  # 0 is a copy of 1
    assert greedy(x, all_there, r[:, None], 4, 0.9)[1].tolist() == [[[True, True, True, False]]]
    places, found = greedy(x.repeat(1, 2, 1), all_there.repeat(1, 2), r.repeat(1, 2)[:, None], 8, 1.0)
    assert sorted(places[0, 0, :4].tolist()) == [0, 1, 2, 3] and found.sum() == 4
    assert not greedy(x, ~all_there, r[:, None], 2, 0.9)[1].any()
    copies = torch.cat([other, other, -other], 1)
    twice = relevance(x, copies, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(twice, torch.zeros(1, 4), atol=1e-6, rtol=0)


def test_kernels_count_and_grow() -> None:
    centre, width = kernel_centres(8, 0.5, 0.01)
    torch.testing.assert_close(centre, torch.tensor([-6, -4, -2, 0, 2, 4, 6, 7]) / 7)
    assert width.tolist() == pytest.approx([0.5] * 7 + [0.01])
    score = torch.tensor([[[1.0, 1.0, 0.2], [0.3, 1.0, -0.5]]])
    there = torch.ones_like(score, dtype=torch.bool)
    exact = kernel_features(score, there, torch.tensor([1.0]), torch.tensor([1e-3]))
    torch.testing.assert_close(exact, torch.tensor([[3.0]]).log() + torch.tensor([[2.0]]).log())
    assert not torch.allclose(
        kernel_features(score.mT, there.mT, centre, width), kernel_features(score, there, centre, width)
    )
    fewer = there.clone()
    fewer[..., 2] = False
    assert (kernel_features(score, there, centre, width) >= kernel_features(score, fewer, centre, width)).all()
    for bad in (lambda: kernel_centres(1), lambda: kernel_centres(3, 0.0)):
        with pytest.raises(ValueError, match="kernels must be 2 at least and widths positive"):
            bad()


FORMS = [
    {},
    {"features": "kernel", "filter": "none"},
    {"filter": "slots"},
    {"filter": "slots", "features": "flat"},
    {"shared": False},
]


@pytest.mark.parametrize("changes", FORMS)
def test_padding_and_missing_fields(changes: dict[str, object]) -> None:
    model, fields = premise(**changes), given()
    sentences = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)
    expected = model(**fields, product_sentences=sentences)
    wide, masks = {}, {}
    for name, x in fields.items():
        wide[name] = torch.cat([x, torch.full_like(x[:, :2], 7.0)], 1)
        masks[f"{name}_mask"] = torch.arange(wide[name].shape[1]).expand(3, -1) < x.shape[1]
    padded = model(**wide, **masks, product_sentences=F.pad(sentences, (0, 2)))
    torch.testing.assert_close(padded.features, expected.features)
    torch.testing.assert_close(padded.score, expected.score)
    nothing = {"review_regions_mask": torch.zeros(3, 5, dtype=torch.bool)}
    without = model(**{name: x for name, x in fields.items() if name != "review_regions"})
    torch.testing.assert_close(model(**fields, **nothing).score, without.score)
    assert without.features[:, -4:].tolist() == [[1.0, 1.0, 1.0, 0.0]] * 3
    assert without.score.isfinite().all() and not torch.allclose(without.score, expected.score)


def test_words_are_numbers_where_there_is_a_vocabulary_and_images_may_be_left_out() -> None:
    model = premise(vocabulary=11, region_dim=None)
    ids = torch.randint(11, (2, 6))
    said = model(ids, ids.flip(1))
    assert said.score.shape == (2,) and said.features.shape[1] == model.matching.dim + 2
    same = model(ids, ids)
    torch.testing.assert_close(same.features[:, 0], torch.ones(2))
    with pytest.raises(
        ValueError, match="product_regions is given, and this network has no images: build it with region_dim"
    ):
        model(ids, ids, torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"review_text must be words \(batch, words\)"):
        model(ids, torch.randn(2, 6, 6))


def test_groups_are_means_of_their_rows() -> None:
    rows = torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found, there = grouped(rows, mask, torch.tensor([[0, 0, 1, 5, 5]] * 2), 3)
    assert there.tolist() == [[True, True, True], [True, False, False]]
    torch.testing.assert_close(found[0, 2], F.normalize(rows[0, 3:].mean(0), dim=0))
    torch.testing.assert_close(found[1, 0], F.normalize(rows[1, :2].mean(0), dim=0))


def test_slots_are_held_apart() -> None:
    model = premise(filter="slots")
    said = model(**given())
    assert said.penalty is not None and said.penalty > 0
    said.penalty.backward()
    assert model.matching.slots[0].queries.grad.abs().max() > 0  # of windows, of which there are several
    assert premise()(**given()).penalty is None


def test_the_losses() -> None:
    label = torch.tensor([3.0, 1, 2, 4, 4, 0])
    assert rank_hinge(label, label, 2) == 0 and rank_hinge(10 * label, label, 2, margin="fixed") == 1 / 2
    score = torch.tensor([1.0, 0.5, 1.5, 0, 0, 0])
    assert rank_hinge(score, label, 2).item() == pytest.approx((1.5 + 1.5 + 0 + 4) / 2)
    gaps = torch.tensor([1.0, 0, 0, 2, 1, 1])
    torch.testing.assert_close(rank_hinge(score, gaps, 2), rank_hinge(score, gaps, 2, margin="fixed"))
    level = torch.zeros(3)
    assert rank_hinge(torch.tensor([0.0, 1.0, -1.0]), level, 2) == 1  # equal labels still push
    for bad, message in (
        (lambda: rank_hinge(score, label, 3), "groups of 4"),
        (lambda: rank_hinge(score[None], label[None], 2), "groups of 3"),
        (lambda: rank_hinge(score, label, 2, margin="soft"), "margin must be adaptive, fixed or a number, got 'soft'"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_the_baseline_without_crossmatch_and_with_padding() -> None:
    torch.manual_seed(0)
    model = ConvKNRM(9, word_dim=4, dim=5, windows=(1, 2), kernels=3, crossmatch=False).eval()
    ids, other = torch.randint(9, (2, 6)), torch.randint(9, (2, 5))
    expected = model(ids, other)
    assert expected.features.shape == (2, 6)
    masks = [torch.arange(n + 2).expand(2, -1) < n for n in (6, 5)]
    padded = model(F.pad(ids, (0, 2)), F.pad(other, (0, 2)), *masks)
    torch.testing.assert_close(padded.features, expected.features)


def test_bad_arguments() -> None:
    model, fields = premise(), given()
    for bad, message in (
        (lambda: model(**{**fields, "review_text": fields["review_text"][:2]}), r"review_text must be \(3, rows, 6\)"),
        (
            lambda: model(**{**fields, "product_regions": torch.rand(3, 2, 4)}),
            r"product_regions must be \(3, rows, 5\)",
        ),
        (lambda: model(**fields, product_text_mask=torch.ones(3, 2)), r"the mask of product_text must be \(3, 7\)"),
        (lambda: model(**fields, review_images=torch.ones(3, 2)), r"the groups of review_regions must be \(3, 5\)"),
        (lambda: premise(filter="random"), "filter must be one of greedy, slots, none, got 'random'"),
        (lambda: premise(features="mean"), "features must be one of topk, kernel, flat"),
        (lambda: premise(features="flat"), "flat features have an order with slots only"),
        (lambda: premise(keep=0), "keep and top_k must be positive"),
        (lambda: premise(threshold=0.0), r"threshold in \(0, 1\]"),
        (lambda: premise(dim=0), "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
