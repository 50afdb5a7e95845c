"""What `saccade advise` reads and writes: a model with its sample text, the advice as JSON and as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.extras import need, new_figure
from saccade.integrations.advise import positions
from saccade.report import pretrained
from saccade.train import models
from saccade.train.data import KEYS, Retrieval, english, retrieval
from saccade.train.files import make_folder, write_bytes, write_text
from saccade.train.plotting import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.integrations.advise import Advice


def sample_model(name: str, data: Path | None, context: int | None) -> tuple[Any, Any, Any]:
    """A model by name, a text cut to `context` tokens, and its tokenizer.

    The name is one of `saccade.train.models`, or of transformers, or of a folder.

    A name is fetched by transformers; where no hub answers, it has to have been fetched before.
    A model with a language head is loaded with it, another without. `saccade.train.data.english` is the text where no
    file is given. All that can be refused is refused before the weights are loaded.

    Raises:
        ValueError: if the model has fewer positions than `context` or no tokenizer, or the text is too short.
        OSError: if the model or the file cannot be read.
        ImportError: if transformers is not installed.
    """
    text = english(data)
    transformers = need("transformers", "advise on a model")
    named = models.named(name)
    if named is not None:
        found = models.load(named)
        if not isinstance(found, tuple):
            raise ValueError(f"{named} reads no text: advice is of models that do")
        model, tokenizer = found
        return model, _sample(lambda: tokenizer, model.config, text, context), tokenizer
    local = pretrained.is_local(name)
    config = pretrained.config_of(name, local)
    tokenizer = cache(lambda: pretrained.tokenizer_of(name, local))
    encoded = _sample(tokenizer, config, text, context)
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


def _sample(tokenizer: Callable[[], Any], config: Any, text: str, context: int | None) -> dict[str, Any]:
    """The first tokens of a text."""
    limit = positions(config)
    if context is not None and limit is not None and context > limit:
        raise ValueError(f"the context must be at most the model's positions ({limit}), got {context}")
    longest = context or min(2048, limit or 2048)
    encoded = tokenizer()(text[: longest * 32], return_tensors="pt", truncation=True, max_length=longest)
    if context is not None and encoded["input_ids"].shape[1] < context:
        had = encoded["input_ids"].shape[1]
        raise ValueError(f"the text must have at least {context} tokens, got {had}; give a longer --data")
    return dict(encoded)


def write_advice(advice: Advice, folder: Path) -> None:
    """`advice.json`, `advice.png` and, where something is recommended, `settings.json` into a folder."""
    make_folder(folder)
    if advice.best is not None and advice.on_model:
        advice.save(folder / "settings.json")
    write_text(folder / "advice.json", json.dumps(advice.as_dict(), indent=1) + "\n")
    drawn = io.BytesIO()
    plot(advice).savefig(drawn, format="png", dpi=120)
    write_bytes(folder / "advice.png", drawn.getvalue())


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
