"""Where kernels run, what is noted of a launch, and every kernel compiled for devices that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from saccade.ops.triton import compiling, launch, launching, refusal
from saccade.ops.triton.compiling import TARGETS, Resources, over_limits

pytest.importorskip("triton", reason="triton is not installed")


class Kernel:
    """What `triton.jit` makes, as far as it is noted and specialised."""

    __name__ = "double"
    arg_names = ("x", "out", "count", "step", "factor", "BLOCK")


def test_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refusal(cpu, torch.float32) is None
    assert "double" in (refusal(cpu, torch.float64) or "")
    assert "meta" in (refusal(torch.device("meta"), torch.float32) or "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in (refusal(cpu, torch.float32) or "")
    monkeypatch.setattr(launching, "_installed", lambda: False)
    assert "saccade[triton]" in (refusal(cpu, torch.float32) or "")


def test_devices_before_sm_80_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        launching._too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (refusal(torch.device("cuda"), torch.bfloat16) is not None) == refused
    launching._too_old.cache_clear()


def test_launches_on_meta_tensors_are_noted_and_specialised() -> None:
    kernel: Any = Kernel()
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    launch(kernel, (1,), x, x.float(), 64, 1, 0.5, BLOCK=16)  # outside, nothing happens
    with launching.noted() as found:
        launch(kernel, (4,), x, x.float(), 64, 1, 0.5, BLOCK=16, warps=8)
        launch(kernel, (0,), x, x, 64, 1, 0.5, BLOCK=16)  # no program, no launch
    (one,) = found
    assert one.grid == (4,) and one.warps == 8 and one.constants == {"BLOCK": 16}
    signature, constants, attributes = compiling._specialised(one)
    assert list(signature.values()) == ["*bf16", "*fp32", "i32", "constexpr", "fp32", "constexpr"]
    assert constants == {"BLOCK": 16, "step": 1}
    assert set(attributes) == {(0,), (1,), (2,)}


def test_float32_is_given_up_where_torch_gives_it_up() -> None:
    device = torch.device("meta")
    assert launching._precision(device, torch.float32) == "tf32x3"
    assert launching._precision(device, torch.bfloat16) == "tf32"
    torch.set_float32_matmul_precision("high")
    try:
        assert launching._precision(device, torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            assert launching._precision(device, torch.float32) == "tf32"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    assert launching._precision(device, torch.float32) == "tf32x3"


def test_limits() -> None:
    target = TARGETS["gfx942"]
    assert over_limits(Resources(512, 0, 65536), target) is None
    assert "spilled" in (over_limits(Resources(10, 4, 0), target) or "")
    assert over_limits(Resources(10, 4, 0), target, spilled=4) is None
    assert "registers" in (over_limits(Resources(513, 0, 0), target) or "")
    assert "shared" in (over_limits(Resources(10, 0, 65537), target) or "")


def test_nothing_is_compiled_where_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compiling.compile_launch(launching.Launch(Kernel(), (1,), (), {}, 4, 2), TARGETS["sm_80"])


def test_command_refuses_unknown_targets() -> None:
    with pytest.raises(SystemExit) as raised:
        compiling.main(["sm_20"])
    assert raised.value.code == 2


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_within_the_limits_of_the_device(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "saccade.ops.triton.compiling", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines and all(line.startswith(target) for line in lines)
