"""What `saccade advise` reads and writes: a model with its sample text, the advice as JSON and as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.train.data import read_files, text_bytes
from saccade.train.files import make_folder, write_bytes, write_text
from saccade.train.plotting import COLORS, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.integrations.advise import Advice


def sample_model(name: str, data: Path | None, context: int | None) -> tuple[Any, Any]:
    """A transformers model by folder or name, and a text cut to `context` tokens by its own tokenizer.

    A model with a language head is loaded with it, another without. English from Python's documentation is the text
    where no file is given.

    Raises:
        ValueError: if transformers is missing, or the text is shorter than `context`.
        OSError: if the model or the file cannot be read.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError("advise on a model needs transformers: pip install 'saccade[transformers]'") from None
    config = AutoConfig.from_pretrained(name)
    decoder = any(architecture.endswith("ForCausalLM") for architecture in config.architectures or ())
    loader = AutoModelForCausalLM if decoder else AutoModel
    model = loader.from_pretrained(name, config=config).eval()
    raw = text_bytes() if data is None else read_files([data], least=1)
    text = bytes(raw.tolist()).decode("utf-8", "replace")
    tokenizer = AutoTokenizer.from_pretrained(name)
    longest = context or min(2048, int(getattr(config, "max_position_embeddings", 2048)))
    encoded = tokenizer(text[: longest * 32], return_tensors="pt", truncation=True, max_length=longest)
    return model, dict(encoded)


def write_advice(advice: Advice, folder: Path) -> None:
    """`advice.json` and `advice.png` into a folder."""
    make_folder(folder)
    write_text(folder / "advice.json", json.dumps(advice.as_dict(), indent=1) + "\n")
    drawn = io.BytesIO()
    plot(advice).savefig(drawn, format="png", dpi=120)
    write_bytes(folder / "advice.png", drawn.getvalue())


def plot(advice: Advice) -> Figure:
    """Deviation against speed-up: a point a setting, the frontier as a line, the tolerance and the recommendation.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    floor = 1e-7
    for index, slug in enumerate(dict.fromkeys(trial.slug for trial in advice.trials)):
        points = [(t.speedup, max(t.deviation, floor)) for t in advice.trials if t.slug == slug]
        axes.scatter(
            *zip(*points), label=slug, color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)], zorder=3
        )
    axes.plot(*zip(*((t.speedup, max(t.deviation, floor)) for t in advice.frontier)) if advice.trials else ((), ()),
              color="0.6", linewidth=1, label="frontier")  # fmt: skip
    if advice.tolerance > 0:
        axes.axhline(advice.tolerance, color="0.4", linestyle="--", linewidth=1, label="tolerance")
    axes.axvline(1.0, color="0.4", linestyle=":", linewidth=1, label="dense attention")
    best = advice.best
    if best is not None:
        axes.annotate(best.name, (best.speedup, max(best.deviation, floor)), xytext=(6, 6), textcoords="offset points")
    axes.set(
        yscale="log", xlabel="speed-up over dense attention", ylabel="deviation of the output (relative L1)",
        title=f"{advice.subject}, {advice.context} tokens",
    )  # fmt: skip
    axes.legend(frameon=False)
    return figure
