"""Networks that say how likely a click is, from categories and numbers: their output, tables, interactions.

    e_i = E[offset_i + x_i],   logit = f(e_1 .. e_F) + sum_i w[offset_i + x_i] + b,   p = sigmoid(logit)

| interaction f | what | source |
|---|---|---|
| `fm` | half of (sum e)^2 - sum e^2, summed over channels | Rendle, ICDM 2010 |
| `fnn` | an MLP of all embeddings side by side | Zhang et al., arXiv 1601.02376 |
| `deepfm` | both, added | Guo et al., arXiv 1703.04247 |
| `ipnn` | an MLP of all embeddings and all inner products | Qu et al., arXiv 1611.00144 |
| `dcn` | x <- x_0 (w^T x) + b + x beside an MLP, both read by a linear layer | Wang et al., arXiv 1708.05123 |

All categories share one table, a field's values follow those of the field before. -1 is a missing value: a zero vector.

Shape letters: B batch, F fields, K values of a field, P pairs of fields, D width, E numbers that an MLP
reads, M numbers of a row, V values of all fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.constants import numbers
from saccade.ops.export import output

#: norms of `deep`: width -> layers
NORMS: Mapping[str, Callable[[int], list[nn.Module]]] = MappingProxyType(
    {
        "none": lambda width: [],
        "batch": lambda width: [nn.BatchNorm1d(width)],
        "layer": lambda width: [nn.LayerNorm(width)],
    }
)
#: what says that a field has no value
MISSING = -1


@output
@dataclass
class ClickOutput:
    """How likely clicks are.

    Attributes:
        logits: (B,), of a click.
        embeddings: (B, F, D), what the interaction network was given.
        penalty: a scalar that is added to the loss in training, where the network has one.
    """

    logits: Tensor
    embeddings: Tensor | None = None
    penalty: Tensor | None = None

    @property
    def probability(self) -> Tensor:
        """(B,), in fp32 at least."""
        return _exact(self.logits).sigmoid()


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def click_loss(said: ClickOutput, label_B: Tensor) -> Tensor:
    """The log loss in fp32 at least, and the network's penalty.

    Args:
        said: of a network.
        label_B: 1 where there was a click, else 0.

    Raises:
        ValueError: if the labels are not as many as the logits.
    """
    if said.logits.shape != label_B.shape:
        raise ValueError(f"labels must be {tuple(said.logits.shape)}, got {tuple(label_B.shape)}")
    logits_B = _exact(said.logits)
    loss = F.binary_cross_entropy_with_logits(logits_B, label_B.to(logits_B.dtype))
    return loss if said.penalty is None else loss + said.penalty


class FieldTable(nn.Module):
    """One table for the values of all fields, with the offset of each field.

    Args:
        fields: how many values each field has.
        dim: D.

    Raises:
        ValueError: if there is no field, or one has no value, or `dim` is not positive.
    """

    def __init__(self, fields: Sequence[int], dim: int) -> None:
        super().__init__()
        self.fields, self.dim = tuple(check_fields(fields)), dim
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.weight = nn.Parameter(torch.empty(sum(self.fields), dim))
        nn.init.xavier_uniform_(self.weight)

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table, those of missing values being row 0, and whether there is a value. See `rows_of`."""
        return rows_of(ids, self.fields)

    def forward(self, ids: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        """The vectors (B, F, D); of several values of a field their mean, of none zeros.

        Args:
            ids: (B, F), or (B, F, K); from 0 in each field, -1 is missing.
            weight_VD: what is read in place of `weight`, such as a masked one.

        Raises:
            ValueError: as `rows_of`.
        """
        row, there = self.rows(ids)
        return pooled(F.embedding(row, self.weight if weight_VD is None else weight_VD), there)


def check_fields(fields: Sequence[int]) -> Sequence[int]:
    """The fields, which are at least one, of at least one value each.

    Raises:
        ValueError: if not.
    """
    if not fields or min(fields) < 1:
        raise ValueError(f"fields must be the numbers of values of at least one field, got {tuple(fields)}")
    return fields


def check_ids(ids: Tensor, fields: Sequence[int]) -> None:
    """
    Raises:
        ValueError: if they are no int64 (B, F) or (B, F, K) of these fields.
    """
    if ids.dtype != torch.int64 or ids.ndim not in (2, 3) or ids.shape[1] != len(fields):
        raise ValueError(
            f"ids must be int64 (batch, {len(fields)}) or (batch, {len(fields)}, values), got {tuple(ids.shape)} "
            f"{ids.dtype}"
        )


def rows_of(ids: Tensor, fields: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows in a table of all fields, missing values being row 0; and whether there is a value, of the same shape.

    Args:
        ids: (B, F) or (B, F, K), from 0 in each field, -1 is missing.
        fields: how many values each has.

    Raises:
        ValueError: if `ids` are no such numbers. Whether each is below its field's size is not looked at.

    >>> rows_of(torch.tensor([[1, -1], [0, 2]]), (2, 3))[0].tolist()
    [[1, 0], [0, 4]]
    """
    check_ids(ids, fields)
    start_F = numbers((0, *accumulate(fields[:-1])), ids)
    there = ids != MISSING
    return torch.where(there, ids + (start_F[:, None] if ids.ndim == 3 else start_F), 0), there


def pooled(vectors: Tensor, there: Tensor) -> Tensor:
    """(B, F, D): vectors of missing values are zeros, of several values of a field there is the mean.

    Args:
        vectors: (B, F, D) or (B, F, K, D).
        there: the same without D.
    """
    vectors = vectors * there[..., None]
    if there.ndim == 2:
        return vectors
    return vectors.sum(2) / there.sum(2, keepdim=True).clamp(min=1)


class FirstOrder(nn.Module):
    """sum_i w[x_i] + b, (B,); `scale_BF` weighs the fields.

    Args:
        fields: how many values each has.
    """

    def __init__(self, fields: Sequence[int]) -> None:
        super().__init__()
        self.table = FieldTable(fields, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor, scale_BF: Tensor | None = None) -> Tensor:
        weight_BF = self.table(ids)[..., 0]
        return (weight_BF if scale_BF is None else weight_BF * scale_BF).sum(1) + self.bias


def deep(inputs: int, hidden: Sequence[int], *, norm: str = "none", drop: float = 0.0) -> nn.Sequential:
    """An MLP to one number: linear, a norm where wanted, ReLU and dropout for each width, and a linear layer.

    Args:
        inputs: width of what comes in.
        hidden: widths.
        norm: behind the linear layers, of `NORMS`.
        drop: of dropout.

    Raises:
        ValueError: if a width is not positive, or the norm is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if min((inputs, *hidden)) < 1:
        raise ValueError(f"widths must be positive, got {inputs} and {tuple(hidden)}")
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), *NORMS[norm](width), nn.ReLU(), nn.Dropout(drop)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


def fm(e_BFD: Tensor) -> Tensor:
    """sum_{i<j} e_i . e_j, (B,), in linear time.

    Args:
        e_BFD: of the fields.
    """
    return 0.5 * (e_BFD.sum(1).square() - e_BFD.square().sum(1)).sum(1)


def pairs_of(fields: int) -> list[tuple[int, int]]:
    """(i, j) for i < j, row by row."""
    return [(i, j) for i in range(fields) for j in range(i + 1, fields)]


def inner_products(e_BFD: Tensor, with_BFD: Tensor | None = None) -> Tensor:
    """e_i . e_j for i < j, (B, P), row by row.

    Args:
        e_BFD: of the fields.
        with_BFD: whose e_j are meant; the same where None.
    """
    first, second = torch.triu_indices(e_BFD.shape[1], e_BFD.shape[1], 1, device=e_BFD.device)
    return (e_BFD[:, first] * (e_BFD if with_BFD is None else with_BFD)[:, second]).sum(-1)


class CrossNetwork(nn.Module):
    """x <- x_0 (w_l^T x) + b_l + x for each layer.

    Args:
        dim: width of x.
        depth: layers.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, dim))
        self.bias = nn.Parameter(torch.zeros(depth, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x_BD: Tensor) -> Tensor:
        start_BD = x_BD
        for weight_D, bias_D in zip(self.weight, self.bias):
            x_BD = start_BD * (x_BD @ weight_D)[:, None] + bias_D + x_BD
        return x_BD


class Interaction(nn.Module):
    """f: embeddings (B, F, D), and whatever else is known of a row (B, E), to a logit (B,).

    Args:
        fields: F.
        dim: D.
        form: of `INTERACTIONS`.
        hidden: widths of the MLP.
        extra: E, further inputs of the MLP.
        norm, drop: of the MLP.
        depth: layers of the cross network.

    Raises:
        ValueError: if the form is unknown, a size is not positive, or `fm` is given further inputs.
    """

    def __init__(
        self,
        fields: int,
        dim: int,
        form: str = "deepfm",
        *,
        hidden: Sequence[int] = (1024, 512, 256),
        extra: int = 0,
        norm: str = "none",
        drop: float = 0.0,
        depth: int = 3,
    ) -> None:
        super().__init__()
        if form not in INTERACTIONS:
            raise ValueError(f"interaction must be one of {', '.join(INTERACTIONS)}, got {form!r}")
        if form == "fm" and extra:
            raise ValueError(
                "interaction 'fm' reads embeddings of one width only: give 'deepfm', 'fnn', 'ipnn' or 'dcn'"
            )
        self.form = form
        inputs = fields * dim + extra + (fields * (fields - 1) // 2 if form == "ipnn" else 0)
        self.mlp = None if form == "fm" else deep(inputs, hidden, norm=norm, drop=drop)
        self.cross = CrossNetwork(inputs, depth) if form == "dcn" else None
        self.read = nn.Linear(inputs, 1, bias=False) if form == "dcn" else None

    def forward(self, e_BFD: Tensor, extra_BE: Tensor | None = None) -> Tensor:
        return INTERACTIONS[self.form](self, e_BFD, e_BFD.flatten(1) if extra_BE is None else _beside(e_BFD, extra_BE))


def _beside(e_BFD: Tensor, extra_BE: Tensor) -> Tensor:
    return torch.cat([e_BFD.flatten(1), extra_BE], 1)


def _deep(net: Interaction, x_BE: Tensor) -> Tensor:
    assert net.mlp is not None
    return net.mlp(x_BE)[:, 0]


def _dcn(net: Interaction, e_BFD: Tensor, x_BE: Tensor) -> Tensor:
    assert net.cross is not None and net.read is not None
    return _deep(net, x_BE) + net.read(net.cross(x_BE))[:, 0]


INTERACTIONS: Mapping[str, Callable[[Interaction, Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "fm": lambda net, e_BFD, x_BE: fm(e_BFD),
        "fnn": lambda net, e_BFD, x_BE: _deep(net, x_BE),
        "deepfm": lambda net, e_BFD, x_BE: fm(e_BFD) + _deep(net, x_BE),
        "ipnn": lambda net, e_BFD, x_BE: _deep(net, torch.cat([x_BE, inner_products(e_BFD)], 1)),
        "dcn": _dcn,
    }
)


class ClickNetwork(nn.Module):
    """Base of the networks of clicks: what the task `click` calls and counts. A subclass gives `forward`."""

    def forward(self, ids: Tensor, numbers: Tensor | None = None) -> ClickOutput:
        """
        Args:
            ids: int64 (B, F), the value of each field from 0; -1 is missing. (B, F, K) where fields have several.
            numbers: (B, M), where the network takes numeric fields.

        Raises:
            ValueError: if they are not of the network's fields.
        """
        raise NotImplementedError

    def stored(self) -> int:
        """How many numbers its embeddings are, those alone that have to be kept once it is trained."""
        raise NotImplementedError
