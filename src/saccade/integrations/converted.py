"""Parts in the place of the attention layers of a transformers language model, for good: put in, saved, loaded.

    report = saccade.convert(model, "moba", tokens, layers=range(0, 30, 2), minutes=5, block_size=128)
    report.save("folder");  saccade.load_converted(model, "folder")

A part keeps its own cache beside the model's: that one is told how many tokens there are, four bytes each, so that
`generate` runs as before. Beam search and caches that are shortened are refused, as a state cannot be taken apart.

Shape letters: B batch, N tokens, C channels, H heads, D head dim.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade import catalogue
from saccade.integrations.converted_layer import Converted, Made, Masks
from saccade.integrations.switching import choose
from saccade.layers.attention_interface import attention_layers
from saccade.layers.pretrained import SoftmaxLayer, read_softmax
from saccade.ops.folder import write_bytes, write_text

__all__ = [
    "Converted",
    "Masks",
    "Nothing",
    "cache_bytes",
    "check",
    "check_part",
    "chosen_layers",
    "load_converted",
    "part_for",
    "put_in",
    "put_in_or_back",
    "save",
    "standing",
]

_RECORD, _WEIGHTS = "saccade_convert.json", "saccade_convert.safetensors"


def part_for(slug: str, layer: nn.Module, **arguments: Any) -> tuple[nn.Module, list[str]]:
    """A part that begins with a trained layer's projections, and the names of those that it begins without.

    A part with `from_softmax` begins as its paper says. Of another, the projections that it has too are copied, those
    of shared key heads once for each head where it shares none; learned positions begin as the layer's rotary ones,
    the rest as ever.

    Args:
        slug: of the part.
        layer: the attention layer.
        **arguments: the part's own.

    Returns:
        the part, and of "q_proj", "k_proj", "v_proj" and "out_proj" those that found no place of their shape.

    Raises:
        ValueError: if there is no such causal part, the layer is no softmax attention, or none of its projections has
            a place in the part.
    """
    check_part(slug)
    entry = catalogue.part(slug)
    build: Any = entry.build
    if "from-softmax" in entry.supports:
        return build.from_softmax(layer, **({"causal": True} | arguments)), []
    known = read_softmax(layer)
    new: Any = catalogue.create(slug, **({"dim": known.dim, "num_heads": known.num_heads, "causal": True} | arguments))
    sources = {"q_proj": known.q, "k_proj": known.k, "v_proj": known.v, "out_proj": known.out}
    anew = [name for name, source in sources.items() if not _copied(_place(new, name), source, known)]
    if len(anew) == len(sources):
        raise ValueError(f"{slug} has no place for any projection of a softmax layer: it would begin from nothing")
    if hasattr(new, "start_as_softmax"):
        new.start_as_softmax()
    if known.rope and hasattr(new, "take_rotary"):
        new.take_rotary(known.rope_base)
    return new.to(device=known.q[0].device, dtype=known.q[0].dtype), anew


#: several projections in one, by the letters of its name: `qkvu_proj` has the rows of q, then those of k ...
_FUSED = re.compile(r"([qkvu]{2,})_proj")

Affine = tuple[Tensor, Tensor | None]


def _place(part: nn.Module, name: str) -> Affine | None:
    """The weight and bias of a projection, or of its rows in one that is several."""
    for own, layer in part.named_children():
        if not isinstance(layer, nn.Linear):
            continue
        if own == name:
            return layer.weight, layer.bias
        fused = _FUSED.fullmatch(own)
        if fused is not None and name.removesuffix("_proj") in fused[1]:
            rows = layer.out_features // len(fused[1])
            cut = slice(fused[1].index(name[0]) * rows, (fused[1].index(name[0]) + 1) * rows)
            return layer.weight[cut], None if layer.bias is None else layer.bias[cut]
    return None


@torch.no_grad()
def _copied(place: Affine | None, source: Affine, known: SoftmaxLayer) -> bool:
    """Whether a projection has been copied to its place, if need be once for each query head."""
    if place is None or (source[1] is not None and place[1] is None):
        return False
    shared, own = (count * known.head_dim for count in (known.num_kv_heads, known.num_heads))
    times = own // shared if (len(source[0]), len(place[0])) == (shared, own) else 1

    def each(x: Tensor) -> Tensor:
        return x.unflatten(0, (known.num_kv_heads, -1)).repeat_interleave(times, 0).flatten(0, 1) if times > 1 else x

    if place[0].shape != each(source[0]).shape:
        return False
    place[0].copy_(each(source[0]))
    if place[1] is not None:
        place[1].zero_() if source[1] is None else place[1].copy_(each(source[1]))
    return True


def check_part(slug: str) -> None:
    """Whether a part can take the place of a language model's layer.

    Args:
        slug: any.

    Raises:
        ValueError: if there is no such part, or it is not causal or does not decode.
    """
    entry = catalogue.part(slug)
    if entry.kind != "sequence" or not {"causal", "decoding"} <= set(entry.supports):
        raise ValueError(f"{slug} cannot take the place of a language model's layer: it must be causal and decode")


def check(model: nn.Module) -> None:
    """Whether layers of a model can be converted.

    Args:
        model: any.

    Raises:
        ValueError: if it is no language model of transformers that writes text.
    """
    if not hasattr(model, "get_decoder") or not model.can_generate():  # type: ignore[operator]
        raise ValueError(f"{type(model).__name__} is no language model of transformers that writes text")


def put_in(model: nn.Module, parts: Mapping[str, nn.Module], made: Mapping[str, Made]) -> Masks:
    """Parts in the places of attention layers; what tells them of padding, whose `hook` takes it off again.

    Args:
        model: of transformers, whose cache numbers its layers.
        parts: module path -> part.
        made: module path -> what it is made of.

    Raises:
        ValueError: if it is no language model with a decoder.
    """
    check(model)
    masks = Masks(model.get_decoder())  # type: ignore[operator]
    for path, part in parts.items():
        layer: Any = model.get_submodule(path)
        new = Converted(part, int(layer.layer_idx), masks, made[path])
        model.set_submodule(path, new.train(layer.training))
    return masks


def save(model: nn.Module, folder: str | Path) -> None:
    """What was converted in a model, by all conversions of it, as a folder that `load_converted` reads; the rest of the
    model is not written.

    Args:
        model: with converted layers, of arguments that JSON can hold.
        folder: made if need be.

    Raises:
        ValueError: if nothing is converted.
        OSError: if it cannot be written.
    """
    from safetensors.torch import save as to_bytes

    layers = {path: module for path, module in model.named_modules() if isinstance(module, Converted)}
    if not layers:
        raise ValueError("the model has no converted layer")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"{path}.{name}": tensor.contiguous()
        for path, module in layers.items()
        for name, tensor in module.part.state_dict().items()
    }
    write_bytes(folder / _WEIGHTS, to_bytes(state))
    made = {path: module.made for path, module in sorted(layers.items())}
    record = {"layers": {path: {"mechanism": slug, "arguments": dict(given)} for path, (slug, given) in made.items()}}
    write_text(folder / _RECORD, json.dumps(record, indent=1) + "\n")


def load_converted(model: nn.Module, folder: str | Path) -> list[str]:
    """Put what `save` wrote into a model, of the sort that it was converted from; returns the layers' paths.

    Args:
        model: as it was before the conversion; is changed.
        folder: that `save` wrote.

    Raises:
        OSError: if the folder cannot be read.
        ValueError: if it holds nothing of the kind, or it is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        record = json.loads((folder / _RECORD).read_text("utf-8"))
        if isinstance(record["layers"], list):  # as it was written when all layers had to be alike
            record["layers"] = dict.fromkeys(record["layers"], record)
        made = {path: (str(one["mechanism"]), dict(one["arguments"])) for path, one in record["layers"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{folder} holds no converted layers") from None
    try:
        state = load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / _WEIGHTS} is damaged ({error})") from None
    known = dict(model.named_modules())
    if again := [path for path in made if isinstance(known.get(path), Converted)]:
        raise ValueError(f"{again[0]} was converted before: give the model as it was")
    places = attention_layers(model)
    if strange := sorted(set(made) - set(places)):
        raise ValueError(f"{folder} is of another model: there is no attention layer {strange[0]}")
    parts = {path: part_for(slug, known[path], **given)[0] for path, (slug, given) in made.items()}
    for path, part in parts.items():
        own = {name.removeprefix(f"{path}."): x for name, x in state.items() if name.startswith(f"{path}.")}
        try:
            part.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"{folder} is of another model: {' '.join(str(error).split())[:200]}") from None
    put_in(model, parts, made)
    return list(made)


def cache_bytes(model: nn.Module, cache: Any) -> int:
    """What a model keeps of the past: its own cache's tensors and what converted layers keep beside it.

    Args:
        model: of transformers, converted or not.
        cache: a `DynamicCache` that it filled.
    """
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    theirs = sum(x.nbytes for x in kept if x is not None)
    return theirs + sum(module.held(cache) for module in model.modules() if isinstance(module, Converted))


def chosen_layers(model: nn.Module, layers: Sequence[int | str]) -> dict[str, nn.Module]:
    """The attention layers that are meant.

    Args:
        model: of transformers.
        layers: by number or pattern, as of `saccade.switch`.

    Raises:
        ValueError: if one is unknown, or was converted before.
    """
    places = attention_layers(model)
    chosen = choose(places, layers, "layers")
    return {path: model.get_submodule(path) for path in places if path in chosen}


@contextmanager
def put_in_or_back(model: nn.Module, parts: Mapping[str, nn.Module], made: Mapping[str, Made]) -> Iterator[None]:
    """`put_in`; where what follows fails or is interrupted, the former layers come back.

    Args:
        model, parts, made: as there.
    """
    former = {path: model.get_submodule(path) for path in parts}
    masks = put_in(model, parts, made)
    try:
        yield
    except BaseException:
        masks.hook.remove()
        for path, module in former.items():
            model.set_submodule(path, module)
        raise


@contextmanager
def standing(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A model with other modules in some places, for a while.

    Args:
        model: any.
        modules: path -> what stands there.
    """
    former = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in former.items():
            model.set_submodule(path, module)


class Nothing(nn.Module):
    """An attention layer that adds nothing: what it costs to leave one out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros, and no weights."""
        return torch.zeros_like(hidden_states), None
