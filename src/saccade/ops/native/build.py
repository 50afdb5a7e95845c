"""Compiling the C code and loading it. See the package's docstring.

It goes into the cache folder (`$XDG_CACHE_HOME/saccade` or `~/.cache/saccade`), under a name that stands for source,
compiler, flags and processor.
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
from pathlib import Path

import torch
from torch import Tensor

from saccade.ops.folder import cache_folder

__all__ = ["FLAGS", "address", "compile_source", "library", "load", "refusal"]

FOLDER = Path(__file__).parent
SOURCES, HEADERS = ("attend.c", "gradients.c", "grid.c", "grid8.c"), ("lists.h", "vectors.h")

#: flags of the compiler: the machine's own vectors, and the OpenMP whose threads torch has already started
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")

#: seconds that the compiler may take
PATIENCE = 120

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


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this kind cannot be computed here, or None."""
    if device.type != "cpu":
        return "for the CPU only"
    if dtype == torch.float64:
        return "single precision only"
    return _loaded()[1]


# what torch.compiler.assume_constant_result does, without its import of the whole compiler
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
