"""The maps of `saccade.explain`, by name: each makes the relevance (M,) of a subject's parts from one run of the model.

Another one is an entry of `METHODS`: a function of the subject and its `Run`, and what it needs of it.

Shape letters: N tokens, M parts (tokens of a text, patches of an image), H heads, n rows at a time,
L tokens before the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.explain import maps
from saccade.explain.subjects import Run, Subject, Tower

__all__ = ["METHODS", "Method", "chosen", "heads"]

#: with more parts than these the slow ones are left out, unless they are asked for
_FEW = 64


@dataclass(frozen=True)
class Method:
    """One map.

    Attributes:
        function: the subject and its run -> relevance (M,).
        needs: what the subject must give beside gradients of its inputs: see `Subject.gives`.
        slow: whether it takes a model's call, or a maximum flow, for each part.
    """

    function: Callable[[Subject, Run], Tensor]
    needs: frozenset[str] = frozenset()
    slow: bool = False

    def __call__(self, subject: Subject, run: Run) -> Tensor:
        return self.function(subject, run)


def _of_towers(function: Callable[[Tower], Tensor]) -> Callable[[Subject, Run], Tensor]:
    """A map (N,) of each tower's tokens as one of the parts of all."""

    def method(subject: Subject, run: Run) -> Tensor:
        return torch.cat([tower.on_parts(function(tower)) for tower in run.towers])

    return method


def _input_gradient(subject: Subject, run: Run) -> Tensor:
    """|x . dL/dx|, of a token's embedding or of a patch's pixels."""
    return run.gradient.abs()


def _occlusion(subject: Subject, run: Run) -> Tensor:
    return maps.occlusion(subject.score, subject.parts)


def _gate(subject: Subject, run: Run) -> Tensor:
    """The last gate's size at each position, the mean over channels."""
    (segment,) = subject.segments
    assert segment.grid is not None
    gate = run.gates[-1].detach().float()
    size_11hw = (gate if gate.ndim == 4 else gate[..., None, None]).abs().mean(1, keepdim=True)
    return F.interpolate(size_11hw, segment.grid, mode="nearest").flatten()


def _tensorlens(subject: Subject, run: Run) -> Tensor:
    """What each token before the blocks adds to the scalar, all that depends on the input held; see `linearised`."""
    return run.towers[0].on_parts(subject.attribution.relevance_L)


_ATTENTION = frozenset({"attention"})
_BACKWARD = frozenset({"attention", "gradients of attention"})

METHODS: dict[str, Method] = {
    "raw": Method(_of_towers(lambda tower: maps.raw(tower.records, rows=tower.reads)[0, 0]), _ATTENTION),
    "rollout": Method(_of_towers(lambda tower: maps.rollout(tower.records, rows=tower.reads)[0, 0]), _ATTENTION),
    "gate": Method(_gate, frozenset({"gates"})),
    "flow": Method(_of_towers(lambda tower: maps.flow(tower.records, tower.reads[0])[0]), _ATTENTION, slow=True),
    "gradient x attention": Method(
        _of_towers(lambda tower: maps.gradient_attention(tower.records, rows=tower.reads)[0, 0]), _BACKWARD
    ),
    "tensorlens": Method(_tensorlens, frozenset({"one stack of blocks"})),
    "input x gradient": Method(_input_gradient),
    "occlusion": Method(_occlusion, slow=True),
}


def chosen(subject: Subject, names: Sequence[str] | None) -> list[str]:
    """The methods that are to be used.

    Args:
        subject: what is explained.
        names: those that are asked for; where None all that fit, without the slow ones of more than 64 parts.

    Raises:
        ValueError: if one is unknown, needs what the subject does not give, or none is named.
    """
    if names is None:
        fit = [name for name, method in METHODS.items() if method.needs <= subject.gives]
        return [name for name in fit if subject.parts <= _FEW or not METHODS[name].slow]
    if not names or (strange := set(names) - set(METHODS)):
        raise ValueError(f"methods must be of {', '.join(METHODS)}, got {', '.join(sorted(strange)) or 'none'}")
    for name in names:
        if missing := METHODS[name].needs - subject.gives:
            why = f": {subject.remark}" if subject.remark else ""
            raise ValueError(f"{name} needs {' and '.join(sorted(missing))}, which cannot be had here{why}")
    return list(names)


def heads(run: Run) -> list[Tensor]:
    """Attention, head by head, of what is read to the parts: (layers, H, M) a tower."""
    return [
        torch.stack([tower.on_parts(_heads(tower, layer)) for layer in range(len(tower.records))]).float().cpu()
        for tower in run.towers
    ]


def _heads(tower: Tower, layer: int) -> Tensor:
    """(H, N) of one layer, some rows at a time."""
    record, read = tower.records[layer], tower.reads[0].nonzero()[:, 0]
    total = torch.zeros(record.shape[1], record.shape[3])
    for rows in read.split(64):
        weights_HnM = record.weights(rows=rows)[0].detach().cpu()
        total += (weights_HnM * tower.reads[0, rows][:, None]).sum(1)
    return total
