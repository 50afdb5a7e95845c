"""What attention layers of a language model did, kept to be learned from, and how far other layers are from it.

    layers   |new(x) - old(x)|^2 / |old(x)|^2        x: what the old model gave the layer
    logits   KL(softmax(old) || softmax(new))        of the whole model, on every few tokens

Each window of a text goes through the old model once, as long as there is memory to keep what was seen.

Shape letters: B windows, W all windows, N tokens of a window, C channels, S tokens that are compared, T tokens
of all windows, V vocabulary, F channels before an output projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.integrations import converted
from saccade.layers.wrapping import Report, changing
from saccade.ops.autocast import has_bfloat16, quick
from saccade.train.data import generator_at

__all__ = ["Teacher", "fit_outputs", "layers_loss", "logits_loss"]

#: windows that are seen before the first step
_FIRST = 24
#: how often a window is learned from, about: to let one through the old model costs as much as learning twice from it
_TIMES = 4
#: windows that go through the model together
_TOGETHER = 4
#: what keeps a fitted projection near where it was, as shares of the mean diagonal; one window in so many judges them
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_JUDGED = 4
#: of how many tokens one's logits are compared: the head and the softmax over the vocabulary cost as much as the rest
_EVERY = 4


class Teacher:
    """A model with its old layers, on the windows of a text.

    Args:
        model: of transformers, causal; whatever stands in the layers' places meanwhile.
        old: module path -> the layer that stood there.
        data: tokens (L,).
        length: N of a window.
        memory: bytes that what was seen may take; beyond, it is seen again each time.
        seed: of the order of the windows, and of what is chosen.
    """

    def __init__(
        self,
        model: Any,
        old: Mapping[str, nn.Module],
        data: Tensor,
        length: int,
        memory: float = 4e9,
        seed: int = 0,
    ) -> None:
        self.model, self.old, self.length, self.seed = model, old, length, seed
        cut_WN = data[: len(data) // length * length].view(-1, length)
        order_W = torch.randperm(len(cut_WN), generator=generator_at(seed, 0, 0))
        self.windows_WN = cut_WN[order_W].to(model.device)
        self.memory = memory
        self.type = torch.bfloat16 if has_bfloat16() else torch.float32
        self._layers: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self._hidden: dict[int, Tensor] = {}
        self.plain = self._is_plain()

    def first(self) -> range:
        """The windows that are seen from the start."""
        return range(min(_FIRST, len(self.windows_WN)))

    def chosen(self, step: int, batch: int) -> list[int]:
        """The windows of a step, any of those that were seen so far; a new one joins them for every four chosen."""
        known = min(len(self.windows_WN), len(self.first()) + step * batch // _TIMES)
        return torch.randint(known, (batch,), generator=generator_at(self.seed, step, 0)).tolist()

    def layers(self, windows: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Module path -> what each old layer was given and gave, (B, N, C) both."""
        seen = self._layers | self._see([w for w in windows if w not in self._layers], layers=True)
        return {path: _stacked([seen[w][path] for w in windows]) for path in self.old}

    def logits(self, windows: Sequence[int], at_S: Tensor) -> Tensor:
        """What the model said, (B, S, V)."""
        if not self.plain:
            with torch.no_grad(), converted.standing(self.model, self.old), quick():
                return self.model(input_ids=self.windows_WN[list(windows)], use_cache=False).logits[:, at_S]
        if new := [w for w in windows if w not in self._hidden]:
            self._see(new, layers=False)
        hidden_BNC = torch.stack([self._hidden[w] for w in windows])
        with torch.no_grad(), quick():
            return self.model.get_output_embeddings()(hidden_BNC[:, at_S].to(self.model.dtype))

    def logits_now(self, windows: Sequence[int], at_S: Tensor) -> Tensor:
        """What the model says with the layers that it has now, (B, S, V)."""
        ids_BN = self.windows_WN[list(windows)]
        with quick():
            if not self.plain:
                return self.model(input_ids=ids_BN, use_cache=False).logits[:, at_S]
            hidden_BNC = self.model.get_decoder()(input_ids=ids_BN, use_cache=False)[0]
            return self.model.get_output_embeddings()(hidden_BNC[:, at_S])

    def forget_layers(self) -> None:
        """Give up the memory of what layers did."""
        self._layers.clear()

    @torch.no_grad()
    def _see(self, windows: Sequence[int], *, layers: bool) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
        """Let windows go through the old model; what its layers did, and that is kept while there is room."""
        found: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        for start in range(0, len(windows), _TOGETHER):
            now = list(windows[start : start + _TOGETHER])
            seen: dict[str, tuple[Tensor, Tensor]] = {}

            def called(path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                x_BNC = args[0] if args else kwargs["hidden_states"]
                seen[path] = x_BNC.to(self.type), out[0].to(self.type)  # noqa: B023 (called before the next turn)

            with converted.standing(self.model, self.old), changing(self.model, Report("convert")) as changes, quick():
                for path, layer in self.old.items() if layers else ():
                    changes.after(layer, partial(called, path))
                hidden_BNC = self.model.get_decoder()(input_ids=self.windows_WN[now], use_cache=False)[0]
            for row, window in enumerate(now):
                if self.plain:
                    self._hidden[window] = hidden_BNC[row].to(self.type, copy=True)
                found[window] = {path: (x[row].clone(), y[row].clone()) for path, (x, y) in seen.items()}
                if layers and self._room(found[window]):
                    self._layers[window] = found[window]
        return found

    def _room(self, one: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
        return (len(self._layers) + 1) * sum(x.nbytes + y.nbytes for x, y in one.values()) <= self.memory

    @torch.no_grad()
    def _is_plain(self) -> bool:
        """Whether logits are the head's product with the decoder's output; some models scale or bend them."""
        head = self.model.get_output_embeddings()
        ids_1N = self.windows_WN[:1, :8]
        if not isinstance(head, nn.Linear):
            return False
        said = self.model(input_ids=ids_1N, use_cache=False).logits
        return torch.allclose(head(self.model.get_decoder()(input_ids=ids_1N, use_cache=False)[0]), said, atol=1e-4)


def layers_loss(parts: Mapping[str, nn.Module], teacher: Teacher, windows: Sequence[int]) -> Tensor:
    """The mean over layers of the squared error by what the old layer's output is.

    Args:
        parts: module path -> the new part.
        teacher: the old model.
        windows: by number.
    """
    losses = []
    for path, (x_BNC, y_BNC) in teacher.layers(windows).items():
        with quick():
            ours_BNC = parts[path](x_BNC.to(teacher.model.dtype))
        size = y_BNC.float().square().sum().clamp(min=1e-12)  # an old layer may give nothing
        losses.append((ours_BNC.float() - y_BNC.float()).square().sum() / size)
    return torch.stack(losses).mean()


def logits_loss(teacher: Teacher, windows: Sequence[int], generator: torch.Generator) -> Tensor:
    """The mean divergence of what the model says now from what it said, on a random token of every few.

    Args:
        teacher: the old model.
        windows: by number.
        generator: of the tokens.
    """
    offset = int(torch.randint(min(_EVERY, teacher.length), (), generator=generator))
    at_S = torch.arange(offset, teacher.length, _EVERY)
    said_BSV = teacher.logits(windows, at_S).float().log_softmax(-1)
    ours_BSV = teacher.logits_now(windows, at_S).float().log_softmax(-1)
    return F.kl_div(ours_BSV, said_BSV, log_target=True, reduction="none").sum(-1).mean()


@torch.no_grad()
def fit_outputs(parts: Mapping[str, nn.Module], teacher: Teacher, windows: Sequence[int]) -> list[str]:
    """Set output projections to what comes nearest to the old layers' outputs, by least squares.

        W <- W + (sum f f^T + lambda)^-1 sum f (old(x) - new(x))^T        f: what the projection is given

    lambda, or that nothing changes, is what is best on every fourth window, to which it has not been fitted.

    Args:
        parts: module path -> the new part; one without a linear `out_proj` is left as it is.
        teacher: the old model.
        windows: by number.

    Returns:
        the paths of those that were fitted.
    """
    places: dict[str, Any] = {path: getattr(part, "out_proj", None) for path, part in parts.items()}
    able = {path: place for path, place in places.items() if isinstance(place, nn.Linear)}
    sums = {path: (_Sums(), _Sums()) for path in able}
    for start in range(0, len(windows), _TOGETHER):
        seen = teacher.layers(windows[start : start + _TOGETHER])
        for path, out in able.items():
            for row, (x_NC, y_NC) in enumerate(zip(*seen[path], strict=True)):
                judging = (start + row) % _JUDGED == _JUDGED - 1
                sums[path][judging].add(*_given(parts[path], out, x_NC[None], y_NC[None]))
    for path, out in able.items():
        learned, judges = sums[path]
        judges = judges if len(windows) >= _JUDGED else learned
        best = min((None, *_RIDGES), key=lambda ridge: judges.error(learned.change(ridge)))
        out.weight += (learned + judges).change(best).mT.to(out.weight)
    return list(able)


@dataclass
class _Sums:
    """sum f f^T (F, F) and sum f r^T (F, C): f is what a projection is given, r what its part's output lacks."""

    gram: Any = 0.0
    cross: Any = 0.0

    def add(self, f_TF: Tensor, r_TC: Tensor) -> None:
        self.gram, self.cross = self.gram + f_TF.mT @ f_TF, self.cross + f_TF.mT @ r_TC

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.gram + other.gram, self.cross + other.cross)

    def change(self, ridge: float | None) -> Tensor:
        """What to add to the weight's transpose, (F, C); nothing where there is no ridge."""
        if ridge is None:
            return torch.zeros_like(self.cross)
        size = ridge * self.gram.diagonal().mean().clamp(min=1e-12)
        return torch.linalg.solve(self.gram + size * torch.eye(len(self.gram), device=size.device), self.cross)

    def error(self, change_FC: Tensor) -> float:
        """By how much such a change raises the squared error here."""
        return float((change_FC * (self.gram @ change_FC - 2 * self.cross)).sum())


def _given(part: nn.Module, out: nn.Linear, x_BNC: Tensor, y_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """What a part's output projection is given (T, F), and what the part's output lacks (T, C)."""
    given: list[Tensor] = []
    hook = out.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        with quick():
            ours_BNC = part(x_BNC.to(out.weight.dtype))
    finally:
        hook.remove()
    return given[0].float().flatten(0, -2), (y_BNC.float() - ours_BNC.float()).flatten(0, -2)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
