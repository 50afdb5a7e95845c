"""Commands on whole models and what they make: `advise`, `insert`, `run`, `explain`, `fuse-metrics`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saccade import catalogue
from saccade.cli.commands.app import AsJson, Seed, afterwards, integers, print_json


def advise(
    model: Annotated[
        str | None,
        typer.Argument(help="A transformers model: its folder, its name where a network is there; smollm2, vit-s14."),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a model: B,H,N,D (B,H,K,N,D: K key heads).")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens to measure at; the longest that --data gives. Of an image model the most tokens of a square "
            "image: 1370 are 518 pixels in patches of 14."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A text file as sample input, or an image; English, a photograph by default.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest acceptable loss of quality.")] = 0.05,
    quality: Annotated[
        str | None,
        typer.Option(
            help="What the tolerance is of: deviation (of the output, relative L1), or perplexity (its rise as a "
            "share), the default for causal language models."
        ),
    ] = None,
    retrieval: Annotated[
        int,
        typer.Option(
            help="Prompts for each of three depths that ask for a number said before, of passkey and of multi-key; "
            "0 for none."
        ),
    ] = 1,
    keep_retrieval: Annotated[
        bool, typer.Option("--keep-retrieval", help="Recommend nothing that answers fewer of them.")
    ] = False,
    bidirectional: Annotated[bool, typer.Option(help="For --shape: the attention is not causal.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls of each; the fastest counts.")] = 3,
    on_processor: Annotated[
        bool,
        typer.Option("--processor-time", help="Times of the processor, on one thread: where others compute, too."),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as the model is read if not said.")
    ] = None,
    partly: Annotated[
        int, typer.Option(help="For so many mechanisms a setting for each head (or layer) is found, in the tolerance.")
    ] = 3,
    mechanism: Annotated[list[str] | None, typer.Option(help="Try only this one; may be given several times.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every setting, not the frontier alone.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for advice.json, settings.json and advice.png.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Which training-free mechanism is worth it here? Measures all of them over their settings, prints the frontier.

    Speed is that of the whole model: of reading the context, and of decoding after it. Quality is perplexity on the
    part of the text that follows what was measured on (on that, where there is no more), the deviation of the output
    and of the worst layer, and, of the frontier, retrieval: whether the model tells a number (passkey), or one of
    several (multi-key), that was said at a tenth, at half, at nine tenths of the context.

    `saccade advise path/to/model --context 8192 --data my.txt` on a model, `saccade advise --shape 1,8,8192,64` on
    shapes alone. `saccade.switch(model, settings="FOLDER/settings.json")` applies what --out wrote. Interrupted, the
    same command with the same --out goes on where it was.
    """
    from contextlib import nullcontext

    import torch

    from saccade.integrations.advise import advise as measure
    from saccade.integrations.advise import check
    from saccade.ops.measure import processor_time
    from saccade.report.advice import begun, retrieval_probes, sample_model, write_advice
    from saccade.train import fingerprints, models
    from saccade.train.data import english
    from saccade.train.files import make_folder
    from saccade.train.progress import bar, showing
    from saccade.train.samples import following

    check(tolerance=tolerance, repeats=repeats, context=context, mechanisms=mechanism, quality=quality)
    if out is not None:
        make_folder(out)  # before minutes of measuring
    if (model is None) == (shape is None):
        raise ValueError("give a model, or --shape, not both" if model else "give a model, or --shape")
    if dtype not in (None, "float32", "bfloat16", "float16") or (dtype is not None and model is None):
        raise ValueError(f"--dtype is of a model, and must be float32, bfloat16 or float16, got {dtype!r}")
    if retrieval < 0:
        raise ValueError(f"--retrieval must not be negative, got {retrieval}")
    if keep_retrieval and (model is None or not retrieval):
        raise ValueError("--keep-retrieval needs a model, and prompts (--retrieval above 0)")
    subject: Any
    judged = None
    probes: dict[str, Any] = {}
    unasked = ""
    if model is not None:
        subject, inputs, tokenizer = sample_model(model, data, context)
        if dtype is not None:
            subject = subject.to(getattr(torch, dtype))
            inputs = {name: x.to(subject.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        if tokenizer is not None:
            judged = following(tokenizer, english(data), inputs)
        try:
            if tokenizer is not None:
                probes = retrieval_probes(subject, tokenizer, inputs["input_ids"].shape[1], retrieval)
        except ValueError as error:
            if keep_retrieval:
                raise
            unasked = str(error)
    elif data is not None:
        raise ValueError("--data is read by a model's tokenizer: --shape has none")
    else:
        subject, inputs = integers(str(shape), "shape"), None
    timing = processor_time() if on_processor else nullcontext()
    asked: dict[str, Any] = {
        "model": model, "shape": shape, "bidirectional": bidirectional, "context": context, "dtype": dtype,
        "tolerance": tolerance, "quality": quality, "retrieval": retrieval, "repeats": repeats,
        "processor_time": on_processor, "seed": seed,
    }  # fmt: skip
    if out is not None:
        weights = subject if model is None else [*subject.parameters()]
        asked["fingerprint"] = fingerprints.values(weights, dict(inputs or {}), dict(judged or {}))
    with begun(out, asked) as kept, timing, showing(False if as_json else None), bar("settings tried:", None) as update:
        update(0, "dense attention")
        advice = measure(
            subject,
            context=None if inputs is not None and "pixel_values" in inputs else context,
            inputs=inputs,
            judged=judged,
            tolerance=tolerance,
            quality=quality,
            causal=not bidirectional,
            mechanisms=mechanism or None,
            partly=partly,
            probes=probes,
            keep_probes=keep_retrieval,
            repeats=repeats,
            seed=seed,
            on_trial=lambda name: update(words=name),
            kept=kept,
        )
    advice.subject = models.named(str(model)) or advice.subject
    advice.subject += "" if dtype is None else f" in {dtype}"
    if unasked:
        advice.skipped["retrieval"] = unasked
    if as_json:
        print_json(advice.as_dict())
    else:
        print(advice.table(everything))
    if out is not None:
        advice.fingerprint = str(asked["fingerprint"])
        afterwards("advice in the folder", lambda: write_advice(advice, out))


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
        print_json(report.as_dict())
    else:
        print(report.table(gently="--gentle"))


def run(
    model: Annotated[
        str, typer.Argument(help="A complete network, its options after a colon: resnest:depths=101,stem_width=64.")
    ],
    files: Annotated[
        list[Path],
        typer.Argument(help="Image files; each a call of its own, or two by two where a network fuses or matches."),
    ],
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
        typer.Option(
            help="Picture (.png, .jpg, .webp), tensors (.safetensors), matches (.csv, or .txt for COLMAP), flow "
            "(.flo), disparity (.pfm), either as KITTI's PNG (.16.png), or a folder; runs/ by default."
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            help="A head in the image, x0,y0,x1,y1 in pixels, for networks that say where people look; repeat."
        ),
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

    `saccade run amfusionnet infrared.png visible.png --weights amfusionnet.pt --out fused.png`

    `saccade run loftr left.png right.png --weights outdoor_ds.ckpt --out matches.png`

    `saccade run unimatch first.png second.png --weights gmflow.pth --out first.flo`

    `saccade run gaze-lle people.jpg --box 120,40,180,110 --weights gazelle_dinov2_vitb14.pt --out gaze.png`

    In Python: `model = ResNeSt.from_authors("resnest50.pth", "ResNeSt-50")`, then `model.predict(files)` and
    `model.picture(output)`.
    """
    import torch

    from saccade.report import predictions

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where torch sees one, got {device!r}")
    called = None if names is None else predictions.read_names(names)
    calls = predictions.calls(model, files)
    targets = predictions.places([call[0] for call in calls], model, out)
    network = predictions.build(model, size, weights, seed).to(device)
    if weights is None:
        print("saccade: without --weights the network is untrained, and its answer means nothing", file=sys.stderr)
    people = [predictions.boxes_of(network, call, box or ()) for call in calls]
    answers = []
    for call, target, where in zip(calls, targets, people):
        output = network.predict(call, **where)
        (said,) = network.answer(output, called)
        predictions.write(network, output, target, called, call)
        file = " + ".join(map(str, call))
        if as_json:
            answers.append({"file": file, "answer": said, "written": str(target)})
        else:
            print(predictions.told(said, file), f"written: {target}", sep="\n", flush=True)
    if as_json:
        print_json(answers)


def explain(
    model: Annotated[
        str, typer.Argument(help="A transformers model by folder or name, or smollm2-135m, minilm, vit-s14.")
    ],
    what: Annotated[list[str], typer.Argument(help="A text, an image file, or an image file and texts.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="The class, the token or the text (a number, or words) that is explained; the likeliest by default."
        ),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Maps, comma-separated; all by default.")] = None,
    faithful: Annotated[
        bool,
        typer.Option("--faithful/--maps-only", help="Measure whether to believe the maps: some hundred calls."),
    ] = True,
    circuit: Annotated[
        bool, typer.Option("--circuit", help="Which heads of a language model wrote what; its edges are cut, too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The page (.html) with maps, measures and pictures; the table alone without.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """What did a model look at, and does the map deserve belief? Maps by several methods, each beside random ones.

    `saccade explain minilm "The cat sat on the mat" --out cat.html`

    `saccade explain smollm2-135m "The capital of France is" --target " Paris" --out paris.html`

    `saccade explain smollm2-135m "When Mary and John went out, John gave a drink to" --circuit --out circuit.html`

    `saccade explain google/vit-base-patch16-224 photo.jpg --out photo.html`

    `saccade explain openai/clip-vit-base-patch32 photo.jpg "a cat" "a dog" --out pair.html`

    `saccade explain HuggingFaceTB/SmolVLM-256M-Instruct photo.jpg "What is this?" --out said.html`

    In Python: `saccade.explain(model, inputs, target)`.
    """
    from saccade.explain.explanation import explain as explained
    from saccade.models.images import read_image
    from saccade.report import pretrained
    from saccade.report.explained import write_explanation
    from saccade.report.predictions import PICTURES

    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must be a page, .html, got {out}")
    files = [each for each in what if Path(each).suffix.lower() in PICTURES]
    texts = [each for each in what if each not in files]
    if len(files) > 1 or (not files and len(texts) > 1):
        raise ValueError(f"give a text, an image, or an image and texts, got {len(files)} images, {len(texts)} texts")
    shown = read_image(files[0]) if files else None
    loaded = pretrained.load(model, image=shown is not None, text=bool(texts))
    pictures: list[Any] | None = None
    if shown is None:
        inputs = dict(loaded.tokenizer(texts[0], return_tensors="pt"))
    elif texts:
        pictures, inputs = loaded.both(shown, texts)
    else:
        sized, pixels = loaded.pixels(shown)
        pictures, inputs = [sized[0]], {"pixel_values": pixels}
    chosen = None if target is None else pretrained.target_of(loaded, target)
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    found = explained(
        loaded.model, inputs, chosen, tokenizer=loaded.tokenizer, methods=names, faithful=faithful, circuit=circuit,
        seed=seed,
    )  # fmt: skip
    traced, causal = found.circuit, found.causal
    words, measured, checked = pretrained.words_of(loaded, found.target), found.faithfulness, found.sanity
    if as_json:
        print_json(
            {
                "target": found.target, "says": words, "probability": found.probability, "best": found.best(),
                "probability_is": found.score_is,
                "labels": found.labels, "maps": {name: each.tolist() for name, each in found.maps.items()},
                "measures": {name: each.figures() for name, each in measured.maps.items()} if measured else None,
                "as_weights_are_random": checked and {name: each.tolist() for name, each in checked.agreement.items()},
                "circuit": traced and [
                    {"writer": str(e.writer), "firing": e.firing, "side": e.side, "weight": e.weight}
                    for e in traced.edges
                ],
                "cut": causal and {"before": causal.before, "circuit": causal.cut, **causal.others},
                "random": [each.figures() for each in measured.floor] if measured else None,
            }
        )  # fmt: skip
    else:
        print(f"explained: {words or 'the embedding'}, {found.score_is} {found.probability:.3f}")
        print(found.table())
    if out is not None:
        afterwards("page", lambda: write_explanation(found, out, model=model, target=words, image=pictures))
        print(f"written: {out}", file=sys.stderr)


def fuse_metrics(
    first: Annotated[Path, typer.Argument(help="An image, such as the infrared one.")],
    second: Annotated[Path, typer.Argument(help="Another of the same place and size, such as the visible one.")],
    fused: Annotated[Path, typer.Argument(help="What was made of both.")],
    as_json: AsJson = False,
) -> None:
    """How good is a fused image? `saccade fuse-metrics a.png b.png fused.png` prints the twelve measures of this field.

    For anyone's fusion; of colour images the luma counts. `saccade.train.metrics.fusion` defines each measure.
    """
    from saccade.tables import table
    from saccade.train.metrics.fusion import of_files

    found = of_files(first, second, fused)
    if as_json:
        print_json({name: value if math.isfinite(value) else None for name, value in found.items()})
    else:
        print(table(("measure", "value"), [(name, f"{value:.4f}") for name, value in found.items()], title=str(fused)))
