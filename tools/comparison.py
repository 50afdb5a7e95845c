"""Compare every causal mechanism on text and on recall, and write docs/comparison.md with its reports; or, with
--networks, every network on its family's tasks, and write docs/networks.md.

Runs are kept in runs/comparison and go on where they were stopped. `make comparison` takes about half an hour on two
cores with the default budget, `make comparison-networks` about as long.
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
from saccade.train.tasks import TASKS
from saccade.train.tasks.network import NetworkTask

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def causal_mechanisms() -> list[str]:
    """Every sequence mechanism that a next-token task admits."""
    return [
        part.slug for part in catalogue.select(kind="sequence") if {"causal", "teacher-forced"} & set(part.supports)
    ]


def networks(tasks: list[str]) -> dict[str, list[str]]:
    """By task of networks, the networks that name it.

    Args:
        tasks: those that are wanted; all where empty.
    """
    known = [name for name, task in TASKS.items() if issubclass(task, NetworkTask)]
    found = {task: [part.slug for part in catalogue.parts() if task in part.tasks] for task in tasks or known}
    return {task: slugs for task, slugs in found.items() if slugs}


def mechanisms(tasks: list[str]) -> dict[str, list[str]]:
    """The causal mechanisms, for each task."""
    return dict.fromkeys(tasks or ["text", "recall"], causal_mechanisms())


HEADS = {
    "comparison": (
        "# Every causal mechanism on text and recall",
        "",
        "Written by `make comparison` (tools/comparison.py); nothing here is typed by hand. The same small model is",
        "trained with each mechanism for the same steps, at its default options for the length: a first look on two",
        "cores, not a ranking. Rates are not tuned per mechanism, and one seed has no spread.",
    ),
    "networks": (
        "# Every network on its family's tasks",
        "",
        "Written by `make comparison-networks` (tools/comparison.py); nothing here is typed by hand. Each network is",
        "trained at a small size of its card for the same steps on the same generated or photographed data: a first",
        "look on two cores, not a ranking. Rates are not tuned per network, and one seed has no spread.",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", action="store_true", help="networks on their tasks, at budget quick by default")
    parser.add_argument("--budget", help="seconds of training a mechanism (20 by default), or quick, standard, long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=[])
    arguments = parser.parse_args()
    name = "networks" if arguments.networks else "comparison"
    given = arguments.budget or ("quick" if arguments.networks else "20")
    budget: str | float = float(given) if given.replace(".", "", 1).isdigit() else given
    lines = [*HEADS[name], "", f"{date.today().isoformat()}, {describe()}, budget {given}, seed {arguments.seed}."]
    for task, slugs in (networks if arguments.networks else mechanisms)(arguments.tasks).items():
        folder = ROOT / "runs" / "comparison" / task
        result = saccade.compare(slugs, task=task, budget=budget, seed=arguments.seed, out=folder)
        report = write_report(result, folder)
        print(f"with pictures of each: {report}")
        lines += ["", f"## {task}", ""]
        if not arguments.networks:
            target = DOCS / f"comparison-{task}.html"
            # without the attention maps: those of all mechanisms are 10 MB
            pictures, dark = panels(result)
            write_text(target, page(result, pictures, {}, dark))
            lines += [f"[The report]({target.name}): learning curves and growth with length.", ""]
        lines += ["```", result.table(width=150), "```", "", *result.answer()]
        write_text(DOCS / f"{name}.md", "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
