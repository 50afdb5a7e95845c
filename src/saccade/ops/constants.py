"""Where constants lie."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_home(x: Tensor) -> AbstractContextManager[Any]:
    """What is made inside without a device lies where `x` does, also under `with torch.device(...)` for another one."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return nullcontext()
    return x.device
