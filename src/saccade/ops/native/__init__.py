"""Inner loops in C for the CPU, compiled on the machine at first use: what torch has no fused operator for.

`attend.c` holds softmax attention over lists of keys, `grid.c` over neighbourhoods on a grid; float32; `gradients.c`
the backward pass of the former. They are compiled by the C compiler that
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
from collections.abc import Callable
from functools import lru_cache
from math import ceil, log
from pathlib import Path
from threading import local

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.folder import cache_folder
from saccade.ops.memory import large_empty

__all__ = ["Gradients", "Keys", "Tasks", "address", "attend_tasks", "library", "merge_shares", "refusal"]

FOLDER = Path(__file__).parent
SOURCES, HEADERS = ("attend.c", "gradients.c", "grid.c", "grid8.c"), ("lists.h", "vectors.h")

#: flags of the compiler: the machine's own vectors, and the OpenMP whose threads torch has already started
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")

#: rows of a task, at most: their queries and outputs stay in the second cache
TASK_ROWS = 128

#: bytes of working memory that a thread keeps
KEPT_BYTES = 2**25

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


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Tasks:
    """Rows that meet the same runs of keys, as `attend.c` lists them.

    Args:
        rows: (R,) which query each row is, tasks one after the other.
        slots: (R,) where its output and LSE go.
        task_row: (T + 1,) first row of each task.
        task_run: (T, 2) first run of each task, and the one after its last.
        run_key: (L,) first key of each run among those of all heads: head * M + key.
        run_count: (L,) keys of the run, within one block.
        run_mask: (L,) where in `masks` the first line of the run's mask begins, or -1.
        task_mask: (T,) line of its masks at which the task's first row stands.
        run_bias: (L,) added to the scores of the run.
        masks: bool, True = may attend, contiguous.
        mask_step: elements from line to line of a mask.
        row_first, row_last: (R,) first and last key of its head that each row may attend to.
        row_place, key_born, key_until: int32 (R,) and (keys of all heads,): a row attends to the keys whose born and
            until enclose its place.
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
        masks: Tensor | None = None,
        mask_step: int = 0,
        row_first: Tensor | None = None,
        row_last: Tensor | None = None,
        row_place: Tensor | None = None,
        key_born: Tensor | None = None,
        key_until: Tensor | None = None,
    ) -> None:
        self.rows, self.slots, self.task_row, self.task_run = rows, slots, task_row, task_run
        self.run_key, self.run_count, self.run_mask, self.run_bias = run_key, run_count, run_mask, run_bias
        self.task_mask = torch.zeros_like(task_row) if task_mask is None else task_mask
        self.row_first, self.row_last, self.row_place = row_first, row_last, row_place
        # C reads whole vectors
        self.key_born, self.key_until = (None if x is None else F.pad(x, (0, WIDTH)) for x in (key_born, key_until))
        self.masks, self.mask_step = masks, mask_step


class _Kept(local):
    """Memory that a thread keeps from call to call: fresh pages cost more than what is written to them."""

    panels: Tensor | None = None


_kept = _Kept()


def _scratch(floats: int) -> Tensor:
    """Memory for `floats` floats, until this thread's next call."""
    if floats * 4 > KEPT_BYTES:
        return large_empty((floats,), torch.float32, torch.device("cpu"))
    if _kept.panels is None or _kept.panels.numel() < floats:
        with torch.inference_mode(False):
            _kept.panels = large_empty((floats,), torch.float32, torch.device("cpu"))
    return _kept.panels


class Keys:
    """Keys and values (B, K, M, ·) as the C code wants them: keys in panels, values as wide as vectors are.

    The panels are the thread's working memory: they hold until the next `Keys`.
    """

    def __init__(self, k: Tensor, v: Tensor, block: int) -> None:
        self.M, self.D, self.block = k.shape[2], k.shape[3], block
        self.panels = _panels(k.detach().contiguous(), block, _scratch)
        self.values = F.pad(v.detach(), (0, -v.shape[3] % WIDTH)).contiguous()


def _panels(x_BKMD: Tensor, block: int, room: Callable[[int], Tensor]) -> Tensor:
    """Keys (or values) transposed into the panels that `attend.c` multiplies with."""
    B, K, M, D = x_BKMD.shape
    code = library()
    lanes = code.saccade_lanes()
    panels = room(B * K * ceil(M / block) * ceil(block / lanes) * lanes * D)
    code.saccade_panels(address(x_BKMD), address(panels), B * K, M, D, block, torch.get_num_threads())
    return panels


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
    t, at = tasks, address
    failed = library().saccade_tasks(
        at(q), at(keys.panels), at(keys.values), at(out), at(lse),
        at(t.rows), at(t.slots), at(t.task_row), at(t.task_run), at(t.task_mask), len(t.task_row) - 1,
        at(t.run_key), at(t.run_count), at(t.run_mask), at(t.run_bias), at(t.row_first), at(t.row_last),
        at(t.row_place), at(t.key_born), at(t.key_until), at(t.masks),
        t.mask_step, keys.M, keys.D, keys.values.shape[3], keys.block, scale / log(2), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no room for the working memory of attention")


class Gradients:
    """The backward pass of tasks: `add` those of a forward pass, then `finish`.

    Args:
        q_BHND, k_BKMD, v_BKME, out_BHNE, lse_BHN, grad_BHNE: inputs, outputs, and the gradient of `out`; float32.
        grad_lse_BHN: the gradient of `lse`, or None.
        block: tokens of a block of keys.
        scale: of the scores.
        apart: no row is in two tasks, so that tasks of one key head may run at the same time.
    """

    def __init__(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        out_BHNE: Tensor,
        lse_BHN: Tensor,
        grad_BHNE: Tensor,
        grad_lse_BHN: Tensor | None,
        block: int,
        scale: float,
        *,
        apart: bool,
    ) -> None:
        self.widths, self.block, self.scale = (q_BHND.shape[3], v_BKME.shape[3]), block, scale
        delta = (grad_BHNE * out_BHNE).sum(-1)
        if grad_lse_BHN is not None:
            delta = delta - grad_lse_BHN.masked_fill(lse_BHN == float("-inf"), 0.0)
        self.delta, self.lse = delta.contiguous(), lse_BHN.contiguous()
        self.q, self.k, v, self.grad = (
            F.pad(x, (0, -x.shape[3] % WIDTH)).contiguous() for x in (q_BHND, k_BKMD, v_BKME, grad_BHNE)
        )
        self.panels, self.value_panels = (_panels(x, block, torch.empty) for x in (self.k, v))
        M = self.k.shape[2]
        self.heads, threads = self.k.shape[0] * self.k.shape[1], torch.get_num_threads()
        even = self.heads % threads == 0 or self.heads >= 4 * threads
        self.parts = 1 if even or not apart else ceil(2 * threads / self.heads)
        self.grad_q = torch.zeros_like(self.q)
        self.grad_k, self.grad_v = (self.k.new_zeros(self.heads, self.parts, M, x.shape[3]) for x in (self.k, v))

    def add(self, tasks: Tasks, run_grad: Tensor | None = None) -> None:
        """Add what these tasks give; `run_grad` (runs,) is added the gradient of the bias of each run.

        Raises:
            MemoryError: if there is no room for the working memory of a thread.
        """
        # tasks stand in the order of heads: each head's in equal parts
        queries, B_H = self.q.shape[2], self.q.shape[0] * self.q.shape[1]
        task_head = tasks.rows[tasks.task_row[:-1].clamp(max=len(tasks.rows) - 1)] // queries * self.heads // B_H
        first = torch.searchsorted(task_head, torch.arange(self.heads + 1))
        share = torch.arange(self.parts)
        owner_task = (first[:-1, None] + first.diff()[:, None] * share // self.parts).flatten()
        owner_task = torch.cat([owner_task, first[-1:]])
        t, at = tasks, address
        M, D = self.k.shape[2:]
        failed = library().saccade_gradients(
            at(self.q), at(self.grad), at(self.delta), at(self.lse), at(self.k), at(self.panels),
            at(self.value_panels), at(self.grad_q), at(self.grad_k), at(self.grad_v), at(run_grad), at(owner_task),
            len(owner_task) - 1, at(t.rows), at(t.task_row), at(t.task_run), at(t.task_mask), at(t.run_key),
            at(t.run_count), at(t.run_mask), at(t.run_bias), at(t.row_first), at(t.row_last),
        at(t.row_place), at(t.key_born), at(t.key_until), at(t.masks),
            t.mask_step, M, D, self.grad.shape[3], self.block, self.scale, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no room for the working memory of attention")

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        D, E = self.widths
        shape = self.k.shape[:3]
        grad_k, grad_v = (x.sum(1) if self.parts > 1 else x for x in (self.grad_k, self.grad_v))
        return (
            self.grad_q[..., :D],
            grad_k.view(*shape, -1)[..., :D].mul_(self.scale),
            grad_v.view(*shape, -1)[..., :E],
        )


def merge_shares(out_RE: Tensor, lse_R: Tensor, parts_RsE: Tensor, lse_Rs: Tensor) -> None:
    """Merge into out and lse what each row got from s other sets of keys; shares whose LSE is -inf are not read."""
    rows, shares = lse_Rs.shape
    library().saccade_merge(
        address(out_RE),
        address(lse_R),
        address(parts_RsE),
        address(lse_Rs),
        rows,
        shares,
        out_RE.shape[1],
        torch.get_num_threads(),
    )


def address(x: Tensor | None) -> int | None:
    """Where a contiguous tensor lies; a null pointer for None."""
    return None if x is None else x.data_ptr()


# ---------------------------------------------------------------------------- compiling and loading

#: types of the arguments, a letter each: p pointer, l long, f float, i int
_SIGNATURES = {
    "saccade_lanes": "",
    "saccade_panels": "pplllli",
    "saccade_tasks": "pppppppppplpppppppppplllllfi",
    "saccade_gradients": "pppppppppppplpppppppppppppplllllfi",
    "saccade_merge": "ppppllli",
    "saccade_grid": "ppppplllllplppllfi",
    "saccade_grid8": "ppppplllllplppllfi",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}


def library() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        RuntimeError: where there is none (`refusal` says why).
    """
    code, reason = _loaded()
    if code is None:
        raise RuntimeError(reason)
    return code


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """The code, or why there is none; found out once."""
    return _load_or_refuse()


def _load_or_refuse() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("SACCADE_NATIVE") == "0":
        return None, "turned off by SACCADE_NATIVE=0"
    try:
        return load(compile_source()), None
    except subprocess.CalledProcessError as error:
        return None, f"the C compiler failed: {error.stderr.strip().splitlines()[-1:] or error}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)


def load(path: Path) -> ctypes.CDLL:
    """The compiled library at `path`, with the types of its functions."""
    code = ctypes.CDLL(str(path))
    for name, letters in _SIGNATURES.items():
        function = getattr(code, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in letters], ctypes.c_int
    return code


def compile_source(flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile the C code unless that has been done for this source, compiler and processor; the library's path.

    Raises:
        OSError: if there is no compiler, or nowhere to write.
        subprocess.SubprocessError: if it fails.
    """
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    text = [(FOLDER / name).read_text(encoding="utf-8") for name in SOURCES + HEADERS]
    known = [*text, version.stdout, *flags, platform.platform(), _processor()]
    name = hashlib.sha256("\0".join(known).encode()).hexdigest()[:32] + ".so"
    folder = _folder()
    target = folder / name
    if target.exists():
        return target
    handle, draft = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *flags, *(str(FOLDER / name) for name in SOURCES), "-o", draft, "-lm"]
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
