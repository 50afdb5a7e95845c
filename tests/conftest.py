"""What several floors' tests share."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from saccade import catalogue
from saccade.catalogue import registry
from saccade.catalogue.cards import Paper

if not torch.cuda.is_available():
    # before anything imports triton: its kernels run on the CPU then, where a test asks for them by name
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton's kernels run: the CUDA device, or the CPU under the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Papers of nobody that have no room yet, a row of papers.json for each kind of part; the catalogue knows them."""
    rows: list[dict[str, Any]] = [
        {"number": 900 + i, "slug": f"nobodys-{kind}", "title": f"Nobody's {kind}", "family": "mixed", "arxiv": "0"}
        for i, kind in enumerate(catalogue.KINDS)
    ]
    known = registry._all()
    more = {row["slug"]: Paper(**row, state="planned", room=None) for row in rows}
    monkeypatch.setattr(registry, "_all", lambda: {**known, **more})
    return rows


@pytest.fixture
def byte_tokenizer() -> Any:
    """A tokenizer of transformers whose tokens are the 256 bytes."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
