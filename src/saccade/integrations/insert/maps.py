"""The feature map within a module's output: the first tensor of a tuple, list, dict or dataclass, or the output.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor


def _map_key(output: Any) -> Any:
    """Where the first tensor of an output stands: a field's name, an index, a key."""
    if isinstance(output, dict):
        pairs: Any = output.items()
    elif dataclasses.is_dataclass(output):
        pairs = ((entry.name, getattr(output, entry.name)) for entry in dataclasses.fields(output))
    elif isinstance(output, (tuple, list)):
        pairs = enumerate(output)
    else:
        pairs = ()
    return next((key for key, value in pairs if isinstance(value, Tensor)), None)


def map_of(output: Any) -> Any:
    """The first tensor of an output; None if there is none."""
    if isinstance(output, Tensor):
        return output
    key = _map_key(output)
    if key is None:
        return None
    return output[key] if isinstance(output, (dict, tuple, list)) else getattr(output, key)


def with_map(output: Any, map_BCHW: Tensor) -> Any:
    """The output with another first tensor."""
    if isinstance(output, Tensor):
        return map_BCHW
    key = _map_key(output)
    if isinstance(output, dict):  # transformers' outputs too, which keep their fields in step with their items
        changed = copy.copy(output)
        changed[key] = map_BCHW
        return changed
    if isinstance(output, (tuple, list)):
        items = [*output[:key], map_BCHW, *output[key + 1 :]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return dataclasses.replace(output, **{key: map_BCHW})
