"""The kinds of parts: what is the same for all parts of one kind, so that whoever handles parts asks and never guesses.

| kind | call | output |
|---|---|---|
| sequence | `module(x_BNC, context_BMC=None, *, mask=None, cache=None)` | `y_BNC` |
| gate | `module(x_BCHW)` | `y_BCHW` |
| fusion | `module(a, b, ..., *, masks=None)` | a tensor, or named tensors |
| model | `model(**inputs)` | a dataclass of named tensors |
| compressor | a transformers `Cache`, or `module(tokens, ...)` | what it kept |
| wrapper | `with wrapper(model, ...):` | the model's own |
| objective | `loss = objective(...)` | a scalar and its named terms |
| analysis | `function(model or recorded attention, inputs)` | a dataclass |

Which tasks take a kind, the tasks say: `saccade.train.tasks.taking(part)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from saccade.catalogue.cards import Part, Published, Summary


class Trial(NamedTuple):
    """What a part's cost is measured on: its constructor's arguments, its call's, and their size in words.

    Attributes:
        size: in words.
        arguments: of the constructor.
        inputs: module -> positional arguments of the call.
    """

    size: str
    arguments: Mapping[str, Any]
    inputs: Callable[[nn.Module], tuple[Any, ...]]


class Kind(str):
    """One kind of part. It is its own name too: `part.kind == "gate"`, and JSON holds the name.

    Attributes:
        words: with an article, as messages say it.
        call, output: how its parts are called and what they return, as the table above.
        usual: constructor arguments of a usual size, for those that must be given.
        baseline: the part beside which the speed is measured and that opens a comparison; None where there is none.
        insertable: whether a part may stand behind any module that gives a feature map.
        published: whether papers print sizes of such parts, in parameters and operations.
        commands: what one does with a part on the command line; `{slug}` stands for it.
    """

    words: ClassVar[str]
    call: ClassVar[str]
    output: ClassVar[str]
    usual: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    baseline: ClassVar[str | None] = None
    insertable: ClassVar[bool] = False
    published: ClassVar[bool] = False
    commands: ClassVar[tuple[str, ...]] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (str(self),)

    def __str__(self) -> str:
        return str.__str__(self)

    def inputs(self, part: Part, module: nn.Module, size: int) -> tuple[Any, ...]:
        """A tiny call's positional arguments, drawn by torch's generator: the part's own, or the usual ones.

        Args:
            module: an instance; its `example` is meant.
            size: tokens, or the side of a map or an image.

        Raises:
            ValueError: if the part gives none and the kind has no usual ones.
        """
        return self.usual_inputs(part, size) if part.inputs is None else part.inputs(module, size)

    def usual_inputs(self, part: Part, size: int) -> tuple[Any, ...]:
        """`inputs` of a part that gives none of its own."""
        raise ValueError(f"{part.slug!r} is {self.words}: its registration must say inputs=")

    def run(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """The output of the call that the table gives."""
        return module(*inputs)

    def complaint(self, inputs: tuple[Any, ...], output: Any) -> str:
        """What is wrong with a call's output; "" where it is what the kind promises."""
        return ""

    def directions(self, part: Summary) -> list[dict[str, Any]]:
        """Constructor arguments for each of the directions in which a part runs."""
        return [{}]

    def lacking(self, part: Summary) -> list[str]:
        """The fields that a registration of this kind must have and that are empty."""
        return [name for name in ("summary", "complexity", "invariants") if not getattr(part, name)]

    def sized(self, published: Published) -> dict[str, Tensor]:
        """The named inputs on which a published size is counted, without values; on torch's device of the moment."""
        import torch

        kinds = {name: torch.long if name in published.integers else None for name in published.inputs}
        return {name: torch.empty(shape, dtype=kinds[name]) for name, shape in published.inputs.items()}

    def trial(self, part: Part) -> Trial | None:
        """What cost is measured on, where it is not measured beside `baseline`: the example at size 64, where there are
        inputs."""
        if part.inputs is None and type(self).usual_inputs is Kind.usual_inputs:
            return None
        size = f"its example ({dict(part.example)}) at size 64"
        return Trial(size, part.example, lambda module: self.inputs(part, module, 64))


class Sequence(Kind):
    words = "a sequence mechanism"
    call = "module(x_BNC, context_BMC=None, *, mask=None, cache=None)"
    output = "y_BNC"
    usual = MappingProxyType({"dim": 256, "num_heads": 8})
    baseline = "softmax"

    def usual_inputs(self, part: Part, size: int) -> tuple[Any, ...]:
        import torch

        return (torch.randn(2, size, part.example["dim"]),)

    def complaint(self, inputs: tuple[Any, ...], output: Any) -> str:
        return _other_shape(inputs[0], output)

    def directions(self, part: Summary) -> list[dict[str, Any]]:
        forward = [{"causal": True}] if {"causal", "teacher-forced"} & set(part.supports) else []
        return forward + ([{"causal": False}] if "bidirectional" in part.supports else [])

    def lacking(self, part: Summary) -> list[str]:
        return super().lacking(part) + ([] if part.efficiency else ["efficiency"])


class Gate(Kind):
    words = "a feature-map gate"
    call = "module(x_BCHW)"
    output = "y_BCHW"
    usual = MappingProxyType({"channels": 64})
    insertable = True
    commands = ("saccade insert MODEL --gate {slug} --after '**.layer'",)

    def usual_inputs(self, part: Part, size: int) -> tuple[Any, ...]:
        import torch

        return (torch.randn(2, part.example["channels"], size, max(1, size - 2)),)

    def complaint(self, inputs: tuple[Any, ...], output: Any) -> str:
        return _other_shape(inputs[0], output)

    def trial(self, part: Part) -> Trial:
        import torch

        channels = self.usual["channels"]
        return Trial(f"{channels} x 56 x 56", self.usual, lambda module: (torch.randn(1, channels, 56, 56),))


class Fusion(Kind):
    words = "a fusion part"
    call = "module(a, b, ..., *, masks=None)"
    output = "a tensor, or named tensors"
    usual = MappingProxyType({"dim": 256, "num_heads": 8})

    def usual_inputs(self, part: Part, size: int) -> tuple[Any, ...]:
        import torch

        return tuple(torch.randn(2, tokens, part.example["dim"]) for tokens in (size, size + 2))


class Model(Kind):
    words = "a whole model"
    call = "model(**inputs)"
    output = "a dataclass of named tensors"
    published = True

    def usual_inputs(self, part: Part, size: int) -> tuple[Any, ...]:
        import torch

        return (torch.randn(2, 3, size, size + 2),)

    def complaint(self, inputs: tuple[Any, ...], output: Any) -> str:
        return _no_dataclass(self, output)


class Compressor(Kind):
    words = "a compressor"
    call = "a transformers Cache, or module(tokens, ...)"
    output = "what it kept"

    def usual_inputs(self, part: Part, size: int) -> tuple[Any, ...]:
        import torch

        return (torch.randn(2, size, part.example["dim"]),)


class Wrapper(Kind):
    words = "a wrapper of models"
    call = "with wrapper(model, ...):"
    output = "the model's own"

    def run(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """The output of the model, which is the first of the inputs, under the wrapper."""
        model, *given = inputs
        with module(model):
            return model(*given)

    def trial(self, part: Part) -> None:
        """None: what it costs depends on the model."""


class Objective(Kind):
    words = "an objective"
    call = "objective(...)"
    output = "a scalar and its named terms"

    def complaint(self, inputs: tuple[Any, ...], output: Any) -> str:
        loss, terms = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
        if getattr(loss, "shape", None) == () and isinstance(terms, Mapping):
            return ""
        return f"{self.words} returns a scalar and its named terms, got {type(output).__name__}"


class Analysis(Kind):
    words = "an analysis"
    call = "function(model or recorded attention, inputs)"
    output = "a dataclass"

    def complaint(self, inputs: tuple[Any, ...], output: Any) -> str:
        return _no_dataclass(self, output)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        str(kind): kind
        for kind in (
            Sequence("sequence"),
            Gate("gate"),
            Fusion("fusion"),
            Model("model"),
            Compressor("compressor"),
            Wrapper("wrapper"),
            Objective("objective"),
            Analysis("analysis"),
        )
    }
)


def named(name: str) -> Kind:
    """The kind of that name.

    Args:
        name: of `KINDS`.

    Raises:
        ValueError: if there is none.
    """
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def _other_shape(x: Any, output: Any) -> str:
    if getattr(output, "shape", None) == x.shape:
        return ""
    return f"the output must have the input's shape {tuple(x.shape)}, got {getattr(output, 'shape', type(output))}"


def _no_dataclass(kind: Kind, output: Any) -> str:
    return "" if dataclasses.is_dataclass(output) else f"{kind.words} returns a dataclass, got {type(output).__name__}"
