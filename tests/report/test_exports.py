from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from saccade import catalogue
from saccade.report import exports

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("slug", ["twins", "fast"])
def test_parts_with_operators_of_our_own_export(slug: str) -> None:
    done = exports.export(slug)
    assert done.error is not None and done.error < 1e-4 and done.operators > 5, done


def test_what_does_not_export_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.part("softmax").build, "forward", lambda self, x: torch.linalg.eigh(x @ x.mT)[0])
    done = exports.export("softmax")
    assert done.error is None and "linalg_eigh" in done.reason and "\n" not in done.reason
    assert "| `softmax` | no |" in exports.page([done])


def test_mra_is_taken_by_torch_export() -> None:
    module, x = catalogue.create("mra", **catalogue.part("mra").example).eval(), torch.randn(2, 12, 16)
    program = torch.export.export(module, (x,))
    assert not any("saccade" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


def test_the_page_names_every_part() -> None:
    text = (Path(__file__).parents[2] / "docs" / exports.PAGE).read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.M) == [part.slug for part in catalogue.parts()]
