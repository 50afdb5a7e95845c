"""What a wrapper puts on somebody else's model while it runs, and takes off again: hooks, and other attributes.

    @contextmanager
    def louder(model, factor):
        with changing(model, Report("louder")) as changes:
            changes.after(model, lambda module, args, kwargs, output: factor * output)
            yield changes.report

Afterwards, also after an exception, the model is as it was: `footprint(model)` before and after are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from saccade.tables import table


@dataclass
class Report:
    """What a wrapper changed; wrappers add what they alone know, and give it in `figures`.

    Attributes:
        wrapper: its name.
        places: what of the model was changed, and how: "before lm_head", "after layers.0", "in place of generate".
        calls: of the model, of which the wrapper changed the outcome.
    """

    wrapper: str
    places: list[str] = field(default_factory=list)
    calls: int = 0

    def figures(self) -> dict[str, str]:
        """What happened, in words: what it is -> how much."""
        return {"calls": str(self.calls), "places": ", ".join(self.places) or "none"}

    def table(self) -> str:
        """A line a figure."""
        return table((self.wrapper, ""), list(self.figures().items()))

    def __str__(self) -> str:
        return self.table()


R = TypeVar("R", bound=Report)


class Changes(Generic[R]):
    """What `changing` yields: each change is entered in the report, and undone at the end, the last one first.

    Args:
        model: whose modules are named in the report.
        report: of the wrapper.
    """

    def __init__(self, model: nn.Module, report: R) -> None:
        self.report = report
        self._names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
        self._undo = ExitStack()

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(module, args, kwargs)` before each call; it returns None, or the (args, kwargs) to call with.

        Args:
            module: of the model.
            hook: as of `register_forward_pre_hook(..., with_kwargs=True)`.
        """
        self._enter("before", module)
        self._undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(module, args, kwargs, output)` after each call; it returns None, or the output to give.

        Args:
            module: of the model.
            hook: as of `register_forward_hook(..., with_kwargs=True)`.
        """
        self._enter("after", module)
        self._undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def put(self, owner: Any, name: str, value: Any) -> Any:
        """Another attribute in the place of one, which is returned: a method, or a setting of a config.

        Args:
            owner: a module or any other object.
            name: of its attribute.
            value: what it shall be.

        Raises:
            AttributeError: if there is none of that name.
        """
        former = getattr(owner, name)
        theirs = name in vars(owner) or not _method_like(type(owner), name)
        self._enter("in place of", owner, name)
        setattr(owner, name, value)
        self._undo.callback(*((setattr, owner, name, former) if theirs else (delattr, owner, name)))
        return former

    def finally_(self, function: Callable[..., Any], *args: Any) -> None:
        """Anything else that is to be done at the end.

        Args:
            function: called with `args`.
            *args: of it.
        """
        self._undo.callback(function, *args)

    def undo(self) -> None:
        """Take everything off."""
        self._undo.close()

    def _enter(self, how: str, owner: Any, name: str = "") -> None:
        place = self._names.get(id(owner), type(owner).__name__)
        words = f"{how} {place}{'.' * bool(name)}{name}"
        if words not in self.report.places:
            self.report.places.append(words)


def _method_like(kind: type, name: str) -> bool:
    """Whether an instance's attribute of that name hides one of the class: then it is taken away, not put back."""
    found = getattr(kind, name, None)
    return found is not None and not hasattr(found, "__set__")


@contextmanager
def changing(model: nn.Module, report: R) -> Iterator[Changes[R]]:
    """Changes to a model that last as long as the `with`.

    Args:
        model: anybody's network.
        report: of the wrapper.

    Raises:
        ValueError: if `model` is no module.

    >>> import torch
    >>> model = nn.Linear(2, 2)
    >>> with changing(model, Report("silent")) as changes:
    ...     changes.after(model, lambda module, args, kwargs, output: output.zero_())
    ...     model(torch.ones(1, 2)).tolist()
    [[0.0, 0.0]]
    >>> changes.report.places, len(model._forward_hooks)
    (['after Linear'], 0)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    changes = Changes(model, report)
    try:
        yield changes
    finally:
        changes.undo()


def frozen(model: nn.Module, changes: Changes[Any]) -> None:
    """No parameter wants gradients, as long as the changes last.

    Args:
        model: any network.
        changes: of it.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            changes.finally_(parameter.requires_grad_)
            parameter.requires_grad_(False)


def footprint(model: nn.Module) -> dict[str, Any]:
    """All that a wrapper might leave behind: equal before and after, if it left nothing.

    Of each module its attributes, hooks and mode; of each parameter and buffer where it lies, how often it was written
    and whether it wants gradients; and the settings of each config.

    Args:
        model: any network.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = sorted(map(id, value.values())) if isinstance(value, dict) else id(value)
            found[f"{name}:{key}"] = held
        found[f"{name}:training"] = module.training
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            found[f"{name}:settings"] = config.to_dict()
            found[f"{name}:attention"] = getattr(config, "_attn_implementation", None)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}:tensor"] = (tensor.data_ptr(), tensor._version, tensor.requires_grad)
    return found
