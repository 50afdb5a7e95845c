"""The checks that every registered part passes: one body, parametrised over the catalogue."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade import catalogue, masks
from saccade.catalogue.options import fits
from saccade.integrations.mechanisms import MECHANISMS
from saccade.report.sizes import count
from saccade.train.lab import Lab

GOLDEN = Path(__file__).parent / "golden"
SLUGS = [part.slug for part in catalogue.parts()]
SEQUENCES = [part.slug for part in catalogue.select(kind="sequence")]
RECORDINGS = sorted(
    path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/*.safetensors") if path.parent.name in SLUGS
)


#: parts of fixed shapes that read values back or copy from the host all the same, and what
WAITING = {
    "context-aware-fusion": "sizes of images",
    "ctr-representation-survey": "where fields begin",
    "evenhancer": "numbers of frames and sizes of the video",
    "faithful-attention-maps": "how many patches the image with the most keeps",
    "fsatfusion": "bases of cosines",
    "gaze-lle": "numbers of the images of heads",
    "human-guided-patterns": "offsets of the patterns",
    "nerf-dets": "sizes of voxels and images",
    "sentence-fusion": "numbers of the other images",
}


def supporting(capability: str) -> list[str]:
    return [part.slug for part in catalogue.select(kind="sequence", supports=capability)]


def build(slug: str, device: torch.device, **changes: object) -> nn.Module:
    """An instance of the example; drawn on the processor, so that it is the same everywhere."""
    torch.manual_seed(0)
    module = catalogue.create(slug, **{**catalogue.part(slug).example, **changes})
    for parameter in module.parameters():  # zero initialisations would hide errors
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval().to(device)


def call_arguments(slug: str, module: nn.Module, size: int, device: torch.device) -> tuple[Any, ...]:
    part = catalogue.part(slug)
    torch.manual_seed(size)
    return mapped(part.kind.inputs(part, module, size), lambda x: x.to(device))


def published(part: catalogue.Summary) -> tuple[catalogue.Published, ...]:
    """Only rooms whose kind has sizes are imported to be asked."""
    return catalogue.part(part.slug).published if part.kind.published else ()


def tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in tensors(value)]
    if dataclasses.is_dataclass(output):
        return [t for field in dataclasses.fields(output) for t in tensors(getattr(output, field.name))]
    return []


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments of a call with their tensors and modules changed."""
    if isinstance(value, (Tensor, nn.Module)):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    return value


def convert(value: Any, dtype: torch.dtype) -> Any:
    def change(x: Any) -> Any:
        if isinstance(x, nn.Module):
            return copy.deepcopy(x).to(dtype)
        return x.to(dtype) if x.is_floating_point() else x

    return mapped(value, change)


def floats(output: object) -> list[Tensor]:
    return [t for t in tensors(output) if t.is_floating_point()]


def outputs(slug: str, module: nn.Module, arguments: Sequence[object]) -> list[Tensor]:
    """The floating tensors that come out of a part's call."""
    return floats(catalogue.part(slug).kind.run(module, arguments))


def relative(ours: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().clamp(min=1e-12)
    return ((ours.double() - expected.double()).abs().max() / scale).item()


def test_every_paper_is_in_the_catalogue() -> None:
    papers = catalogue.papers()
    assert len(papers) == len({paper.slug for paper in papers}) == 119
    assert {paper.state for paper in papers} <= {"ready", "planned"}


@pytest.mark.parametrize("slug", SLUGS)
def test_registration_is_complete(slug: str) -> None:
    part, summary = catalogue.part(slug), next(p for p in catalogue.parts() if p.slug == slug)
    for field in dataclasses.fields(summary):
        assert getattr(part, field.name) == getattr(summary, field.name)
    assert not part.kind.lacking(part) and part.claim
    assert set(part.taxonomy) == set(catalogue.AXES)
    assert (part.replaces is not None) == (slug in MECHANISMS and slug != "softmax")
    assert (
        (Path(__file__).parent / catalogue.paper(slug).room.split(".")[1])
        .joinpath(f"test_{slug.replace('-', '_')}.py")
        .is_file()
    )


@pytest.mark.parametrize("slug", SLUGS)
def test_each_port_has_a_recording_and_each_recording_a_port(slug: str) -> None:
    recorded = {path.name.split(".")[0] for path in (GOLDEN / slug).glob("*.safetensors")}
    assert recorded == {port.module for port in catalogue.part(slug).ports}


def recorded(recording: str) -> tuple[catalogue.AuthorsPort, dict[str, object], dict[str, dict[str, Tensor]]]:
    """The port of a recording, the authors' arguments, and its tensors by kind."""
    slug, name = recording.split("/")
    with safe_open(GOLDEN / recording, "pt") as file:
        arguments = json.loads(file.metadata()["args"])
    groups: dict[str, dict[str, Tensor]] = {"input": {}, "param": {}, "output": {}}
    for key, tensor in load_file(GOLDEN / recording).items():
        group, _, rest = key.partition(".")
        groups[group][rest] = tensor
    return catalogue.port(slug, name.split(".")[0]), arguments, groups


@pytest.mark.parametrize("recording", RECORDINGS)
def test_ports_place_by_name_alone(recording: str) -> None:
    """In any order; what is unknown, missing or of another shape is refused."""
    port, arguments, groups = recorded(recording)
    state, module = groups["param"], port.build(arguments)
    expected = port.convert(state)
    backwards = port.convert(dict(reversed(state.items())))
    assert backwards.keys() == expected.keys() and all(
        torch.equal(backwards[name], expected[name]) for name in expected
    )
    own = module.state_dict()
    with pytest.raises(ValueError, match="strange"):
        catalogue.load_state(module, port.convert({**state, "strange.weight": torch.randn(2)}))
    if not own:  # such a module is made when the weights come, as they are
        return
    for name in list(state)[:: max(1, len(state) // 4)]:
        without = {other: tensor for other, tensor in state.items() if other != name}
        tied = any(name.split(".")[-1] == n.split(".")[-1] and torch.equal(t, state[name]) for n, t in without.items())
        wrong = torch.zeros(*state[name].shape, 3)
        try:
            dropped = port.convert(without).keys() == expected.keys()
        except Exception:  # load_authors puts it in words
            continue
        if dropped or tied or name.endswith("num_batches_tracked"):
            continue
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            catalogue.load_state(module, port.convert(without))
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            catalogue.load_state(module, port.convert({**state, name: wrong}))


@pytest.mark.parametrize("recording", RECORDINGS)
def test_golden(recording: str, device: torch.device) -> None:
    port, arguments, groups = recorded(recording)
    module = port.build(arguments)
    module.load_state_dict(port.convert(groups["param"]))
    module.eval().to(device)
    with torch.no_grad():
        ours = port.run(module, mapped(groups["input"], lambda x: x.to(device)), arguments)
    assert set(ours) == set(groups["output"])
    for key, expected in groups["output"].items():
        got = ours[key].cpu()
        if port.compare is not None:
            got, expected = port.compare(key, got, expected, groups["input"], arguments)
        assert got.shape == expected.shape, key
        assert relative(got, expected) <= port.tolerance, key
    assert port.tolerance <= 1e-5 or port.reason


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("size", [1, 7, 33])
def test_odd_sizes(slug: str, size: int, device: torch.device) -> None:
    module = build(slug, device)
    arguments = call_arguments(slug, module, size, device)
    output = catalogue.part(slug).kind.run(module, arguments)
    out = floats(output)
    assert out and all(t.isfinite().all() for t in out)
    assert not catalogue.part(slug).kind.complaint(arguments, output)


def agrees(
    derivative: Tensor, value: Callable[[], Tensor], leaves: list[Tensor], directions: list[Tensor], bound: float
) -> bool:
    """Whether it is what `value` changes by, per step, in these directions.

    Where a deep network of ReLUs has a kink within the larger step, the smaller one tells; a wrong derivative agrees at
    neither.
    """
    for step in (1e-6, 1e-8):
        values = []
        starts = [leaf.detach().clone() for leaf in leaves]
        for sign in (1, -1):
            with torch.no_grad():
                for leaf, start, direction in zip(leaves, starts, directions, strict=True):
                    leaf.copy_(start + sign * step * direction)
            values.append(value().detach())
        with torch.no_grad():
            for leaf, start in zip(leaves, starts, strict=True):
                leaf.copy_(start)
        measured = (values[0] - values[1]) / (2 * step)
        if abs(derivative - measured) <= bound * max(abs(measured), 1.0):
            return True
    return False


@pytest.mark.parametrize("slug", SLUGS)
def test_gradient_is_the_derivative(slug: str, device: torch.device) -> None:
    module = build(slug, device).double()
    arguments = convert(call_arguments(slug, module, 9, device), torch.float64)
    leaves = [p for p in module.parameters() if p.requires_grad]
    leaves += [t.requires_grad_() for t in floats(arguments)]

    def loss() -> Tensor:
        return sum(
            (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=device).view_as(t)).sum()
            for t in outputs(slug, module, arguments)
        )

    gradients = torch.autograd.grad(loss(), leaves, allow_unused=True)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert agrees(slope, torch.no_grad()(loss), leaves, directions, 1e-5)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_second_derivative_is_right_or_refused(slug: str, device: torch.device) -> None:
    module = build(slug, device).double()
    arguments = convert(call_arguments(slug, module, 7, device), torch.float64)
    leaves = [p for p in module.parameters() if p.requires_grad] + [t.requires_grad_() for t in floats(arguments)]

    def slope(power: int) -> Tensor:
        loss = sum(t.pow(power).sum() for t in outputs(slug, module, arguments))
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        return sum(
            (g.square().sum() for g in gradients if g is not None), torch.zeros((), dtype=torch.float64, device=device)
        )

    for power in (1, 2):  # a loss whose gradient by the output is constant, and one where it is not
        try:
            second = torch.autograd.grad(slope(power), leaves, allow_unused=True)
        except RuntimeError as error:
            assert any(said in str(error) for said in ("has first derivatives only", "is not implemented"))
            continue
        directions = [torch.randn_like(leaf) for leaf in leaves]
        expected = sum((g * d).sum() for g, d in zip(second, directions, strict=True) if g is not None)
        assert agrees(expected, lambda power=power: slope(power), leaves, directions, 1e-4)


@pytest.mark.parametrize("slug", SLUGS)
def test_bfloat16(slug: str, device: torch.device) -> None:
    module = build(slug, device).bfloat16()
    arguments = convert(call_arguments(slug, module, 12, device), torch.bfloat16)
    for t in floats(arguments):
        t.requires_grad_()
    out = outputs(slug, module, arguments)
    assert out[0].dtype == torch.bfloat16
    sum(t.float().square().sum() for t in out).backward()
    touched = [p.grad for p in module.parameters() if p.grad is not None] + [t.grad for t in floats(arguments)]
    assert touched and all(g is None or g.isfinite().all() for g in touched)


def directions(slug: str) -> list[dict[str, bool]]:
    """What a part is built with to run in each of the directions that it has."""
    part = catalogue.part(slug)
    return part.kind.directions(part)


@pytest.mark.parametrize("slug", SLUGS)
def test_autocast_trains_in_either_direction(slug: str, device: torch.device) -> None:
    for direction in directions(slug):
        module = build(slug, device, **direction).train()
        arguments = call_arguments(slug, module, 12, device)
        for t in floats(arguments):
            t.requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            out = outputs(slug, module, arguments)
            sum(t.float().square().sum() for t in out).backward()
        assert all(t.isfinite().all() for t in out)
        gradients = [p.grad for p in module.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_parameter_has_a_gradient(slug: str, device: torch.device) -> None:
    """By default and in the example, so that it trains on several devices."""
    module = catalogue.create(slug, **catalogue.part(slug).example).train().to(device)
    arguments = call_arguments(slug, module, 16, device)
    for t in floats(arguments):  # of parts without parameters too there is something to differentiate by
        t.requires_grad_()
    sum(t.square().sum() for t in outputs(slug, module, arguments)).backward()
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("slug", SLUGS)
def test_compiles(slug: str, device: torch.device) -> None:
    module = build(slug, device)
    arguments = call_arguments(slug, module, 12, device)
    torch._dynamo.reset()
    both, place = [module, *arguments], int(isinstance(arguments[0], nn.Module))  # what a wrapper is put on is compiled
    both[place] = torch.compile(both[place], backend="aot_eager", fullgraph=not catalogue.part(slug).data_dependent)
    compiled, *given = both
    for ours, expected in zip(outputs(slug, compiled, given), outputs(slug, module, arguments), strict=True):
        assert relative(ours, expected) <= 1e-5


@pytest.mark.parametrize("slug", SLUGS)
def test_waits_for_no_device_but_where_it_depends_on_values(
    slug: str, device: torch.device, waits: Callable[[Callable[[], object]], list[str]]
) -> None:
    """Forward and backward. Parts whose shapes depend on values are free to, and say so by `data_dependent`."""
    module = build(slug, device)
    arguments = call_arguments(slug, module, 12, device)
    for t in floats(arguments):
        t.requires_grad_()

    def both() -> None:
        loss = sum(t.float().square().sum() for t in outputs(slug, module, arguments) if t.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()

    found = waits(both)
    assert not found or catalogue.part(slug).data_dependent or slug in WAITING, found
    assert found or slug not in WAITING, "it waits no more: out of the list with it"


@pytest.mark.parametrize("slug", SLUGS)
def test_inputs_of_another_device_are_refused_in_one_line(slug: str) -> None:
    """Nothing is copied for the caller; torch's "meta" is the other device. Parts without tensors take any."""
    module = build(slug, torch.device("cpu"))
    arguments = call_arguments(slug, module, 12, torch.device("cpu"))
    modules = [module, *(x for x in arguments if isinstance(x, nn.Module))]
    if not any(True for each in modules for _ in (*each.parameters(), *each.buffers())):
        return
    elsewhere = mapped(arguments, lambda x: x if isinstance(x, nn.Module) else x.to("meta"))
    with pytest.raises((ValueError, RuntimeError)) as raised:
        catalogue.part(slug).kind.run(module, elsewhere)
    assert {"cpu", "meta"} <= set(re.findall(r"\w+", str(raised.value).splitlines()[0])), raised.value


@pytest.mark.parametrize("slug", SLUGS)
def test_serialises(slug: str, tmp_path: Path, device: torch.device) -> None:
    module = build(slug, device)
    arguments = call_arguments(slug, module, 8, device)
    save_file({k: v.contiguous().clone() for k, v in module.state_dict().items()}, tmp_path / "part.safetensors")
    other = build(slug, device)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(load_file(tmp_path / "part.safetensors"))
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for ours, expected in zip(outputs(slug, twin, arguments), outputs(slug, module, arguments), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("slug", SLUGS)
def test_builds_without_memory(slug: str, device: torch.device) -> None:
    """Under `torch.device("meta")`, then `to_empty` and `load_state_dict`, as large checkpoints are loaded."""
    part, module = catalogue.part(slug), build(slug, device)
    with torch.device("meta"):
        other = catalogue.create(slug, **part.example).eval()
    named = [*other.named_parameters(), *other.named_buffers()]
    assert not [name for name, t in named if t.device.type != "meta"]
    other = other.to_empty(device=device)
    for parameter in other.parameters():
        nn.init.constant_(parameter, torch.nan)
    for name in other.state_dict().keys() & dict(other.named_buffers()).keys():
        other.get_buffer(name).fill_(7)
    other.load_state_dict(module.state_dict())
    arguments = call_arguments(slug, module, 12, device)
    expected = outputs(slug, module, arguments)
    assert all(map(torch.equal, outputs(slug, other, arguments), expected))
    with torch.device("meta"):  # constants follow the input
        assert all(map(torch.equal, outputs(slug, module, arguments), expected))


@pytest.mark.parametrize("slug", SEQUENCES)
def test_rows_of_a_batch_do_not_meet(slug: str, device: torch.device) -> None:
    module = build(slug, device)
    (x,) = call_arguments(slug, module, 11, device)
    assert relative(module(x)[1:], module(x[1:])) <= 1e-5
    assert module(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize("slug", supporting("causal"))
def test_the_past_does_not_see_the_future(slug: str, device: torch.device) -> None:
    module = build(slug, device, causal=True)
    (x,) = call_arguments(slug, module, 21, device)
    changed = x.clone()
    changed[:, 13:] = torch.randn_like(changed[:, 13:])
    assert relative(module(changed)[:, :13], module(x)[:, :13]) <= 1e-6


@pytest.mark.parametrize("slug", supporting("decoding"))
def test_decoding_equals_the_parallel_form(slug: str, device: torch.device) -> None:
    module = build(slug, device, causal=True)
    (x,) = call_arguments(slug, module, 21, device)
    with torch.no_grad():
        expected = module(x)
        cache = module.new_cache(2)
        pieces = [module(x[:, :7], cache=cache)] + [module(x[:, i : i + 1], cache=cache) for i in range(7, 21)]
    assert relative(torch.cat(pieces, 1), expected) <= 1e-5
    assert cache.length == 21 and cache.nbytes > 0


@pytest.mark.parametrize("slug", [part.slug for part in catalogue.parts() if "decoding" in part.supports])
def test_a_chunk_without_tokens_changes_nothing(slug: str, device: torch.device) -> None:
    module = build(slug, device, causal=True)
    (x,) = call_arguments(slug, module, 12, device)
    with torch.no_grad():
        caches = module.new_cache(2), module.new_cache(2)
        for first, last in ((0, 7), (7, 8), (8, 12)):
            for _ in range(2):
                nothing = module(x[:, :0], cache=caches[0])
                assert nothing.shape == (2, 0, x.shape[2]) and caches[0].length == first
            with_nothing, without = (module(x[:, first:last], cache=cache) for cache in caches)
            assert torch.equal(with_nothing, without)
    assert caches[0].length == 12


@pytest.mark.parametrize("slug", supporting("padding"))
def test_padding_at_the_end_changes_nothing(slug: str, device: torch.device) -> None:
    module = build(slug, device)
    (x,) = call_arguments(slug, module, 21, device)
    mask = torch.ones(2, 21, dtype=torch.bool, device=device)
    mask[:, 15:] = False
    assert relative(module(x, mask=mask)[:, :15], module(x[:, :15], mask=mask[:, :15])) <= 1e-5
    mask[:] = False
    assert module(x, mask=mask).isfinite().all()


@pytest.mark.parametrize("slug", supporting("padding"))
def test_padding_is_taken_in_every_form(slug: str, device: torch.device) -> None:
    """Bool (B, M), (B, 1, 1, M), and mask objects; another size is refused in words."""
    for direction in directions(slug):
        module = build(slug, device, **direction)
        (x,) = call_arguments(slug, module, 12, device)
        real = torch.ones(2, 12, dtype=torch.bool, device=device)
        real[1, 9:] = False
        expected = module(x, mask=real)
        for given in (real[:, None, None], masks.padding(real), masks.dense(real[:, None, None])):
            assert torch.equal(module(x, mask=given), expected)
        for wrong in (real[:, 1:], real.float(), real[:, None], "padding"):
            with pytest.raises(ValueError, match=r"mask|cu_seqlens"):
                module(x, mask=wrong)


@pytest.mark.parametrize("slug", SEQUENCES)
def test_packed_sequences_are_attended_to_apart(slug: str, device: torch.device) -> None:
    """By `cu_seqlens` or by number, the same as one call each."""
    for direction in directions(slug):
        module = build(slug, device, **direction)
        (x,) = call_arguments(slug, module, 21, device)
        if "documents" not in getattr(module, "takes", ()):
            continue
        cu_seqlens = torch.tensor([0, 5, 13, 21], dtype=torch.int32, device=device)
        out = module(x, mask=cu_seqlens)
        ids = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 8, 8])).to(device)
        assert relative(out, module(x, mask=masks.documents(ids))) <= 1e-6
        if slug == "nats":  # its chunks, and the first of them that is always Global, are the row's
            continue
        module.rope = False  # not every score knows differences of positions only
        apart = torch.cat([module(x[:, first:last]) for first, last in ((0, 5), (5, 13), (13, 21))], 1)
        assert relative(module(x, mask=cu_seqlens), apart) <= 1e-5


@pytest.mark.parametrize("slug", supporting("padding"))
@pytest.mark.parametrize("place", [[0, 1, 2], [18, 19, 20], [2, 5, 6, 13]])
def test_the_content_of_padding_does_not_matter(slug: str, place: list[int], device: torch.device) -> None:
    for direction in directions(slug):
        module = build(slug, device, **direction)
        (x,) = call_arguments(slug, module, 21, device)
        mask = torch.ones(2, 21, dtype=torch.bool, device=device)
        mask[0, place] = False
        other = x.masked_fill(~mask[..., None], 100.0)
        assert relative(module(other, mask=mask)[mask], module(x, mask=mask)[mask]) <= 1e-5


@pytest.mark.parametrize("slug", supporting("cross"))
def test_cross_attention(slug: str, device: torch.device) -> None:
    module = build(slug, device, causal=False)
    (x,), (context,) = call_arguments(slug, module, 5, device), call_arguments(slug, module, 11, device)
    out = module(x, context)
    assert out.shape == x.shape and out.isfinite().all()
    assert not torch.allclose(out, module(x, context.flip(0)))


@pytest.mark.parametrize("slug", supporting("from-softmax"))
def test_starts_from_a_softmax_layer(slug: str, device: torch.device) -> None:
    module = build(slug, device)
    theirs = nn.MultiheadAttention(module.dim, module.num_heads, batch_first=True, device=device)
    arguments = {k: v for k, v in catalogue.part(slug).example.items() if k not in ("dim", "num_heads", "num_kv_heads")}
    ours = type(module).from_softmax(theirs, **{**arguments, "rope": False})
    assert torch.equal(torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]), theirs.in_proj_weight)
    assert torch.equal(ours.out_proj.bias, theirs.out_proj.bias)
    x = torch.randn(2, 9, module.dim, device=device)
    assert ours(x).isfinite().all()


SIZES = [(part.slug, size.name) for part in catalogue.parts() for size in published(part)]


@pytest.mark.parametrize(("slug", "name"), SIZES)
def test_published_sizes(slug: str, name: str) -> None:
    size = count(slug, name)
    assert size.error <= size.published.tolerance, (size.parameters, size.flops)
    assert size.published.tolerance <= 0.01 or size.published.note


@pytest.mark.parametrize("slug", sorted({slug for slug, _ in SIZES}))
def test_published_sizes_are_built_by_name(slug: str) -> None:
    model = catalogue.part(slug).build
    name = catalogue.part(slug).published[0].name
    with torch.device("meta"):
        assert isinstance(model.from_config(name), model)
    with pytest.raises(ValueError, match=f"{slug} was published as {name}.*; got 'huge'"):
        model.from_config("huge")


@pytest.mark.parametrize("slug", SEQUENCES)
def test_bad_arguments(slug: str, device: torch.device) -> None:
    module = build(slug, device)
    dim = catalogue.part(slug).example["dim"]
    for bad in (torch.randn(2, 5, dim + 1, device=device), torch.randn(5, dim, device=device)):
        with pytest.raises(ValueError, match=r"x must be|expected|got"):
            module(bad)
    with pytest.raises(ValueError):
        catalogue.create(slug, dim=dim, num_heads=0)
    with pytest.raises(ValueError):
        catalogue.create(slug, no_such_argument=1)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_option_can_be_given(slug: str) -> None:
    example = catalogue.part(slug).example
    options = catalogue.options(slug)
    assert set(example) <= set(options)
    for name, (kind, default) in options.items():
        if name in example:
            continue
        assert not isinstance(kind, str) and fits(default, kind), (name, kind, default)
        try:
            catalogue.create(slug, **example, **{name: default})
        except ValueError as error:  # a default may not go with the example's values, but it is taken
            assert not isinstance(error.__cause__, TypeError), name


@pytest.mark.parametrize("slug", SLUGS)
def test_claim_runs(slug: str) -> None:
    class Once(Lab):
        def steps(self, number: int) -> int:
            assert number > 2, "these are steps already: in a long run they would be taken ten times ten times"
            return super().steps(number)

    result = catalogue.part(slug).claim.run(Once(smoke=True))
    assert result.measured and all(isinstance(value, float) for value in result.measured.values())
