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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ...: where the tests run that take the fixture `device`; on another than the cpu only "
        "they do, and those that need it anyway",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs CUDA is skipped without it; on another device than the processor only what can run there is left."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip("torch sees no CUDA device here"))
    if torch.device(config.getoption("--device")).type != "cpu":
        there = [item for item in items if _runs_elsewhere(item)]
        config.hook.pytest_deselected(items=[item for item in items if not _runs_elsewhere(item)])
        items[:] = there


def _runs_elsewhere(item: pytest.Item) -> bool:
    fixtures = {"device", "kernel_device"} & set(getattr(item, "fixturenames", ()))
    return bool(fixtures) or item.get_closest_marker("cuda") is not None


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """`--device`, where the test's tensors and modules are to be; skips it where torch has none."""
    place = torch.device(request.config.getoption("--device"))
    if place.type == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device here")
        # convolutions in the precision that the bounds are for
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return place


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
