"""What `saccade advise` reads and writes: a model with its sample text, the advice as JSON and as a picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade import __version__
from saccade.extras import need, new_figure
from saccade.integrations.advise import Advice, Keep, Trial
from saccade.report import pretrained
from saccade.train import models
from saccade.train.data import KEYS, Retrieval, english, retrieval
from saccade.train.files import locked, make_folder, write_bytes, write_text
from saccade.train.plotting import style
from saccade.train.resumable import Resumable
from saccade.train.samples import carried, text_sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: of a folder, what was measured of an advice that is not written yet
UNFINISHED = "unfinished.safetensors"


def sample_model(name: str, data: Path | None, context: int | None) -> tuple[Any, Any, Any]:
    """A model by name, what it is called with (a text of `context` tokens, an image of at most so many), its tokenizer.

    The name is one of `saccade.train.models`, or of transformers, or of a folder.

    A name is fetched by transformers; where no hub answers, it has to have been fetched before.
    A model with a language head is loaded with it, another without. Where no file is given, the text is
    `saccade.train.data.english`, and the image scikit-image's astronaut. All that can be refused is refused before
    weights of a folder or of transformers' are loaded.

    Raises:
        ValueError: if the model has fewer positions than `context` or no tokenizer, the text is too short, or the
            context less than a patch.
        OSError: if the model or the file cannot be read.
        ImportError: if transformers is not installed, or what the model is from.
    """
    named = models.named(name)
    if named is not None:
        return carried(named, context, data)
    text = english(data)
    transformers = need("transformers", "advise on a model")
    local = pretrained.is_local(name)
    config = pretrained.config_of(name, local)
    tokenizer = cache(lambda: pretrained.tokenizer_of(name, local))
    encoded = text_sample(tokenizer, config, text, context)
    decoder = any(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in config.architectures or ())
    loader = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
    return loader.from_pretrained(name, config=config, local_files_only=local).eval(), encoded, tokenizer()


def retrieval_probes(model: Any, tokenizer: Any, context: int, each: int) -> dict[str, Retrieval]:
    """Passkey and multi-key retrieval for a model that tells tokens; nothing for another.

    Args:
        model, tokenizer: of `sample_model`.
        context: tokens of a prompt.
        each: prompts for each depth; 0 for none.

    Raises:
        ValueError: if the context is too short, or the tokenizer has no tokens for digits.
    """
    if not each or model.get_output_embeddings() is None:
        return {}
    kinds = [retrieval(tokenizer, context, keys=keys, each=each) for keys in KEYS]
    return {kind.name: kind for kind in kinds}


@contextmanager
def begun(folder: Path | None, asked: Mapping[str, Any]) -> Iterator[Keep]:
    """What keeps the pieces of an advice in a folder until `write_advice` has written it: an interrupted one goes on.

    Args:
        folder: that is there; None keeps nothing.
        asked: all that figures depend on, plain data.

    Raises:
        ValueError: if the folder has pieces of another.
        OSError: if it cannot be written, or another run is in it.
    """
    with nullcontext() if folder is None else locked(folder):
        file = None if folder is None else folder / UNFINISHED
        yield Resumable(file, {**asked, "saccade": __version__}).once


def write_advice(advice: Advice, folder: Path) -> None:
    """`advice.json`, `advice.png` and, where something is recommended, `settings.json` into a folder.

    What the folder has of other settings, of the same model on the same inputs, stays: mechanisms may be measured one
    after another. Each is as fast as it was beside the dense attention of its own run.

    Raises:
        ValueError: if the folder has a damaged `advice.json`.
        OSError: if it cannot be written.
    """
    make_folder(folder)
    path = folder / "advice.json"
    if path.exists():
        before = read_advice(path)
        same = all(
            getattr(before, name) == getattr(advice, name) for name in ("subject", "context", "quality", "clock")
        )
        same = same and (not before.fingerprint or before.fingerprint == advice.fingerprint)
        same = same and math.isclose(before.perplexity or 0.0, advice.perplexity or 0.0, rel_tol=1e-3)  # the same text
        names = {trial.name for trial in advice.trials}
        kept = [trial for trial in before.trials if trial.name not in names] if same else []
        skipped = (before.skipped if same else {}) | advice.skipped
        advice = replace(advice, trials=kept + advice.trials, skipped=skipped)
    (folder / "settings.json").unlink(missing_ok=True)  # it would be of what is recommended no longer
    if advice.best is not None and advice.on_model:
        advice.save(folder / "settings.json")
    write_text(path, json.dumps(advice.as_dict(), indent=1) + "\n")
    drawn = io.BytesIO()
    plot(advice).savefig(drawn, format="png", dpi=120)
    write_bytes(folder / "advice.png", drawn.getvalue())
    (folder / UNFINISHED).unlink(missing_ok=True)


def read_advice(path: Path) -> Advice:
    """The advice that `write_advice` wrote.

    Args:
        path: of `advice.json`.

    Raises:
        ValueError: if it is none.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        known = {each.name: found[each.name] for each in fields(Advice) if each.name in found}
        return Advice(**known | {"trials": [Trial.read(each) for each in found["trials"]]})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no advice: {type(error).__name__} {error}") from error


def plot(advice: Advice) -> Figure:
    """Loss of quality against speed-up: a point a setting, the frontier, the tolerance and the recommendation.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = new_figure(8, 5)
    from saccade.train.point_labels import PointLabels  # after the figure, which says what is missing

    axes = figure.subplots()
    floor = 1e-7
    words = "deviation of the output (relative L1)" if advice.quality == "deviation" else "rise of perplexity, a share"
    slugs = list(dict.fromkeys(trial.slug for trial in advice.trials))
    for index, slug in enumerate(slugs):
        points = [(t.speedup, max(advice.loss(t), floor)) for t in advice.trials if t.slug == slug]
        axes.scatter(*zip(*points), label=slug, zorder=3, **style(index, len(slugs)))
    axes.plot(*zip(*((t.speedup, max(advice.loss(t), floor)) for t in advice.frontier)) if advice.trials else ((), ()),
              color="0.6", linewidth=1, label="frontier")  # fmt: skip
    if advice.tolerance > 0:
        axes.axhline(advice.tolerance, color="0.4", linestyle="--", linewidth=1, label="tolerance")
    axes.axvline(1.0, color="0.4", linestyle=":", linewidth=1, label="dense attention")
    best = advice.best
    if best is not None:
        dots = [(t.speedup, max(advice.loss(t), floor)) for t in advice.trials]
        PointLabels(axes, [(best.speedup, max(advice.loss(best), floor))], [best.name], ["#000000"], others=dots)
    axes.set(
        yscale="log", xlabel="speed-up over dense attention", ylabel=words,
        title=f"{advice.subject}, {advice.context} tokens",
    )  # fmt: skip
    figure.legend(loc="outside right upper", frameon=False)
    return figure
