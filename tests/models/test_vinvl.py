"""What VinVL implies: selection, attributes, regions beside words, what is drawn for training, bad arguments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.vinvl import (
    MATCHED,
    UNASKED,
    WRONG_FIRST,
    WRONG_SECOND,
    Answers,
    AttributeHead,
    OscarPlus,
    RegionDetector,
    answer_loss,
    attribute_loss,
    caption,
    captioning_mask,
    decode,
    encode,
    hidden_words,
    polluted,
    pretraining_loss,
    region_vectors,
    select_boxes,
    unmatched_unasked,
)
from saccade.models.vinvl.captioning import advance, start


def _oscar(**changes: Any) -> OscarPlus:
    torch.manual_seed(0)
    model = catalogue.create("vinvl", **{**catalogue.part("vinvl").example, **changes})
    assert isinstance(model, OscarPlus)
    return model.eval()


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(30, (2, 6), generator=generator), torch.randn(2, 5, 10, generator=generator)


def _boxes(count: int = 40, classes: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    low = 30 * torch.rand(count, 2, generator=generator)
    sides = 5 + 10 * torch.rand(count, 2, generator=generator)
    return torch.cat([low, low + sides], 1), torch.randn(count, classes, generator=generator).mul(2).softmax(1)


@pytest.mark.parametrize("agnostic", [False, True])
def test_selection(agnostic: bool) -> None:
    boxes, shares = _boxes()
    counts = []
    for threshold in (0.0, 0.3, 0.6, 0.9, 1.1):
        kept = select_boxes(boxes, shares, threshold=threshold, least=4, most=12, agnostic=agnostic)
        assert len(kept.numbers.unique()) == len(kept.numbers) and 4 <= len(kept.numbers) <= 12
        assert kept.scores.diff().le(0).all() and kept.labels.ge(1).all()
        assert kept.scores.gt(0).all() and torch.equal(kept.scores, shares[kept.numbers, kept.labels])
        counts.append(len(kept.numbers))
    assert counts == sorted(counts, reverse=True) and counts[-1] == 4
    few = select_boxes(boxes[:3], shares[:3], least=10, most=20, agnostic=agnostic)
    assert len(few.numbers) == 3
    same = boxes[:1].expand(3, -1)
    share = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.7, 0.2], [0.3, 0.1, 0.6]])
    kept = select_boxes(same, share, least=0, most=3, agnostic=agnostic)
    assert kept.labels.tolist() == ([1] if agnostic else [1, 2])


def test_region_vectors() -> None:
    found = region_vectors(torch.ones(1, 3), torch.tensor([[10.0, 5.0, 30.0, 20.0]]), (20, 40))
    assert found.tolist() == [[1, 1, 1, 0.25, 0.25, 0.75, 1.0, 0.5, 0.75]]


def test_attributes_go_by_the_class_through_its_vector_alone() -> None:
    torch.manual_seed(0)
    head, maps = AttributeHead(8, 5, 4, 3, 6), torch.randn(3, 8, 2, 2)
    nn.init.normal_(head.inner.weight)
    labels = torch.tensor([0, 1, 2])
    torch.testing.assert_close(head(maps, labels), head(maps.mean((2, 3)), labels))
    assert not torch.equal(head(maps, labels), head(maps, labels + 1))
    with torch.no_grad():
        head.inner.weight[:, 8:] = 0
    assert torch.equal(head(maps, labels), head(maps, labels + 1))
    untold = AttributeHead(8, 5, 4, 3, 6, told=False)
    assert torch.equal(untold(maps, labels), untold(maps, labels + 1))


def test_attribute_loss() -> None:
    like = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(attribute_loss(torch.zeros(2, 4), like), torch.tensor(4.0).log() / 2)
    logits = torch.randn(2, 4)
    torch.testing.assert_close(attribute_loss(logits, like), F.cross_entropy(logits[:1], like[:1] / 2) / 2)
    assert attribute_loss(logits[:0], like[:0]) == 0


def test_regions_have_no_order() -> None:
    model, (ids, regions) = _oscar(), _inputs()
    order = torch.randperm(5)
    plain, other = model(ids, regions), model(ids, regions[:, order])
    torch.testing.assert_close(other.states[:, :6], plain.states[:, :6])
    torch.testing.assert_close(other.states[:, 6:], plain.states[:, 6:][:, order])
    torch.testing.assert_close(other.matched, plain.matched)


def test_masked_regions_change_nothing_and_none_is_bert() -> None:
    model, (ids, regions) = _oscar(), _inputs()
    real = torch.ones(2, 11, dtype=torch.long)
    real[:, 9:] = 0
    changed = regions.clone()
    changed[:, 3:] = 9.0
    masked = model(ids, regions, real)
    torch.testing.assert_close(model(ids, changed, real).states[:, :9], masked.states[:, :9])
    torch.testing.assert_close(model(ids, regions[:, :3]).states, masked.states[:, :9])
    assert torch.equal(model(ids, regions[:, :0]).states, model(ids).states)
    assert torch.equal(model(ids).states, model.bert(ids))


def test_captioning_sees_the_past_alone() -> None:
    model, (ids, regions) = _oscar(), _inputs()
    tags = torch.tensor([[7, 8], [9, 9]])
    words, others = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    mask = captioning_mask(words, others)
    assert mask.shape == (2, 11, 11) and not mask[:, 4:, :4].any() and mask[:, :4, 4:].all()
    kinds = torch.tensor([[0, 0, 0, 0, 1, 1]]).expand(2, -1)
    said = model(torch.cat([ids[:, :4], tags], 1), regions, mask, kinds).states
    later = ids[:, :4].clone()
    later[:, 3] = (later[:, 3] + 1) % 30
    again = model(torch.cat([later, tags], 1), regions, mask, kinds).states
    torch.testing.assert_close(again[:, :3], said[:, :3])
    torch.testing.assert_close(again[:, 4:], said[:, 4:])
    assert not torch.allclose(again[:, 3], said[:, 3])


def test_captions_word_by_word_are_those_of_the_whole_text() -> None:
    model, (ids, regions) = _oscar(), _inputs()
    nn.init.normal_(model.bert.embeddings.words.weight)
    tags, longest, mask = ids[:, :3], 8, 29
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 2], real[1, 7] = False, False
    state, step, said = start(model, regions, tags, real=real, longest=longest), advance(model, mask), [5]
    types = torch.tensor([0] * longest + [1] * 3).expand(2, -1)
    with torch.no_grad():
        for number in range(4):
            found, state = step(torch.full((2,), said[-1]), state)
            text = torch.zeros(2, longest, dtype=torch.long)
            text[:, : len(said)], text[:, len(said)] = torch.tensor(said), mask
            words = (torch.arange(longest) <= len(said)).expand(2, -1)
            whole = model(torch.cat([text, tags], 1), regions, captioning_mask(words, real), types)
            torch.testing.assert_close(found.logits, whole.logits[:, len(said)])
            said.append(7 + number)
    options: dict[str, Any] = {"begin": 5, "end": 6, "mask": mask, "longest": 8, "most": 4}
    greedy = caption(model, regions, tags, **options)
    assert greedy.words.shape[0] == 2 and not torch.isin(greedy.words, torch.tensor([5, mask])).any()
    first = advance(model, mask)(torch.full((2,), 5), start(model, regions, tags, longest=8))[0].logits
    first[:, [0, 5, mask]] = -torch.inf
    assert torch.equal(greedy.words[:, 0], first.argmax(1))
    assert caption(model, regions, tags, beams=3, **options).scores.shape == (2,)
    assert caption(model, regions, **options).words.shape[0] == 2


def test_what_is_drawn_for_training() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs: list[tuple[str, str | None]] = [("a", "A"), ("b", "B"), ("c", None)]
    kinds = []
    for _ in range(4000):
        first, second, kind = polluted(pairs, 0, generator)
        kinds.append(kind)
        assert (first == "a") == (kind != WRONG_FIRST) and (second == "A") == (kind != WRONG_SECOND)
    shares = torch.tensor(kinds).bincount() / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.03, rtol=0)
    alone = [polluted(pairs, 2, generator).kind for _ in range(400)]
    assert set(alone) == {MATCHED, WRONG_FIRST} and 150 < alone.count(MATCHED) < 250
    ids, marks = torch.full((100, 50), 7), torch.zeros(100, 50, dtype=torch.bool)
    marks[:, 0] = True
    shown, asked = hidden_words(ids, marks, mask=3, vocabulary=1000, generator=generator)
    there = asked != UNASKED
    assert abs(there.float().mean() - 0.15 * 49 / 50) < 0.02 and not there[:, 0].any()
    assert asked[there].eq(7).all() and torch.equal(shown[~there], ids[~there])
    assert abs((shown[there] == 3).float().mean() - 0.8) < 0.06
    assert 0.05 < (shown[there] == 7).float().mean() < 0.15
    second = torch.arange(50).expand(100, -1) >= 25
    left = unmatched_unasked(asked, second, torch.tensor([WRONG_SECOND, MATCHED] * 50))
    assert torch.equal(left[1::2], asked[1::2]) and not (left[::2, 25:] != UNASKED).any()
    assert torch.equal(left[::2, :25], asked[::2, :25])


def test_losses() -> None:
    model, (ids, regions) = _oscar(), _inputs()
    asked, kinds = torch.full((2, 6), UNASKED), torch.tensor([0, 2])
    asked[0, 2], asked[1, 4] = 5, 9
    said = model(ids, regions)
    loss, terms = pretraining_loss(said, asked, kinds)
    words = F.cross_entropy(torch.stack([said.logits[0, 2], said.logits[1, 4]]), torch.tensor([5, 9]))
    torch.testing.assert_close(terms["words"], words)
    torch.testing.assert_close(loss, words + F.cross_entropy(said.matched, kinds))
    longer = F.pad(asked, (0, 5), value=UNASKED)
    torch.testing.assert_close(pretraining_loss(said, longer, kinds).loss, loss)
    nothing = pretraining_loss(said, torch.full((2, 6), UNASKED), kinds)
    assert nothing.terms["words"] == 0
    pair = Answers(16, 2, views=2, hidden=8)
    assert pair(said.pooled).shape == (1, 2)
    logits, target = Answers(16, 4)(said.pooled), torch.rand(2, 4)
    torch.testing.assert_close(
        answer_loss(logits, target), F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 2
    )


def test_box_coding_goes_there_and_back() -> None:
    boxes, others = _boxes()[0], _boxes()[0].flip(0)
    torch.testing.assert_close(decode(encode(boxes, others, (10, 10, 5, 5)), others, (10, 10, 5, 5)), boxes)
    assert not encode(boxes, boxes).any()


def _detector(**changes: Any) -> RegionDetector:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "width": 8, "blocks": (1, 1, 1, 1), "groups": 2, "stem": 4, "sizes": (16, 32), "class_dim": 3,
        "attribute_hidden": 5,
    }  # fmt: skip
    return RegionDetector(4, 3, **{**sizes, **changes}).eval()


def test_the_detector(tmp_path: Path) -> None:
    detector, images = _detector(), torch.rand(2, 3, 48, 64)
    said = detector(images)
    T = said.boxes.shape[1]
    assert 1 <= T <= 100 and said.features.shape == (2, T, 64 + 6) and said.attributes.shape == (2, T, 4)
    assert said.boxes[..., 2].max() <= 64 and said.boxes[..., 3].max() <= 48 and said.labels.max() < 4
    real = said.scores > 0
    torch.testing.assert_close(said.attributes[real].sum(1), torch.ones(int(real.sum())))
    torch.testing.assert_close(
        said.features[0, :, 64:], region_vectors(said.features[0, :, :64], said.boxes[0], (48, 64))[:, 64:]
    )
    alone = detector(images[1:])
    n = int((alone.scores > 0).sum())
    torch.testing.assert_close(alone.boxes[0, :n], said.boxes[1, :n])
    moved = _detector(regress=True)(images)
    assert moved.boxes.shape == said.boxes.shape and not torch.allclose(moved.boxes, said.boxes)
    picture = pytest.importorskip("PIL.Image")
    picture.new("RGB", (40, 30), (200, 40, 40)).save(tmp_path / "a.png")
    found = detector.predict(tmp_path / "a.png")
    assert found.boxes[..., 2].max() <= 40.01 and len(detector.answer(found)) == 1
    assert detector.picture(found).size == (40, 30)


def test_a_region_s_feature_is_the_mean_of_its_map() -> None:
    detector = _detector()
    detector.last = nn.Identity()  # type: ignore[assignment]
    constant = torch.arange(32.0)[None, :, None, None].expand(1, 32, 3, 4)
    torch.testing.assert_close(
        detector.of_regions(constant, torch.tensor([[3.0, 4.0, 40.0, 30.0]])), torch.arange(32.0)[None]
    )


def test_the_detector_learns() -> None:
    detector = _detector().train()
    truth = [
        {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]), "attributes": torch.eye(4)[1:2]},
        {"labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)},
    ]
    torch.manual_seed(0)
    loss = detector.loss(torch.rand(2, 3, 48, 64), truth)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    frozen = detector.freeze().train()
    assert not any(norm.training for norm in frozen.modules() if isinstance(norm, nn.BatchNorm2d))
    assert not frozen.stages[0][0].conv1.weight.requires_grad and frozen.stages[1][0].conv1.weight.requires_grad


def test_refusals() -> None:
    model, (ids, regions) = _oscar(), _inputs()
    boxes, shares = _boxes()
    said = model(ids, regions)
    calls = (
        (partial(_oscar, kinds=1), "kinds at least 2"),
        (partial(model, ids, regions[..., :9]), r"region_vectors must be \(batch, regions, 10\)"),
        (partial(model, ids, regions[:1]), "of 2 images, got 1"),
        (partial(caption, model, regions, longest=8, most=8), "most must be from 1 to 7"),
        (partial(caption, model, regions, ids, longest=8, most=3), "has 12 places for words, and one stands at 13"),
        (partial(caption, model, regions, real=torch.ones(2, 4, dtype=torch.bool)), r"real must be \(2, 5\)"),
        (partial(model, ids, regions, torch.ones(2, 6)), r"attention_mask must be \(2, 11\)"),
        (partial(model, ids.repeat(1, 3)), "at most 12 words"),
        (partial(select_boxes, boxes, shares[:3]), "boxes must be"),
        (partial(select_boxes, boxes, shares, least=5, most=4), "least must be at least 0 and at most 4"),
        (partial(AttributeHead, 0), "widths must be positive"),
        (partial(Answers, 4, 0), "must be positive"),
        (partial(Answers(16, 2, views=2), torch.zeros(3, 16)), "2 images a question, got 3"),
        (partial(polluted, [("a", "b")], 0, torch.Generator()), "pairs must be two at least"),
        (partial(pretraining_loss, said, torch.zeros(2, 12).long(), torch.zeros(2).long()), "at most 11 places"),
        (partial(_detector, blocks=(1, 1)), "four numbers of blocks"),
        (partial(_detector(), torch.zeros(1, 1, 32, 32)), r"images \(batch, 3"),
    )
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
