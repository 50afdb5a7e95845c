"""A transformers model as the affine map that it is at one input: Y = T X + b, all that depends on the input held.

    X      the tokens before the first block;  Y what is read of the model: hidden states, logits, a scalar
    A v                        attention as it is at X
    s C(x) gamma + beta        a norm with s = 1 / std as it is at X; C takes the mean away (RMSNorm: nothing)
    G u,  G = f(u) / u         an activation, f'(0) at 0;  in a gated layer f(u) as it is at X

In a call the first of the batch tells the factors, and the others go through the same map: so T v is a row of a call,
and w^T T one pass backward. T itself, (L, D, L, D), is never made. The model is as it was afterwards.

Shape letters: B batch, S vectors at once, L tokens, D width, V width of what is read, N queries, M keys, H heads,
K key heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.explain import recording
from saccade.layers.attention_interface import attended, attention_layers, register
from saccade.layers.watching import evaluating
from saccade.layers.wrapping import Changes, Report, changing, frozen

__all__ = ["GATED", "LinearModel", "TokenSum", "attribution", "blocks", "held", "held_slope", "stacked"]

#: the name by which transformers' interface knows the attention whose weights are held
IMPLEMENTATION = "saccade_linearised"
#: what is held in a product f(gate) * up: the gate, the up branch, or the mean of both maps
GATED = ("gate", "up", "half")
#: below it an activation's argument counts as 0
ZERO = 1e-6
#: the branch that a gated layer multiplies, and what only a gated layer has beside layers called a gate
_UP, _PRODUCTS = ("up_proj", "wi_1"), ("wi_1", "Wi")
#: activations that a model may call by themselves
_FUNCTIONS = (torch.tanh, torch.relu, F.gelu, F.silu, F.relu)


def held_slope(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """G = f(u) / u; where u is 0, f / u just below it: 0 of ReLU, 1/2 of GELU and SiLU.

    Args:
        function: f, element by element.
        u: anything.
    """
    u = torch.where(u.abs() < ZERO, -ZERO, u)
    return function(u) / u


def blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model with one stack of them: the outermost list each of whose modules holds attention.

    Raises:
        ValueError: if its attention layers do not stand in one such list.
    """
    places = [f"{name}." for name in attention_layers(model)]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(place.startswith(f"{name}.") for place in places):
            stems = (f"{name}.{number}." for number in range(len(module)))
            if all(any(place.startswith(stem) for place in places) for stem in stems):
                return module
    raise ValueError(f"the attention layers of {type(model).__name__} must stand in one list of blocks")


def stacked(model: nn.Module) -> bool:
    """Whether a model has one stack of blocks.

    Args:
        model: any network.
    """
    try:
        return bool(blocks(model))
    except ValueError:
        return False


@contextmanager
def held(model: nn.Module, batch: int = 1, *, gated: str = "gate") -> Iterator[None]:
    """Calls of the model are affine in the tokens before its blocks, with the factors of the first of the batch.

    Args:
        model: of transformers, in evaluation.
        batch: of the calls.
        gated: of `GATED`.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if `gated` is unknown, or the model has gated layers whose branches cannot be told apart.
    """
    if gated not in GATED:
        raise ValueError(f"gated must be one of {', '.join(GATED)}, got {gated!r}")
    register(IMPLEMENTATION, _attention, "a model as an affine map")
    with changing(model, Report("linearised")) as changes, attended(model, IMPLEMENTATION), _Functions(batch):
        for parent in model.modules():
            for child in parent.children():
                if _normalises(child):
                    changes.after(child, partial(_norm, batch))
                elif _activates(child):
                    _activation(changes, parent, child, batch, gated)
        frozen(model, changes)
        yield


class LinearModel:
    """T and b of a model at one input, as products.

    Args:
        model: of transformers, with one stack of blocks.
        inputs: of one example, by the names of the model's arguments.
        read: the model's output -> Y (B, L, V); where None the final hidden states, of the model without its head.
        layers: the first block of the map, and the last one, from the end where negative; X is then what goes into the
            first and Y, where not all blocks are in it, what comes out of the last.
        gated: of `GATED`.

    Attributes:
        x_BLD: X, B = 1.
        y_BLV: Y, as the model itself says it.
        offset_BLV: b.
        whole: whether the last block is in the map, and with it what stands behind.

    Raises:
        ValueError: as of `blocks` and `held`, or if there are no such blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        read: Callable[[Any], Tensor] | None = None,
        layers: tuple[int, int] = (0, -1),
        gated: str = "gate",
    ) -> None:
        count = len(blocks(model))
        first, last = (number + count * (number < 0) for number in layers)
        if not 0 <= first <= last < count:
            raise ValueError(f"layers must be two of {count} blocks, in order, got {layers}")
        if read is not None and last + 1 < count:
            raise ValueError(f"layers must end with the last where something is read of the model, got {layers}")
        self.model, self.inputs, self.gated, self.first = model, dict(inputs), gated, first
        self.whole = last + 1 == count
        self.last = None if self.whole else last
        if read is None:
            self.model = getattr(model, "base_model", model)
        self.read = read or (lambda said: said.last_hidden_state)
        with torch.no_grad(), evaluating(self.model):
            self.x_BLD, self.y_BLV = self._call(None)
        self._graph: tuple[Tensor, Tensor] | None = None
        with torch.no_grad():
            self.offset_BLV = self._rows(torch.zeros_like(self.x_BLD))

    def linear(self, v_SBLD: Tensor) -> Tensor:
        """T v (S, 1, L, V).

        Args:
            v_SBLD: in the place of the tokens.
        """
        with torch.no_grad():
            return self._rows(v_SBLD.flatten(0, 1)).unflatten(0, v_SBLD.shape[:2]) - self.offset_BLV

    def transposed(self, w_SBLV: Tensor) -> Tensor:
        """w^T T (S, 1, L, D).

        Args:
            w_SBLV: in the place of what is read.
        """
        if self._graph is None:
            leaf = self.x_BLD.clone().requires_grad_()
            with torch.enable_grad(), evaluating(self.model), held(self.model, gated=self.gated):
                self._graph = leaf, self._call(leaf)[1]
        leaf, y = self._graph
        return torch.stack([torch.autograd.grad(y, leaf, w, retain_graph=True)[0] for w in w_SBLV])

    def _rows(self, x_SLD: Tensor) -> Tensor:
        """T x + b of any tokens."""
        with evaluating(self.model), held(self.model, 1 + len(x_SLD), gated=self.gated):
            return self._call(torch.cat([self.x_BLD, x_SLD]))[1][1:]

    def _call(self, x_SLD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens before the blocks and what is read, with others in their place where they are given."""
        said, x, out = _called(self.model, self.inputs, x_SLD, first=self.first, last=self.last)
        return x, self.read(said) if out is None else out


@dataclass(frozen=True)
class TokenSum:
    """A scalar that a model says, as a sum over tokens.

    Attributes:
        relevance_L: what each token adds: (grad y) . x_j, factors held.
        offset: what is added by no token: b.
        value: the scalar, as the model itself says it.
    """

    relevance_L: Tensor
    offset: float
    value: float

    @property
    def error(self) -> float:
        """|sum of all - value|: of the size of rounding, or the model has something that is not known here."""
        return abs(self.total - self.value)

    @property
    def total(self) -> float:
        """What all tokens and none add."""
        return float(self.relevance_L.double().sum()) + self.offset

    def __str__(self) -> str:
        return (
            f"tokens add {self.total - self.offset:.4f} and no token {self.offset:.4f}, together {self.total:.4f}; "
            f"the model says {self.value:.4f}, {self.error:.1e} away"
        )


def attribution(
    model: nn.Module, inputs: Mapping[str, Any], scalar: Callable[[Any], Tensor], *, gated: str = "gate"
) -> TokenSum:
    """What each token before the blocks adds to a scalar, such as a logit.

    Args:
        model: of transformers, with one stack of blocks.
        inputs: of one example, by the names of the model's arguments.
        scalar: of the model's output, linear in it.
        gated: of `GATED`.

    Raises:
        ValueError: as of `blocks` and `held`.
    """
    blocks(model)
    with evaluating(model):
        with torch.no_grad():
            said, x, _ = _called(model, inputs, None)
            value = float(scalar(said))
        with torch.enable_grad(), held(model, 2, gated=gated):
            leaf = x.clone().requires_grad_()
            said, _, _ = _called(model, inputs, torch.cat([leaf, torch.zeros_like(x)]))
            (gradient,) = torch.autograd.grad(scalar(_row(said, 0)), leaf)
            offset = float(scalar(_row(said, 1)).detach())
    return TokenSum((gradient * x).sum(-1)[0], offset, value)


def _called(
    model: nn.Module, inputs: Mapping[str, Any], x_SLD: Tensor | None, *, first: int = 0, last: int | None = None
) -> tuple[Any, Tensor, Tensor | None]:
    """What the model says, what goes into a block, and what comes out of another; other tokens may take X's place."""
    stack, seen, out = blocks(model), list[Tensor](), list[Tensor]()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if seen:  # blocks that share their weights are one module
            return None
        given = args[0] if args else kwargs["hidden_states"]
        seen.append(given if x_SLD is None else x_SLD)
        return ((seen[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": seen[0]})

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        out.append(output if isinstance(output, Tensor) else output[0])

    count = 1 if x_SLD is None else len(x_SLD)
    wide = {
        name: value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    with changing(model, Report("linearised")) as changes:
        changes.before(stack[first], before)
        if last is not None:
            changes.after(stack[last], after)
        said = model(**wide)
    return said, seen[0], out[-1] if out else None


def _row(said: Any, row: int) -> SimpleNamespace:
    """An output of a batch as that of one of it."""
    return SimpleNamespace(**{n: v[row : row + 1] for n, v in said.items() if isinstance(v, Tensor)})


def _normalises(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or named


def _activates(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__ in ("torch.nn.modules.activation", "transformers.activations") and not any(module.children())


def _first(x: Tensor, batch: int) -> Tensor:
    """Of the first of the batch; models may have laid tokens and batch on one axis."""
    return x[: len(x) // batch].detach()


def _times(x: Tensor, factor: Tensor, batch: int) -> Tensor:
    """All of the batch by the first's factor."""
    return (x.unflatten(0, (batch, -1)) * factor).flatten(0, 1)


def _norm(batch: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """s C(x) gamma + beta, with s of the first."""
    x = (args[0] if args else kwargs["hidden_states"]).to(torch.promote_types(output.dtype, torch.float32))
    eps = next((getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)), None)
    eps = torch.finfo(output.dtype).eps if eps is None else eps
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        gain, bias = module.weight, module.bias
    else:  # what it makes of ones, for some have 1 + weight
        gain, bias = type(module).forward(module, x.new_ones(x.shape[-1])) * (1 + eps) ** 0.5, None
    y = _times(x, (_first(x, batch).square().mean(-1, keepdim=True) + eps).rsqrt(), batch)
    y = y if gain is None else y * gain.to(x.dtype)
    return (y if bias is None else y + bias).to(output.dtype)


def _activation(changes: Changes[Report], parent: nn.Module, module: nn.Module, batch: int, gated: str) -> None:
    """G u; in a gated layer what `gated` says."""
    names = dict(parent.named_children())
    multiplied = [names[name] for name in _UP if name in names]
    still, sloped = partial(_held, batch), partial(_sloped, batch)
    if not any("gate" in name or name in _PRODUCTS for name in names):
        changes.after(module, sloped)
        return
    if gated == "gate":
        changes.after(module, still)
        return
    if not multiplied:
        raise ValueError(f"gated must be 'gate': {type(parent).__name__} has both branches in one layer, got {gated!r}")
    branch = ["up"]
    changes.after(module, lambda *call: sloped(*call) if branch[0] == "up" else still(*call))
    changes.after(multiplied[0], lambda *call: still(*call) if branch[0] == "up" else None)
    if gated == "half":
        own = parent.forward

        def both(*args: Any, **kwargs: Any) -> Tensor:
            branch[0] = "up"
            first = own(*args, **kwargs)
            branch[0] = "gate"
            return (first + own(*args, **kwargs)) / 2

        changes.put(parent, "forward", both)


def _held(batch: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return _first(output, batch).repeat(batch, *[1] * (output.ndim - 1))


def _sloped(batch: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    (u,) = args
    with torch._C.DisableTorchFunction():  # the function that it calls is its own
        slope = held_slope(lambda u: type(module).forward(module, u), _first(u, batch))
    return _times(u, slope, batch)


class _Functions(TorchFunctionMode):
    """Activations that a model calls as functions."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            u, *others = args
            slope = held_slope(lambda u: func(u, *others, **kwargs), _first(u, self.batch))
            return _times(u, slope, self.batch)
        return func(*args, **kwargs)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The recording's attention, with the weights of the first; passes backward reach the values alone."""
    q_BHNE, k_BKME = (each[:1].detach().expand(len(value), *each.shape[1:]) for each in (query, key))
    return recording._attention(module, q_BHNE, k_BKME, value, *args, **kwargs)
