"""The card of a part: lines that can be copied, every option, every published size."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade import catalogue
from saccade.catalogue.options import check
from saccade.report.card import card

SLUGS = [part.slug for part in catalogue.parts()]


@pytest.mark.parametrize("slug", SLUGS)
def test_the_line_to_copy_gives_what_must_be_given_and_the_card_names_every_option(slug: str) -> None:
    found, part = card(slug, measure=False), catalogue.part(slug)
    if part.build is not None:
        (line,) = (line for line in found["to copy"] if line.startswith("part = "))
        given: dict[str, object] = {}
        exec(line, {"saccade": type("Noted", (), {"create": staticmethod(lambda slug, **told: given.update(told))})})
        check(slug, catalogue.options(slug), given)
        assert [text.partition(":")[0] for text in found["options"]] == list(catalogue.options(slug))
    assert len(found.get("published sizes", ())) == len(part.published)


def test_copied_lines_run() -> None:
    for slug in ("moba", "cbam"):
        space = {"saccade": saccade}
        exec(card(slug, measure=False)["to copy"][0], space)
        assert isinstance(space["part"], torch.nn.Module)
    with torch.device("meta"):
        exec(next(line for line in card("twins", measure=False)["to copy"] if "from_config" in line))


def test_what_has_no_parameters_has_a_cost() -> None:
    (line,) = card("token-compression", measure=True)["cost here"]
    assert "ms forward, " in line


def test_published_sizes_are_shown() -> None:
    sizes = card("twins", measure=False)["published sizes"]
    assert any(size == "Twins-SVT-S: 24.06 M parameters, 2.8 G multiply-adds at 224 x 224" for size in sizes)
