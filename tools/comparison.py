"""Compare every causal mechanism on text and on recall, and write docs/comparison.md with its reports.

Runs are kept in runs/comparison and go on where they were stopped. `make comparison` takes about half an hour on two
cores with the default budget.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

import saccade
from saccade import catalogue
from saccade.bench.machine import describe
from saccade.report.html import page, panels, write_report
from saccade.train.files import write_text

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def causal_mechanisms() -> list[str]:
    """Every sequence mechanism that a next-token task admits."""
    return [
        part.slug for part in catalogue.select(kind="sequence") if {"causal", "teacher-forced"} & set(part.supports)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="20", help="seconds of training a mechanism, or quick, standard, long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["text", "recall"])
    arguments = parser.parse_args()
    budget: str | float = arguments.budget
    if arguments.budget.replace(".", "", 1).isdigit():
        budget = float(arguments.budget)
    slugs = causal_mechanisms()
    lines = [
        "# Every causal mechanism on text and recall",
        "",
        "Written by `make comparison` (tools/comparison.py); nothing here is typed by hand. The same small model is",
        "trained with each mechanism for the same steps, at its default options for the length: a first look on two",
        "cores, not a ranking. Rates are not tuned per mechanism, and one seed has no spread.",
        "",
        f"{date.today().isoformat()}, {describe()}, budget {arguments.budget}, seed {arguments.seed}.",
    ]
    for task in arguments.tasks:
        folder = ROOT / "runs" / "comparison" / task
        result = saccade.compare(slugs, task=task, budget=budget, seed=arguments.seed, out=folder)
        report = write_report(result, folder)
        target = DOCS / f"comparison-{task}.html"
        # without the attention maps: those of all mechanisms are 10 MB
        pictures, dark = panels(result)
        write_text(target, page(result, pictures, {}, dark))
        print(f"with attention maps: {report}")
        lines += ["", f"## {task}", "", f"[The report]({target.name}): learning curves and growth with length.", ""]
        lines += ["```", result.table(width=150), "```", "", *result.answer()]
    write_text(DOCS / "comparison.md", "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
