"""A feature-map gate into an existing network: `saccade.insert(model, "cbam", after="encoder.stages.*")`.

A gate becomes a child of the module whose output it gates, under the name `saccade_gate`, and a forward hook applies
it. So every parameter of the network keeps its name (its old checkpoints load, `strict=False` for the gates that they
lack), the code around the place still finds the module that it expects, and the whole, gates included, is in
`state_dict()`: to load such a state, insert the same gates into a fresh network first.

A plain `nn.Sequential` runs all its children, so a gate after one goes into its last module, whose output is the
sequence's.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saccade import catalogue
from saccade.extras import need
from saccade.ops.folder import write_text
from saccade.tables import table

__all__ = ["Gentle", "Inserted", "Place", "insert", "load", "save"]

_NAME = "saccade_gate"
_RECORD = "saccade_insert.json"


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


@dataclass(frozen=True)
class Place:
    """One gate in the network.

    Attributes:
        path: the module after which it stands.
        gate: where its parameters are in `state_dict()`.
        channels: C of the map.
        size: H and W of the map in the dry run; None where there was none.
        parameters: of the gate.
        flops: multiply-adds of its convolutions and matrix products on that map.
        change: |gated - map| / |map| on that map, as inserted; 0 keeps the network's behaviour exactly.
    """

    path: str
    gate: str
    channels: int
    size: tuple[int, int] | None
    parameters: int
    flops: int | None
    change: float | None


@dataclass
class Inserted:
    """What `insert` did; `print` it for a table, `remove()` undoes it.

    Attributes:
        slug, arguments: the gate.
        gentle: it stands behind a learnable amount that starts at zero, where it does not start as the identity.
        places: one entry per gate.
        parameters, flops: of the network without them (multiply-adds of the dry run; None without one).
        input: shapes of the dry run's inputs.
    """

    slug: str
    arguments: dict[str, Any]
    gentle: bool
    places: list[Place]
    parameters: int
    flops: int | None
    input: list[tuple[int, ...]]
    _undo: list[tuple[nn.Module, str, RemovableHandle]] = field(default_factory=list, repr=False)

    @property
    def added_parameters(self) -> int:
        return sum(place.parameters for place in self.places)

    @property
    def added_flops(self) -> int | None:
        """Multiply-adds; None without a dry run."""
        known = [place.flops for place in self.places if place.flops is not None]
        return sum(known) if len(known) == len(self.places) else None

    def remove(self) -> None:
        """Take the gates out again; the network is as it was. A second call does nothing."""
        for module, name, handle in self._undo:
            handle.remove()
            delattr(module, name)
        self._undo.clear()

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values."""
        rows = [dataclasses.asdict(place) for place in self.places]
        names = ("slug", "arguments", "gentle", "input", "parameters", "flops", "added_parameters", "added_flops")
        return {**{name: getattr(self, name) for name in names}, "places": rows}

    def table(self, gently: str = "gentle=True") -> str:
        """One line per gate, then the sums. `gently`: how the reader asks for a gentle start."""
        rows = []
        for place in self.places:
            size = "x".join(map(str, (place.channels, *(place.size or ("?", "?")))))
            work = "?" if place.flops is None else f"{place.flops:,}"
            change = "?" if place.change is None else f"{place.change:.1%}" if place.change else "none"
            rows.append((place.path, size, f"{place.parameters:,}", work, change))
        lines = [table(("after", "map", "parameters", "multiply-adds", "change at start"), rows)]
        added, flops = self.added_parameters, self.added_flops
        lines.append(
            f"{self.slug} x {len(self.places)}: {added:,} parameters "
            f"({added / max(1, self.parameters):+.2%} of {self.parameters:,})"
        )
        if flops is not None and self.flops is not None:
            lines[-1] += f", {flops:,} multiply-adds ({flops / max(1, self.flops):+.2%} of {self.flops:,}"
            lines[-1] += f" on an input of {' and '.join('x'.join(map(str, shape)) for shape in self.input)})"
        if any(place.change for place in self.places):
            lines.append(f"This gate changes the map from the start; {gently} begins with what the network does now.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


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
    targets = _targets(model, wanted)
    before = sum(p.numel() for p in model.parameters())
    if channels is None:
        run = _dry_run(model, targets, example)
    else:
        run = _DryRun([], None, dict.fromkeys((target.path for target in targets), None))
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
        flops, change = (None, None) if map_BCHW is None else _measure(gate, map_BCHW)
        name = _free_name(target.module)
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
        return _with_map(output, getattr(module, self.name)(_map_of(output)))


def _map_key(output: Any) -> Any:
    """Where the first tensor of an output stands: a field's name, an index, a key."""
    if isinstance(output, dict):
        pairs: Any = output.items()
    elif dataclasses.is_dataclass(output):
        pairs = ((entry.name, getattr(output, entry.name)) for entry in dataclasses.fields(output))
    elif isinstance(output, (tuple, list)):
        pairs = enumerate(output)
    else:
        pairs = ()
    return next((key for key, value in pairs if isinstance(value, Tensor)), None)


def _map_of(output: Any) -> Any:
    """The first tensor of an output; None if there is none."""
    if isinstance(output, Tensor):
        return output
    key = _map_key(output)
    if key is None:
        return None
    return output[key] if isinstance(output, (dict, tuple, list)) else getattr(output, key)


def _with_map(output: Any, map_BCHW: Tensor) -> Any:
    """The output with another first tensor."""
    if isinstance(output, Tensor):
        return map_BCHW
    key = _map_key(output)
    if isinstance(output, dict):  # transformers' outputs too, which keep their fields in step with their items
        changed = copy.copy(output)
        changed[key] = map_BCHW
        return changed
    if isinstance(output, (tuple, list)):
        items = [*output[:key], map_BCHW, *output[key + 1 :]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return dataclasses.replace(output, **{key: map_BCHW})


@dataclass(frozen=True)
class _Target:
    """A module after which a gate shall stand: `path` as it was asked for, `inside` the path of `module`, on which the
    gate will hang."""

    path: str
    inside: str
    module: nn.Module


def _targets(model: nn.Module, wanted: Sequence[str | type[nn.Module]]) -> list[_Target]:
    """The modules that are meant, in the network's order."""
    modules = {
        path: module
        for path, module in model.named_modules()
        if path and not any(name.startswith(_NAME) for name in path.split("."))
    }
    if not wanted:
        raise ValueError("after must name at least one module, got an empty list")
    chosen: set[str] = set()
    for want in wanted:
        chosen |= _matching(modules, want)
    targets: dict[int, _Target] = {}
    for path in modules:
        if path in chosen:
            inside, module = _last(path, modules[path])
            if inside != path and [id(m) for _, m in model.named_modules(remove_duplicate=False)].count(id(module)) > 1:
                raise ValueError(f"{inside!r}, the end of {path!r}, is used elsewhere too: name another place")
            targets.setdefault(id(module), _Target(path, inside, module))
    return list(targets.values())


def _matching(modules: Mapping[str, nn.Module], want: str | type[nn.Module]) -> set[str]:
    """The paths for which one entry of `after` stands."""
    # a bare list of modules is never called, so nothing comes out of it
    callable_ = {path: m for path, m in modules.items() if type(m) not in (nn.ModuleList, nn.ModuleDict)}
    if isinstance(want, type):
        found = {path for path, module in callable_.items() if isinstance(module, want)}
        if not found:
            there = sorted({type(module).__name__ for module in callable_.values()})
            raise ValueError(f"after: no module is a {want.__name__}; there are {', '.join(there)}")
        return found
    if want in callable_:
        return {want}
    types = {path: type(module).__name__ for path, module in callable_.items()}
    paths = {path: path for path in callable_}
    for star, names in (("[^.]*", paths), (".*", paths), (".*", types)):
        pattern = _pattern(want, star)
        found = {path for path, name in names.items() if pattern.fullmatch(name)}
        if found:
            return found
    near = catalogue.nearest(want, [*callable_, *sorted(set(types.values()))])
    hint = f"; the nearest names are {', '.join(map(repr, near))}" if near else f"; paths are like {min(modules)!r}"
    raise ValueError(f"after: no module has the path, pattern or type {want!r}{hint if modules else ''}")


def _pattern(text: str, star: str) -> re.Pattern[str]:
    pieces = {"**": ".*", "*": star, "?": "[^.]"}
    return re.compile("".join(pieces.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*|\*|\?)", text)))


def _last(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module itself, or where it is a plain sequence, its last member."""
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        if not len(module):
            raise ValueError(f"{path!r} is an empty sequence: name the module before it")
        name, module = list(module.named_children())[-1]
        path = f"{path}.{name}"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"{path!r} runs its children itself and cannot hold a gate: name a module inside it")
    return path, module


def _free_name(module: nn.Module) -> str:
    names = [_NAME, *(f"{_NAME}_{number}" for number in range(2, 100))]
    return next(name for name in names if not hasattr(module, name))


def _channels(path: str, map_BCHW: Tensor | None, channels: int | Mapping[str, int] | None) -> int:
    if map_BCHW is not None:
        return map_BCHW.shape[1]
    assert channels is not None
    count = channels if isinstance(channels, int) else channels.get(path, 0)
    if count < 1:
        raise ValueError(f"channels must be a positive number for {path!r}, got {channels!r}")
    return count


@dataclass(frozen=True)
class _DryRun:
    """Shapes of the inputs, multiply-adds, and what came out of each place."""

    inputs: list[tuple[int, ...]]
    flops: int | None
    maps: Mapping[str, Tensor | None]


def _dry_run(model: nn.Module, targets: Sequence[_Target], example: Any) -> _DryRun:
    """One forward pass in evaluation mode, without gradients, that looks at the output of each target."""
    from torch.utils.flop_counter import FlopCounterMode

    arguments, named = _inputs(model, example)
    seen: dict[str, list[Any]] = {target.path: [] for target in targets}

    def look(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            x = _map_of(output)
            seen[path].append(x.clone() if isinstance(x, Tensor) else x)  # networks add to their maps in place

        return hook

    handles = [target.module.register_forward_hook(look(target.path)) for target in targets]
    shapes = [tuple(x.shape) for x in (*arguments, *named.values()) if isinstance(x, Tensor)]
    try:
        with _evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*arguments, **named)
    except Exception as error:  # whatever the network raises on an input that is not for it
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the dry run on inputs {shapes} failed ({type(error).__name__}: {what}); give example= or channels="
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for path, maps in seen.items():
        if not maps:
            raise ValueError(f"{path!r} is not called by the network, so nothing can be gated there")
        for x in maps:
            if not isinstance(x, Tensor) or x.ndim != 4:
                got = tuple(x.shape) if isinstance(x, Tensor) else "no tensor"
                raise ValueError(f"a gate needs maps (batch, channels, height, width), but after {path!r} come {got}")
        if len({x.shape[1] for x in maps}) > 1:
            raise ValueError(f"{path!r} is called with several numbers of channels: {[x.shape[1] for x in maps]}")
    return _DryRun(shapes, counter.get_total_flops() // 2, {path: maps[0] for path, maps in seen.items()})


def _inputs(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named inputs of the dry run."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if example is not None:
        return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    config = getattr(model, "config", None)
    convolution = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.LazyConv2d))), None)
    count = getattr(config, "num_channels", None) or getattr(convolution, "in_channels", 0)
    if not count:
        raise ValueError(f"{type(model).__name__} does not say what it takes: give example= or channels=")
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    noise = torch.randn(1, count, height, width, generator=torch.Generator().manual_seed(0))
    return (noise.to(device=weight.device, dtype=weight.dtype),), {}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _is_identity(gate: nn.Module, channels: int) -> bool:
    """Whether the gate leaves a map as it is. A second zero in front of such a gate's own would stop all gradients."""
    like = next(gate.parameters(), torch.empty(()))
    noise = torch.randn(1, channels, 7, 7, generator=torch.Generator().manual_seed(0)).to(like.device)
    with _evaluating(gate):
        return bool((gate(noise) - noise).abs().max() <= 1e-5)


@torch.no_grad()
def _measure(gate: nn.Module, map_BCHW: Tensor) -> tuple[int, float | None]:
    """Multiply-adds of the gate on a map, and |gate(x) - x| / |x|; None for the latter on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with _evaluating(gate), FlopCounterMode(display=False) as counter:
        out_BCHW = gate(map_BCHW)
    flops = counter.get_total_flops() // 2
    if map_BCHW.is_meta:
        return flops, None
    scale = torch.linalg.vector_norm(map_BCHW.double())
    return flops, (torch.linalg.vector_norm((out_BCHW - map_BCHW).double()) / scale.clamp(min=1e-30)).item()


def save(model: nn.Module, folder: str | Path, reports: Sequence[Inserted]) -> None:
    """A transformers model with gates as a folder that `load` reads: the model's own files and what was inserted.

    Args:
        model: a transformers model.
        folder: to be written; made if need be.
        reports: of every `insert` into this model, in order.
    """
    folder = Path(folder)
    model.save_pretrained(folder)  # type: ignore[operator]
    rows = [report.as_dict() for report in reports]
    write_text(folder / _RECORD, json.dumps(rows, indent=2))


def load(folder: str | Path) -> nn.Module:
    """A model that `save` (or `saccade insert --out`) wrote, in evaluation mode.

    Args:
        folder: that `save` wrote.

    Raises:
        OSError: if the folder has no such model.
        ValueError: if its files do not fit together.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    rows = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    gates = {name for name in state if f".{_NAME}" in f".{name}"}
    model = pretrained(folder, {name: tensor for name, tensor in state.items() if name not in gates})
    for row in rows:
        channels = {place["path"]: place["channels"] for place in row["places"]}
        options = {"channels": channels, "gentle": row["gentle"], **row["arguments"]}
        insert(model, row["slug"], after=list(channels), **options)
    lacking = [name for name in model.load_state_dict(state, strict=False).missing_keys if f".{_NAME}" in f".{name}"]
    if lacking:
        raise ValueError(f"{folder} lacks the gates' weights, such as {lacking[0]!r}")
    return model.eval()


def pretrained(folder: str | Path, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A transformers model from its folder, of the class that its config names.

    Args:
        folder: that `save_pretrained` wrote.
        state: its weights, where they are not to be read from the folder.

    Raises:
        OSError: if there is no model.
        ValueError: if transformers has no such class.
    """
    transformers = need("transformers", "a model from a folder")
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no transformers model in {folder}: it has no config.json")
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or ["AutoModel"]
    loader = getattr(transformers, names[0], None)
    if loader is None:
        raise ValueError(f"transformers has no class {names[0]!r}, which {folder} was saved from")
    if state is None:
        return loader.from_pretrained(folder)
    return loader.from_pretrained(None, config=config, state_dict=dict(state))
