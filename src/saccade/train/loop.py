"""Training: one optimiser, one schedule, resumable at any step.

AdamW (betas 0.9 and 0.95), learning rate warmed up linearly over the first steps and then lowered by a cosine to a
tenth, gradients clipped to norm 1. `fit` is the short form for experiments; `Training` is the same with its state in
reach, for runs that are stopped and resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saccade.train.progress import bar

T = TypeVar("T")


class NotFinite(ValueError):
    """A loss or a quality that is no finite number."""


class Training:
    """A model and its optimiser, a step at a time; `state` and `load_state` make it resumable exactly.

    Args:
        model: is changed.
        steps: how many there will be (the schedule needs to know).
        lr: the highest learning rate.
        weight_decay: of AdamW.
        warmup: share of them with rising learning rate.
        final: learning rate at the end, as a share of `lr`.
        clip: the largest norm of the gradients.
        schedule: the learning rate as a share of `lr`, where it does not go by steps; it takes the place of `warmup`
            and `final`.

    Raises:
        ValueError: if `steps` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        final: float = 0.1,
        clip: float = 1.0,
        schedule: Callable[[], float] | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}")
        self.model, self.steps, self.lr, self.clip, self.final = model, steps, lr, clip, final
        self.warmup_steps, self.schedule = max(1, round(warmup * steps)), schedule
        self.step = 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters or [nn.Parameter(torch.zeros(1))], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
        )

    def learning_rate(self) -> float:
        """Of the step to come."""
        if self.schedule is not None:
            return self.lr * self.schedule()
        if self.step < self.warmup_steps:
            return self.lr * (self.step + 1) / self.warmup_steps
        share = (self.step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))

    def __call__(self, batch: T, loss: Callable[[nn.Module, T], Tensor]) -> float:
        """One step; returns its loss, without what the parts add to it (see `auxiliary_loss`).

        Raises:
            NotFinite: if the loss is not a finite number.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        value = loss(self.model, batch)
        figure = float(value.detach())
        if not math.isfinite(figure):
            raise NotFinite(
                f"the loss became {figure} at step {self.step + 1} of {self.steps}: try a lower learning rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        extra = auxiliary_loss(self.model)
        (value if extra is None else value + extra).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.step += 1
        return figure

    def state(self) -> dict[str, Tensor]:
        """Model, optimiser and torch's random state as named tensors (the step is `step`)."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        tensors["step"] = torch.tensor(self.step)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a state.

        Raises:
            ValueError: if it is of another model, or of a step that this training does not have.
        """
        model = {name[len("model.") :]: t for name, t in tensors.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict(model)
            state: dict[int, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".", 2)
                    state.setdefault(int(index), {})[key] = tensor
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            torch.set_rng_state(tensors["random"].cpu())
            if "random.cuda" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["random.cuda"].cpu())
            step = int(tensors["step"])
        except (RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"the checkpoint is of another model: {' '.join(str(error).split())[:200]}") from error
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must be between 0 and {self.steps}, got {step}")
        self.step = step


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """What the parts of a model add to the task's loss: the mean of `aux_weight * aux_loss` of those that have one.

    A part with a loss of its own (MoH's load balance, say) leaves it as `aux_loss` after a call in training mode, None
    otherwise, and says in `aux_weight` how much of it its paper adds.

    Args:
        model: after a call in training mode.
    """
    parts: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "aux_loss", None), Tensor)]
    losses = [part.aux_weight * part.aux_loss for part in parts]
    return torch.stack(losses).mean() if losses else None


def fit(
    model: nn.Module,
    batches: Iterable[T] | Callable[[int], T],
    loss: Callable[[nn.Module, T], Tensor],
    steps: int,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    progress: str | None = None,
) -> list[float]:
    """Train `model` in place; returns the loss of each step.

    Args:
        model: is changed.
        batches: an iterator, an iterable (begun again where it ends), or a function of the step.
        loss: (model, batch) -> a scalar tensor.
        steps: how many.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        progress: the description of a bar in the display that is open (see `saccade.train.progress`); none where None.

    Raises:
        ValueError: if the batches run out or the loss is not finite.
    """
    training = Training(model, steps, lr=lr, weight_decay=weight_decay)
    batch_at = batches if callable(batches) else _Cycle(batches)
    losses: list[float] = []
    with bar(progress, steps) if progress is not None else nullcontext() as update:
        for step in range(steps):
            losses.append(training(batch_at(step), loss))
            if update is not None:
                update(words=f"loss {losses[-1]:.3f}")
    return losses


class _Cycle:
    """An iterable as a function of the step; steps must come in order (a first one further on skips there)."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source, self.iterator, self.next = source, iter(source), 0

    def __call__(self, step: int) -> Any:
        while True:
            try:
                batch = next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.source)
                try:
                    batch = next(self.iterator)
                except StopIteration:
                    raise ValueError(f"the batches ran out at step {step + 1}") from None
            self.next += 1
            if self.next > step:
                return batch
