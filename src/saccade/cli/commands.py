"""The commands. Heavy imports stand inside them, so that `saccade --help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from saccade import __version__, catalogue
from saccade.tables import table

T = TypeVar("T")

app = typer.Typer(
    name="saccade",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Every published attention system as one kind of part: faithful, fast, inspectable, proved.\n\n"
    "Start with `saccade compare softmax lightning moba mosa --task text`, or `saccade list`.\n\n"
    "`--debug` after any command shows the traceback of an error.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def _version(show: bool) -> None:
    if show:
        print(f"saccade {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


@app.command("list")
def list_parts(
    family: Annotated[str | None, typer.Option(help="Only this family, or those with this in their name.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: sequence, gate, fusion, model ...")] = None,
    supports: Annotated[str | None, typer.Option(help="Only parts that support this, e.g. decoding.")] = None,
    ready: Annotated[bool, typer.Option("--ready", help="Only what is built.")] = False,
    taxonomy: Annotated[bool, typer.Option("--taxonomy", help="Show each part's place in the surveys.")] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="The survey's classes of efficient attention, with parts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the 119 papers and the parts built from them."""
    if tree:
        from saccade.explain.efficient_attention_survey import CLASSES, place
        from saccade.explain.efficient_attention_survey import tree as draw

        placed = {path: [part.slug for part in found] for path, found in place().items()}
        if as_json:
            _print_json([{**vars(entry), "parts": placed[path]} for path, entry in CLASSES.items()])
        else:
            print(draw())
        return
    chosen = {part.slug: part for part in catalogue.select(kind=kind, supports=supports)}
    only_built = ready or kind is not None or supports is not None
    papers = [catalogue.paper("softmax"), *catalogue.papers()]
    families = _families({paper.family for paper in papers}, family)
    rows = [
        (paper, chosen.get(paper.slug))
        for paper in papers
        if paper.family in families and (paper.slug in chosen or not only_built)
    ]
    if as_json:
        _print_json(
            [
                {
                    **{name: value for name, value in vars(paper).items() if name != "room"},
                    **(
                        {"kind": part.kind, "supports": list(part.supports), "taxonomy": dict(part.taxonomy)}
                        | {"efficiency": part.efficiency, "complexity": part.complexity, "summary": part.summary}
                        if part
                        else {}
                    ),
                }
                for paper, part in rows
            ]
        )
        return
    more = (*catalogue.AXES, "efficiency") if taxonomy else ("what it is" if only_built else "title",)
    columns, groups = ("id", "state", "arXiv", *more), dict[str, list[list[str]]]()
    for paper, part in rows:
        cells = [paper.slug, paper.state, paper.arxiv]
        if taxonomy:
            cells += [part.taxonomy.get(axis, "") if part else "" for axis in catalogue.AXES]
            cells.append(part.efficiency if part else "")
        else:
            cells.append(part.summary if part and only_built else paper.title)
        groups.setdefault(paper.family, []).append(cells)
    for name, lines in groups.items():
        print(table(columns, lines, title=name.upper(), left=len(columns)), end="\n\n")
    ready_count = sum(paper.state == "ready" for paper, _ in rows)
    print(f"{ready_count} ready, {len(rows) - ready_count} planned")


@app.command()
def show(
    slug: Annotated[str, typer.Argument(help="The part, e.g. moba.")],
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Measure it on this machine.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show a part: its card, its evidence, what it costs on this machine."""
    from saccade.report.card import card, card_text

    found = card(slug, measure=cost)
    if as_json:
        _print_json(found)
    else:
        print(card_text(found))


@app.command()
def plan(
    shape: Annotated[str, typer.Option(help="B,H,N,D of the queries.")] = "1,8,4096,64",
    keys: Annotated[int | None, typer.Option(help="Number of keys; as many as queries where not given.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key heads, a divisor of H.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="e.g. 'causal & window(512)' or 'neighborhood((64,64), 13)'.")
    ] = None,
    normalize: Annotated[str, typer.Option(help="softmax, sigmoid, relu or abs-sum.")] = "softmax",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Ask for a path by name.")] = None,
    picture: Annotated[bool, typer.Option("--picture", help="Draw the mask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Forecast a call of saccade.attend: path, reason, FLOPs, bytes, density."""
    from dataclasses import asdict

    import torch

    import saccade
    from saccade.cli.masks import parse_mask

    sizes = _integers(shape, "shape", 4)
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees none here")
    B, H, N, D = sizes
    heads, M = H if kv_heads is None else kv_heads, N if keys is None else keys
    if heads < 1 or M < 0:
        raise ValueError(f"kv_heads must be positive and keys not negative, got {heads} and {M}")
    if B * H * max(N, M) * D >= 2**63:
        raise ValueError(f"the shape has more numbers than torch can count: {shape}")
    # strided views of one number: shapes without memory
    query = torch.zeros((), dtype=getattr(torch, dtype), device=device).expand(B, H, N, D)
    key = torch.zeros((), dtype=getattr(torch, dtype), device=device).expand(B, heads, M, D)
    parsed = parse_mask(mask) if mask else None
    forecast = saccade.plan(query, key, key, mask=parsed, normalize=normalize, backend=backend)
    if as_json:
        _print_json(asdict(forecast))
        return
    print(forecast)
    if picture and parsed is not None:
        print(parsed.picture(N, M))


@app.command()
def bench(
    slugs: Annotated[list[str], typer.Argument(help="Sequence mechanisms, e.g. moba lightning.")],
    lengths: Annotated[str, typer.Option(help="Comma-separated sequence lengths.")] = "512,2048,8192",
    dim: Annotated[int, typer.Option(help="Channels.")] = 256,
    num_heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    batch: Annotated[int, typer.Option(help="Sequences a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory of layers against SDPA, with the share of the machine's matmul rate."""
    import torch

    from saccade.bench.machine import describe, matmul_rate
    from saccade.bench.parts import measure
    from saccade.ops.measure import busy, machine
    from saccade.train.progress import bar, showing

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    rows = []
    count = len({"softmax", *slugs}) * len(_integers(lengths, "lengths"))
    with showing(False if as_json else None), bar("measuring", count) as update:
        for row in measure(
            slugs,
            lengths=_integers(lengths, "lengths"),
            dim=dim,
            num_heads=num_heads,
            batch=batch,
            dtype=getattr(torch, dtype),
            seed=seed,
        ):
            rows.append(row)
            update(words=f"{row.slug} at {row.length} done")
    if as_json:
        _print_json({"machine": machine(), "matmul_flops": matmul_rate(), "rows": [row.as_dict() for row in rows]})
        return
    columns = ("part", "length", "forward", "backward", "memory", "tokens/s", "dense FLOPs / matmul", "x softmax")
    lines = [
        (
            row.slug,
            f"{row.length:,}",
            f"{row.forward * 1e3:.1f} ms",
            "not measurable" if row.backward is None else f"{row.backward * 1e3:.1f} ms",
            f"{row.memory / 2**20:.1f} MiB",
            f"{row.tokens_per_second:,.0f}",
            f"{row.matmul_share:.2f}",
            f"{row.speedup:.2f}",
        )
        for row in rows
    ]
    print(table(columns, lines, title=describe()))
    note = busy(max((row.waited for row in rows if row.waited is not None), default=None))
    if note:
        print(note)


@app.command()
def claim(
    slugs: Annotated[list[str] | None, typer.Argument(help="Parts, e.g. moba.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every part that is built.")] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Those that --out does not have yet: goes on where a run was stopped.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A step or two only: shows that it runs, measures nothing.")
    ] = False,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of claims.json and claims.md; each claim is written as it ends.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the papers' central claims at laptop size: what the paper says, what was expected, what was measured.

    `saccade claim --all --out FOLDER` may be stopped: `saccade claim --missing --out FOLDER` goes on with the rest.
    """
    from contextlib import ExitStack
    from datetime import date

    from saccade.ops.measure import machine
    from saccade.report import claims
    from saccade.train.files import locked, make_folder
    from saccade.train.lab import Lab, run_claim

    if (bool(slugs) and everything) or not (slugs or everything or missing):
        raise ValueError("say which claims: names, --all, or --missing with --out")
    if missing and out is None:
        raise ValueError("--missing needs --out, the folder whose claims are not run again")
    if smoke and out is not None and not missing:
        raise ValueError("a smoke run measures nothing and is not written: leave --out away")
    names = list(slugs) if slugs else [part.slug for part in catalogue.parts()]
    for name in slugs or ():
        catalogue.part(name)
    writes = out is not None and not smoke
    with ExitStack() as stack:
        if writes:
            assert out is not None
            make_folder(out)
            stack.enter_context(locked(out))
        records = claims.read(out) if out else {}
        lab, count = Lab(seed=seed, smoke=smoke, show_progress=None), 0
        for name in names:
            if missing and name in records:
                continue
            outcome = run_claim(name, lab)
            if as_json:
                print("," if count else "[", json.dumps(outcome.as_dict(), indent=2), sep="\n", flush=True)
            else:
                print(outcome.text(), flush=True)
            count += 1
            if writes:
                assert out is not None
                records[name] = claims.record(outcome, date.today().isoformat(), machine())
                claims.write(out, records)
    if as_json:
        print("]" if count else "[]")
    elif not count:
        print(f"{out} has all of them already")


@app.command()
def compare(
    mechanisms: Annotated[
        list[str], typer.Argument(help="Parts to compare; options as in moba:block_size=32,top_k=3.")
    ],
    task: Annotated[
        str, typer.Option(help="text, digits, recall, listops, digits-cnn (gates) or paired (fusion).")
    ] = "text",
    budget: Annotated[
        str, typer.Option(help="quick (minutes), standard, long, or seconds a mechanism, on the mean.")
    ] = "quick",
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds, from --seed on; several give a spread.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Run folder: what was interrupted goes on, more is added.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Text files for --task text, one or several.")] = None,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the same small model with each mechanism and answer: which attention should I use here?

    Writes a run folder with config, metrics, checkpoints, and report.html, which opens offline.
    """
    import saccade
    from saccade.report.html import write_report

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
    )
    if as_json:
        print(result.to_json(), flush=True)
    else:
        print(result.table())
        print(*result.answer(), sep="\n", flush=True)
    for line in result.unkept if as_json else ():  # the table says it itself
        print(f"saccade: not kept: {line}", file=sys.stderr)
    report = _afterwards("report", lambda: write_report(result, folder))
    if report is not None and not as_json:
        print(f"report: {report}")
    if report is not None and open_report:
        typer.launch(str(report))


def _afterwards(what: str, make: Callable[[], T]) -> T | None:
    """What comes after the measurements, pictures above all. Where it fails, for whatever reason, one line says so:
    the measurements have been shown."""
    from saccade.cli import one_line

    sys.stdout.flush()
    try:
        return make()
    except Exception as error:
        print(f"saccade: no {what}: {one_line(error)}", file=sys.stderr)
        return None


@app.command()
def advise(
    model: Annotated[
        str | None, typer.Argument(help="A transformers model: its folder, or its name where a network is there.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a model: B,H,N,D (B,H,K,N,D: K key heads).")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens to measure at; the longest that --data gives.")] = None,
    data: Annotated[Path | None, typer.Option(help="A text file as sample input; English by default.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest acceptable deviation of the output (relative L1).")] = 0.05,
    bidirectional: Annotated[bool, typer.Option(help="For --shape: the attention is not causal.")] = False,
    mechanism: Annotated[list[str] | None, typer.Option(help="Try only this one; may be given several times.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every setting, not the frontier alone.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for advice.json and a picture, advice.png.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which training-free mechanism is worth it here? Measures all of them over their settings, prints the frontier.

    `saccade advise path/to/model --context 8192 --data my.txt` on a model, `saccade advise --shape 1,8,8192,64` on
    shapes alone.
    """
    from saccade.integrations.advise import advise as measure
    from saccade.integrations.advise import check
    from saccade.report.advice import sample_model, write_advice
    from saccade.train.files import make_folder
    from saccade.train.progress import bar, showing

    check(tolerance=tolerance, context=context, mechanisms=mechanism)
    if out is not None:
        make_folder(out)  # before minutes of measuring
    if (model is None) == (shape is None):
        raise ValueError("give a model, or --shape, not both" if model else "give a model, or --shape")
    subject: Any
    if model is not None:
        subject, inputs = sample_model(model, data, context)
    elif data is not None:
        raise ValueError("--data is read by a model's tokenizer: --shape has none")
    else:
        subject, inputs = _integers(str(shape), "shape"), None
    with showing(False if as_json else None), bar("settings tried:", None) as update:
        update(0, "dense attention")
        advice = measure(
            subject,
            context=context,
            inputs=inputs,
            tolerance=tolerance,
            causal=not bidirectional,
            mechanisms=mechanism or None,
            seed=seed,
            on_trial=lambda name: update(words=name),
        )
    if as_json:
        _print_json(advice.as_dict())
    else:
        print(advice.table(everything))
    if out is not None:
        _afterwards("advice in the folder", lambda: write_advice(advice, out))


@app.command()
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
    from saccade.report.gallery import Settings, make, page_path, write_gallery
    from saccade.train.files import make_folder

    make_folder(page_path(out).parent)  # before minutes of training
    made = make(gates, Settings(steps=steps, seed=seed), show_progress=False if as_json else None)
    if as_json:
        _print_json(made.as_dict())
    else:
        print(made.table())
    page = _afterwards("page", lambda: write_gallery(made, out))
    if page is not None and not as_json:
        print(f"gallery: {page}")
    if page is not None and open_page:
        typer.launch(str(page))


@app.command()
def insert(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model.")],
    gate: Annotated[str, typer.Option(help="The gate, options after a colon: cbam:reduction=8.")],
    after: Annotated[
        list[str],
        typer.Option(help="Module path, pattern ('*' within a name, '**' across dots) or type; may be repeated."),
    ],
    gentle: Annotated[bool, typer.Option("--gentle", help="Start with what the model does now.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the model with its gates.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Put a gate into an image model, and say what it adds: `saccade insert FOLDER --gate cbam --after '**.layer'`.

    `saccade.integrations.insert.load` reads what --out writes.
    """
    import torch

    from saccade.integrations import insert as inserting
    from saccade.train.entries import parse

    (wanted,) = parse([gate])
    if not catalogue.part(str(wanted.slug)).kind.insertable:
        gates = ", ".join(part.slug for part in catalogue.parts() if part.kind.insertable)
        raise ValueError(f"--gate must be one of {gates}, got {wanted.slug!r}")
    catalogue.check_options(str(wanted.slug), **wanted.options)
    torch.manual_seed(seed)
    network = inserting.pretrained(model)
    report = inserting.insert(network, str(wanted.slug), after=after, gentle=gentle, **wanted.options)
    if out is not None:
        inserting.save(network, out, [report])
    if as_json:
        _print_json(report.as_dict())
    else:
        print(report.table(gently="--gentle"))


@app.command()
def run(
    model: Annotated[
        str, typer.Argument(help="A complete network, its options after a colon: resnest:depths=101,stem_width=64.")
    ],
    files: Annotated[list[Path], typer.Argument(help="Image files; each is a call of its own.")],
    size: Annotated[
        str | None,
        typer.Option(help="A published size by the paper's name: `saccade show` lists them."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="The authors' released file, or a state dict of this network."),
    ] = None,
    names: Annotated[Path | None, typer.Option(help="Text file with the name of a class on each line.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Picture (.png, .jpg, .webp), tensors (.safetensors), or a folder; runs/ by default."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a complete network on image files: what it says of each, and a picture of that.

    Classifiers name the likeliest classes, segmentation colours the image by class, super-resolution enlarges it:

    `saccade run resnest photo.jpg --size ResNeSt-50 --weights resnest50.pth --names imagenet.txt`

    `saccade run bevanet street.png --weights bevanet.pt --out street-classes.png`

    `saccade run han small.png --size 'HAN x2' --weights HAN_BIX2.pt --out large.png`

    In Python: `model = ResNeSt.from_authors("resnest50.pth", "ResNeSt-50")`, then `model.predict(files)` and
    `model.picture(output)`.
    """
    import torch

    from saccade.report import predictions

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where torch sees one, got {device!r}")
    called = None if names is None else predictions.read_names(names)
    targets = predictions.places(files, model.partition(":")[0].strip(), out)
    network = predictions.build(model, size, weights, seed).to(device)
    if weights is None:
        print("saccade: without --weights the network is untrained, and its answer means nothing", file=sys.stderr)
    answers = []
    for file, target in zip(files, targets):
        output = network.predict(file)
        (said,) = network.answer(output, called)
        predictions.write(network, output, target, called)
        if as_json:
            answers.append({"file": str(file), "answer": said, "written": str(target)})
        else:
            print(predictions.told(said, file), f"written: {target}", sep="\n", flush=True)
    if as_json:
        _print_json(answers)


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="A planned paper's name, as `saccade list` has it.")],
    kind: Annotated[str, typer.Option(help="What the room will hold: sequence, gate, fusion or model.")],
    root: Annotated[Path | None, typer.Option(help="The source checkout; this package's own by default.")] = None,
) -> None:
    """Lay out an empty room for a paper, with its test: `saccade new loftr --kind model`.

    The room runs from the start, on the plainest thing of its kind; the tests name what the paper must still give.
    """
    from saccade.catalogue.layout import lay_out

    for path in lay_out(slug, kind, root):
        print(path)
    print(f"Next: write the page and the mathematics, then `python -m pytest tests/test_parts.py -k {slug}`.")


def _families(known: set[str], asked: str | None) -> set[str]:
    """The family of that name, else those that have it in their name; all where none is asked for."""
    if asked is None or asked in known:
        return known if asked is None else {asked}
    found = {family for family in known if asked.strip().lower() in family}
    if not asked.strip() or not found:
        raise ValueError(f"family must be one of {'; '.join(sorted(known))}; or a part of one's name, got {asked!r}")
    return found


def _integers(text: str, name: str, count: int | None = None) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be comma-separated integers, got {text!r}") from None
    if count is not None and len(numbers) != count:
        raise ValueError(f"{name} must be {count} integers, got {len(numbers)}")
    if min(numbers) < 1:
        raise ValueError(f"{name} must be positive, got {text!r}")
    return numbers
