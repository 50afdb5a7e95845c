"""A loaded model with switched layers: which, for how long, and as it was afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from saccade.integrations.diffusers.layer import Layer
from saccade.integrations.diffusers.models import TEXT, Side, attention_layers, transformers_of
from saccade.integrations.diffusers.run import Clock, Run
from saccade.integrations.mechanisms import mechanism
from saccade.integrations.switching import LayerReport, Report, choose


def switch(
    model_or_pipeline: Any,
    slug: str,
    *,
    layers: Sequence[int | str] | None = None,
    dense_layers: Sequence[int | str] = (),
    dense_steps: int = 0,
    curve: bool | tuple[int, int, int] = False,
    text: Side | None = None,
    report: bool = False,
    **options: Any,
) -> AbstractContextManager[Report]:
    """Run a loaded diffusers transformer, or a pipeline's, with another attention; on leaving, it is as it was.

    A `switch` inside a `switch` changes the layers that it names and leaves the others as they are.

    Args:
        model_or_pipeline: a transformer whose blocks hold attention processors, or a pipeline with such.
        slug: a training-free mechanism for bidirectional attention: "rectified-spaattn", "spargeattn", "window" ...
        layers: the layers to switch, by number (negative from the end; single-stream blocks go on counting) or by
            pattern of module path ("single_transformer_blocks.*"); all self-attention of the blocks where None.
        dense_layers: layers to leave as they are, in the same words.
        dense_steps: the first denoising steps that run dense. A step is a change of the model's `timestep`; where it
            rises, another run begins. Without a `timestep` each call is a step.
        curve: put visual tokens along the generalised Hilbert curve of their grid, for mechanisms whose blocks are to
            hold neighbours. True reads the grid off the model's inputs, else (frames, rows, columns).
        text: where text stands in a model of a class that is not known here: "first" or "last".
        report: measure each layer against dense attention on the same inputs (costs a dense pass).
        **options: the mechanism's own. Left open, `text_tokens` is the call's, and `neighbors` the curve's.

    Returns:
        A context manager; `as` gives the `Report`, which fills as the model runs.

    Raises:
        ValueError: if the mechanism, an option or a layer is unknown, or the model has no attention processors; from
            the model's call, if its tokens are no grid, text is in an unknown place, or it runs context-parallel.

    >>> import torch
    >>> from diffusers import WanTransformer3DModel
    >>> model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
    ...     text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2).eval()
    >>> call = dict(hidden_states=torch.randn(1, 4, 2, 8, 8), timestep=torch.tensor([9]),
    ...     encoder_hidden_states=torch.randn(1, 3, 8))
    >>> with torch.no_grad(), switch(model, "window", left=3, report=True) as report:
    ...     out = model(**call)
    >>> [round(layer.density, 2) for layer in report.layers]
    [0.21, 0.21]
    """
    entry = mechanism(slug)
    entry.check(options)
    if not entry.bidirectional:
        raise ValueError(f"{slug} is not defined for bidirectional attention, which diffusers' transformers have")
    if dense_steps < 0:
        raise ValueError(f"dense_steps must not be negative, got {dense_steps}")
    if text not in (None, "first", "last"):
        raise ValueError(f"text must be 'first' or 'last', got {text!r}")
    if not isinstance(curve, bool) and (len(curve) != 3 or min(curve) < 1):
        raise ValueError(f"curve must be True, False or (frames, rows, columns), got {curve!r}")
    models = transformers_of(model_or_pipeline)
    places = {
        f"{prefix}{name}": (model, block, module, number)
        for prefix, model in models.items()
        for name, (block, module, number) in attention_layers(model).items()
    }
    if not places:
        raise ValueError(f"{type(model_or_pipeline).__name__} has no blocks with attention processors")
    numbers = {name: place[3] for name, place in places.items()}
    chosen = choose(numbers, layers, "layers") if layers is not None else set(numbers)
    chosen -= choose(numbers, dense_layers, "dense_layers")
    rows = {name: LayerReport(numbers[name], name) for name in numbers if report and name in chosen}
    clock = Clock(dense_steps)
    runs = {id(model): Run(model, clock, curve) for model in models.values()}
    switched = []
    for name in numbers:
        if name in chosen:
            model, block, module, _ = places[name]
            side = text or TEXT.get(type(model).__name__)
            switched.append(Layer(entry, options, module, block, runs[id(model)], side, rows.get(name)))
    yielded = Report(slug, {**entry.options, **options}, list(rows.values()))
    return _switched(switched, yielded)


@contextmanager
def _switched(layers: Sequence[Layer], report: Report) -> Iterator[Report]:
    with ExitStack() as stack:
        for run in {id(layer.run): layer.run for layer in layers}.values():
            stack.callback(run.model.register_forward_pre_hook(run.begin, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.block.register_forward_pre_hook(layer.enter_block, with_kwargs=True).remove)
            stack.callback(_replace_forward(layer))
        yield report


def _replace_forward(layer: Layer) -> Callable[[], None]:
    """Let the layer's module run under the mechanism; what is returned puts it back."""
    module = layer.module
    before = module.__dict__.get("forward")
    # an outer switch steps aside
    inner = getattr(module.forward, "_saccade_inner", module.forward)

    # which path runs depends on tensors' contents; a compiled model calls this between its graphs
    @torch.compiler.disable
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return layer(inner, *args, **kwargs)

    forward._saccade_inner = inner  # type: ignore[attr-defined]
    module.__dict__["forward"] = forward

    def put_back() -> None:
        module.__dict__.pop("forward")
        if before is not None:
            module.__dict__["forward"] = before

    return put_back
