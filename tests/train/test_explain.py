"""The tasks of planted evidence: what is planted, maps of models whose answer is known, figures, the second table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saccade
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.report.html import page
from saccade.train.data.planted import (
    ASKING,
    BLANK,
    CLASSES,
    FAMILIES,
    PLANTED_WORDS,
    planted_shapes,
    planted_tokens,
)
from saccade.train.entries import Entry, parse
from saccade.train.lab import Lab
from saccade.train.result import CompareResult
from saccade.train.tasks import TASKS, Explain, ExplainCNN, Settings

CPU = torch.device("cpu")
TINY = {
    "dim": 16, "steps": 2, "batch": 4, "evaluation_size": 3, "evaluations": 1, "lengths": (8, 16), "sweep_seconds": 0.01
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def words() -> Explain:
    return Explain(Settings(length=16, batch=4, pairs=2, evaluation_size=3, dim=16), CPU)


@pytest.fixture(scope="module")
def forms() -> ExplainCNN:
    return ExplainCNN(Settings(length=12**2, batch=4, evaluation_size=3, dim=16, layers=2), CPU)


# ---------------------------------------------------------------------------- what is planted


def test_the_words_of_the_asked_family_are_the_evidence_and_say_the_label() -> None:
    found = planted_tokens(200, 32, 3, generator())
    assert found.tokens.shape == (200, 32) and found.tokens.min() >= 0 and found.tokens.max() < PLANTED_WORDS
    assert (found.evidence.sum(1) == 3).all() and not found.evidence[:, -1].any()
    asked = found.tokens[:, -1] - ASKING
    said = found.tokens[found.evidence].view(200, 3) - 1
    assert (said // CLASSES == asked[:, None]).all() and (said % CLASSES == found.labels[:, None]).all()
    for family in range(FAMILIES):  # every family is there, in one class
        there = (found.tokens > BLANK) & (found.tokens < ASKING) & ((found.tokens - 1) // CLASSES == family)
        assert (there.sum(1) == 3).all()
    assert (found.tokens == BLANK).any(1).float().mean() > 0.9
    shares = found.labels.bincount() / 200
    assert shares.min() > 0.15
    again = planted_tokens(200, 32, 3, generator())
    assert all(map(torch.equal, found, again))
    assert not torch.equal(found.tokens, planted_tokens(200, 32, 3, generator(1)).tokens)


def test_the_form_is_the_evidence_and_others_have_its_ink() -> None:
    found = planted_shapes(100, 24, generator())
    assert found.images.shape == (100, 1, 24, 24) and found.images.min() >= 0 and found.images.max() <= 1.1
    assert (found.evidence.flatten(1).sum(1) == 9).all()
    ink = (found.images[:, 0] > 0.5).unflatten(1, (4, 6)).unflatten(3, (4, 6)).sum((2, 4))
    assert set(ink.unique().tolist()) == {0, 9} and (ink > 0).sum((1, 2)).unique().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert (found.images[:, 0][found.evidence] >= 0.6).all()
    # one form a class: cut out, those of a class are all alike
    for label in range(CLASSES):
        pixels = [each.nonzero() for each in found.evidence[found.labels == label]]
        cuts = {str((each - each.amin(0)).tolist()) for each in pixels}
        assert len(cuts) == 1
    assert all(map(torch.equal, found, planted_shapes(100, 24, generator())))


def test_refusals_of_data() -> None:
    with pytest.raises(ValueError, match=r"length at least 4 x pieces \+ 2 \(10\), got 1, 2 and 9"):
        planted_tokens(1, 9, 2)
    with pytest.raises(ValueError, match="side a multiple of 6 from 12 on, got 1 and 20"):
        planted_shapes(1, 20)
    with pytest.raises(ValueError, match="got 1, 8 and 16"):
        Explain(Settings(length=16, pairs=8), CPU)
    with pytest.raises(ValueError, match="length must be the square of a multiple of 6 pixels"):
        ExplainCNN(Settings(length=20**2), CPU)


# ---------------------------------------------------------------------------- tasks


def test_batches_depend_on_seed_and_step_alone_and_hold_no_evidence(words: Explain, forms: ExplainCNN) -> None:
    for task in (words, forms):
        batch = task.batch(1, 2)
        assert len(batch) == 2 and all(map(torch.equal, batch, task.batch(1, 2)))
        assert not torch.equal(batch[0], task.batch(1, 3)[0])
        assert sum(len(held[0]) for held in task.held_out()) == 3
        assert 0.5 < task.chance() < 1
    labels = words.batch(0, 0)[1]
    assert (labels[:, :-1] == -100).all() and (labels[:, -1] < CLASSES).all()


def test_a_word_that_is_taken_away_is_blank_and_the_asking_one_stays(words: Explain) -> None:
    tokens = words.test.tokens[0]
    kept = torch.zeros(2, 15, dtype=torch.bool)
    kept[1, 3] = True
    left = words.without(tokens, kept)
    assert left.shape == (2, 16) and (left[:, -1] == tokens[-1]).all()
    assert (left[0, :-1] == BLANK).all() and left[1, 3] == tokens[3] and (left[1, :3] == BLANK).all()


def test_a_patch_that_is_taken_away_is_empty(forms: ExplainCNN) -> None:
    image = forms.test.images[0]
    kept = torch.ones(1, 16, dtype=torch.bool)
    kept[0, 5] = False  # the second of the second row of four
    left = forms.without(image, kept)
    assert left.shape == (1, 1, 12, 12) and (left[0, 0, 3:6, 3:6] == 0).all()
    torch.testing.assert_close(left[0, 0, 6:], image[0, 6:])
    evidence = forms.evidence(forms.test)
    assert evidence.shape == (3, 16)
    hidden = [forms.without(i, ~e[None])[0, 0] for i, e in zip(forms.test.images, evidence)]
    assert all((image[pixels] == 0).all() for image, pixels in zip(hidden, forms.test.evidence))


class Reader(nn.Module):
    """Answers as if it had learned: attends to the words of the asked family, and these say their class."""

    num_heads = 1

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.empty(0)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor) -> Tensor:
        tokens = self.tokens
        asked = (tokens - 1) // CLASSES == (tokens[:, -1:] - ASKING)
        weights_BM = (asked & (tokens < ASKING)).float()
        weights_BM = weights_BM / weights_BM.sum(1, keepdim=True)
        return (weights_BM[:, None, None] @ values_BHME).expand(-1, -1, tokens.shape[1], -1)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.mix(x_BNC, x_BNC[:, None])[:, 0]


def test_maps_of_a_model_that_reads_the_evidence_find_it(words: Explain) -> None:
    model: Any = words.model(Entry("mine", None, {}, lambda **_: Reader()), 0)
    for mixer in model.mixers:
        model.register_forward_pre_hook(lambda _, given, mixer=mixer: setattr(mixer, "tokens", given[0]))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judgement = words.judged(model)
    assert judgement.measures["raw"]["auc"] == judgement.measures["rollout"]["auc"] == 1.0
    assert judgement.measures["raw"]["precision"] == 1.0 and words.quality(model) == 1.0
    assert "gradient x attention" not in judgement.measures
    (why, answered) = words.remarks(model)
    assert why.startswith("has no map by gradient x attention: Reader does not tell") and "% of" in answered
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    figures = words.figures(model)
    assert figures["evidence_auc"] == 1.0 and 0 <= figures["accuracy"] <= 1
    assert {"raw: auc", "occlusion: deletion", "random: sensitivity", "rollout: believed"} <= set(figures)
    # nothing is read from the fillers, so nothing is lost with them
    found, _ = words.maps(model, words.test.tokens)
    fillers = words.test.tokens[:, :-1] >= ASKING + FAMILIES
    assert found["occlusion"][fillers].abs().max() < 1e-5
    assert words.pictures(model)["raw"].shape == (3, 32, 32, 3)


@pytest.mark.parametrize("slug", ["none", "cbam", "cnntention"])
def test_maps_of_gates(forms: ExplainCNN, slug: str) -> None:
    (entry,) = parse([slug])
    model = forms.model(entry, 0)
    found, missing = forms.maps(model.eval(), forms.test.images)
    shown = [] if slug == "none" else ["gate", "all gates"]
    assert list(found) == [*shown, "gradient x gate", "input x gradient", "occlusion"]
    assert all(map_BM.shape == (3, 16) and map_BM.isfinite().all() for map_BM in found.values())
    assert missing == ({"gate": "it has no gate", "all gates": "it has no gate"} if slug == "none" else {})
    assert list(forms.pictures(model)) == ["example", "evidence", *found]
    figures = forms.figures(model)
    assert figures["evidence_auc"] == pytest.approx(forms.quality(model))


@pytest.mark.parametrize(
    ("task", "names", "rows"),
    [("explain", ["softmax", "lightning"], {"raw", "rollout"}), ("explain-cnn", ["cbam"], {"gate", "gradient x gate"})],
)
def test_a_comparison_prints_a_row_for_each_part_and_map(
    tmp_path: Path, task: str, names: list[str], rows: set[str]
) -> None:
    pytest.importorskip("matplotlib")
    length = 16 if task == "explain" else 144
    sizes: dict[str, Any] = {**TINY, "length": length}
    result = saccade.compare(names, task=task, out=tmp_path / "run", progress=False, **sizes)
    headings, cells = result.details() or ([], [])
    assert headings[:4] == ["mechanism", "map", "auc", "precision"] and headings[-1] == "believed"
    assert {(name, row) for name in names for row in rows} <= {(cell[0], cell[1]) for cell in cells}
    assert "map" in result.table() and "answers" in result.table()
    assert "<td>random</td>" in page(result, {}, {})
    assert result[names[0]].maps["evidence"].shape[-1] == 3
    again = saccade.compare(names, task=task, out=tmp_path / "run", progress=False, **sizes)
    assert again.details() == result.details() == CompareResult.load(tmp_path / "run").details()
    assert TASKS[task].rows == "map" and TASKS["text"].rows == ""


def test_a_comparison_of_another_task_has_no_second_table(tmp_path: Path) -> None:
    result = saccade.compare(["softmax"], task="recall", progress=False, **{**TINY, "length": 24, "pairs": 2})
    assert result.details() is None


# ---------------------------------------------------------------------------- for claims


def test_claims_have_the_data_a_trained_model_and_the_scores() -> None:
    lab = Lab(smoke=True)
    model, task = lab.planted(lambda dim: SoftmaxAttention(dim, 4))
    assert not model.training and any(isinstance(module, SoftmaxAttention) for module in model.modules())
    found = lab.judge(task.maps(model, task.test.tokens)[0], task.evidence(task.test))
    assert {"raw", "gradient x attention", "random"} <= set(found)
    shapes = lab.data.planted_shapes(2, 12, lab.generator())
    evidence = shapes.evidence.flatten(1)
    kept = lab.judge({"mine": evidence.float()}, evidence, lambda b, kept_SM: kept_SM.float().mean(1))
    assert kept["mine"]["auc"] == 1.0 and "deletion" in kept["random"]
