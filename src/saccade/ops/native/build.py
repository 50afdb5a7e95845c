"""Compiling the C code and loading it. See the package's docstring.

It goes into the cache folder (`$XDG_CACHE_HOME/saccade` or `~/.cache/saccade`), under a name that stands for source,
compiler, flags and processor, and for its own contents. What lies there is loaded only where nobody else could have
written it and the contents are what the name says: a damaged library is compiled again.
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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from saccade.ops.folder import cache_folder, exposure, private_folder, settle

__all__ = ["FLAGS", "address", "compile_source", "forecast", "library", "load", "refusal"]

FOLDER = Path(__file__).parent
SOURCES, HEADERS = (
    (
        "attend.c",
        "gradients.c",
        "soften.c",
        "grid.c",
        "grid_gradients.c",
        "grid8.c",
        "linear.c",
        "gather.c",
        "wkv.c",
        "scan.c",
        "team.c",
    ),
    ("grid.h", "lists.h", "vectors.h"),
)

#: flags of the compiler: the machine's own vectors, and the OpenMP whose threads torch has already started
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")

#: seconds that the compiler may take
PATIENCE = 120

#: types of the arguments, a letter each: p pointer, l long, f float, i int
_SIGNATURES = {
    "saccade_lanes": "",
    "saccade_panels": "pplllli",
    "saccade_tasks": "pppppppppplpppppppppplllllfipi",
    "saccade_gradients": "pppppppppppplpppppppppppppplllllfip",
    "saccade_merge": "ppppllli",
    "saccade_soften": "pppppplllllllli",
    "saccade_grid": "ppppplllllplppllppfi",
    "saccade_grid8": "ppppplllllplppllppfi",
    "saccade_grid_gradients": "ppppppppppplllllplppllppfi",
    "saccade_grid8_gradients": "ppppppppppplllllplppllppfi",
    "saccade_grid_tasks": "pppllll",
    "saccade_grid8_tasks": "pppllll",
    "saccade_team": "pi",
    "saccade_linear": "pppppppllllllllifi",
    "saccade_linear_sums": "pppppllllllllii",
    "saccade_gather": "pppplllli",
    "saccade_gather_dot": "pppplllli",
    "saccade_scatter": "ppppllllii",
    "saccade_crops": "pppppppllllllli",
    "saccade_crops_gradients": "pppppppppplllllllii",
    "saccade_wkv": "pppppppplllllli",
    "saccade_wkv_backward": "ppppppppppppplllllli",
    "saccade_scan": "ppppppplllllllli",
    "saccade_scan_backward": "pppppppppppplllllllli",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this kind cannot be computed here, or None. Compiles, where that is still to be done.

    Args:
        device, dtype: of the tensors.
    """
    return _strange(device, dtype) or _loaded()[1]


def forecast(device: torch.device, dtype: torch.dtype) -> str | None:
    """What `refusal` will say, as far as that can be known without compiling anything.

    Args:
        device, dtype: of the tensors.
    """
    return _strange(device, dtype) or (_prospect() if _outcome is None else _outcome[1])


def _strange(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "for the CPU only"
    return "single precision only" if dtype == torch.float64 else None


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
forecast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def address(x: Tensor | None) -> int | None:
    """Where a contiguous tensor lies; a null pointer for None."""
    return None if x is None else x.data_ptr()


def library() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        RuntimeError: where there is none (`refusal` says why).
    """
    code, reason = _loaded()
    if code is None:
        raise RuntimeError(reason)
    return code


_Outcome = tuple[ctypes.CDLL | None, str | None]
_outcome: _Outcome | None = None
_turn = Lock()


@contextmanager
def turned_off(reason: str) -> Iterator[None]:
    """Everything is computed in torch, as where there is no compiler; for measuring and testing.

    Args:
        reason: what `refusal` says meanwhile.
    """
    global _outcome
    before, _outcome = _outcome, (None, reason)
    try:
        yield
    finally:
        _outcome = before


def _loaded() -> _Outcome:
    """The code, or why there is none; found out once."""
    global _outcome
    if _outcome is None:
        with _turn:
            if _outcome is None:
                _outcome = _load_or_refuse()
    return _outcome


def _load_or_refuse() -> _Outcome:
    reason = _prospect()
    if reason is not None:
        return None, reason
    try:
        return load(compile_source()), None
    except subprocess.CalledProcessError as error:
        reason = f"the C compiler failed: {''.join(error.stderr.strip().splitlines()[-1:]) or error}"
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error)
    warnings.warn(f"saccade has no C code and computes in torch: {reason}", stacklevel=3)
    return None, reason


def _prospect() -> str | None:
    """Why there will be no code, where that is clear from the start; nothing is wrong then."""
    if os.environ.get("SACCADE_NATIVE") == "0":
        return "turned off by SACCADE_NATIVE=0"
    return _no_compiler(os.environ.get("CC"), os.environ.get("PATH"))


@lru_cache(maxsize=4)
def _no_compiler(named: str | None, path: str | None) -> str | None:
    """Why there is no compiler; looked for once, as every plan asks."""
    try:
        _compiler()
    except OSError as error:
        return str(error)
    return None


def load(path: Path) -> ctypes.CDLL:
    """The compiled library at `path`, with the types of its functions.

    Raises:
        OSError: if it cannot be loaded, or is not ours.
    """
    code = ctypes.CDLL(str(path))
    for name, letters in _SIGNATURES.items():
        try:
            function = getattr(code, name)
        except AttributeError as error:
            raise OSError(f"{path} has no {name}; delete it") from error
        function.argtypes, function.restype = [_TYPES[letter] for letter in letters], ctypes.c_int
    return code


def compile_source(flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile the C code unless that has been done for this source, compiler and processor; the library's path.

    Raises:
        OSError: if there is no compiler, or nowhere to write where others cannot.
        subprocess.SubprocessError: if it fails.
    """
    compiler = _compiler()
    version = _run(compiler, "--version")
    text = [(FOLDER / name).read_text(encoding="utf-8") for name in SOURCES + HEADERS]
    known = [*text, version, *flags, platform.platform(), _processor()]
    name = _digest("\0".join(known).encode())
    folder = private_folder(cache_folder() / "native")
    for kept in folder.glob(f"{name}-*.so"):
        if _is_whole(kept):
            return kept
        with suppress(OSError):
            kept.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as desk:
        draft = Path(desk) / "draft.so"
        _run(compiler, *flags, *(str(FOLDER / name) for name in SOURCES), "-o", str(draft), "-lm")
        draft.chmod(0o700)
        target = folder / f"{name}-{_digest(draft.read_bytes())}.so"
        settle(draft, target)
    return target


def _is_whole(path: Path) -> bool:
    """Nobody else can have written it, and it is what its name says."""
    try:
        return path.is_file() and exposure(path) is None and path.stem.endswith(_digest(path.read_bytes()))
    except OSError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=PATIENCE)
    return done.stdout


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
