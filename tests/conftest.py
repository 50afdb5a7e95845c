"""What several floors' tests share."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from saccade import catalogue
from saccade.catalogue import registry
from saccade.catalogue.cards import Paper
from saccade.ops.constants import numbers
from saccade.ops.native import build

if not torch.cuda.is_available():
    # before anything imports triton: its kernels run on the CPU then, where a test asks for them by name
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: on CUDA, if need be that of `--device`, or on the CPU under the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    asked = torch.device(request.config.getoption("--device"))
    return asked if asked.type == "cuda" else torch.device("cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ...: where the tests run that take the fixture `device`; on another than the cpu only "
        "they do, and those that need it anyway",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """On another device than the processor, files of which no test takes a device or asks for CUDA are not imported."""
    if torch.device(config.getoption("--device")).type == "cpu" or collection_path.suffix != ".py":
        return None
    taken = r"(?<![.\w])(device|kernel_device|waits)\s*[,:)]|mark\.cuda"
    return None if re.search(taken, collection_path.read_text(encoding="utf-8")) else True


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


#: operators after which a device is waited for
READING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}


class Reads(TorchDispatchMode):
    """Notes the operators that read values back, or whose shapes depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        chooses = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        # numbers of Python become a tensor there, which `ops.constants.numbers` sends without waiting
        copied = name == "lift_fresh" and args[0].ndim > 0 and not _sent()
        if name in READING or copied or chooses or repeats or (name == "equal" and args[0].dtype != torch.uint8):
            # (equality of bytes is asked of the states of generators, which are on the processor anyway)
            lines = [x for x in traceback.extract_stack() if "/saccade/" in x.filename]
            self.found.append(f"{name} at {lines[-1].filename}:{lines[-1].lineno}" if lines else name)
        return function(*args, **(kwargs or {}))


def _sent() -> bool:
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not numbers.__code__:
        frame = frame.f_back
    return frame is not None


@pytest.fixture
def waits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """What a call waits for: as CUDA itself finds, or, on the processor, by the operators that any device waits for.

    There the code in C is off, and so is what looks at values on the processor only.
    """
    return _waits_of_cuda if device.type == "cuda" else partial(_waits_elsewhere, monkeypatch=monkeypatch)


def _waits_of_cuda(run: Callable[[], object]) -> list[str]:
    run()  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return [str(error)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


def _waits_elsewhere(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for place in ("backends.sdpa.has_nan", "nan.has_nan", "looking.can_look"):  # by name: triton is not imported here
        monkeypatch.setattr(f"saccade.ops.{place}", lambda x: False)
    choose = import_module("saccade.ops.backends.stream.call")._choose_tile

    def choose_unseen(problem: Any, *rest: Any) -> Any:
        """What a mask without tensors is like is known on the processor."""
        known = problem.mask is None or not problem.mask.tensors()
        with _disable_current_modes() if known else nullcontext():
            return choose(problem, *rest)

    monkeypatch.setattr("saccade.ops.backends.stream.call._choose_tile", choose_unseen)
    monkeypatch.setattr(nn.functional, "one_hot", lambda x, n: (x[..., None] == torch.arange(n)).long())
    with build.turned_off("not in this test"), Reads() as reads:
        run()
    return reads.found


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
