"""What exports to ONNX: each part's tiny example exported, run by onnxruntime, and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.extras import need

PAGE = "onnx.md"

#: side of the example's map, or tokens of its sequence
SIZE = 16


@dataclasses.dataclass(frozen=True)
class Export:
    """What came of one part.

    Attributes:
        slug: the part.
        error: largest difference between onnxruntime and torch, over the output's largest number; None where it does
            not export.
        operators: how many kinds of operators the graph has.
        reason: the exporter's, in a line.
    """

    slug: str
    error: float | None
    operators: int = 0
    reason: str = ""


def export(slug: str) -> Export:
    """Export a part's example, in evaluation, and compare what onnxruntime computes with torch.

    Raises:
        ImportError: where onnx, onnxscript or onnxruntime are missing.
    """
    onnxruntime, _ = need("onnxruntime"), need("onnxscript")
    torch.manual_seed(0)
    part = catalogue.part(slug)
    module = catalogue.create(slug, **part.example).eval()
    for parameter in module.parameters():  # what starts at 0 would prove nothing
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    inputs = part.kind.inputs(part, module, SIZE)
    with torch.no_grad():
        expected = [x for x in tensors(part.kind.run(module, inputs)) if x.is_floating_point()]
    try:
        with quiet():
            program = torch.onnx.export(module, inputs, dynamo=True)
            assert program is not None
            session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        names = [x.name for x in session.get_inputs()]
        found = session.run(None, dict(zip(names, (x.detach().numpy() for x in tensors(inputs)), strict=True)))
    except Exception as error:  # whatever exporter and runtime raise is the answer
        said = [line for line in str(error).splitlines() if "No ONNX function" in line or "<class" in line]
        return Export(slug, None, reason=(said or str(error).splitlines() or [type(error).__name__])[-1].strip())
    ours = [torch.from_numpy(x) for x in found if x.dtype.kind == "f"]
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True)]
    return Export(slug, max(errors), len({node.op_type for node in program.model_proto.graph.node}))


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a module's arguments or output, in order."""
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's reports of its progress go nowhere."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def page(exports: Sequence[Export]) -> str:
    """The table as a page of the docs."""
    done = sum(each.error is not None for each in exports)
    rows = [
        "# ONNX",
        "",
        f"Written by `make onnx`: {done} of {len(exports)} parts export with `torch.onnx.export(..., dynamo=True)`,",
        "each as its example is configured, and onnxruntime computes what torch does. While a graph is taken, what has",
        "operators of our own computes in torch's: sparse and linear mechanisms then look at all pairs of tokens, and",
        "a file costs what dense attention does. Decoding with a cache is not part of it.",
        "",
        "| part | exports | largest difference | kinds of operators | remark |",
        "|---|---|---|---|---|",
    ]
    for each in exports:
        yes, error = ("no", "") if each.error is None else ("yes", f"{each.error:.0e}")
        rows.append(f"| `{each.slug}` | {yes} | {error} | {each.operators or ''} | {remark(each.reason)} |")
    return "\n".join(rows) + "\n"


def remark(reason: str) -> str:
    """An exporter's reason as a cell of a table: without the class of the error, and with nothing that reads as a link.

    Args:
        reason: in a line.
    """
    words = re.sub(r"^<class '[^']*'>: ", "", reason).removesuffix(" See the stack trace for more information.")
    return words.replace("](", "] (").replace("|", "/")
