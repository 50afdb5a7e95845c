"""`saccade explain`: the page of an explanation, and models by folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.models.images import to_picture

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner  # noqa: E402

from saccade.cli.commands import app  # noqa: E402
from saccade.explain.explanation import explain  # noqa: E402
from saccade.report.explained import page, write_explanation  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of texts and one of images, as folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("models")
    words = ["[UNK]", "[CLS]", "a", "cat", "sat", "<b>", "on", "mats"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(root / "text")
    torch.manual_seed(0)
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    config = transformers.BertConfig(**SMALL, vocab_size=8, max_position_embeddings=16, **names)
    transformers.BertForSequenceClassification(config).save_pretrained(root / "text")
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(root / "image")
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(root / "image")
    return root


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_a_text_becomes_a_page(folder: Path, tmp_path: Path) -> None:
    said = run(folder / "text", "a cat sat on <b> mats", "--target", "bad", "--out", tmp_path / "page.html")
    assert said.exit_code == 0, said.output
    assert "bad" in said.output and "random" in said.output
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in text and "<b>" not in text and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:)', text), "the page must open offline"
    assert (
        text.count('class="token"') == 6 * 6 - text.count('class="token against"')
        and text.count('tabindex="0"') == 6 * 6
    )  # six maps of six tokens
    assert "prefers-color-scheme: dark" in text and "What did" in text


def test_an_image_and_json(folder: Path, tmp_path: Path) -> None:
    to_picture(torch.rand(3, 20, 24)).save(tmp_path / "a.png")
    said = run(
        folder / "image", tmp_path / "a.png", "--methods", "raw, rollout", "--json", "--out", tmp_path / "p.html"
    )
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert set(found["maps"]) == {"raw", "rollout"} and len(found["maps"]["raw"]) == 16
    assert len(found["random"]) == 5 and set(found["measures"]["raw"]) >= {"deletion", "insertion"}
    assert (tmp_path / "p.html").read_text().count("<img ") == 4


def test_what_is_wrong_is_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((folder / "text", "a cat", "--target", "ugly"), "no class 'ugly'; there are good, bad"),
        ((folder / "text", "a cat", "--out", "page.pdf"), "must be a page"),
        ((folder / "text", "a cat", "--methods", "magic"), "methods must be of"),
        ((folder / "image", "a cat"), "tokenizer"),
        ((folder / "text", tmp_path / "none.png"), "none.png"),
        ((tmp_path / "nothing", "a cat"), "no folder"),
    ):
        said = run(*arguments)
        assert said.exit_code != 0
        assert message in (said.output + str(said.exception)), said.output


def test_an_image_is_needed_to_lay_maps_over(folder: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(folder / "image")
    found = explain(model, {"pixel_values": torch.rand(1, 3, 16, 16)}, methods=["raw"], random=1, subsets=4)
    with pytest.raises(ValueError, match="laid over"):
        page(found, model="vit")


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page_on_any_screen(
    folder: Path, tmp_path: Path, shown: Callable[..., str], width: int
) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "text")
    found = explain(model, {"input_ids": torch.tensor([[1, 2, 3, 4] * 3])}, random=1, subsets=4)
    path = write_explanation(found, tmp_path / "page.html", model="bert")
    pictures = "[...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
    wide = "(document.documentElement.scrollWidth <= window.innerWidth)"
    focus = "(document.querySelector('.token').focus(), document.activeElement.getAttribute('aria-label'))"
    said = shown(path, f"{pictures} + ' ' + {wide} + ' ' + {focus}", width)
    assert said.startswith("2 true 1, relevance")
