"""Which feature gets a representation: gates of fields, and of the fields of one row.

    AutoField   g = softmax over fields of a / beta_t
    AdaFS       g = softmax over fields of w . LN(e_i) + b, for each row
    LPFS        g = a^2 / (a^2 + eps);    each step  a <- sign(a) max(|a| - 2 lambda lr, 0)
    LPFS++      g = (alpha eps^(1/tau) atan(a) +- a^2 / (a^2 + eps)) / a_0, + where a > 0, a_0 being where a starts

Shape letters: B batch, F fields, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: what LPFS keeps
KEPT = 1e-10


def temperature_at(step: int, rate: float = 5e-5, least: float = 0.01) -> float:
    """beta_t = max(least, 1 - rate t), of AutoField and OptInter.

    Args:
        step: t.
        rate: by which it falls.
        least: where it stops.

    >>> temperature_at(0), temperature_at(10_000), temperature_at(10**6)
    (1.0, 0.5, 0.01)
    """
    return max(least, 1 - rate * step)


def autofield_gates(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax of a / beta over fields.

    Args:
        logits: a, (..., F).
        temperature: beta.
    """
    return (logits / temperature).softmax(-1)


def lpfs_gates(a: Tensor, epsilon: float = 0.1) -> Tensor:
    """a^2 / (a^2 + eps): 0 at 0, 1 far from it.

    Args:
        a: of each field.
        epsilon: how far 1 is.
    """
    return a.square() / (a.square() + epsilon)


def lpfs_plus_gates(
    a: Tensor, epsilon: float = 0.1, *, alpha: float = 100.0, tau: float = 2.0, initial: float = 1.0
) -> Tensor:
    """LPFS++: the odd gate with a slope at 0. It is not 1 where a starts, nor bounded by 1.

    Args:
        a: of each field.
        epsilon, alpha, tau: as above.
        initial: a_0, by which it is divided.
    """
    slope, step = alpha * epsilon ** (1 / tau) * a.atan(), lpfs_gates(a, epsilon)
    return torch.where(a > 0, slope + step, slope - step) / initial


def shrunk(a: Tensor, by: float) -> Tensor:
    """sign(a) max(|a| - by, 0), the proximal step of the L1 norm.

    Args:
        a: of each field.
        by: 2 lambda lr.
    """
    return a.sign() * (a.abs() - by).clamp(min=0)


class Selection(nn.Module):
    """Base of the gates: `forward` gives gates (B, F) of embeddings, `kept` the fields that are worth keeping."""

    def forward(self, e_BFD: Tensor) -> Tensor:
        raise NotImplementedError

    def kept(self) -> Tensor:
        """Bool (F,).

        Raises:
            ValueError: if fields are chosen anew for each row.
        """
        raise NotImplementedError


class AutoField(Selection):
    """A logit for each field, softmax over fields; a field is kept where its logit is above 0.

    Args:
        fields: F.
        dim: is not used.
    """

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(fields))
        #: beta_t; the trainer lowers it, see `temperature_at`
        self.temperature = 1.0

    def forward(self, e_BFD: Tensor) -> Tensor:
        return autofield_gates(self.logits, self.temperature).expand(len(e_BFD), -1)

    def kept(self) -> Tensor:
        return self.logits.detach() > 0


class AdaFS(Selection):
    """A controller that weighs the fields of each row by their layer-normalised embeddings.

    While `pretraining`, there are no gates, and the normalised embeddings are the network's input.

    Args:
        fields: is not used.
        dim: D.
    """

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        self.controller = nn.Linear(dim, 1)
        self.pretraining = False

    def forward(self, e_BFD: Tensor) -> Tensor:
        return self.controller(F.layer_norm(e_BFD, e_BFD.shape[-1:]))[..., 0].softmax(1)

    def kept(self) -> Tensor:
        raise ValueError("adafs chooses fields anew for each row, so none is dropped for all")


class LPFS(Selection):
    """A gate of each field that reaches 0 exactly, by plain SGD on a and `shrink` after each step.

    Args:
        fields: F.
        dim: is not used.
        epsilon: Criteo 0.1, Avazu 4e-3, KDD12 1e-3.
        penalty: lambda; Criteo 0.1, Avazu 0.25, KDD12 0.3.
        plus: LPFS++.
        alpha, tau: of LPFS++.
        initial: where a starts.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        *,
        epsilon: float = 0.1,
        penalty: float = 0.1,
        plus: bool = False,
        alpha: float = 100.0,
        tau: float = 2.0,
        initial: float = 1.0,
    ) -> None:
        super().__init__()
        self.epsilon, self.penalty, self.plus = epsilon, penalty, plus
        self.alpha, self.tau, self.initial = alpha, tau, initial
        self.a = nn.Parameter(torch.full((fields,), initial))

    def forward(self, e_BFD: Tensor) -> Tensor:
        if self.plus:
            gates = lpfs_plus_gates(self.a, self.epsilon, alpha=self.alpha, tau=self.tau, initial=self.initial)
        else:
            gates = lpfs_gates(self.a, self.epsilon)
        return gates.expand(len(e_BFD), -1)

    @torch.no_grad()
    def shrink(self, lr: float) -> None:
        """The proximal step that follows one of SGD.

        Args:
            lr: of that step.
        """
        self.a.copy_(shrunk(self.a, 2 * self.penalty * lr))

    def kept(self) -> Tensor:
        return self.a.detach() > KEPT


class Kept(Selection):
    """Fixed gates: 1 for the fields that are kept, 0 for the others; for retraining after a search.

    Args:
        fields: F.
        dim: is not used.
        keep: the fields that are kept; all where None.

    Raises:
        ValueError: if one is no field.
    """

    gates: Tensor

    def __init__(self, fields: int, dim: int, *, keep: tuple[int, ...] | None = None) -> None:
        super().__init__()
        chosen = range(fields) if keep is None else keep
        if any(not 0 <= i < fields for i in chosen):
            raise ValueError(f"keep must be numbers of {fields} fields, got {tuple(chosen)}")
        self.register_buffer(
            "gates", torch.zeros(fields).index_fill(0, torch.tensor(list(chosen), dtype=torch.long), 1.0)
        )

    def forward(self, e_BFD: Tensor) -> Tensor:
        return self.gates.to(e_BFD.dtype).expand(len(e_BFD), -1)

    def kept(self) -> Tensor:
        return self.gates > 0


def _lpfs_plus(fields: int, dim: int, **options: Any) -> LPFS:
    return LPFS(fields, dim, **{"plus": True, **options})


SELECTIONS: Mapping[str, Any] = MappingProxyType(
    {"autofield": AutoField, "adafs": AdaFS, "lpfs": LPFS, "lpfs++": _lpfs_plus, "kept": Kept}
)
