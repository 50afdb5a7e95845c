"""`saccade.convert`: a language model's attention layers to another mechanism, by a short distillation.

    1   the new layer imitates the old one on the old model's own hidden states:   |new(x) - old(x)|^2 / |old(x)|^2
    2   (a share `whole` of the time) the model imitates what it said before:      KL(softmax(old) || softmax(new))

Only the new parts learn. All layers learn step 1 at once, from one pass of the old model.

Shape letters: B batch, N tokens of a window, C channels, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.integrations import converted
from saccade.layers.wrapping import Report, changing
from saccade.ops.autocast import quick
from saccade.tables import table
from saccade.train.data import generator_at
from saccade.train.files import make_folder, read_tensors, write_tensors
from saccade.train.loop import Training
from saccade.train.progress import bar, showing

__all__ = ["Conversion", "convert", "perplexity"]

#: seconds between two checkpoints
_EVERY = 20.0


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        slug, arguments: the parts.
        layers: module paths.
        before, dropped, started, after: perplexity of the held-out tokens: of the model as it was, with these layers
            left out, with the parts as they began, and at the end; None where there were no held-out tokens.
        steps, seconds: of the training.
        losses: of step 1, then of step 2, as they went.
    """

    slug: str
    arguments: dict[str, Any]
    layers: list[str]
    before: float | None = None
    dropped: float | None = None
    started: float | None = None
    after: float | None = None
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list, repr=False)
    _model: nn.Module | None = field(default=None, repr=False)

    def save(self, folder: str | Path) -> None:
        """The converted layers as a folder that `saccade.integrations.converted.load` puts into the model again.

        Args:
            folder: made if need be.

        Raises:
            OSError: if it cannot be written.
        """
        assert self._model is not None
        converted.save(self._model, folder, self.slug, self.arguments)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}

    def table(self) -> str:
        """Perplexity, a line a state of the model."""
        names = {
            "before": "as it was",
            "dropped": "these layers left out",
            "started": f"{self.slug}, untrained",
            "after": f"{self.slug}, after {self.steps} steps in {self.seconds:.0f} s",
        }
        rows = [(words, f"{value:.3f}") for name, words in names.items() if (value := getattr(self, name)) is not None]
        return table(("model", "perplexity"), rows, title=f"{len(self.layers)} layers to {self.slug}")

    def __str__(self) -> str:
        return self.table()


def convert(
    model: nn.Module,
    slug: str,
    data: Tensor,
    *,
    layers: Sequence[int | str] | None = None,
    held_out: Tensor | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    whole: float = 0.25,
    length: int = 256,
    batch: int = 4,
    lr: float = 1e-3,
    seed: int = 0,
    folder: str | Path | None = None,
    shown: bool | None = None,
    **arguments: Any,
) -> Conversion:
    """Replace attention layers of a causal language model, and teach the new ones what the old ones did.

    Args:
        model: of transformers; is changed. Its other weights stay as they are.
        slug: of a causal part that decodes.
        data: tokens (L,) of a text to learn from, more than `length`.
        layers: by number or pattern, as of `saccade.switch`; every other one where None.
        held_out: tokens (L,) on which perplexity is measured; not at all where None.
        minutes, steps: of the training, one of them.
        whole: share of it in which the whole model learns from its former logits.
        length, batch: of windows of the text.
        lr: the highest rate.
        seed: of the windows and the new weights.
        folder: for checkpoints: whoever was interrupted goes on where they were, with the same arguments.
        shown: False for no progress; see `saccade.train.progress.showing`.
        **arguments: of the part.

    Returns:
        what happened; `.save(folder)` keeps the layers.

    Raises:
        ValueError: if the part, a layer or a number does not do, or the text is too short.
        OSError: if the folder cannot be used.
    """
    if (minutes is None) == (steps is None) or not (minutes or steps or 0) > 0:
        raise ValueError(f"give either minutes or steps, above 0, got {minutes} and {steps}")
    if not 0 <= whole <= 1 or min(length, batch) < 1 or length < 2:
        raise ValueError(f"whole must be of 0 to 1, length at least 2 and batch 1, got {whole}, {length} and {batch}")
    for name, tokens in (("data", data), ("held_out", held_out)):
        if tokens is not None and (tokens.ndim != 1 or len(tokens) <= length):
            raise ValueError(f"{name} must be more than {length} tokens in a row, got {tuple(tokens.shape)}")
    model.requires_grad_(False).eval()
    old = converted.chosen_layers(model, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {path: converted.part_for(slug, layer, **arguments).requires_grad_() for path, layer in old.items()}
        report = Conversion(slug, arguments, list(parts), _model=model)
        measured = partial(perplexity, model, held_out, length) if held_out is not None else None
        if measured is not None:
            report.before = measured()
            with converted.standing(model, {path: converted.Nothing() for path in old}):
                report.dropped = measured()
        converted.put_in(model, parts)
        new = {path: model.get_submodule(path) for path in parts}
        if measured is not None:
            report.started = measured()
        training = _Distillation(model, old, new, steps, minutes, lr, folder)
        with showing(shown):
            training.run(report, data, whole, length, batch, seed)
    model.eval()
    if measured is not None:
        report.after = measured()
    return report


class _Distillation:
    """Both steps, resumable."""

    def __init__(
        self,
        model: nn.Module,
        old: dict[str, nn.Module],
        new: dict[str, nn.Module],
        steps: int | None,
        minutes: float | None,
        lr: float,
        folder: str | Path | None,
    ) -> None:
        self.model, self.old, self.new = model, old, new
        self.minutes = minutes
        # of minutes nobody knows how many steps they are: the schedule goes by their share that is spent
        self.training = Training(
            nn.ModuleList(new.values()), steps or 1_000_000, lr=lr, weight_decay=0.0, schedule=self.rate
        )
        self.file = None if folder is None else Path(folder) / "state.safetensors"
        self.seconds = 0.0
        if self.file is not None:
            make_folder(self.file.parent)
            if self.file.exists():
                state, said = read_tensors(self.file)
                self.training.load_state(state)
                self.seconds = float(said["seconds"])

    def share(self) -> float:
        """Of the training that is done."""
        if self.minutes is not None:
            return min(1.0, self.seconds / (60 * self.minutes))
        return self.training.step / self.training.steps

    def rate(self) -> float:
        """Of the highest."""
        done = self.share()
        return min(1.0, 20 * done + 0.05) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def run(self, report: Conversion, data: Tensor, whole: float, length: int, batch: int, seed: int) -> None:
        saved = time.monotonic()
        with bar(f"converting to {report.slug}", 1000) as update:
            while self.share() < 1:
                start = time.monotonic()
                generator = generator_at(seed, self.training.step, 0)
                first_B = torch.randint(len(data) - length, (batch,), generator=generator)
                ids_BN = data[first_B[:, None] + torch.arange(length)]
                second = self.share() >= 1 - whole
                value = self.training(ids_BN, self.logits_loss if second else self.layers_loss)
                report.losses.append(value)
                self.seconds += time.monotonic() - start
                update(int(1000 * self.share()), words=f"{'logits' if second else 'layers'}, loss {value:.4f}")
                if self.file is not None and (time.monotonic() - saved > _EVERY or self.share() >= 1):
                    write_tensors(self.file, self.training.state(), {"seconds": str(self.seconds)})
                    saved = time.monotonic()
        report.steps, report.seconds = self.training.step, self.seconds

    def layers_loss(self, parts: nn.Module, ids_BN: Tensor) -> Tensor:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def called(path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            seen[path] = (args[0] if args else kwargs["hidden_states"]).detach(), out[0].detach()

        with (
            torch.no_grad(),
            converted.standing(self.model, self.old),
            changing(self.model, Report("convert")) as changes,
            quick(),
        ):
            for path, theirs in self.old.items():
                changes.after(theirs, partial(called, path))
            self.model(input_ids=ids_BN, use_cache=False)
        losses = []
        for path, (x_BNC, y_BNC) in seen.items():
            layer: Any = self.new[path]
            with quick():
                ours_BNC = layer.part(x_BNC)
            losses.append((ours_BNC.float() - y_BNC.float()).square().mean() / y_BNC.float().square().mean())
        return torch.stack(losses).mean()

    def logits_loss(self, parts: nn.Module, ids_BN: Tensor) -> Tensor:
        with torch.no_grad(), converted.standing(self.model, self.old), quick():
            said_BNV = self.model(input_ids=ids_BN, use_cache=False).logits.float().log_softmax(-1)
        with quick():
            ours_BNV = self.model(input_ids=ids_BN, use_cache=False).logits
        found = F.kl_div(ours_BNV.float().log_softmax(-1), said_BNV, log_target=True, reduction="none")
        return found.sum(-1).mean()


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, length: int = 256, windows: int = 16) -> float:
    """exp of the mean cross-entropy of a text's tokens, by windows that begin anew.

    Args:
        model: causal, of transformers.
        tokens: (L,).
        length: of a window.
        windows: at most so many, from the beginning.
    """
    cut = tokens[: len(tokens) // length * length].view(-1, length)[:windows]
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in cut]
    return math.exp(sum(losses) / len(losses))
