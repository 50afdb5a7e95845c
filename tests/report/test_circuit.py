"""A circuit by `saccade.explain` and on its page: drawn for eyes, pointers, keyboards and screen readers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import saccade

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner  # noqa: E402

from saccade.cli.commands import app  # noqa: E402
from saccade.explain.explanation import Explanation  # noqa: E402
from saccade.report.circuit import drawing, sections  # noqa: E402
from saccade.report.explained import page, write_explanation  # noqa: E402

WORDS = ["[UNK]", "a", "cat", "<b>", "sat", "on", "mats", "dogs"]
TEXT = "a cat sat on <b> mats a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose heads choose, though it has learned nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("models") / "decoder"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(root)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24, vocab_size=len(WORDS),
        max_position_embeddings=16, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.7)
    model.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def found(folder: Path) -> Explanation:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = saccade.explain(model, TEXT, tokenizer=tokenizer, methods=["raw"], faithful=False, circuit=True)
    assert isinstance(said, Explanation)
    return said


def test_explain_traces_what_it_explains(found: Explanation) -> None:
    assert found.circuit is not None and found.causal is not None and found.circuit.edges
    assert found.target is not None and found.circuit.target[:2] == found.target
    assert found.causal.edges == len(found.circuit.edges)
    assert "attends from" in found.table() and "the circuit" in found.table()


def test_the_page_says_in_words_what_it_draws(found: Explanation) -> None:
    assert found.circuit is not None
    text = page(found, model="decoder")
    assert "Who wrote what was read?" in text and "Does it matter?" in text and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    drawn = drawing(found.circuit)
    assert "<b>" not in "".join(sections(found.circuit, found.causal))
    edges = found.circuit.strongest(60)
    places = found.circuit.places(edges)
    assert drawn.count("<path ") == len(edges) and drawn.count("<rect ") == len(places)
    assert drawn.count('role="img" aria-label=') == len(places) and drawn.count("class=seed") == len(
        found.circuit.seeds
    )
    box = [int(each) for each in re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn).groups()]  # type: ignore[union-attr]
    for x, y in re.findall(r'<rect x="(-?\d+)" y="(-?\d+)"', drawn):
        assert 0 <= int(x) <= box[0] - 50 and 0 <= int(y) <= box[1] - 18
    alone = "".join(sections(found.circuit, None))
    assert "strongest edges" in alone and "Does it matter?" not in alone
    found.circuit.edges, kept = [], found.circuit.edges
    assert "no head" in "".join(sections(found.circuit, None)) or found.circuit.seeds
    found.circuit.edges = kept


def test_the_command(folder: Path, tmp_path: Path) -> None:
    arguments = ["explain", str(folder), TEXT, "--methods", "raw", "--maps-only", "--circuit"]
    said = CliRunner().invoke(app, [*arguments, "--json", "--out", str(tmp_path / "page.html")])
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    assert told["circuit"] and set(told["circuit"][0]) == {"writer", "firing", "side", "weight"}
    assert set(told["cut"]) >= {"before", "circuit", "other writers"}
    assert "<svg" in (tmp_path / "page.html").read_text()
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0 and "attends from" in said.output


def test_no_circuit_of_what_says_no_token() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=16, vocab_size=9)).eval()
    with pytest.raises(ValueError, match="a token that a language model says"):
        saccade.explain(model, {"input_ids": torch.tensor([[1, 2]])}, methods=["raw"], faithful=False, circuit=True)


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_on_any_screen(
    found: Explanation, tmp_path: Path, shown: Callable[..., str], width: int
) -> None:
    path = write_explanation(found, tmp_path / "page.html", model="decoder")
    wide = "(document.documentElement.scrollWidth <= window.innerWidth)"
    focus = "(document.querySelector('.circuit g').focus(), document.activeElement.getAttribute('aria-label'))"
    size = "(document.querySelector('.circuit').getBoundingClientRect().width > 100)"
    assert re.match(r"true true .* at \d+ ", shown(path, f"{wide} + ' ' + {size} + ' ' + {focus}", width))
