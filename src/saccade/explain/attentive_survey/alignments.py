"""The alignment functions of the survey, under one interface: how well a key fits a query.

An alignment makes of each query and of each key what meets (`queries`, `keys`: once a token), and scores pairs of these
(`score`). Where that is a dot product (`is_dot`), it runs wherever dot products run.

Shape letters: ... batch and heads, N queries, M keys, D head dim, F hidden width, E channels of a score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import ACTIVATIONS
from saccade.ops.linear import elu_plus_one

#: feature maps of the generalised kernel
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": elu_plus_one,
    "relu": F.relu,
    "exp": torch.exp,
}


class Alignment(nn.Module):
    """Base, and the dot product: a(k, q) = q . k.

    Args:
        dim: D.
        channels: E, numbers that each pair has for itself, a weight for each channel of the values; one where None.

    Raises:
        ValueError: if a number is not positive, or there are channels and the alignment gives one number a pair.
    """

    #: `score` is the dot product of what `queries` and `keys` make
    is_dot = True
    #: what scores depend on
    reads_queries = reads_keys = True
    #: `keys` reads all keys for each
    reads_all_keys = False
    #: pairs may have a number for each channel
    has_channels = False

    def __init__(self, dim: int, *, channels: int | None = None) -> None:
        super().__init__()
        if channels is not None and not self.has_channels:
            raise ValueError(f"{type(self).__name__} gives one score a pair, not one for each of {channels} channels")
        if dim < 1 or (channels is not None and channels < 1):
            raise ValueError(f"dim and channels must be at least 1, got {dim} and {channels}")
        self.dim, self.channels = dim, channels

    def queries(self, q: Tensor) -> Tensor:
        """What each query (..., N, D) brings."""
        return q

    def keys(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        """What each key (..., M, D) brings; `real` (..., M) says which are tokens, all where None."""
        return k

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Of what `queries` and `keys` gave, (..., N, M), or (..., N, M, E) with channels."""
        return q @ k.mT

    def forward(self, q: Tensor, k: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (..., N, M) of queries and keys, or (..., N, M, E).

        Args:
            q: (..., N, D).
            k: (..., M, D).
            real: which keys are tokens.
        """
        return self.score(self.queries(q), self.keys(k, real))


class Dot(Alignment):
    """q . k (Luong et al., 2015)."""


class ScaledDot(Alignment):
    """q . k / sqrt(D) (Vaswani et al., 2017)."""

    def queries(self, q: Tensor) -> Tensor:
        return q * self.dim**-0.5


class Similarity(Alignment):
    """The cosine of q and k, or less their distance (Graves et al., 2014).

    Args:
        dim: D.
        distance: -|q - k| in place of the cosine.
    """

    def __init__(self, dim: int, *, distance: bool = False, channels: int | None = None) -> None:
        super().__init__(dim, channels=channels)
        self.distance, self.is_dot = distance, not distance

    def queries(self, q: Tensor) -> Tensor:
        return q if self.distance else F.normalize(q, dim=-1)

    def keys(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        return self.queries(k)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        if not self.distance:
            return super().score(q, k)
        # the distance of equal ones is 0, where the root has no derivative
        return -(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1).clamp(min=1e-12).sqrt()


class General(Alignment):
    """q^T W k (Luong et al., 2015).

    Args:
        dim: D.
    """

    def __init__(self, dim: int, *, channels: int | None = None) -> None:
        super().__init__(dim, channels=channels)
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.xavier_uniform_(self.weight)

    def queries(self, q: Tensor) -> Tensor:
        return q @ self.weight


class BiasedGeneral(General):
    """k . (W^T q + b): with a bias for keys whatever the query (Sordoni et al., 2016).

    Args:
        dim: D.
    """

    def __init__(self, dim: int, *, channels: int | None = None) -> None:
        super().__init__(dim, channels=channels)
        self.bias = nn.Parameter(torch.zeros(dim))

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(q) + self.bias


class ActivatedGeneral(General):
    """act(q^T W k + b), b a number (Ma et al., 2017).

    Args:
        dim: D.
        activation: of `saccade.layers.mlp.ACTIVATIONS`.
    """

    is_dot = False

    def __init__(self, dim: int, *, activation: str = "tanh", channels: int | None = None) -> None:
        super().__init__(dim, channels=channels)
        self.bias, self.activation = nn.Parameter(torch.zeros(1)), _known("activation", activation, ACTIVATIONS)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](q @ k.mT + self.bias)


class Kernel(Alignment):
    """phi(q) . phi(k) (Choromanski et al., 2021).

    Args:
        dim: D.
        features: of `FEATURES`.
    """

    def __init__(self, dim: int, *, features: str = "elu", channels: int | None = None) -> None:
        super().__init__(dim, channels=channels)
        self.features = _known("features", features, FEATURES)

    def queries(self, q: Tensor) -> Tensor:
        return FEATURES[self.features](q)

    def keys(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        return FEATURES[self.features](k)


class Additive(Alignment):
    """w . act(W_1 q + W_2 k + b) (Bahdanau et al., 2015).

    Args:
        dim: D.
        hidden: F, D where None.
        activation: of `saccade.layers.mlp.ACTIVATIONS`.
        channels: E; w is E x F then.
    """

    is_dot = False
    has_channels = True

    def __init__(
        self, dim: int, *, hidden: int | None = None, activation: str = "tanh", channels: int | None = None
    ) -> None:
        super().__init__(dim, channels=channels)
        hidden = dim if hidden is None else hidden
        self.query, self.key = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, channels or 1, bias=False)
        self.activation = _known("activation", activation, ACTIVATIONS)

    def queries(self, q: Tensor) -> Tensor:
        return self.query(q)

    def keys(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        return self.key(k)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        scores = self.out(self.within(ACTIVATIONS[self.activation](q[..., :, None, :] + k[..., None, :, :])))
        return scores[..., 0] if self.channels is None else scores

    def within(self, hidden: Tensor) -> Tensor:
        """What further layers make of the hidden units (..., N, M, F)."""
        return hidden


class Concat(Additive):
    """w . act(W [q ; k] + b) (Luong et al., 2015): `Additive` with W = [W_1, W_2] as one matrix.

    Args:
        dim, hidden, activation, channels: as of `Additive`.
    """

    def __init__(
        self, dim: int, *, hidden: int | None = None, activation: str = "tanh", channels: int | None = None
    ) -> None:
        super().__init__(dim, hidden=hidden, activation=activation, channels=channels)
        del self.query, self.key
        self.both = nn.Linear(2 * dim, dim if hidden is None else hidden)

    def queries(self, q: Tensor) -> Tensor:
        return F.linear(q, self.both.weight[:, : self.dim], self.both.bias)

    def keys(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        return F.linear(k, self.both.weight[:, self.dim :])


class Deep(Additive):
    """w . E_(L-1) + b_L, E_l = act(W_l E_(l-1) + b_l), E_1 = act(W_1 k + W_0 q + b_1) (Pavlopoulos et al., 2017).

    Args:
        dim, hidden, activation, channels: as of `Additive`.
        depth: L; 2 is `Additive` with a bias at the end.

    Raises:
        ValueError: if the depth is below 2.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        activation: str = "tanh",
        depth: int = 3,
        channels: int | None = None,
    ) -> None:
        super().__init__(dim, hidden=hidden, activation=activation, channels=channels)
        if depth < 2:
            raise ValueError(f"depth must be at least 2, got {depth}")
        width = self.out.in_features
        self.deeper = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 2))
        # a number that all scores share moves no softmax: it has a gradient where the distribution is another
        self.out = nn.Linear(width, channels or 1)

    def within(self, hidden: Tensor) -> Tensor:
        for layer in self.deeper:
            hidden = ACTIVATIONS[self.activation](layer(hidden))
        return hidden


class Location(Alignment):
    """Component i of W q for key i: keys are not read (Luong et al., 2015).

    Args:
        dim: D.
        max_keys: the most keys.
    """

    reads_keys = False

    def __init__(self, dim: int, *, max_keys: int = 64, channels: int | None = None) -> None:
        super().__init__(dim, channels=channels)
        self.place = nn.Linear(dim, max_keys, bias=False)

    def queries(self, q: Tensor) -> Tensor:
        return self.place(q)

    def keys(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        """A key says which it is.

        Raises:
            ValueError: if there are more keys than places.
        """
        if k.shape[-2] > self.place.out_features:
            raise ValueError(f"keys must be {self.place.out_features} at most, got {k.shape[-2]}")
        one_hot = torch.eye(k.shape[-2], self.place.out_features, dtype=k.dtype, device=k.device)
        return one_hot.expand(*k.shape[:-2], -1, -1)


class Feature(Alignment):
    """w . act(W_1 k + W_2 mean(K) + b): no query, how a key stands among all keys (Li et al., 2019).

    Args:
        dim, hidden, activation: as of `Additive`.
    """

    reads_queries = False
    reads_all_keys = True

    def __init__(
        self, dim: int, *, hidden: int | None = None, activation: str = "tanh", channels: int | None = None
    ) -> None:
        super().__init__(dim, channels=channels)
        hidden = dim if hidden is None else hidden
        self.key, self.among = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.out, self.activation = nn.Linear(hidden, 1, bias=False), _known("activation", activation, ACTIVATIONS)

    def queries(self, q: Tensor) -> Tensor:
        return torch.ones_like(q[..., :1])

    def keys(self, k: Tensor, real: Tensor | None = None) -> Tensor:
        share = torch.ones_like(k[..., :1]) if real is None else real[..., None].expand(*k.shape[:-1], 1).to(k)
        mean = (torch.where(share > 0, k, 0)).sum(-2, keepdim=True) / share.sum(-2, keepdim=True).clamp(min=1)
        return self.out(ACTIVATIONS[self.activation](self.key(k) + self.among(mean)))


#: the survey's table
ALIGNMENTS: dict[str, type[Alignment]] = {
    "similarity": Similarity,
    "dot": Dot,
    "scaled-dot": ScaledDot,
    "general": General,
    "biased-general": BiasedGeneral,
    "activated-general": ActivatedGeneral,
    "kernel": Kernel,
    "concat": Concat,
    "additive": Additive,
    "deep": Deep,
    "location": Location,
    "feature": Feature,
}


def alignment(name: str, dim: int, **arguments: object) -> Alignment:
    """The alignment of that name.

    Args:
        name: of `ALIGNMENTS`.
        dim: D.
        **arguments: those that it takes (`hidden`, `activation`, `depth`, `features`, `distance`, `max_keys`,
            `channels`).

    Raises:
        ValueError: if there is none of that name, or it does not take an argument.
    """
    try:
        return ALIGNMENTS[_known("alignment", name, ALIGNMENTS)](dim, **arguments)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _known(what: str, name: str, table: Mapping[str, object]) -> str:
    """
    Raises:
        ValueError: if the table has no such name.
    """
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return name
