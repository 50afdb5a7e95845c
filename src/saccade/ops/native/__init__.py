"""Inner loops in C for the CPU, compiled on the machine at first use: what torch has no fused operator for.

`attend.c` holds softmax attention over lists of keys in float32, forward. It is compiled by the C compiler that
`torch.compile` uses too (`$CC`, else cc, gcc or clang; a second), for the machine's own instructions, into
the cache folder (`$XDG_CACHE_HOME/saccade` or `~/.cache/saccade`). Where that cannot be done, `refusal` says
why, `saccade.plan` shows it, and the paths in pure torch run instead. `SACCADE_NATIVE=0` turns it off.

Shape letters: H heads of keys (batch x key heads), M keys of a head, D head dim of q and k, E head dim of v; T tasks,
R rows of all tasks, L runs of keys of all tasks.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from math import ceil, log
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.folder import cache_folder

__all__ = ["Keys", "Tasks", "attend_tasks", "refusal"]

SOURCE = Path(__file__).with_name("attend.c")

#: flags of the compiler: the machine's own vectors, and the OpenMP whose threads torch has already started
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")

#: rows of a task, at most: their queries and outputs stay in the second cache
TASK_ROWS = 128

#: values are made a multiple of this wide: the lanes of the widest vectors
WIDTH = 16

#: seconds that the compiler may take
PATIENCE = 120


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this kind cannot be computed here, or None."""
    if device.type != "cpu":
        return "for the CPU only"
    if dtype == torch.float64:
        return "single precision only"
    return _loaded()[1]


class Tasks:
    """Rows that meet the same runs of keys, as `attend.c` lists them.

    Args:
        rows: (R,) which query each row is, tasks one after the other.
        slots: (R,) where its output and LSE go.
        task_row: (T + 1,) first row of each task.
        task_run: (T, 2) first run of each task, and the one after its last.
        run_key: (L,) first key of each run among those of all heads: head * M + key.
        run_count: (L,) keys of the run, within one block.
        run_mask: (L,) mask tile of the run, or -1.
        task_mask: (T,) line of a mask tile that the task's first row is.
        run_bias: (L,) added to the scores of the run.
        tiles: bool (tiles, rows, keys), True = may attend.
    """

    def __init__(
        self,
        rows: Tensor,
        slots: Tensor,
        task_row: Tensor,
        task_run: Tensor,
        run_key: Tensor,
        run_count: Tensor,
        run_mask: Tensor | None = None,
        task_mask: Tensor | None = None,
        run_bias: Tensor | None = None,
        tiles: Tensor | None = None,
    ) -> None:
        self.rows, self.slots, self.task_row, self.task_run = rows, slots, task_row, task_run
        self.run_key, self.run_count, self.run_mask, self.run_bias = run_key, run_count, run_mask, run_bias
        self.task_mask = torch.zeros_like(task_row) if task_mask is None else task_mask
        self.mask_shape = (0, 0) if tiles is None else (tiles.shape[1], tiles.shape[2])
        # C reads whole vectors
        self.tiles = None if tiles is None else F.pad(tiles.reshape(-1).view(torch.uint8), (0, 64))


class Keys:
    """Keys and values (B, K, M, ·) as the C code wants them: keys in panels, values as wide as vectors are."""

    def __init__(self, k: Tensor, v: Tensor, block: int) -> None:
        library = _library()
        self.M, self.D, self.block = k.shape[2], k.shape[3], block
        heads, lanes = k.shape[0] * k.shape[1], library.saccade_lanes()
        k = k.detach().contiguous()
        panels = heads * ceil(self.M / block) * ceil(block / lanes)
        self.panels = k.new_empty(panels * lanes * self.D)
        threads = torch.get_num_threads()
        library.saccade_panels(_at(k), _at(self.panels), heads, self.M, self.D, block, threads)
        self.values = F.pad(v.detach(), (0, -v.shape[3] % WIDTH)).contiguous()


def attend_tasks(q_BHND: Tensor, keys: Keys, tasks: Tasks, scale: float, out: Tensor, lse: Tensor) -> None:
    """Write out_slot = softmax(scale * q_row K^T + bias) V and its natural-log LSE for each row of each task.

    Args:
        q_BHND: float32 queries; rows count through all batch rows and heads.
        keys: prepared keys and values.
        tasks: which rows meet which keys.
        out: float32 (slots, E), E a multiple of `WIDTH`; slots that no task names are left alone.
        lse: float32 (slots,).

    Raises:
        MemoryError: if there is no room for the working memory of a thread.
    """
    q = q_BHND.detach().contiguous()
    failed = _library().saccade_tasks(
        _at(q), _at(keys.panels), _at(keys.values), _at(out), _at(lse),
        _at(tasks.rows), _at(tasks.slots), _at(tasks.task_row), _at(tasks.task_run), _at(tasks.task_mask),
        len(tasks.task_row) - 1, _at(tasks.run_key), _at(tasks.run_count), _at(tasks.run_mask), _at(tasks.run_bias),
        _at(tasks.tiles), *tasks.mask_shape, keys.M, keys.D, keys.values.shape[3], keys.block,
        scale / log(2), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no room for the working memory of attention")


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# ---------------------------------------------------------------------------- compiling and loading

#: types of the arguments, a letter each: p pointer, l long, f float, i int
_SIGNATURES = {
    "saccade_lanes": "",
    "saccade_panels": "pplllli",
    "saccade_tasks": "pppppppppplpppppllllllfi",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}


def _library() -> ctypes.CDLL:
    library, reason = _loaded()
    if library is None:
        raise RuntimeError(reason)
    return library


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if os.environ.get("SACCADE_NATIVE") == "0":
        return None, "turned off by SACCADE_NATIVE=0"
    try:
        return load(compile_source()), None
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"the C code could not be compiled here: {said.strip().splitlines()[-1] if said else error!r}"


def load(path: Path) -> ctypes.CDLL:
    """The compiled library at `path`, with the types of its functions."""
    library = ctypes.CDLL(str(path))
    for name, letters in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in letters], ctypes.c_int
    return library


def compile_source(flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile `attend.c` unless that has been done for this source, compiler and processor; the library's path.

    Raises:
        OSError: if there is no compiler, or nowhere to write.
        subprocess.SubprocessError: if it fails.
    """
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    known = [SOURCE.read_text(encoding="utf-8"), version.stdout, *flags, platform.platform(), _processor()]
    name = hashlib.sha256("\0".join(known).encode()).hexdigest()[:32] + ".so"
    folder = _folder()
    target = folder / name
    if target.exists():
        return target
    handle, draft = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *flags, str(SOURCE), "-o", draft, "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
        os.replace(draft, target)
    finally:
        Path(draft).unlink(missing_ok=True)
    return target


def _compiler() -> str:
    if sys.platform == "win32":
        raise OSError("no C compiler of the GNU kind on Windows")
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise OSError("no C compiler (cc, gcc or clang) was found")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _folder() -> Path:
    """Where compiled code is kept: the user's own cache, which others cannot write to."""
    folder = cache_folder() / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
