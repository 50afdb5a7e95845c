"""Packages that come with an extra of saccade, and what is said where one is missing."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

#: package -> the extra that brings it
EXTRAS = {
    "transformers": "transformers",
    "huggingface_hub": "transformers",
    "diffusers": "diffusers",
    "accelerate": "diffusers",
    "sklearn": "data",
    "skimage": "data",
    "scipy": "data",
    "matplotlib": "plots",
    "torchmetrics": "metrics",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "pywt": "wavelets",
    "kornia": "geometry",
    "triton": "triton",
    "ray": "ray",
    "fla": "fla",
}


def need(module: str, what: str = "this") -> ModuleType:
    """Import a module of a package in `EXTRAS`.

    Args:
        module: its name, e.g. "matplotlib.figure".
        what: who needs it, as the beginning of a sentence.

    Raises:
        ImportError: if the package is not installed; the message says what installs it.

    >>> need("matplotlib.figure", "drawing").Figure
    <class 'matplotlib.figure.Figure'>
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, but one that it needs is not
        message = f"{what} needs {package}: pip install 'saccade[{EXTRAS[package]}]'"
        raise ImportError(message, name=package) from None


@cache
def lacking(distribution: str, module: str, oldest: tuple[int, ...]) -> str | None:
    """Why an optional package cannot be used, or None: it is not installed, too old, or fails when it is imported.

    Args:
        distribution: its name, as pip knows it.
        module: what is used of it.
        oldest: the first version that will do, e.g. (0, 3).

    >>> lacking("torch", "torch", (99,))  # doctest: +ELLIPSIS
    'torch ... is older than 99'
    >>> lacking("no-such-package", "no_such_package", (0,))
    'no-such-package is not installed'
    """
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    numbers = tuple(int(part) for part in found.split(".")[: len(oldest)] if part.isdigit())
    if numbers < oldest:
        return f"{distribution} {found} is older than {'.'.join(map(str, oldest))}"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package does that was built for another torch or another device
        return f"{module} of {distribution} {found} cannot be imported: {str(error).strip().partition(chr(10))[0]}"
    return None


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, without touching matplotlib's global state.

    Args:
        width, height: in inches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    return need("matplotlib.figure", "drawing").Figure(figsize=(width, height), layout="constrained")
