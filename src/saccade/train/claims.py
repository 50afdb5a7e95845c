"""Claims that are run: a part's experiment on the bench, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from saccade import catalogue
from saccade.catalogue import Claim, ClaimResult
from saccade.ops.measure import Watch, busy, clock
from saccade.train.lab import Lab
from saccade.train.progress import bar, showing


@dataclass(frozen=True)
class Outcome:
    """A claim that was run: the paper's words, what was expected, what came, how long it took.

    Attributes:
        slug, title: of the part and its paper.
        paper, expected: the claim's own words.
        measured, holds, note: the `ClaimResult`.
        seconds: it took.
        smoke, seed: of the lab.
        waited: of that time, the share in the queue for a processor; None where not known, or not in the times.
        scale: trainings took so many times the claim's own steps.
        model, context: of a second line: the real model on which the part was measured, and its tokens.
    """

    slug: str
    title: str
    paper: str
    expected: str
    measured: dict[str, float]
    holds: bool
    note: str
    seconds: float
    smoke: bool
    seed: int
    waited: float | None = None
    scale: int = 1
    model: str = ""
    context: int = 0

    @property
    def where(self) -> str:
        """What tells this line from the claim's own; "" for that one."""
        return where(self.as_dict())

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def text(self) -> str:
        """The outcome in a few lines."""
        verdict = "smoke run, no verdict" if self.smoke else "shows" if self.holds else "does NOT show at this size"
        named = f"{self.slug} {self.where}".strip()
        lines = [f"{named}: {verdict} ({self.seconds:.0f} s)", f"  {self.title}"]
        lines += [f"  the paper says   {self.paper}", f"  expected here    {self.expected}"]
        lines += [f"  measured         {name} = {value:.4g}" for name, value in self.measured.items()]
        lines += [f"  note             {note}" for note in (self.note, busy(self.waited)) if note]
        return "\n".join(lines)


def where(line: Mapping[str, Any]) -> str:
    """What tells a line from the claim's own, "" for that one: the model and its tokens, or how long it was trained.

    Args:
        line: of an `Outcome`, as `claims.json` keeps it.
    """
    if line.get("model"):
        return f"on {line['model']}, {line['context']} tokens"
    return f"with {line['scale']} times the steps" if line.get("scale", 1) != 1 else ""


def run_claim(slug: str, lab: Lab) -> Outcome:
    """Run the claim of one part; the lab's `scale` makes it a long one.

    Args:
        slug: of the part.
        lab: on which it is measured.

    Raises:
        ValueError: if the part is unknown, not built, or has none.
    """
    part = catalogue.part(slug)
    if part.claim is None:
        raise ValueError(f"{slug!r} has no claim")
    return outcome(slug, part.title, part.claim, lab)


def outcome(slug: str, title: str, claim: Claim, lab: Lab, *, model: str = "", context: int = 0) -> Outcome:
    """Run a claim, and what came of it.

    Args:
        slug, title: of the part.
        claim: the part's own, or one of it on a real model.
        lab: on which it is measured.
        model, context: the real model, and its tokens.
    """
    start, trained, words = time.perf_counter(), lab.trained, f"claim {slug}{f' on {model}' if model else ''}"
    with lab.seeded(), showing(lab.show_progress), bar(words, 1), Watch() as watch:
        result: ClaimResult = claim.run(lab)
    note = result.note
    if lab.scale != 1 and lab.trained == trained:
        note = f"nothing is trained here, so this is the claim as it always is. {note}".rstrip()
    return Outcome(
        slug=slug,
        title=title,
        paper=claim.paper,
        expected=claim.expected,
        measured=dict(result.measured),
        holds=bool(result.holds),
        note=note,
        seconds=time.perf_counter() - start,
        smoke=lab.smoke,
        seed=lab.seed,
        waited=watch.waited if clock() == "wall" else None,
        scale=lab.scale,
        model=model,
        context=context,
    )
