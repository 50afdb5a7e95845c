"""Claims that are run: a part's experiment on the bench, and what came of it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from saccade import catalogue
from saccade.catalogue import ClaimResult
from saccade.ops.measure import Watch, busy
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
        waited: of that time, the share in the queue for a processor; None where not known.
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

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def text(self) -> str:
        """The outcome in a few lines."""
        verdict = "smoke run, no verdict" if self.smoke else "shows" if self.holds else "does NOT show at this size"
        lines = [f"{self.slug}: {verdict} ({self.seconds:.0f} s)", f"  {self.title}"]
        lines += [f"  the paper says   {self.paper}", f"  expected here    {self.expected}"]
        lines += [f"  measured         {name} = {value:.4g}" for name, value in self.measured.items()]
        lines += [f"  note             {note}" for note in (self.note, busy(self.waited)) if note]
        return "\n".join(lines)


def run_claim(slug: str, lab: Lab) -> Outcome:
    """Run the claim of one part.

    Args:
        slug: of the part.
        lab: on which it is measured.

    Raises:
        ValueError: if the part is unknown, not built, or has none.
    """
    part = catalogue.part(slug)
    if part.claim is None:
        raise ValueError(f"{slug!r} has no claim")
    start = time.perf_counter()
    with lab.seeded(), showing(lab.show_progress), bar(f"claim {slug}", 1), Watch() as watch:
        result: ClaimResult = part.claim.run(lab)
    return Outcome(
        slug=slug,
        title=part.title,
        paper=part.claim.paper,
        expected=part.claim.expected,
        measured=dict(result.measured),
        holds=bool(result.holds),
        note=result.note,
        seconds=time.perf_counter() - start,
        smoke=lab.smoke,
        seed=lab.seed,
        waited=watch.waited,
    )
