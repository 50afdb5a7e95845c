"""Print the speed tables of every benchmark here, one after another: `python benchmarks/run.py [--quick] [NAME ...]`.

Each is a process of its own, so that none inherits another's memory or threads. `make benchmarks` runs all of them, but
for `device.py`, which is for accelerators and measures its own ten minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from saccade.bench.machine import describe

FOLDER = Path(__file__).parent


def main() -> int:
    known = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("run", "device"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(known)}; all where none is named")
    parser.add_argument("--quick", action="store_true", help="few repeats, the cases with goals only")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there is {', '.join(known)}")
    print(describe(), flush=True)
    failed = 0
    for name in arguments.names or known:
        command = [sys.executable, str(FOLDER / f"{name}.py"), *(["--quick"] if arguments.quick else [])]
        failed |= subprocess.run(command, check=False).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
