"""The effective attention of the catalogue's parts in a network, as records that the maps of `explain.maps` take.

    with effective(model, {"layer 0": model.blocks[0].attention, ...}) as records:
        model(tokens)[:, -1].amax(1).sum().backward()
    rollout(records, rows=[-1]);  gradient_attention(records, rows=[-1])

    A = attention_map(part, x),     dL/dA = dL/dout v^T where the part is a function of queries, keys and values

So linear, recurrent, windowed and sparse mechanisms have the maps that dense attention has.

Shape letters: B batch, N queries, M keys, H heads, K key heads, E value dim; h heads and n queries that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.explain import maps
from saccade.explain.recording import Chosen
from saccade.layers.qkv_attention import QKVAttention
from saccade.layers.wrapping import Report, changing
from saccade.ops.heads import repeat_heads
from saccade.ops.maps import attention_map

__all__ = ["MixRecord", "effective", "part_maps"]

#: how far A v may be from what the part summed, relative to its size, for its gradient to be that of A
_TOLERANCE = 1e-3


@dataclass
class MixRecord:
    """One call of a part: its effective attention, made when it is asked for.

    Attributes:
        name: path of the part; its type's name where it is the whole.
        number: of the part.
        module: the part.
        args, kwargs: what it was called with.
        shape: B, H, N, M of its weights.
        v_BKME: the values that it sums, where it tells.
        out_BHNE: their sums, likewise; its `grad` is there after a backward pass.
    """

    name: str
    number: int
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, int, int, int]
    v_BKME: Tensor | None = None
    out_BHNE: Tensor | None = None

    def weights(self, *, heads: Chosen = None, rows: Chosen = None) -> Tensor:
        """A (B, heads, rows, M), in float32; of a linear mechanism of either sign.

        Args:
            heads, rows: numbers of those that are wanted; all where None.

        Raises:
            ValueError: if the part is not linear in its values, shows no weights, or there is none of that number.
        """
        return attention_map(self.module, *self.args, heads=heads, rows=rows, **self.kwargs).float()

    def gradients(self, *, heads: Chosen = None, rows: Chosen = None) -> Tensor:
        """dL/dA (B, heads, rows, M), of the scalar whose `backward` was called.

        Args:
            heads, rows: as of `weights`.

        Raises:
            RuntimeError: if nothing was called backward through the part.
            ValueError: if it does not tell the values that it sums, or sums more than these.
        """
        kind = type(self.module).__name__
        if self.v_BKME is None or self.out_BHNE is None:
            raise ValueError(f"{kind} does not tell the values that it sums, so its weights have no gradient")
        if self.out_BHNE.grad is None:
            raise RuntimeError(f"{self.name} has no gradient: call backward() on what the model said")
        head_h, row_n = (
            torch.arange(count) if wanted is None else torch.arange(count)[torch.as_tensor(wanted)]
            for wanted, count in zip((heads, rows), self.shape[1:3], strict=True)
        )
        v_BhME = repeat_heads(self.v_BKME, self.shape[1]).detach().float()[:, head_h]
        sums, grad_BhnE = (x[:, head_h][:, :, row_n].float() for x in (self.out_BHNE.detach(), self.out_BHNE.grad))
        if v_BhME.shape[2] != self.shape[3] or not _close(self.weights(heads=head_h, rows=row_n) @ v_BhME, sums):
            raise ValueError(f"{kind} sums more than its values, so its weights' gradient is not known")
        return grad_BhnE @ v_BhME.mT


@contextmanager
def effective(model: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[list[MixRecord]]:
    """Records of each call of the parts, in the order of the calls, as long as the `with` lasts; the parts are as they
    were afterwards.

    Args:
        model: with the parts in it, in evaluation.
        parts: by name: mechanisms of sequences, or feature-map attention whose positions attend to one another.
    """
    records: list[MixRecord] = []
    told: dict[int, dict[str, Tensor]] = {}

    def called(name: str, number: int, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        # what is looked at later must not hold the graph
        (x, *more), given = _detached(args), _detached(kwargs)
        given = {key: value for key, value in given.items() if value is not None and key != "cache"}
        if more:
            given["context"] = more[0]
        keys = tokens_of(given.get("context", x))
        shape = len(x), getattr(module, "num_heads", 1), tokens_of(x), keys
        records.append(MixRecord(name, number, module, (x,), given, shape, **told.pop(id(module), {})))

    with changing(model, Report("looked at")) as changes:
        for number, (name, part) in enumerate(parts.items()):
            changes.after(part, partial(called, name, number))
            if isinstance(part, QKVAttention):
                changes.put(part, "project", partial(_values, part.project, told, part))
                changes.put(part, "out", partial(_sums, part.out, told, part))
        yield records


def part_maps(records: Sequence[MixRecord], row: int = -1) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The maps of `explain.maps` that records of several examples give, after a backward pass, and why others are not
    there.

    Args:
        records: of one model's layers, in order.
        row: the token that the output is read from.

    Returns:
        relevance (B, M) by the names of `saccade.explain`'s methods; name -> reason. Flow is left out of more than two
        layers, where it takes minutes.
    """
    makers: dict[str, Callable[[], Tensor]] = {
        "raw": lambda: maps.raw(records, rows=[row])[:, 0].abs(),
        "rollout": lambda: maps.rollout(records, rows=[row])[:, 0],
        "flow": lambda: maps.flow(records, row),
        "gradient x attention": lambda: maps.gradient_attention(records, rows=[row])[:, 0],
    }
    if len(records) > 2:
        del makers["flow"]
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ValueError, TypeError, NotImplementedError) as error:
            missing[name] = " ".join(str(error).split())
    return found, missing


def tokens_of(x: Tensor) -> int:
    """Tokens or positions."""
    return x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3]


def _values(
    project: Callable[..., Any], told: dict[int, dict[str, Tensor]], part: nn.Module, *args: Any, **kw: Any
) -> Any:
    projected = project(*args, **kw)
    if torch.is_grad_enabled():  # not where the weights are asked for, which goes through here too
        told[id(part)] = {"v_BKME": projected[2]}
    return projected


def _sums(out: Callable[..., Tensor], told: dict[int, dict[str, Tensor]], part: nn.Module, out_BHNE: Tensor) -> Tensor:
    if out_BHNE.requires_grad and id(part) in told:
        out_BHNE.retain_grad()
        told[id(part)]["out_BHNE"] = out_BHNE
    return out(out_BHNE)


def _close(found: Tensor, sums: Tensor) -> bool:
    return bool((found - sums).abs().max() <= _TOLERANCE * sums.abs().max())


def _detached(given: Any) -> Any:
    """Tensors of a call, without their graph."""
    if isinstance(given, dict):
        return {key: _detached(value) for key, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_detached(value) for value in given)
    return given.detach() if isinstance(given, Tensor) else given
