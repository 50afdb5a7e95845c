"""The answer of a comparison in sentences: best, fastest, flattest, and what its figures do not tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saccade.ops.measure import busy
from saccade.train.records import MechanismRecord, count, plural

if TYPE_CHECKING:
    from saccade.train.result import CompareResult

#: steps from which on their median says how fast training is: the first ones warm up
_TIMED = 5


def answer(result: CompareResult) -> list[str]:
    """ "Which attention should I use here?", in a few sentences, each from figures of this result."""
    sentences = _quality(result)
    for label, value in (
        ("Trains fastest here", lambda record: record.train_tokens_per_second),
        ("Decodes fastest", lambda record: record.decode_tokens_per_second),
    ):
        timed = [r for r in result.mechanisms if label != "Trains fastest here" or r.steps is None or r.steps >= _TIMED]
        known = [(value(record), record) for record in timed if value(record) is not None]
        if len(known) > 1:
            rate, fastest = max(known, key=lambda pair: pair[0])
            slowest = min(rate for rate, _ in known)
            sentences.append(f"{label}: {fastest.name}, {count(rate)} tokens/s ({rate / slowest:.1f} x the slowest).")
    fitted = [record for record in result.mechanisms if "seconds" in record.fits]
    if len(fitted) > 1:
        flattest = min(fitted, key=lambda record: record.fits["seconds"].exponent)
        steepest = max(fitted, key=lambda record: record.fits["seconds"].exponent)
        sentences.append(
            f"Time grows slowest with length: {flattest.name}, N^{flattest.fits['seconds'].exponent:.2f}; "
            f"fastest: {steepest.name}, N^{steepest.fits['seconds'].exponent:.2f}."
        )
    return sentences


def _quality(result: CompareResult) -> list[str]:
    """What the qualities say, and which of them say nothing."""
    sentences = []
    ranked = [record for record in result.ranked if not result.doubt(record)]
    if ranked:
        best, *others = ranked
        sentences.append(f"Best quality: {best.name}, {result.metric.text(best.quality)} {result.metric.unit}.")
        close = [record for record in others if abs(record.quality - best.quality) <= _close(best, record)]
        if close:
            why = (
                "within the spread of the seeds"
                if best.spread is not None
                else "by less than 1 %, which one seed cannot tell apart; run several"
            )
            sentences.append(f"{_names(close)} differ{'s' if len(close) == 1 else ''} from it {why}.")
    hardly = [record for record in result.mechanisms if result.doubt(record) == "hardly trained"]
    if hardly:
        counts = sorted({record.steps or 0 for record in hardly})
        steps = plural(counts[0], "step") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} steps"
        sentences.append(
            f"Hardly trained, so not ranked: {_names(hardly)} ({steps}, where at least "
            f"{result.config['least_steps']} are needed); give a larger budget."
        )
    guessing = [record for record in result.mechanisms if result.doubt(record) == "at chance"]
    if guessing:
        reached = result.metric.text(result.metric.chance or 0.0)
        sentences.append(
            f"At chance, so not ranked: {_names(guessing)} (guessing reaches {reached} {result.metric.unit})."
        )
    sentences += [f"Not trained: {why}." for why in result.failed.values()]
    sentences += filter(None, [busy(result.waited)])
    return sentences


def _close(a: MechanismRecord, b: MechanismRecord) -> float:
    """Differences up to this are not told apart: the seeds' joint spread, or 1 % with a single seed."""
    if a.spread is None or b.spread is None:
        return 0.01 * abs(a.quality)
    return math.hypot(a.spread, b.spread)


def _names(records: Sequence[MechanismRecord]) -> str:
    names = [record.name for record in records]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
