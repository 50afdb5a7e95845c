"""Mechanisms inside diffusers' video and image transformers: `switch` on a loaded model or pipeline.

What a switched layer does:

- Self-attention among visual tokens, alone (Wan) or with text (HunyuanVideo, Flux, CogVideoX): the mechanism. Tokens
  that a padding mask takes out are taken out before, so that each row gives what it would give alone. Mechanisms with
  a form for text (`text_tokens`, or `special_tokens`) are told how much there is.
- Cross-attention, layers that only text passes, steps of the warm-up (`dense_steps`), and calls whose mask is more
  than padding: dense attention.

How: the processors of Wan, HunyuanVideo and Flux hand their heads to diffusers' attention dispatch, whose native
backend calls `scaled_dot_product_attention`; CogVideoX's calls it itself. So a layer's call runs on the native backend
with that one function replaced, in this call and thread only; projections, norms and rotary positions remain the
processor's.

`curve` puts the visual tokens along the generalised Hilbert curve of their grid. Attention is the only place in these
models where tokens meet, so permuting there is the same as permuting tokens and rotary table around all the blocks,
and nothing that a model does between blocks needs to know (control nets, per-token timesteps, first-frame
tokens).

Shape letters: B batch, H heads, N tokens, V visual tokens, D head dim, E width of values, S sequences, L their length,
T tokens of all sequences.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.integrations.mechanisms import Mechanism, mechanism
from saccade.integrations.switching import LayerReport, Report, choose, sequences, take
from saccade.ops import masks
from saccade.ops.hilbert import gilbert_order, neighbor_blocks

__all__ = ["LayerReport", "Report", "switch"]

Side = Literal["first", "last"]

#: where text stands among the tokens of a joint attention; None: not among them
_TEXT: dict[str, Side | None] = {
    "WanTransformer3DModel": None,
    "HunyuanVideoTransformer3DModel": "last",
    "FluxTransformer2DModel": "first",
    "CogVideoXTransformer3DModel": "first",
}


def _wan_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    T, H, W = (side // patch for side, patch in zip(call["hidden_states"].shape[2:], model.config.patch_size))
    return T, H, W


def _hunyuan_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    frames, height, width = call["hidden_states"].shape[2:]
    patch = model.config.patch_size
    return frames // model.config.patch_size_t, height // patch, width // patch


def _cogvideox_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    _, frames, _, height, width = call["hidden_states"].shape
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return -(-frames // patch_t), height // patch, width // patch


def _flux_grid(model: Any, call: Mapping[str, Any]) -> tuple[int, int, int]:
    rows, columns = (call["img_ids"].reshape(-1, 3).amax(0)[1:].long() + 1).tolist()
    return 1, rows, columns


#: (frames, rows, columns) of the visual tokens, from the model and what it is called with
_GRIDS: dict[str, Callable[[Any, Mapping[str, Any]], tuple[int, int, int]]] = {
    "WanTransformer3DModel": _wan_grid,
    "HunyuanVideoTransformer3DModel": _hunyuan_grid,
    "FluxTransformer2DModel": _flux_grid,
    "CogVideoXTransformer3DModel": _cogvideox_grid,
}


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
    models = _transformers(model_or_pipeline)
    places = {
        f"{prefix}{name}": (model, block, module, number)
        for prefix, model in models.items()
        for name, (block, module, number) in _attention_layers(model).items()
    }
    if not places:
        raise ValueError(f"{type(model_or_pipeline).__name__} has no blocks with attention processors")
    numbers = {name: place[3] for name, place in places.items()}
    chosen = choose(numbers, layers, "layers") if layers is not None else set(numbers)
    chosen -= choose(numbers, dense_layers, "dense_layers")
    rows = {name: LayerReport(numbers[name], name) for name in numbers if report and name in chosen}
    clock = _Clock(dense_steps)
    runs = {id(model): _Run(model, clock, curve) for model in models.values()}
    switched = []
    for name in numbers:
        if name in chosen:
            model, block, module, _ = places[name]
            side = text or _TEXT.get(type(model).__name__)
            switched.append(_Layer(entry, options, module, block, runs[id(model)], side, rows.get(name)))
    yielded = Report(slug, {**entry.options, **options}, list(rows.values()))
    return _switched(switched, yielded)


@contextmanager
def _switched(layers: Sequence[_Layer], report: Report) -> Iterator[Report]:
    with ExitStack() as stack:
        for run in {id(layer.run): layer.run for layer in layers}.values():
            stack.callback(run.model.register_forward_pre_hook(run.begin, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.block.register_forward_pre_hook(layer.enter_block, with_kwargs=True).remove)
            stack.callback(_replace_forward(layer))
        yield report


def _replace_forward(layer: _Layer) -> Callable[[], None]:
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


def _transformers(model_or_pipeline: Any) -> dict[str, nn.Module]:
    """The models to switch, by the prefix of their layers' names."""
    if isinstance(model_or_pipeline, nn.Module):
        return {"": model_or_pipeline}
    parts = getattr(model_or_pipeline, "components", None)
    if not isinstance(parts, Mapping):
        raise ValueError(f"{type(model_or_pipeline).__name__} is neither a diffusers model nor a pipeline")
    found = {f"{k}.": v for k, v in parts.items() if k.startswith("transformer") and isinstance(v, nn.Module)}
    if not found:
        raise ValueError(f"{type(model_or_pipeline).__name__} has no transformer among {', '.join(parts)}")
    return found


def _attention_layers(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module, int]]:
    """Self-attention modules of the model's blocks, by path: (block, module, number of the block)."""
    found: dict[str, tuple[nn.Module, nn.Module, int]] = {}
    blocks = [
        (f"{name}.{i}", block)
        for name, blocks in model.named_children()
        if isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks)
    ]
    number = 0
    for path, block in blocks:
        inside = {
            name: module
            for name, module in block.named_modules()
            if hasattr(module, "get_processor") and not getattr(module, "is_cross_attention", False)
        }
        found |= {f"{path}.{name}": (block, module, number) for name, module in inside.items()}
        number += bool(inside)
    return found


@dataclass
class _Clock:
    """Which denoising step it is, over all models of a pipeline."""

    dense_steps: int
    step: int = -1
    last: float | None = None

    def tick(self, timestep: Any) -> None:
        if not self.dense_steps:
            return
        now = None if timestep is None else float(torch.as_tensor(timestep).max())
        if now is not None and self.last is not None and now > self.last:
            self.step = 0
        elif now is None or self.last is None or now < self.last:
            self.step += 1
        self.last = now

    @property
    def warming_up(self) -> bool:
        return 0 <= self.step < self.dense_steps


@dataclass
class _Run:
    """What the layers of one model know of its present call."""

    model: nn.Module
    clock: _Clock
    curve: bool | tuple[int, int, int]
    grid: tuple[int, int, int] | None = None
    orders: dict[Any, Tensor | None] = field(default_factory=dict)
    touching: dict[Any, Tensor] = field(default_factory=dict)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        call = dict(zip(names, args)) | kwargs
        self.clock.tick(call.get("timestep"))
        if self.curve is True:
            read = _GRIDS.get(type(model).__name__)
            if read is None:
                raise ValueError(f"the grid of {type(model).__name__} is not known: curve=(frames, rows, columns)")
            self.grid = read(model, call)
        elif self.curve:
            self.grid = self.curve

    def order(self, visual: int, tokens: int, begin: int, front: bool | None, device: torch.device) -> Tensor | None:
        """The order in which the mechanism sees the tokens; None where it is their own.

        Args:
            begin: where the visual tokens begin.
            front: text goes before them, after them, or (None) stays where it is.
        """
        key = (self.grid, visual, tokens, begin, front, device)
        if key not in self.orders:
            pixels = torch.arange(visual)
            if self.grid is not None:
                T, H, W = self.grid
                if visual != T * H * W:
                    raise ValueError(f"curve: a grid of {T} x {H} x {W} is not the layer's {visual} visual tokens")
                pixels = gilbert_order(self.grid)
            place = torch.arange(tokens)
            words = torch.cat([place[:begin], place[begin + visual :]])
            first = words.numel() if front or (front is None and begin) else 0
            order = torch.cat([words[:first], pixels + begin, words[first:]])
            self.orders[key] = None if torch.equal(order, place) else order.to(device)
        return self.orders[key]

    def neighbors(self, block_q: int, block_k: int, device: torch.device) -> Tensor:
        """The blocks along the curve that touch in the grid."""
        assert self.grid is not None
        key = (self.grid, block_q, block_k, device)
        if key not in self.touching:
            near = neighbor_blocks(self.grid, gilbert_order(self.grid), (block_q, block_k))
            self.touching[key] = near.to(device)
        return self.touching[key]


@dataclass
class _Layer:
    """One switched layer."""

    mechanism: Mechanism
    options: Mapping[str, Any]
    module: nn.Module
    block: nn.Module
    run: _Run
    text: Side | None
    report: LayerReport | None
    visual: int = 0

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Visual tokens come in as the block's `hidden_states`, text on its own."""
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.visual = hidden_states.shape[1]

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.run.clock.warming_up:
            self._count_dense()
            return inner(*args, **kwargs)
        with _native(self.module), _Replace(self.attend):
            return inner(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What the layer calls in the place of `scaled_dot_product_attention`, with its arguments."""

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        N = query.shape[2]
        if key.shape[2] != N:
            return dense()
        V, text = self.visual, N - self.visual
        if text < 0 or (text and self.text is None):
            model = type(self.run.model).__name__
            raise ValueError(f"{model} attends over {N} tokens, {V} of them visual: say where text is, text='first'")
        begin = text if self.text == "first" else 0
        valid = _padding(attn_mask, query.shape[0], N)
        if is_causal or (attn_mask is not None and valid is None):
            self._count_dense()
            return dense()
        if valid is not None and valid.all():
            valid = None
        if valid is not None and not valid[:, begin : begin + V].all():
            self._count_dense()  # the grid has holes
            return dense()

        known = self.mechanism.options
        front = True if "special_tokens" in known else False if "text_tokens" in known else None
        order = self.run.order(V, N, begin, front, query.device)
        q, k, v = (query, key, value) if order is None else (x[:, :, order] for x in (query, key, value))
        real = valid if valid is None or order is None else valid[:, order]
        out, kept, pairs = self._apply(q, k, v, real, dropout_p, scale)
        if order is not None:
            out = out[:, :, order.argsort()]
        if self.report is not None:
            with torch.no_grad():
                exact, ours = dense(), out
                if valid is not None:
                    exact, ours = (x * valid[:, None, :, None] for x in (exact, ours))
                self.report.add(kept, pairs, ours, exact)
        return out

    def _apply(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, dropout: float, scale: float | None
    ) -> tuple[Tensor, float, float]:
        """The mechanism's output, and with a report the pairs that it computed and those of dense attention."""
        entry = self.mechanism
        B, H, N, _ = q.shape
        if valid is None or entry.masks == "any":
            mask = None if valid is None else masks.padding(valid)
            options = self._options(N, q.device)
            out = entry.run(q, k, v, mask=mask, dropout=dropout, scale=scale, options=options)
            return out, *self._work(q, k, v, mask, scale, options)
        out_THE = q.new_zeros(B * N, H, v.shape[3])
        kept = pairs = 0.0
        for index_SL in sequences(B, N, valid):
            q_SHLD, k_SHLD, v_SHLD = (take(x, index_SL) for x in (q, k, v))
            options = self._options(index_SL.shape[1], q.device)
            out = entry.run(q_SHLD, k_SHLD, v_SHLD, dropout=dropout, scale=scale, options=options)
            out_THE[index_SL] = out.transpose(1, 2)
            work = self._work(q_SHLD, k_SHLD, v_SHLD, None, scale, options)
            kept, pairs = kept + work[0], pairs + work[1]
        return out_THE.unflatten(0, (B, N)).transpose(1, 2), kept, pairs

    def _options(self, tokens: int, device: torch.device) -> dict[str, Any]:
        """The user's options, and those that follow from the call."""
        known, text = self.mechanism.options, tokens - self.visual
        filled: dict[str, Any] = {}
        if "text_tokens" in known:
            filled["text_tokens"] = text
        if "special_tokens" in known:
            filled["special_tokens"] = text
        if "neighbors" in known and self.run.grid is not None:
            blocks = {**known, **self.options}
            filled["neighbors"] = self.run.neighbors(blocks["block_q"], blocks["block_k"], device)
        return {**filled, **self.options}

    def _work(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, options: Mapping[str, Any]
    ) -> tuple[float, float]:
        if self.report is None:
            return 0.0, 0.0
        with torch.no_grad():
            return self.mechanism.work(q, k, v, mask=mask, scale=scale, options=options)

    def _count_dense(self) -> None:
        if self.report is not None:
            self.report.dense_calls += 1


def _padding(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """A mask that only says which keys are real, as (B, N); None for any other."""
    if mask is None or mask.dtype != torch.bool or mask.shape[-1] != tokens:
        return None
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0].expand(batch, tokens)


class _Replace(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` go to another function."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = self.attend if func is F.scaled_dot_product_attention else func
        return target(*args, **(kwargs or {}))


@contextmanager
def _native(module: nn.Module) -> Iterator[None]:
    """The module's processor dispatches to the backend that calls torch's function."""
    processor: Any = module.processor
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(f"{type(processor).__name__} runs context-parallel, which a mechanism cannot")
    if not hasattr(processor, "_attention_backend"):  # calls torch's function itself
        yield
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    own = vars(processor).get("_attention_backend", _native)
    processor._attention_backend = AttentionBackendName.NATIVE
    try:
        yield
    finally:
        if own is _native:
            del processor._attention_backend
        else:
            processor._attention_backend = own
