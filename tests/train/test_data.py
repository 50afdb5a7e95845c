"""Data: the same from the same seed, what the benchmark says, and clear errors for what cannot be used."""

from __future__ import annotations

import sys

import pytest
import torch

from saccade.train import data


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_text_has_english_and_a_split_that_shares_no_paragraph() -> None:
    whole, train, held_out = (data.text_bytes(split) for split in ("all", "train", "held-out"))
    assert whole.dtype == torch.uint8 and len(whole) > 300_000
    paragraphs = [set(bytes(part.tolist()).decode().split("\n\n")) for part in (train, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    assert 0.05 < len(held_out) / len(train) < 0.2
    assert paragraphs[0] | paragraphs[1] == set(bytes(whole.tolist()).decode().split("\n\n"))
    with pytest.raises(ValueError, match="split must be"):
        data.text_bytes("test")


def test_files_are_read_and_bad_ones_named(tmp_path) -> None:
    for name, content in {
        "a": b"abc" * 2000,
        "b": bytes(range(1, 256)) * 20,
        "empty": b"",
        "short": b"hello",
        "c": b"a\0" * 4096,
    }.items():
        (tmp_path / name).write_bytes(content)
    both = data.read_files([tmp_path / "a", tmp_path / "b"])
    assert bytes(both.tolist()) == b"abc" * 2000 + bytes(range(1, 256)) * 20
    for name, message in {"empty": "is empty", "short": "at least 4096 bytes, got 5", "c": "is no text"}.items():
        with pytest.raises(ValueError, match=message):
            data.read_files([tmp_path / name])
    for path, message in {tmp_path / "missing": "no data file", tmp_path: "is a folder"}.items():
        with pytest.raises(OSError, match=message):
            data.read_files([path])


def test_windows_are_the_data_and_their_successors() -> None:
    inputs, targets = data.windows(torch.arange(200, dtype=torch.uint8), 5, 7, generator())
    assert inputs.shape == targets.shape == (5, 7)
    assert torch.equal(targets, inputs + 1)
    starts = data.windows(torch.arange(9, dtype=torch.uint8), 500, 7, generator())[0][:, 0]
    assert set(starts.tolist()) == {0, 1}, "every window that fits must be drawn, and no other"
    with pytest.raises(ValueError, match="at least 8 bytes"):
        data.windows(torch.zeros(7, dtype=torch.uint8), 1, 7, generator())


def test_recall_asks_each_key_once_for_the_value_it_came_with() -> None:
    tokens, labels = data.recall(16, 40, 6, vocab=20, generator=generator())
    assert tokens.shape == labels.shape == (16, 40)
    for row, wanted in zip(tokens, labels):
        keys, values = row[0:12:2], row[1:12:2]
        assert len(set(keys.tolist())) == 6 and keys.max() < 10 <= values.min()
        asked = (wanted != data.IGNORE).nonzero()[:, 0]
        assert asked.min() >= 12 and sorted(row[asked].tolist()) == sorted(keys.tolist())
        pairs = dict(zip(keys.tolist(), values.tolist()))
        assert [pairs[key] for key in row[asked].tolist()] == wanted[asked].tolist()


def test_recall_with_power_one_asks_anywhere_and_with_less_asks_sooner() -> None:
    def mean_place(power: float) -> float:
        labels = data.recall(256, 100, 2, power=power, generator=generator())[1]
        return (labels != data.IGNORE).nonzero()[:, 1].float().mean().item()

    assert abs(mean_place(1.0) - 51.5) < 4
    assert mean_place(0.1) < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 9, 3), "batch and pairs"),
        ((1, 8, 3), "length must be at least 3 x pairs"),
        ((1, 900, 40), "at most half the vocabulary"),
    ],
)
def test_recall_refuses(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.recall(*arguments)


def evaluate(tokens: list[str]) -> int:
    """An evaluator of its own, with a stack."""
    stack: list[list[object]] = [[]]
    for token in tokens:
        if token.startswith("["):
            stack.append([token])
        elif token == "]":
            operator, *values = stack.pop()
            numbers = torch.tensor(values)
            value = {
                "[MAX": lambda n: n.max(),
                "[MIN": lambda n: n.min(),
                "[SM": lambda n: n.sum() % 10,
                "[MED": lambda n: n.double().quantile(0.5).floor(),
            }[operator](numbers)
            stack[-1].append(int(value))
        else:
            stack[-1].append(int(token))
    (value,) = stack[0]
    return value


def test_listops_are_nested_within_their_limits_and_have_their_value() -> None:
    tokens, values = data.listops(24, 60, least=20, depth=3, arguments=5, generator=generator())
    deepest = 0
    for row, value in zip(tokens, values):
        names = [data.LISTOPS_TOKENS[token] for token in row[row != 0]]
        assert 20 <= len(names) <= 60 and not row[len(names) :].any()
        assert evaluate(names) == int(value)
        depth = 0
        for name in names:
            depth += name.startswith("[") - (name == "]")
            deepest = max(deepest, depth)
    assert deepest == 3
    with pytest.raises(ValueError, match="no less than least"):
        data.listops(1, 8, least=9)
    with pytest.raises(ValueError, match="arguments at least 2"):
        data.listops(1, 8, arguments=1)
    with pytest.raises(ValueError, match="no expression of"):
        data.listops(1, 500, least=499, depth=2, arguments=2)


def test_digits_have_a_fixed_split() -> None:
    digits = data.digits()
    assert digits.train_images.shape == (1438, 1, 8, 8) and digits.test_images.shape == (359, 1, 8, 8)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    assert set(digits.test_labels.tolist()) == set(range(10))


def test_paired_views_miss_one_view_at_most_and_show_the_digit() -> None:
    views = data.paired(400, noise=0.0, missing=0.5, generator=generator())
    assert bool(views.present.any(1).all())
    assert 0.4 < (~views.present.all(1)).float().mean() < 0.6
    both = views.present.all(1)
    assert torch.equal(views.a[both], views.b[both]), "without noise both views are the digit"
    assert not views.a[~views.present[:, 0]].any() and not views.b[~views.present[:, 1]].any()
    noisy = data.paired(None, split="test", missing=0.0, generator=generator())
    assert len(noisy.labels) == 359 and 0.6 < (noisy.a - noisy.b).std() < 0.8
    with pytest.raises(ValueError, match="split must be"):
        data.paired(1, split="all")


def test_the_same_seed_gives_the_same_data_and_steps_differ() -> None:
    draws = [
        lambda g: data.recall(2, 20, 3, generator=g)[0],
        lambda g: data.listops(2, 20, generator=g)[0],
        lambda g: data.paired(2, generator=g).a,
        lambda g: data.windows(data.text_bytes(), 2, 20, g)[0],
    ]
    for draw in draws:
        assert torch.equal(draw(data.generator_at(3, 5)), draw(data.generator_at(3, 5)))
        for other in (data.generator_at(3, 6), data.generator_at(4, 5), data.generator_at(3, 5, 1)):
            assert not torch.equal(draw(data.generator_at(3, 5)), draw(other))


def test_rows_are_the_same_of_each_tensor() -> None:
    first, second = data.rows(50, generator(), torch.arange(8), 10 * torch.arange(8))
    assert torch.equal(10 * first, second) and set(first.tolist()) == set(range(8))


def test_photographs_open_without_a_network() -> None:
    colour, grey, coins = data.photographs("coffee", "camera", "coins")
    assert colour.shape == (3, 400, 600) and grey.shape == (1, 512, 512) and coins.shape == (1, 303, 384)
    assert all(0 <= image.min() < 0.1 and 0.9 < image.max() <= 1 for image in (colour, grey, coins))
    (luminance,) = data.photographs("coffee", grey=True)
    assert luminance.shape == (1, 400, 600)
    assert torch.corrcoef(torch.stack([luminance.flatten(), colour[1].flatten()]))[0, 1] > 0.99
    with pytest.raises(ValueError, match="photographs must be among astronaut"):
        data.photographs("retina")


def test_crops_cut_all_maps_at_one_place() -> None:
    place = torch.arange(12 * 20).view(12, 20)
    twice = place.repeat_interleave(2, 0).repeat_interleave(2, 1)
    small, large = data.crops([(place[None], twice)] * 2, 32, 5, generator(), turned=True, within=10)
    assert small.shape == (32, 1, 5, 5) and large.shape == (32, 10, 10)
    assert torch.equal(large, small[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert (small % 20).max() < 10
    corners = small[:, 0, ::4, ::4].flatten(1).argmin(1)
    assert set(corners.tolist()) == {0, 1, 2, 3}, "turned by all four angles"
    with pytest.raises(ValueError, match="side must be at most 10, got 11"):
        data.crops([(place,)], 1, 11, generator(), within=10)
    assert data.crops([(place,)], 1, 12, generator())[0].shape == (1, 12, 12)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch) -> None:
    for name in ["sklearn", *(name for name in sys.modules if name.startswith("sklearn."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"saccade\[data\]"):
        data.digits.__wrapped__()


def test_sentences_come_topic_by_topic_and_once() -> None:
    everything = data.sentences()
    flat = [each for topic in everything for each in topic]
    assert len(flat) == len(set(flat)) > 1000 and all(40 <= len(each) <= 250 for each in flat)
    assert all(len(topic) >= 8 for topic in everything)
    parts = [data.sentences(split) for split in ("train", "held-out")]
    assert sum(map(len, parts)) == len(everything) and not set(parts[0][0]) & set(parts[1][0])
    with pytest.raises(ValueError, match="split must be"):
        data.sentences("test")
