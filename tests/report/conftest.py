"""A browser without a window, for pages; a language model in a folder, for commands."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def shown(tmp_path: Path) -> Callable[..., str]:
    """`shown(page, of, width=1200, dark=False)`: what the JavaScript expression `of` gives once a page is loaded, to a
    reader who likes light or dark pages; no error is reported meanwhile."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")

    def run(page: Path, of: str, width: int = 1200, dark: bool = False) -> str:
        probe = tmp_path / "probe.html"
        # a window has the keyboard a little after it is loaded
        script = (
            f"<script>const say = left => document.hasFocus() || !left ? document.title = 'said:' + ({of}) + ':'"
            " : setTimeout(say, 20, left - 1); addEventListener('load', () => say(50))</script>"
        )
        probe.write_text(page.read_text().replace("</body>", script + "</body>"))
        done = subprocess.run(
            [
                str(CHROMIUM),
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
                *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"),
                *("--virtual-time-budget=5000", "--dump-dom", probe.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "CONSOLE" not in done.stderr
        return done.stdout.split("said:")[1].split(":")[0]

    return run


@pytest.fixture
def tiny_model() -> Callable[..., Path]:
    """`tiny_model(folder, vocab_size=8)` writes a language model without learning, and its tokenizer, there."""

    def make(folder: Path, vocab_size: int = 8) -> Path:
        transformers = pytest.importorskip("transformers")
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {"[UNK]": 0, **{word: i for i, word in enumerate(("the", "a", "of", "is", "to", "in"), 1)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
        config = transformers.LlamaConfig(
            vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make
