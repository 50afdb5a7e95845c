"""The cards: a paper, a part built from it, how the authors' own code maps to it, and its claim."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from saccade.catalogue.kinds import Kind, named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from saccade.catalogue.lab import Lab

#: what a part may say that it supports; "teacher-forced" is causal attention whose *selection* looks ahead (MoSA)
CAPABILITIES = (
    "causal",
    "teacher-forced",
    "bidirectional",
    "cross",
    "padding",
    "decoding",
    "grouped-heads",
    "training-free",
    "from-softmax",
    "missing-modality",
)

#: the four axes of Chaudhari et al. (arXiv 1904.02874); one value each for every mechanism
AXES: dict[str, tuple[str, ...]] = {
    "sequences": ("self", "distinctive", "co-attention"),
    "levels": ("single", "multi"),
    "positions": ("soft", "hard", "local"),
    "representations": ("single", "multi-representational", "multi-dimensional"),
}


@dataclass(frozen=True)
class Paper:
    """A paper of the basis.

    Attributes:
        number: in the list of 119; 0 for the baseline.
        slug: its name here.
        title, arxiv: of the paper.
        family: of mechanisms, as the list has it.
        state: "ready" or "planned".
        room: the module in which its part stands; None where it is planned.
    """

    number: int
    slug: str
    title: str
    family: str
    arxiv: str
    state: Literal["ready", "planned"]
    room: str | None


@dataclass(frozen=True)
class Summary:
    """What a room says of itself in literals, readable without importing it.

    Attributes:
        slug, title, arxiv, family: as in `Paper`.
        kind: a name of `KINDS`; becomes the `Kind` itself.
        summary: what it does, in a sentence.
        supports: of `CAPABILITIES`.
        taxonomy: a value for each of `AXES`.
        efficiency: its class in the survey's tree (`saccade.explain.efficient_attention_survey`), "" where it has none.
        complexity: time and memory.
        note: what a reader must know beside it.
        invariants: what its tests hold.
        tasks: of a whole network: the tasks on which it can be compared, with constructor arguments of a size that a
            laptop trains.

    Raises:
        ValueError: if there is no such kind.
    """

    slug: str
    title: str
    arxiv: str
    family: str
    kind: Kind
    summary: str
    supports: tuple[str, ...] = ()
    taxonomy: Mapping[str, str] = field(default_factory=dict)
    efficiency: str = ""
    complexity: str = ""
    note: str = ""
    invariants: tuple[str, ...] = ()
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", named(self.kind))


@dataclass(frozen=True)
class AuthorsPort:
    """How one module of the authors' code maps to ours; proved on `golden/<slug>/<module>.*.safetensors`.

    Attributes:
        module: the recording's name.
        build: authors' constructor arguments ({} for a function) -> our module (an `nn.Identity` for a function).
        convert: authors' state dict -> ours.
        run: (module, the authors' named inputs, their arguments) -> the authors' named outputs.
        tolerance: largest error relative to the output's scale in fp32.
        reason: why the tolerance is above 1e-5.
        compare: (name, ours, recorded, inputs, arguments) -> the two tensors to be compared; for outputs of which only
            a part is defined.
    """

    module: str
    build: Callable[[dict[str, Any]], nn.Module]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    run: Callable[[Any, dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
    tolerance: float = 1e-5
    reason: str = ""
    compare: Callable[..., tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class ClaimResult:
    """What came out of a claim.

    Attributes:
        measured: figures by name, with units in the names.
        holds: whether the claim shows.
        note: what a reader must know beside them.
    """

    measured: Mapping[str, float]
    holds: bool
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A paper's central claim as a small experiment.

    `run(lab)` gets a `saccade.train.lab.Lab` (data, training, timing, seed, progress) and returns a ClaimResult.

    Attributes:
        paper: what the paper says, and where.
        expected: what should show at this size.
        run: the experiment.
    """

    paper: str
    expected: str
    run: Callable[[Lab], ClaimResult]


@dataclass(frozen=True)
class Published:
    """A size of a model as its paper's table prints it.

    Attributes:
        name: the paper's, e.g. "Twins-SVT-S".
        arguments: of `build`.
        parameters: in millions; None where the paper gives none.
        flops: in thousand millions of multiply-adds on `inputs`; None where the paper gives none.
        inputs: the shapes of the call's named inputs, batch included.
        tolerance: how far the table may be off, as a share.
        note: why the tolerance is above 1 %, or what else the table does not say.
        integers: the names of those inputs that are numbers of words.
    """

    name: str
    arguments: Mapping[str, Any]
    parameters: float | None = None
    flops: float | None = None
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"pixel_values": (1, 3, 224, 224)})
    tolerance: float = 0.01
    note: str = ""
    integers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replacement:
    """How a part takes the place of a pretrained model's attention: by a function of (q, k, v) that adds no weights.

    Its options are the keyword arguments of the function, less those that the layer fills in where the function takes
    them: `mask`, `causal`, `scale`, `offset`, `dropout`, `soft_cap`, `sink_logits`.

    Attributes:
        function: (q (B, H, N, D), k (B, K, M, D), v (B, K, M, E), *, ...) -> (B, H, N, E).
        causal, bidirectional: which layers it is defined for.
        masks: what the function takes beside causality. "any": every mask, at any `offset`. "sequences": padding and
            packed documents, and queries that are the last of the keys. "none": sequences of one length, as many
            queries as keys; padded and packed rows are taken apart for it.
        kept: (N, M, causal, offset, options) -> the pairs that it computes, for the report: a mask, or their number
            per head. None where the function gives them with `return_map`, as a mask or as blocks of `block_q` x
            `block_k` (or `block_size`) tokens.
        settings: context length -> options worth trying, from the fastest to the closest; what `saccade.advise` runs.
        per_head: options that may also be a value per query head -> the value at which a head is dense.
    """

    function: Callable[..., Any]
    causal: bool = True
    bidirectional: bool = True
    masks: Literal["any", "sequences", "none"] = "none"
    kept: Callable[[int, int, bool, int, Mapping[str, Any]], Any] | None = None
    settings: Callable[[int], list[dict[str, Any]]] | None = None
    per_head: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Part(Summary):
    """A full registration: a `Summary`, and what needs the room's code.

    Attributes:
        build: the constructor that `create` calls.
        passes: the constructors to which it hands its `**keywords`, where that is not the next class.
        example: constructor arguments of a tiny instance.
        inputs: (a tiny instance, a size) -> its call's positional arguments, where the default of its kind does not do.
        at_length: length -> arguments for short sequences, where the defaults are made for long ones.
        data_dependent: shapes depend on values, so torch.compile breaks the graph.
        published: the sizes of a model's paper, by which its parameters and FLOPs are checked.
        replaces: how a "training-free" mechanism takes the place of a pretrained model's attention.
        room: the module in which it stands.
    """

    build: Callable[..., nn.Module] | None = None
    passes: tuple[Callable[..., Any], ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[nn.Module, int], tuple[Any, ...]] | None = None
    at_length: Callable[[int], dict[str, Any]] | None = None
    data_dependent: bool = False
    published: tuple[Published, ...] = ()
    replaces: Replacement | None = None
    room: str = ""

    @property
    def ports(self) -> tuple[AuthorsPort, ...]:
        """The authors' modules that are ported: `PORTS` in the room's `authors.py`, which is imported for it."""
        return _beside(self.room, "authors", "PORTS") or ()

    @property
    def claim(self) -> Claim | None:
        """The paper's claim: `CLAIM` in the room's `claim.py`, which is imported for it."""
        return _beside(self.room, "claim", "CLAIM")

    def __repr__(self) -> str:
        return f"Part({self.slug!r}, {self.kind}: {self.summary})"


def _beside(room: str, file: str, name: str) -> Any:
    """What stands under `name` in a file of a room; None where the room has no such file."""
    path = f"{room}.{file}"
    if not room or importlib.util.find_spec(path) is None:
        return None
    return getattr(importlib.import_module(path), name)
