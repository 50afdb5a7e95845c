"""What machine this is, and how fast it multiplies matrices: the measure of every other rate."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from saccade.ops.measure import seconds


@dataclass(frozen=True)
class Machine:
    """Attributes are what `describe` found; `matmul_flops` is measured, in FLOP/s of fp32."""

    processor: str
    cores: int
    threads: int
    accelerator: str
    python: str
    torch: str
    matmul_flops: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        place = self.accelerator or f"{self.processor}, {self.threads} of {self.cores} cores"
        return f"{place}, torch {self.torch}, matmul {self.matmul_flops / 1e9:.0f} GFLOP/s fp32"


@lru_cache(maxsize=1)
def describe() -> Machine:
    """This machine; measures the matrix multiplication once a process (a tenth of a second)."""
    cuda = torch.cuda.is_available()
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerator=torch.cuda.get_device_name() if cuda else "",
        python=platform.python_version(),
        torch=torch.__version__,
        matmul_flops=matmul_rate("cuda" if cuda else "cpu"),
    )


def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1536) -> float:
    """FLOP/s of a square matrix multiplication."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ a)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    except OSError:
        pass
    return platform.processor() or platform.machine()
