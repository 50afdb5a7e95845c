"""A gate behind each of the chosen modules, applied by a hook.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.integrations.insert.dry_run import DryRun, dry_run, measure
from saccade.integrations.insert.maps import map_of, with_map
from saccade.integrations.insert.places import free_name, targets_of
from saccade.integrations.insert.report import Inserted, Place
from saccade.layers.watching import evaluating


class Gentle(nn.Module):
    """y = x + g (gate(x) - x) with one learnable g that starts at zero: at the start the gate does nothing.

    In no paper: it lets a gate whose own initialisation changes the map (CBAM starts at x / 4) grow into a pretrained
    network. g = 1 is the paper's gate.

    Args:
        gate: of a feature map, which keeps its shape.
    """

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.amount = nn.Parameter(torch.zeros(()))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.lerp(x_BCHW, self.gate(x_BCHW), self.amount.to(x_BCHW.dtype))


def insert(
    model: nn.Module,
    slug: str,
    *,
    after: str | type[nn.Module] | Sequence[str | type[nn.Module]],
    channels: int | Mapping[str, int] | None = None,
    example: Any = None,
    gentle: bool = False,
    **arguments: Any,
) -> Inserted:
    """Put a gate after modules of a network, in place.

    Args:
        model: any module; transformers' models need no `example`, nor do others that start with a convolution.
        slug: a part of kind "gate".
        after: which modules' outputs are gated: a module path ("layer1.0"), a pattern of one (`*` within a name, `**`
            across dots; where nothing matches, `*` too crosses them), the name of a type ("ResNetBasicLayer"), a type,
            or several of these. An output is a tensor (B, C, H, W), or a tuple, list, dict or dataclass whose first
            tensor is one.
        channels: C of the maps, one for all or by path; found by a dry run where None.
        example: input of the dry run: a tensor, a tuple of positional arguments or a dict of named ones; noise of the
            config's image size (224 where it has none) by default.
        gentle: put the gate behind a learnable amount that starts at zero (`Gentle`; in no paper), unless it starts as
            the identity of its own.
        **arguments: the gate's. Where it takes `identity_init`, that is True by default: the network starts with what
            it does now.

    Returns:
        the report: places, added parameters and FLOPs, how much each gate changes its map at the start.

    Raises:
        ValueError: if the part is no gate, no module matches (the nearest names are in the message), a module's output
            is no map or it is not called, or the dry run fails. The network is then as it was.

    >>> import saccade
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
    >>> report = saccade.insert(model, "cbam", after="Conv2d", reduction=4)
    >>> [(place.path, place.channels) for place in report.places]
    [('0', 8), ('2', 16)]
    """
    part = catalogue.part(slug)
    if not part.kind.insertable or part.build is None:
        gates = ", ".join(gate.slug for gate in catalogue.parts() if gate.kind.insertable)
        raise ValueError(f"insert needs a gate ({gates}), but {slug!r} is {part.kind.words}")
    if "identity_init" in inspect.signature(part.build).parameters:
        arguments.setdefault("identity_init", True)
    wanted = list(after) if isinstance(after, Sequence) and not isinstance(after, str) else [after]
    if not all(isinstance(each, (str, type)) for each in wanted):
        raise ValueError(f"after must be a module path, a pattern, a type or several of these, got {after!r}")
    targets = targets_of(model, wanted)
    before = sum(p.numel() for p in model.parameters())
    if channels is None:
        run = dry_run(model, targets, example)
    else:
        run = DryRun([], None, dict.fromkeys((target.path for target in targets), None))
    built = []
    for target in targets:
        map_BCHW = run.maps[target.path]
        count = _channels(target.path, map_BCHW, channels)
        try:
            gate: nn.Module = catalogue.create(slug, **{"channels": count, **arguments})
        except ValueError as error:
            raise ValueError(f"after {target.path!r}: {error}") from error
        if gentle and not _is_identity(gate, count):
            gate = Gentle(gate)
        like = (
            map_BCHW if map_BCHW is not None else next(iter((*target.module.parameters(), *model.parameters())), None)
        )
        if like is not None:
            gate.to(device=like.device, dtype=like.dtype)
        flops, change = (None, None) if map_BCHW is None else measure(gate, map_BCHW)
        name = free_name(target.module)
        place = Place(
            path=target.path,
            gate=f"{target.inside}.{name}" if target.inside else name,
            channels=count,
            size=None if map_BCHW is None else (map_BCHW.shape[2], map_BCHW.shape[3]),
            parameters=sum(p.numel() for p in gate.parameters()),
            flops=flops,
            change=change,
        )
        built.append((target.module, name, gate, place))
    report = Inserted(slug, dict(arguments), gentle, [row[-1] for row in built], before, run.flops, run.inputs)
    for module, name, gate, _ in built:
        module.add_module(name, gate.train(module.training))
        report._undo.append((module, name, module.register_forward_hook(_Apply(name))))
    return report


class _Apply:
    """The forward hook: gates the output of the module that it hangs on, with its child of that name.

    By name, so that a copied or unpickled network uses its own gate.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return with_map(output, getattr(module, self.name)(map_of(output)))


def _channels(path: str, map_BCHW: Tensor | None, channels: int | Mapping[str, int] | None) -> int:
    if map_BCHW is not None:
        return map_BCHW.shape[1]
    assert channels is not None
    count = channels if isinstance(channels, int) else channels.get(path, 0)
    if count < 1:
        raise ValueError(f"channels must be a positive number for {path!r}, got {channels!r}")
    return count


@torch.no_grad()
def _is_identity(gate: nn.Module, channels: int) -> bool:
    """Whether the gate leaves a map as it is. A second zero in front of such a gate's own would stop all gradients."""
    like = next(gate.parameters(), torch.empty(()))
    noise = torch.randn(1, channels, 7, 7, generator=torch.Generator().manual_seed(0)).to(like.device)
    with evaluating(gate):
        return bool((gate(noise) - noise).abs().max() <= 1e-5)
