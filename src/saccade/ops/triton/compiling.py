"""Every kernel compiled for devices that are not there, and what it takes of their registers and memory.

    python -m saccade.ops.triton.compiling              for all targets
    python -m saccade.ops.triton.compiling sm_90        for one

    python -m saccade.ops.triton.compiling --every      of all types and forms

Each module of `HOSTS` has a function `rehearse(every)` that calls what it launches on meta tensors of usual sizes, and
of sizes that are all 1. A launch that differs from those before in its kernel, types or constants is compiled as Triton
would at the call: whole numbers that are 1 are constants, too, and multiples of 16 are known as such.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.triton.launching import Launch, interpreted, noted

__all__ = [
    "HOSTS",
    "SPARED",
    "TARGETS",
    "Resources",
    "Target",
    "compile_launch",
    "may_spill",
    "over_limits",
    "rehearsed",
]

#: modules with a `rehearse`
HOSTS: tuple[str, ...] = tuple(f"saccade.ops.triton.{x}" for x in ("linear", "routed", "selective_scan", "wkv"))


class Target(NamedTuple):
    """A kind of device.

    Attributes:
        backend, arch, warp: as in Triton's `GPUTarget`.
        shared: bytes of shared memory (LDS) that a program may have.
        registers: 32-bit registers that a thread may have.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    registers: int


#: NVIDIA A100 and H100/H200 (CUDA C++ programming guide, "Technical Specifications per Compute Capability"), AMD MI300
#: (CDNA 3 instruction set architecture: 512 vector registers, of which half are accumulation registers)
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 255),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 255),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 512),
}


#: bytes of a thread that NVIDIA's assembler may keep in memory: a few numbers, often so that more programs fit on a
#: multiprocessor, as it does with half of the registers taken
SPARED = 16


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: vector registers of a thread.
        spilled: bytes (on AMD registers) of a thread that found no room there.
        shared: bytes of shared memory of a program.
    """

    registers: int
    spilled: int
    shared: int


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def rehearsed(target: Target, every: bool = False, hosts: Sequence[str] = HOSTS) -> dict[str, Launch]:
    """The launches that differ, by a name each.

    Args:
        target: the kind of device, which need not be there.
        every: of all types and forms, else of those that between them have every path of every kernel.
        hosts: names of modules with a `rehearse`.
    """
    with noted(hip=target.backend == "hip") as launches:
        for host in hosts:
            importlib.import_module(host).rehearse(every)
    found: dict[str, Launch] = {}
    for one in launches:
        found.setdefault(_name(one), one)
    return found


def compile_launch(one: Launch, target: Target) -> Resources:
    """Compile the kernel of a launch for a kind of device.

    Args:
        one: the launch.
        target: the kind of device, which need not be there.

    Raises:
        RuntimeError: if kernels are interpreted in this process, or the compiler does not say what it used.
    """
    if interpreted():
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET before triton is imported")
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialised(one)
    compiled = triton_compile(
        ASTSource(one.kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True},
    )
    read = _of_cubin if target.backend == "cuda" else _of_amdgcn
    return Resources(*read(compiled.asm), compiled.metadata.shared)


def may_spill(one: Launch, target: Target) -> int:
    """Bytes (on AMD registers) that a thread of a launch may spill.

    `SPARED`, but for rows of 256 columns in float32 on NVIDIA's: as three products in tf32 the smallest tile of them,
    16 rows, is 256 registers of each thread. Fewer or more warps, and longer tiles, spill more.

    Args:
        one: the launch.
        target: the kind of device.
    """
    wide = one.constants.get("WIDTH", 0) > 128 and one.constants["PRECISION"] == "tf32x3"
    return 248 if wide else SPARED if target.backend == "cuda" else 0


def over_limits(found: Resources, target: Target, spilled: int = 0) -> str | None:
    """In what a kernel goes beyond the device, or None.

    Args:
        found: what the kernel takes.
        target: the kind of device.
        spilled: what it may spill.

    >>> over_limits(Resources(255, 0, 200_000), TARGETS["sm_80"])
    '200000 bytes of shared memory, of 166912'
    """
    if found.spilled > spilled:
        return f"{found.spilled} spilled, of {spilled}"
    if found.registers > target.registers:
        return f"{found.registers} registers, of {target.registers}"
    if found.shared > target.shared:
        return f"{found.shared} bytes of shared memory, of {target.shared}"
    return None


def _specialised(one: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[Any]]]:
    """Types by argument, values of constants, and which arguments are multiples of 16."""
    names = one.kernel.arg_names
    signature, constants = dict.fromkeys(names, "constexpr"), dict(one.constants)
    attributes: dict[tuple[int], list[Any]] = {}
    for place, (name, value) in enumerate(zip(names, one.arguments)):
        if value is None or (type(value) is int and value == 1):
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _name(one: Launch) -> str:
    """Kernel, types of its tensors, constants; launches of one name are compiled alike but for their numbers."""
    types = [_TYPES[x.dtype] for x in one.arguments if isinstance(x, Tensor)]
    constants = " ".join(f"{name}={value}" for name, value in one.constants.items())
    ones = ",".join(name for name, x in zip(one.kernel.arg_names, one.arguments) if type(x) is int and x == 1)
    name = f"{one.kernel.__name__} {'/'.join(dict.fromkeys(types))} {constants} warps={one.warps}"
    return f"{name} 1={ones}" if ones else name


def _of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and spilled bytes, as NVIDIA's `cuobjdump` (which comes with triton) reads them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _of_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    text = asm["amdgcn"]
    return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.vgpr_spill_count:\s*(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output does not say {pattern!r}")
    return int(found[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: a line for each kernel and target; 1 where one is over a limit.

    Args:
        arguments: of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m saccade.ops.triton.compiling",
        description="Compile every Triton kernel for devices that need not be here; print what each takes of their "
        "registers and shared memory; exit with 1 where that is more than a device has.",
        epilog="example: python -m saccade.ops.triton.compiling sm_90 gfx942",
    )
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--every", action="store_true", help="of all types and forms, not of a choice (minutes)")
    given = parser.parse_args(arguments)
    for name in given.targets:
        if name not in TARGETS:
            parser.error(f"targets are {', '.join(TARGETS)}, got {name!r}")
    over = False
    for name in given.targets or TARGETS:
        for kernel, one in rehearsed(TARGETS[name], given.every).items():
            found = compile_launch(one, TARGETS[name])
            wrong = over_limits(found, TARGETS[name], may_spill(one, TARGETS[name]))
            over |= wrong is not None
            taken = f"{found.registers:3} registers {found.spilled:4} spilled {found.shared:6} bytes shared"
            print(f"{name:7} {taken}  {kernel}{'' if wrong is None else f'  OVER: {wrong}'}", flush=True)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
