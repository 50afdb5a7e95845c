"""`convert`: layers of a language model to another mechanism, for good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saccade.cli.commands.app import AsJson, Seed, print_json


def convert(
    model: Annotated[
        str, typer.Argument(help="A transformers language model: its folder, its name where a network is, or smollm2.")
    ],
    mechanism: Annotated[
        str, typer.Argument(help="A causal part that decodes, options after a colon: moba:block_size=64,top_k=4.")
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the new layers, what happened, and checkpoints: the same command continues."),
    ],
    layers: Annotated[
        str,
        typer.Option(
            help="half, or a share like 0.25: those layers that the model misses least; or numbers, negative ones "
            "from the end, and patterns of module paths, with commas."
        ),
    ] = "half",
    minutes: Annotated[float, typer.Option(help="Of training; measuring comes on top.")] = 5.0,
    logits: Annotated[
        float,
        typer.Option(
            help="Share of the minutes in which the whole model learns from what it said before, after its layers "
            "have learned from the old ones; 0 for none."
        ),
    ] = 0.5,
    length: Annotated[int, typer.Option(help="Tokens of a window of the text.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 2,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text files to learn from, the last tenth to be judged on; English by default."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Also measure decoding behind so many tokens, before and after: time and bytes of the cache."
        ),
    ] = None,
    processor_time: Annotated[
        bool,
        typer.Option("--processor-time", help="Minutes and times are the processor's, all threads together."),
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Replace attention layers of a language model by another mechanism, and teach them what the old layers did.

    The output projections are fitted at once, then each new layer imitates the old one, then the whole model learns
    from its former logits. Nothing else of the model changes. The table says what it costs: perplexity as it was, with
    these layers left out, with the new ones untrained, and after each stage.

    `saccade convert smollm2 lightning --layers half --minutes 5 --out smollm2-lightning`

    `saccade convert path/to/model moba:block_size=64,top_k=4 --layers 0,2,4 --context 8192 --out converted`

    In Python `saccade.load_converted(model, "smollm2-lightning")` puts the layers into the model again, and
    `saccade.convert` is this command.
    """
    import time

    from saccade import catalogue
    from saccade.integrations.converted import check_part
    from saccade.report.conversion import language_model, layers_of, write_conversion
    from saccade.train.conversion import convert as converted
    from saccade.train.entries import parse
    from saccade.train.files import make_folder

    (wanted,) = parse([mechanism])
    check_part(str(wanted.slug))
    catalogue.check_options(str(wanted.slug), **wanted.options)
    chosen = layers_of(layers)
    make_folder(out)  # before minutes of training
    network, tokens, held_out = language_model(model, data or [], length)
    report = converted(
        network, str(wanted.slug), tokens, layers=chosen, held_out=held_out, minutes=minutes, whole=logits,
        length=length, batch=batch, context=context, seed=seed, folder=out, shown=False if as_json else None,
        clock=time.process_time if processor_time else time.monotonic, **wanted.options,
    )  # fmt: skip
    write_conversion(report, out)
    if as_json:
        print_json(report.as_dict())
    else:
        print(report.table())
