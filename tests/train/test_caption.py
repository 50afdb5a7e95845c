"""The task of captions: scenes and their sentences, figures, pictures; scores of sentences; generation by beams."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.models.beams import Said, search, taken
from saccade.models.captioning import Captioner, CaptionOutput, caption_loss
from saccade.models.images import to_picture
from saccade.train.data import WORDS, described, sentence
from saccade.train.data.described import BEGIN, COLOUR_NAMES, END, MOST_WORDS, PAD, THINGS
from saccade.train.entries import parse
from saccade.train.metrics.text import bleu, cider, exact_match
from saccade.train.tasks.caption import Caption, looking
from saccade.train.tasks.settings import Settings

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Table(Captioner):
    """Says the next word by the word before, whatever the image; looks at the region of the word's number."""

    def __init__(self, logits_VV: Tensor, begin: int = 1, end: int = 2, pad: int = 0) -> None:
        super().__init__()
        self.see_through((4, 4))
        self.logits, self.vocab_size = nn.Parameter(logits_VV), len(logits_VV)
        self.begin, self.end, self.pad = begin, end, pad

    def start(self, pixel_values: Tensor | None) -> tuple[Tensor, Tensor]:
        regions = self.regions(pixel_values, 4)
        return regions, torch.zeros(len(regions), 1)

    def advance(self, words_N: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Said, tuple[Tensor, Tensor]]:
        regions, history = state
        attention = F.one_hot(words_N % regions.shape[1], regions.shape[1]).float()
        said = Said(self.logits[words_N] + 0 * regions.sum((1, 2))[:, None], attention, attention[:, 0])
        return said, (regions, torch.cat([history, words_N[:, None]], 1))


@pytest.fixture(scope="module")
def task() -> Caption:
    return Caption(Settings(length=32**2, batch=8, steps=2, evaluation_size=24), torch.device("cpu"))


def test_scores_of_sentences_by_hand() -> None:
    found, true = ["a red ring above a cross", "two crosses"], [["a red ring above a cross"], ["two red crosses", "x"]]
    assert exact_match(found, true) == 0.5
    assert bleu(found, true) == pytest.approx(math.exp(0.25 * sum(math.log(p) for p in (1, 5 / 6, 1, 1)) + 1 - 9 / 8))
    # by hand: the first is its reference, 10; of the second unigrams alone, and its only bigram is not there
    log2 = math.log(2)
    cosine = 2 * log2**2 / (math.sqrt(2) * log2 * math.sqrt(3) * log2)
    rare = math.sqrt(2 / 3)
    assert cosine == pytest.approx(rare)
    expected = 0.5 * (10 + 10 * (cosine / 4 * math.exp(-1 / 72)) / 2)
    assert cider(found, [true[0], ["two blue crosses", "x"]]) == pytest.approx(expected)
    assert cider(["a b c d"], [["a b c d"]]) == 0  # of one image
    for bad in (
        lambda: exact_match([], []),
        lambda: bleu(found, true[:1]),
        lambda: cider(found, [["a"], []]),
        lambda: cider(found, ["a", "b"]),  # type: ignore[list-item]
    ):
        with pytest.raises(ValueError, match="references"):
            bad()


def test_scenes_show_what_their_sentences_say() -> None:
    scenes, again = described(64, 32, generator()), described(64, 32, generator())
    assert scenes.images.shape == (64, 3, 32, 32) and torch.equal(scenes.images, again.images)
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1
    assert scenes.captions.shape == scenes.cells.shape == (64, MOST_WORDS)
    assert not torch.equal(scenes.images, described(64, 32, generator(), judge=True).images)
    colours = {
        "red": (0.9, 0.2, 0.2),
        "green": (0.2, 0.8, 0.3),
        "blue": (0.25, 0.35, 0.95),
        "yellow": (0.95, 0.85, 0.2),
    }
    kinds = set()
    for image, words, cells in zip(*scenes):
        text = sentence(words.tolist()).split()
        kinds.add(len(text))
        assert [WORDS[word] for word in words if word not in (PAD, END)] == text and (words == END).sum() == 1
        named = [(word, int(cell)) for word, cell in zip(text, cells) if cell >= 0]
        assert all(word in (*COLOUR_NAMES, *WORDS[-2 * len(THINGS) :]) for word, _ in named)
        where = {cell for _, cell in named}
        if "left" in text:
            first, second = named[0][1], named[-1][1]
            assert second == first + 1 and first % 2 == 0
        if "above" in text:
            assert named[-1][1] == named[0][1] + 2
        for cell in range(4):
            patch = image[:, cell // 2 * 16 : cell // 2 * 16 + 16, cell % 2 * 16 : cell % 2 * 16 + 16]
            assert (patch.max() > 0.5) == (cell in where)
        word, cell = named[0]
        patch = image[:, cell // 2 * 16 : cell // 2 * 16 + 16, cell % 2 * 16 : cell % 2 * 16 + 16].flatten(1)
        strongest = patch[:, (patch - patch.median()).abs().sum(0).argmax()]
        assert min(colours, key=lambda name: float((strongest - torch.tensor(colours[name])).norm())) == word
    assert kinds == {3, 7, 8}
    alone = described(20, 32, generator(), most_things=1)
    assert all(len(sentence(words).split()) == 3 for words in alone.captions.tolist())
    behind = described(2, 32, generator(), photographs=[torch.rand(3, 40, 40)])
    assert behind.images.shape == (2, 3, 32, 32)
    for arguments in ({"side": 15}, {"side": 32, "most_things": 3}):
        with pytest.raises(ValueError, match="most_things"):
            described(2, generator=generator(), **arguments)  # type: ignore[arg-type]


def test_the_likeliest_caption_is_found_by_beams_and_not_by_greed() -> None:
    # after 1: 3 (0.6) or 4 (0.4); after 3 anything; after 4 the end at once
    share = torch.full((6, 6), 1e-9)
    share[1, 3], share[1, 4] = 0.6, 0.4
    share[3, 2:6] = torch.tensor([0.4, 0.2, 0.2, 0.2])
    share[4, 2] = 1.0
    share[5, 5] = 1.0
    model, images = Table(share.log()), torch.rand(2, 3, 8, 8)
    greedy, beams = model.generate(images), model.generate(images, beams=2)
    assert greedy.words[0, 0] == 3 and beams.sentences() == [["4"]] * 2
    assert beams.words[:, 1].tolist() == [END] * 2
    torch.testing.assert_close(beams.scores.exp(), torch.tensor([0.4, 0.4]))
    torch.testing.assert_close(greedy.scores.exp(), torch.tensor([0.24, 0.24]))
    assert beams.attention.shape == (2, 2, 4) and beams.attention[0].argmax(1).tolist() == [1, 0]
    every = {}
    for first in (3, 4):
        for second in range(2, 6):
            every[first, second] = float(share[1, first] * share[first, second])
    best = model.generate(images, beams=4, most=2)
    assert float(best.scores[0].exp()) == pytest.approx(max(every.values()), rel=1e-4)
    prompted = model.generate(images, prompt=torch.tensor([[4], [5]]), most=3)
    assert prompted.words.tolist() == [[END, PAD, PAD], [5, 5, 5]] and prompted.lengths.tolist() == [0, 3]
    longer = model.generate(images, beams=3, most=4, length_power=5.0)
    assert longer.lengths[0] > 1  # what is longer is preferred
    for arguments in ({"most": 0}, {"beams": 0}, {"beams": 5}):
        with pytest.raises(ValueError, match="most and beams"):
            model.generate(images, **arguments)
    with pytest.raises(ValueError, match="neither"):
        model.generate()


def test_beams_take_the_state_of_the_caption_that_they_go_on_with() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 7)

    def advance(words: Tensor, state: list[Tensor]) -> tuple[Said, list[Tensor]]:
        history = torch.cat([state[0], words[:, None]], 1)
        seen.append(history)
        return Said(logits[words] + 0.3 * logits[history.sum(1) % 7]), [history]

    seen: list[Tensor] = []
    said = search(
        advance, [torch.zeros(3, 0, dtype=torch.long)], torch.tensor([1, 3, 4]), end=2, pad=0, most=6, beams=3
    )
    for row, first in enumerate((1, 3, 4)):
        words, total, history = said.words[row].tolist(), 0.0, [first]
        for word in words:
            step = (logits[history[-1]] + 0.3 * logits[sum(history) % 7]).log_softmax(0)
            total += float(step[word])
            history.append(word)
            if word == 2:
                break
        assert total == pytest.approx(float(said.scores[row]), rel=1e-4)
    assert taken((None, [torch.arange(3)]), torch.tensor([2, 0]))[1][0].tolist() == [2, 0]


def test_given_captions_are_told_word_by_word() -> None:
    torch.manual_seed(0)
    model, images, captions = Table(torch.randn(6, 6)), torch.rand(2, 3, 8, 8), torch.tensor([[3, 4, 2], [5, 2, 0]])
    said = model(images, captions)
    torch.testing.assert_close(said.logits[0], model.logits[[1, 3, 4]])
    loss = caption_loss(said.logits, captions, END, PAD)
    logs = said.logits.log_softmax(2)
    by_hand = -(logs[0, 0, 3] + logs[0, 1, 4] + logs[0, 2, 2] + logs[1, 0, 5] + logs[1, 1, 2]) / 5
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(caption_loss(said.logits, captions.where(captions != 2, 0), 0, 0), caption_loss(
        said.logits, captions.where(captions != 2, 0), 0, 7))  # fmt: skip
    for given, message in (
        ((images, captions[:1]), "captions must be"),
        ((images, captions.float()), "torch.long"),
        ((images, captions + 3), "from 0 to 5, got 3 to 8|from 0 to 5"),
        ((images[:, :, 0], captions), "features"),
        ((torch.rand(2, 5, 3), captions), "regions, 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*given)
    model.see_through()
    with pytest.raises(ValueError, match="needs features, or an encoder"):
        model(torch.rand(2, 3, 28, 28), captions)
    assert model.on(lambda x: torch.rand(len(x), 5, 4))(torch.rand(2, 3, 28, 28), captions).logits.shape == (2, 3, 6)


def test_the_task_judges_words_and_looks(task: Caption) -> None:
    assert task.arguments(None) == {"vocab_size": len(WORDS), "begin": BEGIN, "end": END, "pad": PAD}  # type: ignore[arg-type]
    images, captions, cells = task.batch(0, 3)
    assert images.shape == (8, 3, 32, 32) and captions.shape == cells.shape == (8, MOST_WORDS)
    torch.manual_seed(0)
    model = Table(torch.randn(len(WORDS), len(WORDS)))
    figures = task.figures(model)
    assert set(figures) == {"exact", "bleu4", "cider", "pointing", "look_named", "look_others"}
    assert figures["exact"] == task.quality(model) == 0 and task.chance() < 0.2
    assert task.loss(model, task.batch(0, 0)) > 3
    rows = task.pictures(model)
    assert {name: tuple(x.shape) for name, x in rows.items()} == {
        name: (4, 160, 160, 3) for name in ("scene", "named things", "said", "truth")
    }
    assert [tuple(x.shape) for x in task.part_inputs(300)] == [(1, 3, 16, 16), (1, MOST_WORDS)]
    with pytest.raises(ValueError, match="multiple of 16"):
        Caption(Settings(length=1000), torch.device("cpu"))


@pytest.mark.parametrize("slug", [part.slug for part in catalogue.parts() if "caption" in part.tasks])
def test_networks_take_part_as_their_cards_say(task: Caption, slug: str) -> None:
    model = task.model(parse([slug])[0], 0)
    task.loss(model, task.batch(0, 0)).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert task.figures(model, share=0.4).keys() >= {"exact", "bleu4", "cider"}
    assert model(*task.part_inputs(1024)).logits.shape == (1, MOST_WORDS, len(WORDS))


def test_who_looks_at_the_cell_points_at_it() -> None:
    captions, cells = torch.tensor([[3, 8, 12, 2, 0]]), torch.tensor([[-1, 3, 3, -1, -1]])
    regions = F.one_hot(torch.tensor([[0, 15, 14, 0, 0]]), 16).float()  # of 4 x 4, and 2 x 2 cells
    said = CaptionOutput(torch.zeros(1, 5, 6), regions, torch.tensor([[0.2, 0.9, 0.7, 0.5, 0.5]]))
    figures = looking([(said, captions, cells)])
    assert figures == pytest.approx({"pointing": 1.0, "look_named": 0.8, "look_others": 0.2})
    assert looking([(CaptionOutput(said.logits), captions, cells)]) == {}


def test_files_in_words_out(tmp_path: object) -> None:
    paths = []
    for number in range(2):
        paths.append(f"{tmp_path}/{number}.png")
        to_picture(torch.rand(3, 30, 40, generator=generator(number))).save(paths[-1])
    share = torch.full((6, 6), 1e-9)
    share[1, 3] = share[3, 4] = share[4, 2] = 1
    model = Table(share.log())
    model.image_size = (16, 16)
    output = model.predict(paths)
    said = model.answer(output, ["<pad>", "<begin>", "<end>", "a", "cat", "dog"])
    assert [each["caption"] for each in said] == ["a cat"] * 2 and said[0]["log-probability"] == pytest.approx(
        0, abs=1e-6
    )
    assert model.answer(output)[0]["caption"] == "3 4"
    assert model.picture(output).size == (3 * 112, 2 * 128)
    with pytest.raises(ValueError, match="one for each word, got 3 and word 4"):
        model.answer(output, ["a", "b", "c"])
    with pytest.raises(ValueError, match="must have words"):
        CaptionOutput(torch.zeros(1, 2, 3)).sentences()
