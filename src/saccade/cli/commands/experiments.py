"""Commands that train: `claim`, `compare`, `gallery`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from saccade import catalogue
from saccade.cli.commands.app import AsJson, Seed, afterwards, print_json


def claim(
    slugs: Annotated[list[str] | None, typer.Argument(help="Parts, e.g. moba.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every part that is built.")] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Those that --out does not have yet: goes on where a run was stopped.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A step or two only: shows that it runs, measures nothing.")
    ] = False,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Ten times the steps, kept as a line of its own; without names, all that do not show in --out.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of the claim's experiment: training-free parts on a real model (smollm2, vit-s14, minilm), "
            "loss of quality and speed beside dense attention. --all: those that fit it."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="With --model: tokens; of an image the most.")] = 2048,
    on_processor: Annotated[
        bool,
        typer.Option("--processor-time", help="Times of the processor, on one thread: where others compute, too."),
    ] = False,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of claims.json and claims.md; each claim is written as it ends.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the papers' central claims at laptop size: what the paper says, what was expected, what was measured.

    `saccade claim --all --out FOLDER` may be stopped: `saccade claim --missing --out FOLDER` goes on with the rest.

    `saccade claim combiner --long` trains ten times as long; `saccade claim --long --out FOLDER` takes all that do not
    show in FOLDER, with --missing those of them that were not run long yet.

    `saccade claim spargeattn moba --model smollm2 --out FOLDER` adds lines of these on SmolLM2;
    `saccade claim --all --model vit-s14 --context 1370` takes an image of 518 pixels.
    """
    from contextlib import ExitStack
    from datetime import date

    from saccade.ops.measure import machine, processor_time
    from saccade.report import claims
    from saccade.train import models
    from saccade.train.claims import run_claim
    from saccade.train.files import locked, make_folder
    from saccade.train.lab import LONG, Lab
    from saccade.train.model_claims import fitting, run_on_model, tokens_on

    if (bool(slugs) and everything) or not (slugs or everything or missing or (long and out)):
        raise ValueError("say which claims: names, --all, or --missing or --long with --out")
    if missing and out is None:
        raise ValueError("--missing needs --out, the folder whose claims are not run again")
    if smoke and out is not None and not missing:
        raise ValueError("a smoke run measures nothing and is not written: leave --out away")
    if long and model is not None:
        raise ValueError("--long is of what a claim trains, and on a real model nothing is trained: leave one away")
    on = None if model is None else models.named(model)
    if model is not None and on is None:
        raise ValueError(f"--model must be one of {', '.join(models.MODELS)}, got {model!r}")
    for name in slugs or () if on is None else ():
        catalogue.part(name)
    able = [part.slug for part in catalogue.parts()] if on is None else fitting(on, slugs or ())
    tokens = 0 if on is None or smoke else tokens_on(on, context)
    writes = out is not None and not smoke
    with ExitStack() as stack:
        if on_processor:
            stack.enter_context(processor_time())
        if writes:
            assert out is not None
            make_folder(out)
            stack.enter_context(locked(out))
        records = claims.read(out) if out else {}
        lab, count = Lab(seed=seed, smoke=smoke, show_progress=None, scale=LONG if long else 1), 0
        names = list(slugs) if slugs else able
        if long and not (slugs or everything):
            names = [name for name in names if name in records and not records[name]["holds"]]
        for name in names:
            line = claims.line({"slug": name, "scale": lab.scale, "model": on or "", "context": tokens})
            if missing and line in records:
                continue
            outcome = run_claim(name, lab) if on is None else run_on_model(name, on, lab, context=context)
            if as_json:
                print("," if count else "[", json.dumps(outcome.as_dict(), indent=2), sep="\n", flush=True)
            else:
                print(outcome.text(), flush=True)
            count += 1
            if writes:
                assert out is not None
                records[line] = claims.record(outcome, date.today().isoformat(), machine())
                claims.write(out, records)
    if as_json:
        print("]" if count else "[]")
    elif not count:
        print(f"{out} has all of them already")


def compare(
    mechanisms: Annotated[
        list[str], typer.Argument(help="Parts to compare; options as in moba:block_size=32,top_k=3.")
    ],
    task: Annotated[
        str,
        typer.Option(
            help="text, digits, recall, listops, digits-cnn (gates), paired (fusion), restore (images), compress "
            "(caches of a language model)."
        ),
    ] = "text",
    budget: Annotated[
        str,
        typer.Option(
            help="quick (minutes), standard, long, or seconds a mechanism, on the mean; of compress with sizes, as in "
            "long:texts=1,each=0."
        ),
    ] = "quick",
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds, from --seed on; several give a spread.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Run folder: what was interrupted goes on, more is added.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Files in place of the task's own data: texts for text, tables of clicks for click."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="For --task compress: a language model, by name (smollm2) or folder; smollm2 by default."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(help="Train on a Ray cluster: ray (the one that runs here, or a local one), or ray://HOST:PORT."),
    ] = None,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the same small model with each mechanism and answer: which attention should I use here?

    Writes a run folder with config, metrics, checkpoints, and report.html, which opens offline.

    `saccade compare softmax moba:block_size=32 lightning --task recall`

    With --task compress nothing is trained: key-value caches that hold fewer tokens run in a pretrained language model,
    at shares of 1, 1/2, 1/4 and 1/8 of the tokens: perplexity, retrieval, bytes, speed. What was measured is kept text
    by text, and never measured again.

    `saccade compare --task compress window heavy-hitters:recent=0.25 key-norm random --model smollm2 --out runs/caches`
    """
    import saccade
    from saccade.report.html import write_report

    if task == "compress":
        if on is not None:
            raise ValueError("task compress trains nothing: it takes no --on")
        if seeds != 1 or len(data or ()) > 1:
            raise ValueError("task compress takes one seed, and one text file as --data")
        _compress(mechanisms, model or "smollm2", budget, out, data[0] if data else None, seed, open_report, as_json)
        return
    if model is not None:
        raise ValueError(f"--model is for task compress, got task {task!r}")
    folder = out or Path("runs") / f"{task}-{'-'.join(name.split(':')[0] for name in mechanisms)}"
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    result = saccade.compare(
        mechanisms,
        task=task,
        budget=budget,
        seed=list(range(seed, seed + seeds)),
        out=folder,
        data=data or None,
        on=on,
    )
    _told(result, lambda: write_report(result, folder), open_report, as_json)


def _compress(
    caches: list[str],
    model: str,
    budget: str,
    out: Path | None,
    data: Path | None,
    seed: int,
    open_report: bool,
    as_json: bool,
) -> None:
    """`compare --task compress`."""
    from saccade.report.arena import write_arena
    from saccade.train.arena import arena

    folder = out or Path("runs") / f"compress-{'-'.join(name.split(':')[0] for name in caches)}"
    result = arena(caches, model, budget, out=folder, data=data, seed=seed)
    _told(result, lambda: write_arena(result, folder), open_report, as_json)


def _told(result: Any, write: Callable[[], Path], open_report: bool, as_json: bool) -> None:
    """Print a result, write its report, and open that where it is asked for."""
    if as_json:
        print(result.to_json(), flush=True)
    else:
        print(result.table())
        print(*result.answer(), sep="\n", flush=True)
    for line in result.unkept if as_json else ():  # the table says it itself
        print(f"saccade: not kept: {line}", file=sys.stderr)
    report = afterwards("report", write)
    if report is not None and not as_json:
        print(f"report: {report}")
    if report is not None and open_report:
        typer.launch(str(report))


def gallery(
    gates: Annotated[
        list[str] | None, typer.Argument(help="Gates, options as in cbam:reduction=8; all of the catalogue by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page, or a folder for gallery.html.")] = Path("runs"),
    steps: Annotated[int, typer.Option(help="Steps of training for each gate.")] = 400,
    seed: Seed = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a small CNN with each gate in the same way, and show where each looks on the same photographs."""
    from saccade.report.gallery.exhibits import Settings
    from saccade.report.gallery.page import page_path, write_gallery
    from saccade.report.gallery.training import make
    from saccade.train.files import make_folder

    make_folder(page_path(out).parent)  # before minutes of training
    made = make(gates, Settings(steps=steps, seed=seed), show_progress=False if as_json else None)
    if as_json:
        print_json(made.as_dict())
    else:
        print(made.table())
    page = afterwards("page", lambda: write_gallery(made, out))
    if page is not None and not as_json:
        print(f"gallery: {page}")
    if page is not None and open_page:
        typer.launch(str(page))
