"""The page of what our mechanisms buy on real models, of what was measured: advice, the arena, conversions, claims."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saccade.bench import records
from saccade.integrations.advise import Advice, Trial
from saccade.report import claims
from saccade.report.advice import read_advice
from saccade.train.arena import ArenaResult
from saccade.train.model_claims import FASTER

__all__ = ["PAGE", "page"]

PAGE = "smollm2.md"
#: beside it: folders that `saccade advise --out` and `saccade compare --out` wrote, and the figures of conversions
FOLDER = "real-models"

HEAD = """\
# On real models: what each mechanism buys

Made by `make readme` from what lies in docs/real-models and docs/claims.json; do not edit. Nothing was trained for
these models but where a section says so. The models are those of `saccade.train.models`, the text is Python's language
reference, the image scikit-image's astronaut. Speed is that of the whole model beside the same with dense attention
(torch's SDPA), measured in the same run; quality is what the model loses.
"""


def page(docs: Path) -> str:
    """The page; a section says so where it is not measured.

    Args:
        docs: the folder of the page.

    Raises:
        ValueError: if what was measured cannot be read.
    """
    sections = {
        "The frontier of every mechanism": _advice(docs),
        "The arena: caches that drop tokens": _arena(docs),
        "Conversions: half of the layers to another mechanism": _conversions(docs),
        "Claims of training-free parts, on these models": _claims(docs),
    }
    lines = HEAD.splitlines()
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _absent(command: str, what: str = "it") -> list[str]:
    return [f"Not measured yet: `{command}` writes {what}."]


def _where(machine: Mapping[str, Any], date: str | None) -> str:
    place = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    return f"{place}, torch {machine['torch']}, {date or 'no date'}"


# ---------------------------------------------------------------------------- the frontier


def _advice(docs: Path) -> list[str]:
    """A table a model and context, of each mechanism the settings that no other of its own beats in both."""
    paths = sorted((docs / FOLDER).glob("*/advice.json"), key=lambda path: (-_context(path), path))
    lines = [
        "Of each mechanism the settings that no other of its own beats in both speed and quality; **bold** those that",
        "no setting of any mechanism beats. `saccade.switch(model, settings=FILE)` applies a settings.json.",
    ]
    for path in paths:
        advice, told = read_advice(path), json.loads(path.read_text("utf-8"))
        lines += ["", f"### {advice.subject}, {advice.context} tokens", ""]
        dense = f"dense attention takes {advice.dense_seconds * 1e3:,.0f} ms"
        dense += " of the processor, on one thread" if advice.clock == "processor" else ""
        dense += "" if advice.perplexity is None else f", perplexity {advice.perplexity:.3f}"
        dense += "" if advice.peak_bytes is None else f", {_mebibytes(advice.peak_bytes)} of memory beside the model"
        lines += [f"{_where(told['machine'], told.get('date'))}: {dense}.", ""]
        picture = path.with_name("advice.png")
        lines += [f"![frontier]({picture.relative_to(docs).as_posix()})", ""] if picture.exists() else []
        lines += [*_frontiers(advice), "", *_recommended(advice, path.with_name("settings.json"), docs)]
        lines += [f"- not here: {slug} ({reason})" for slug, reason in advice.skipped.items()]
    lost = _absent("saccade advise smollm2 --context 8192 --tolerance 0.01 --out docs/real-models/NAME")
    return lines if paths else lost


def _context(path: Path) -> int:
    return int(json.loads(path.read_text("utf-8"))["context"])


def _frontiers(advice: Advice) -> list[str]:
    best = {trial.name for trial in advice.frontier}
    columns = ["setting", "speed-up", {"perplexity": "rise of perplexity"}.get(advice.quality, advice.quality)]
    columns += ["worst layer", "density"]
    further = sorted({name for trial in advice.trials for name in _further(trial)})
    rows = []
    for slug in sorted({trial.slug for trial in advice.trials}):
        own = replace(advice, trials=[trial for trial in advice.trials if trial.slug == slug])
        for trial in own.frontier:
            name = f"**{trial.name}**" if trial.name in best else trial.name
            cells = [f"{trial.speedup:.2f} x", f"{advice.loss(trial):+.2%}"]
            said = _further(trial)
            cells += [f"{trial.worst_layer:.1%}", f"{trial.density:.0%}", *(said.get(each, "") for each in further)]
            rows.append([name, *cells])
    return records.table([*columns, *further], rows)


def _further(trial: Trial) -> dict[str, str]:
    """What was measured of some settings only."""
    found = {} if trial.decode_rate is None else {"decoding, tokens/s": f"{trial.decode_rate:.1f}"}
    found |= {} if trial.peak_bytes is None else {"memory": _mebibytes(trial.peak_bytes)}
    return found | {name: f"{value:.0%}" for name, value in trial.probes.items()}


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _recommended(advice: Advice, settings: Path, docs: Path) -> list[str]:
    best = advice.best
    within = f"within {advice.tolerance:.1%} of loss"
    if best is None:
        return [f"- nothing is faster {within}: keep dense attention"]
    kept = settings.relative_to(docs).as_posix()
    how = f"[settings]({kept})" if settings.exists() else f"`{advice.code()}`"
    return [f"- {within}: {best.name}, {best.speedup:.2f} x as fast: {how}"]


# ---------------------------------------------------------------------------- the others


def _arena(docs: Path) -> list[str]:
    """The tables of comparisons that were kept."""
    lines: list[str] = []
    for path in sorted((docs / FOLDER).glob("*/result.json")):
        result = ArenaResult.load(path.parent)
        lines += ["", f"### {path.parent.name}", "", f"{_where(result.machine, result.config.get('date'))}.", ""]
        lines += [result.markdown(), "", *(f"- {line}" for line in result.answer())]
    return lines[1:] or _absent("saccade compare --task compress CACHE ... --out docs/real-models/compress")


#: of a conversion: figures of its record, and what they are called
_STATES = {
    "before": "as it was",
    "dropped": "without them",
    "started": "untrained",
    "imitated": "after imitation",
    "after": "after all",
}


def _conversions(docs: Path) -> list[str]:
    """Perplexity before and after, of leaving the layers out, and what a token costs."""
    path = docs / FOLDER / "convert.json"
    kept = {name: row for name, row in records.known(path).items() if "before" in row}
    if not kept:
        return _absent(f"python benchmarks/convert.py --json docs/{FOLDER}/convert.json")
    columns = ["to", *_STATES.values(), "regained", "ms a token", "cache, MB", "minutes"]
    rows = []
    for name, row in kept.items():
        before, after = row["decoding"]
        cells = [f"{row[state]:.2f}" for state in _STATES]
        cells += ["-" if row["regained"] is None else f"{row['regained']:.0%}"]
        cells += [f"{1e3 * before['seconds']:.0f} to {1e3 * after['seconds']:.0f}"]
        cells += [
            f"{before['cache_bytes'] / 1e6:.1f} to {after['cache_bytes'] / 1e6:.1f}",
            f"{row['seconds'] / 60:.1f}",
        ]
        rows.append([f"`{name}`", *cells])
    machines = sorted({f"{row['machine']}, {row['date']}" for row in kept.values()})
    about = "Perplexity on held-out text. Regained is the share of the rise of log-perplexity by leaving the layers out"
    return [f"{'; '.join(machines)}.", "", f"{about} that the new layers undo.", "", *records.table(columns, rows)]


def _claims(docs: Path) -> list[str]:
    """The second lines of docs/claims.md, those of a model and context side by side."""
    kept = [found for found in claims.read(docs).values() if found.get("model")]
    lines = [
        f"Each is in [claims.md](claims.md) with the figures of all settings; it shows where a setting is {FASTER:g} x",
        "as fast as dense attention within the tolerance.",
    ]
    for model, context in sorted({(found["model"], found["context"]) for found in kept}):
        of = [found for found in kept if (found["model"], found["context"]) == (model, context)]
        places = sorted({_where(found["machine"], found["date"]) for found in of})
        lines += ["", f"### {model}, {context} tokens", "", f"{'; '.join(places)}.", ""]
        lines += _rows(of)
    return lines if kept else _absent("saccade claim --all --model smollm2 --out docs", "them")


def _rows(kept: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [[f"`{found['slug']}`", "yes" if found["holds"] else "no", found["note"]] for found in kept]
    return ["| part | shows | with |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
