"""Files of numbers as tensors: volumes, events, whatever is no image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def read_array(path: str | Path, what: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of a file of numpy's.

    Args:
        path: of a `.npy` file.
        what: it holds, as messages say it: "volume".
        dtype: of the tensor, float32 or float64.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it holds no finite numbers.
    """
    import numpy

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a {what}")
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        values = numpy.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {' '.join(str(error).split())}") from error
    if not isinstance(values, numpy.ndarray) or values.dtype.kind not in "biuf" or not values.size:
        raise ValueError(f"{path} must hold numbers")
    array = torch.from_numpy(values.astype(numpy.float64)).to(dtype)
    if not array.isfinite().all():
        raise ValueError(f"{path} has values that are not finite")
    return array
