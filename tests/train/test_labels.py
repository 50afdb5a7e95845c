"""Labels are short, all different, and nothing that they leave out is lost."""

from __future__ import annotations

import pytest

from saccade.train.labels import labels


@pytest.mark.parametrize("limit", [4, 12, 22, 36, 100])
@pytest.mark.parametrize(
    "names",
    [
        ["softmax", "moba:block_size=32,top_k=3"],
        ["moba:block_size=16,top_k=2", "moba:block_size=16,top_k=4"],
        ["moba", "moba:top_k=2", "moba:top_k=2,block_size=(4, 4)"],
        ["a name of my own that is rather long, and says it", "b"],
        ["none"],
    ],
)
def test_labels_differ_and_tell_everything(names: list[str], limit: int) -> None:
    short = labels(names, limit)
    assert list(short.of) == names and len(set(short.of.values())) == len(names)
    said = " ".join([*short.of.values(), *short.caption])
    for name in names:
        slug, _, options = name.partition(":")
        assert slug in said
        for piece in options.replace(",t", "|t").replace(",b", "|b").split("|"):
            assert piece in said
    assert all(len(label) <= max(limit, 3) for label in short.of.values() if label not in names)


def test_options_in_common_go_to_the_caption() -> None:
    short = labels(["moba:block_size=16,top_k=2", "moba:block_size=16,top_k=4", "softmax"])
    assert list(short.of.values()) == ["moba:top_k=2", "moba:top_k=4", "softmax"]
    assert short.caption == ["moba: block_size=16"]
