"""The task of recognising: identities in degraded views, its losses and figures; and scores of retrieval."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.embedding import Embedder, EmbeddingOutput
from saccade.train.data import CONDITIONS, degraded, faces
from saccade.train.data.identities import scaled
from saccade.train.metrics.retrieval import apart, mean_average_precision, rank, tar_at_far
from saccade.train.tasks.recognise import VIEWS, Recognise, contrastive_loss, scored
from saccade.train.tasks.settings import Settings

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def task() -> Recognise:
    return Recognise(Settings(length=576, batch=8, steps=2, evaluation_size=24), torch.device("cpu"))


class Pixels(Embedder):
    """The picture itself."""

    def __init__(self, spaces: bool = False) -> None:
        super().__init__()
        self.scale, self.spaces = nn.Parameter(torch.tensor(1.0)), spaces

    def embed(self, x_BCHW: Tensor) -> EmbeddingOutput:
        embedding = F.normalize(self.scale * x_BCHW[:, 0].flatten(1), dim=1)
        return EmbeddingOutput(embedding, torch.stack([embedding, embedding], 1) if self.spaces else None)


def test_scores_of_retrieval_by_hand() -> None:
    likeness = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.1, 0.2, 0.9, 0.3]])
    relevant = torch.tensor([[False, True, False, True], [False, False, False, False]])
    assert mean_average_precision(likeness, relevant) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert rank(likeness, relevant) == 0 and rank(likeness, relevant, k=2) == 1
    counts = torch.tensor([[False, True, True, True], [True] * 4])
    assert mean_average_precision(likeness, relevant, counts) == pytest.approx((1 + 2 / 3) / 2)
    score = torch.tensor([0.9, 0.5, 0.3, 0.8, 0.4, 0.2, 0.1])
    genuine = torch.tensor([True, True, True, False, False, False, False])
    assert [tar_at_far(score, genuine, far) for far in (0, 0.25, 0.5, 1)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    for bad, message in (
        (lambda: mean_average_precision(likeness, relevant[:, :2]), "queries, gallery"),
        (lambda: mean_average_precision(likeness, torch.zeros(2, 4, dtype=torch.bool)), "nothing|no query"),
        (lambda: rank(likeness, relevant, k=0), "k must be positive"),
        (lambda: tar_at_far(score, genuine, 2.0), r"far must be in \[0, 1\], got 2.0"),
        (lambda: tar_at_far(score, genuine.float()), "genuine bool"),
        (lambda: tar_at_far(score[:3], genuine[:3]), "impostors"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_nothing_is_found_in_itself_nor_by_its_own_camera() -> None:
    label, camera = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 0])
    relevant, counts = apart(label, camera)
    assert (relevant & counts)[0].tolist() == [False, False, True, False] and counts[0, 3]
    assert apart(label)[1].sum() == 12


def test_views_follow_from_their_generator_and_are_as_bad_as_their_condition() -> None:
    clear = scaled(faces()[:12], 24)
    assert faces().shape == (100, 1, 25, 25) and clear.shape == (12, 1, 24, 24)
    condition = torch.arange(12) % len(CONDITIONS)
    first, again, other = (degraded(clear, condition, 3, generator(seed)) for seed in (0, 0, 1))
    assert first.shape == (12, 3, 1, 24, 24) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1
    many = {name: degraded(clear, torch.full((12,), k), 8, generator()) for k, name in enumerate(CONDITIONS)}

    def rough(x: Tensor) -> float:
        return float(x.diff(dim=-1).abs().mean())

    plain = rough(clear)
    assert rough(many["blurred"]) < plain and rough(many["coarse"]) < plain and rough(many["noisy"]) > 2 * plain
    assert many["dark"].mean() < 0.6 * clear.mean()
    assert many["blurred"].mean() == pytest.approx(float(clear.mean()), rel=0.05)
    with pytest.raises(ValueError, match="condition must be from 0 to 3"):
        degraded(clear, torch.full((12,), 4), 2, generator())


def test_batches_hold_pairs_and_what_is_judged_on_is_new(task: Recognise) -> None:
    images, truth = task.batch(0, 3)
    assert images.shape == (8, VIEWS, 3, 24, 24) and torch.equal(images, task.batch(0, 3)[0])
    assert not torch.equal(images, task.batch(1, 3)[0])
    identity, condition = truth.unbind(1)
    assert identity.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and (condition[::2] != condition[1::2]).all()
    judged = task.test[1]
    assert judged.shape == (24, 2) and len({tuple(row) for row in judged.tolist()}) == 24
    for learned, held_out in zip(*task.things):
        same = torch.cdist(learned.flatten(1), held_out.flatten(1)) == 0
        assert not same.any() or len(held_out) > 30  # two digits may be the same picture, faces may not


def test_who_knows_everything_has_map_1_and_who_knows_nothing_less(task: Recognise) -> None:
    truth = task.test[1]
    who, how = (F.one_hot(column).float() for column in truth.unbind(1))
    assert scored(who, how, truth) == {"map": 1.0, "rank1": 1.0, "tar_at_far": 1.0, "condition_map": 1.0}
    assert scored(how, who, truth)["map"] < 0.5


def test_a_network_of_pixels_is_judged_as_pixels_are(task: Recognise) -> None:
    model = Pixels()
    figures = task.figures(model)
    assert set(figures) == {"map", "rank1", "tar_at_far", "condition_map"}
    assert task.quality(model) == figures["map"] and 0.1 < figures["map"] < 1 and 0.1 < task.chance() < 1
    assert task.loss(model, task.batch(0, 0)).isfinite()
    both = task.loss(Pixels(spaces=True), task.batch(0, 0))
    assert both != task.loss(model, task.batch(0, 0))
    assert {name: tuple(x.shape) for name, x in task.pictures(model).items()} == {
        name: (4, 24, 24, 3) for name in ("a view", "mean of views", "nearest")
    }
    assert [tuple(x.shape) for x in task.part_inputs(300)] == [(2, 3, 17, 17)]
    with pytest.raises(ValueError, match="square"):
        Recognise(Settings(length=1000), torch.device("cpu"))


def test_the_contrastive_loss_by_hand() -> None:
    embedding = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    label = torch.tensor([4, 4, 7])
    assert contrastive_loss(embedding, label, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
    with pytest.raises(ValueError, match="two of one label"):
        contrastive_loss(embedding, torch.arange(3))


def test_a_set_is_the_mean_direction_of_its_views() -> None:
    views = torch.rand(2, 3, 3, 5, 5, generator=generator())
    said = Pixels(spaces=True)(views)
    each = F.normalize(views[:, :, 0].flatten(2), dim=2)
    torch.testing.assert_close(said.embedding, F.normalize(each.mean(1), dim=1))
    torch.testing.assert_close(said.views, each)
    assert said.spaces.shape == (2, 2, 25)
    with pytest.raises(ValueError, match="a view at least"):
        Pixels()(views[:, :0])


def test_likeness_is_told_and_drawn(tmp_path: object) -> None:
    from saccade.models.images import to_picture

    paths = []
    for number in range(2):
        paths.append(f"{tmp_path}/{number}.png")
        to_picture(torch.rand(3, 9, 12, generator=generator(number))).save(paths[-1])
    model = Pixels(spaces=True)
    model.image_size = (8, 8)
    output = model.predict(paths)
    said = model.answer(output, ["shape", "colour"])
    assert list(said[0]) == ["like image 1 in shape", "like image 1 in colour"]
    assert said[0]["like image 1 in shape"] == pytest.approx(1) and said[1]["like image 1 in colour"] < 1
    assert model.picture(output).height == 2 * 112
    with pytest.raises(ValueError, match="one for each of 2 spaces, got 1"):
        model.answer(output, ["shape"])
    assert list(Pixels().answer(EmbeddingOutput(output.embedding))[1]) == ["like image 1"]
