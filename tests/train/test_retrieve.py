"""The task of retrieving: triples, sentences, its loss and figures; a retriever's documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.embedding import EmbeddingOutput
from saccade.models.retrieval import Retriever, nearest
from saccade.train.data import composed
from saccade.train.data.composed import ATTRIBUTES, LONGEST, WORDS, description, pictures
from saccade.train.metrics.retrieval import ndcg
from saccade.train.tasks.retrieve import Retrieve, coded, matching_loss
from saccade.train.tasks.settings import Settings

pytest.importorskip("torchmetrics")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def said(words: Tensor) -> str:
    return " ".join(WORDS[number] for number in words.tolist() if number > 1)


@pytest.fixture(scope="module")
def task() -> Retrieve:
    return Retrieve(Settings(length=256, batch=8, steps=2, evaluation_size=24), torch.device("cpu"))


class Knowing(Retriever):
    """Reads the attributes from a text, and the target's from those of the reference and the request."""

    def __init__(self, deaf: bool = False) -> None:
        super().__init__()
        self.scale, self.deaf, self.tables = nn.Parameter(torch.tensor(1.0)), deaf, {}

    def learn(self, images: Tensor, attributes: Tensor) -> None:
        self.tables |= {float(image.sum()): row for image, row in zip(images, attributes)}

    def vector(self, pixel_values: Tensor | None, input_ids: Tensor | None, mask_BL: Tensor | None) -> EmbeddingOutput:
        values = ((0, 14), (1, 16), (2, 21))
        if pixel_values is None:
            assert input_ids is not None
            rows = torch.zeros(len(input_ids), 4, dtype=torch.long)
        else:
            rows = torch.stack([self.tables[float(image.sum())] for image in pixel_values])
        if input_ids is not None and not (self.deaf and pixel_values is not None):
            for row, words in zip(rows, input_ids.tolist()):
                for axis, first in values:
                    found = [word - first for word in words if first <= word < first + ATTRIBUTES[axis]]
                    row[axis] = found[0] if found else row[axis]
                if WORDS.index("top") in words or WORDS.index("bottom") in words:
                    row[3] = 2 * (WORDS.index("bottom") in words) + (WORDS.index("right") in words)
        one_hot = [F.one_hot(column, many) for column, many in zip(rows.unbind(1), ATTRIBUTES)]
        return EmbeddingOutput(F.normalize(self.scale * torch.cat(one_hot, 1).float(), dim=1))


def test_triples_differ_in_what_is_asked_for_and_follow_from_their_generator() -> None:
    first, again, other = (composed(64, 16, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.reference, other.reference)
    assert first.reference.shape == (64, 3, 16, 16) and first.target.min() >= 0 and first.target.max() <= 1
    assert first.request.shape == first.caption.shape == (64, LONGEST)
    changed = (first.before != first.after).sum(1)
    assert set(changed.tolist()) == {1, 2}
    for before, after, request, words, caption in zip(
        first.before.tolist(), first.after.tolist(), first.request, first.description, first.caption
    ):
        assert said(words) == description(before) and said(caption) == description(after)
        assert said(request).count(" and ") == sum(a != b for a, b in zip(before, after)) - 1


def test_things_are_where_and_what_they_are_said_to_be() -> None:
    every = torch.cartesian_prod(*(torch.arange(n) for n in ATTRIBUTES))
    shown = pictures(every, 32, generator())
    colour = shown.amax(1) - shown.amin(1) > 0.45  # things have colour, the ground hardly
    right, down = every[:, 3] % 2 == 1, every[:, 3] >= 2
    rows, columns = colour.float().sum(2), colour.float().sum(1)
    at = torch.arange(32) + 0.5
    x, y = ((mass * at).sum(1) / mass.sum(1).clamp(min=1) for mass in (columns, rows))
    assert ((x > 16) == right).float().mean() > 0.97 and ((y > 16) == down).float().mean() > 0.97
    assert colour[every[:, 0] == 1].sum() > 2 * colour[every[:, 0] == 0].sum()
    with pytest.raises(ValueError, match="side of 8 pixels at least, got 4"):
        pictures(every, 4, generator())


def test_who_knows_everything_finds_everything(task: Retrieve) -> None:
    images = [*task.test[:1], task.test[3]]
    scores = {}
    for deaf in (False, True):
        model = Knowing(deaf)
        for image, attributes in zip(images, task.test[5:]):
            model.learn((image - 0.5) / 0.25, attributes)
        scores[deaf] = task.figures(model)
    assert scores[False]["recall1"] == scores[False]["text_recall1"] == scores[False]["recall5"] == 1
    assert scores[False]["ndcg"] == pytest.approx(1)
    assert scores[True]["recall1"] < 0.3 and scores[True]["ndcg"] < 1 and scores[True]["text_recall1"] == 1
    assert 0 < task.chance() < 0.1


def test_another_picture_of_the_same_is_no_negative() -> None:
    vectors = F.normalize(torch.randn(4, 6, generator=generator()), dim=1)
    score, labels = vectors @ vectors.T / 0.07, torch.arange(4)
    apart = matching_loss(vectors, vectors, labels)
    torch.testing.assert_close(apart, (F.cross_entropy(score, labels) + F.cross_entropy(score.T, labels)) / 2)
    assert matching_loss(vectors, vectors, torch.zeros(4, dtype=torch.long)) == 0
    assert len(set(coded(torch.cartesian_prod(*(torch.arange(n) for n in ATTRIBUTES))).tolist())) == 160


def test_gains_are_discounted_by_place() -> None:
    likeness, gain = torch.tensor([[0.9, 0.8, 0.7], [0.3, 0.2, 0.1]]), torch.tensor([[0, 2, 1], [0, 0, 0]])
    log = torch.tensor([2.0, 3.0, 4.0]).log2()
    expected = float((gain[0] / log).sum() / (torch.tensor([2, 1, 0]) / log).sum())
    assert ndcg(likeness, gain) == pytest.approx(expected, rel=1e-5)
    assert ndcg(likeness, gain, k=1) == 0
    assert ndcg(likeness, gain, torch.tensor([[False, True, True], [True] * 3])) == pytest.approx(1)
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        ndcg(likeness, gain, k=0)
    with pytest.raises(ValueError, match="no query"):
        ndcg(likeness, torch.zeros(2, 3))


def test_what_is_nearest_has_its_number_or_its_name() -> None:
    gallery = F.normalize(torch.randn(5, 3, generator=generator()), dim=1)
    assert nearest(gallery, gallery, k=1)[:, 0].tolist() == list(range(5))
    named = {f"item {i}": row for i, row in enumerate(gallery)}
    assert nearest(gallery[2:3], named, k=9)[0][0] == "item 2" and len(nearest(gallery[2:3], named, k=9)[0]) == 5
    for bad, message in (
        (lambda: nearest(gallery, gallery[:0]), "must have items and k be positive"),
        (lambda: nearest(gallery, gallery[:, :2]), "of one width"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_a_network_learns_and_is_shown(task: Retrieve) -> None:
    from saccade.train.entries import Entry

    entry = Entry("covr", "covr")
    model = task.model(entry, 0)
    before = task.loss(model, task.batch(0, 0))
    before.backward()
    assert before.isfinite() and all(p.grad is not None for p in model.parameters())
    rows = task.pictures(model)
    assert [(name, tuple(row.shape)) for name, row in rows.items()] == [
        (name, (4, 16, 16, 3)) for name in ("reference", "asked for", "found")
    ]
    assert set(task.figures(model)) == {"recall1", "recall5", "ndcg", "text_recall1"}
    assert task.part(entry, 256)(*task.part_inputs(1024)).embedding.shape == (1, 32)
