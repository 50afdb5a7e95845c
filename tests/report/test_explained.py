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
    both(root, tokenizer)
    return root


def both(root: Path, tokenizer: Any) -> None:
    """A model that compares an image with texts, and one that reads an image, as folders."""
    from tokenizers.processors import TemplateProcessing

    sizes = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
    pictures = transformers.CLIPImageProcessorPil(**sizes)
    vision = {**SMALL, "image_size": 16, "patch_size": 4, "projection_dim": 8}
    words = {**SMALL, "vocab_size": 12, "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 1}
    special = {"unk_token": "[UNK]", "pad_token": "[UNK]", "eos_token": "[CLS]"}
    tokenizer.post_processor = TemplateProcessing(single="$A [CLS]", special_tokens=[("[CLS]", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    transformers.CLIPProcessor(pictures, made).save_pretrained(root / "pair")
    config = transformers.CLIPConfig(text_config=words, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(root / "pair")
    tokenizer.post_processor = None
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special
    )
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(pictures, made, **options).save_pretrained(root / "reader")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**words, num_key_value_heads=1, pad_token_id=0),
        image_token_id=made.convert_tokens_to_ids("<image>"),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(root / "reader")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_a_text_becomes_a_page(folder: Path, tmp_path: Path) -> None:
    said = run(folder / "text", "a cat sat on <b> mats", "--target", "bad", "--out", tmp_path / "page.html")
    assert said.exit_code == 0, said.output
    assert "bad" in said.output and "random" in said.output
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in text and "<b>" not in text and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text), "the page must open offline"
    assert (
        text.count('class="token"') == 7 * 6 - text.count('class="token against"')
        and text.count('tabindex="0"') == 7 * 6 + 3
    )  # seven maps of six tokens, three tables
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
    assert (tmp_path / "p.html").read_text().count("<img ") == 2 + 3


def test_an_image_beside_texts(folder: Path, tmp_path: Path) -> None:
    to_picture(torch.rand(3, 20, 24)).save(tmp_path / "a.png")
    arguments = ("a cat sat", "on mats", "--target", "on mats", "--methods", "raw", "--json", "--out")
    said = run(folder / "pair", tmp_path / "a.png", *arguments, tmp_path / "p.html")
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert found["target"] == [None, 1] and found["says"] == "likeness to 'on mats'"
    assert len(found["labels"]) == 16 + 3 and found["labels"][16:] == ["on", "mats", "[CLS]"]
    assert found["as_weights_are_random"]["raw"] and 0 < found["probability"] < 1
    text = (tmp_path / "p.html").read_text()
    # the map over the image, and for each reader curves, randomisation and the heads of two towers
    assert text.count("<img ") == 1 + 4 and text.count('class="token"') == 3 and "row 1 column" in text


def test_an_image_before_a_text(folder: Path, tmp_path: Path) -> None:
    to_picture(torch.rand(3, 20, 24)).save(tmp_path / "a.png")
    arguments = ("a cat sat", "--methods", "raw,rollout", "--maps-only", "--out")
    said = run(folder / "reader", tmp_path / "a.png", *arguments, tmp_path / "p.html")
    assert said.exit_code == 0, said.output
    assert "believe" not in said.stdout and "rollout" in said.stdout
    text = (tmp_path / "p.html").read_text()
    assert text.count("<img ") == 2 + 1 and text.count('class="token"') == 2 * 3
    assert "was not measured" in text and "Do they deserve belief" not in text


def test_what_is_wrong_is_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    to_picture(torch.rand(3, 20, 24)).save(picture)
    for arguments, message in (
        ((folder / "text", "a cat", "--target", "ugly"), "no class 'ugly'; there are good, bad"),
        ((folder / "text", "a cat", "--out", "page.pdf"), "must be a page"),
        ((folder / "text", "a cat", "--methods", "magic"), "methods must be of"),
        ((folder / "image", "a cat"), "tokenizer"),
        ((folder / "text", tmp_path / "none.png"), "none.png"),
        ((tmp_path / "nothing", "a cat"), "no folder"),
        ((folder / "text", "a cat", "sat"), "give a text, an image, or an image and texts"),
        ((folder / "reader", picture, "a cat", "sat"), "takes one text with an image, got 2"),
        ((folder / "pair", picture, "a cat", "--target", "sat"), "no text 'sat'; there are 'a cat'"),
        ((folder / "image", picture, "a cat"), "no processor of images with texts"),
    ):
        said = run(*arguments)
        assert said.exit_code != 0
        assert message in (said.output + str(said.exception)), said.output


def test_an_image_is_needed_to_lay_maps_over(folder: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(folder / "image")
    found = explain(model, {"pixel_values": torch.rand(1, 3, 16, 16)}, methods=["raw"], random=1, subsets=4)
    with pytest.raises(ValueError, match="laid over"):
        page(found, model="vit")


def test_tokens_are_tinted_from_the_least_relevant_to_the_most(folder: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "text")
    found = explain(model, {"input_ids": torch.tensor([[1, 2, 3]])}, methods=["raw"], faithful=False)
    for values, shares in (([5.0, 7.0, 6.0], ["0", "1", "0.5"]), ([-2.0, 4.0, 1.0], ["0.5", "1", "0.25"])):
        found.maps["raw"] = torch.tensor(values)
        tints = re.findall(r"--much:([0-9.]+)", page(found, model="bert"))
        assert [float(each) for each in tints] == [float(each) for each in shares]


@pytest.fixture(scope="module")
def both_kinds(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with an image and a text."""
    model = transformers.CLIPModel.from_pretrained(folder / "pair").eval()
    inputs = {"input_ids": torch.tensor([[2, 3, 4, 5, 6, 7] * 8 + [1]]), "pixel_values": torch.rand(1, 3, 16, 16)}
    found = explain(model, inputs, methods=["raw", "input x gradient"], random=1, subsets=4)
    path = tmp_path_factory.mktemp("page") / "page.html"
    return write_explanation(found, path, model="clip", image=torch.rand(3, 16, 16))


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page_on_any_screen(both_kinds: Path, shown: Callable[..., str], width: int) -> None:
    pictures = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    wide = "(document.documentElement.scrollWidth <= window.innerWidth)"
    focus = "(document.querySelector('.token').focus(), document.activeElement.getAttribute('aria-label'))"
    # what a token says hangs over the edge of a phone's screen, which must not move
    edge = f"[...document.querySelectorAll('.token')].every(t => (t.focus(), {wide}))"
    said = shown(both_kinds, f"{pictures} + ' ' + {wide} + ' ' + {edge} + ' ' + {focus}", width)
    assert said.startswith("true true true 2, relevance")


def test_the_keyboard_and_a_screen_reader_reach_everything(both_kinds: Path, shown: Callable[..., str]) -> None:
    # a link to each map and, in each, one past its tokens; tokens, and tables that scroll
    stops = "document.querySelectorAll('a[href], [tabindex=\\'0\\']').length"
    past = (
        "(() => { const a = document.querySelector('.skip'); a.focus(); "
        "const seen = a.getBoundingClientRect().left >= 0; a.click(); return seen + location.hash })()"
    )
    named = (
        "[...document.querySelectorAll('[role]')].every(e => e.getAttribute('aria-label')) && "
        "[...document.images].every(i => i.alt) && [...document.querySelectorAll('th')].every(t => t.scope)"
    )
    ends = "[...document.querySelectorAll('a')].every(a => document.getElementById(a.getAttribute('href').slice(1)))"
    said = shown(both_kinds, f"[{stops}, {past}, {named}, {ends}].join(' ')")
    assert said == f"{2 + 2 + 2 * 49 + 3} true#map-1 true true"


def test_a_dark_page_is_dark_and_its_words_can_be_read(both_kinds: Path, shown: Callable[..., str]) -> None:
    def brightness(dark: bool) -> tuple[list[float], str]:
        of = "(e, what) => getComputedStyle(e)[what].match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765"
        source = "document.querySelector('picture img').currentSrc.length"
        words = f"(b => [b(document.body, 'backgroundColor'), b(document.body, 'color')])({of})"
        *shades, drawn = shown(both_kinds, f"[...{words}, {source}].join(' ')", dark=dark).split()
        return [float(each) for each in shades], drawn

    (light_paper, light_ink), light_picture = brightness(False)
    (dark_paper, dark_ink), dark_picture = brightness(True)
    assert light_paper > 0.95 and light_ink < 0.3 and dark_paper < 0.15 and dark_ink > 0.8
    assert light_picture != dark_picture


def test_a_map_without_an_image_is_drawn(tmp_path: Path, shown: Callable[..., str]) -> None:
    from saccade.catalogue import create

    found = explain(create("cbam", channels=8, reduction=2), torch.randn(1, 8, 6, 5), random=1, subsets=4)
    path = write_explanation(found, tmp_path / "page.html", model="cbam")
    assert "row" in path.read_text() and "by its likeness" in path.read_text()
    high = "document.querySelector('.map img').naturalHeight / document.querySelector('.map img').naturalWidth"
    assert shown(path, high) == "1.2"
