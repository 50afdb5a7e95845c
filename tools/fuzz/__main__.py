"""Attack the library with generated cases: `python tools/fuzz --minutes 5 --seed 0`, or `make fuzz`.

Each case is drawn from one number, printed where it fails, so that `--only AREA --case NUMBER` repeats it alone.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
import traceback
from collections import Counter
from random import Random

from cases import Skip, Wrong

#: what is attacked, and its share of the time
AREAS = {"engine": 8, "nans": 2, "linear": 1, "routed": 2, "pairs": 2, "parts": 2, "files": 1, "kills": 0.01}

#: not among a few cases, unless named: one takes as long as a thousand of the others
SLOW = ("kills",)

#: seconds after which a case counts as hanging
PATIENCE = 180


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default 5)")
    parser.add_argument("--cases", type=int, help="stop after so many cases (default: as many as the minutes allow)")
    parser.add_argument("--seed", type=int, default=0, help="which cases (default 0)")
    parser.add_argument("--only", choices=sorted(AREAS), action="append", help="an area; may be repeated")
    parser.add_argument("--case", type=int, help="repeat one case of the one area named by --only")
    parser.add_argument("--keep-going", action="store_true", help="count failures instead of stopping at the first")
    options = parser.parse_args()
    areas = options.only or [name for name in AREAS if options.cases is None or name not in SLOW]
    if options.case is not None:
        if len(areas) != 1:
            parser.error("--case needs one --only")
        return _one(areas[0], options.case)
    if options.cases is None:
        end, most, span = time.monotonic() + 60 * options.minutes, float("inf"), f"{options.minutes:g} minutes"
    else:
        end, most, span = float("inf"), options.cases, f"{options.cases:,} cases"
    print(f"{span} of {', '.join(areas)}, seed {options.seed}", flush=True)
    tried, skipped, failed = Counter(), Counter(), Counter()
    rng, told = Random(options.seed), time.monotonic()
    while time.monotonic() < end and sum(tried.values()) < most:
        area = rng.choices(areas, [AREAS[name] for name in areas])[0]
        number = rng.getrandbits(48)
        outcome = _try(area, number)
        tried[area] += 1
        skipped[area] += outcome == "skipped"
        if outcome == "wrong":
            failed[area] += 1
            if not options.keep_going:
                break
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"  {sum(tried.values()):,} cases, {sum(failed.values())} wrong", flush=True)
    for area in areas:
        print(f"{area:10} {tried[area]:>8,} cases  {skipped[area]:>7,} refused by name  {failed[area]:>4} wrong")
    print(f"{sum(tried.values()):,} cases, {sum(failed.values())} wrong")
    return 1 if failed else 0


def _one(area: str, number: int) -> int:
    outcome = _try(area, number, tell=True)
    print(outcome)
    return int(outcome == "wrong")


def _try(area: str, number: int, tell: bool = False) -> str:
    run = importlib.import_module(area).run
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(PATIENCE)
    try:
        text = run(Random(number))
    except Skip as reason:
        if tell:
            print(reason)
        return "skipped"
    except Wrong as wrong:
        print(f"WRONG: {wrong}\nagain: python tools/fuzz --only {area} --case {number}", flush=True)
        return "wrong"
    except Exception:
        traceback.print_exc()
        print(f"RAISED\nagain: python tools/fuzz --only {area} --case {number}", flush=True)
        return "wrong"
    finally:
        signal.alarm(0)
    if tell:
        print(text)
    return "right"


def _hangs(*_: object) -> None:
    raise Wrong(f"took more than {PATIENCE} s")


if __name__ == "__main__":
    sys.exit(main())
