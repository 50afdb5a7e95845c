"""What the attention of any transformers model does in a call: queries, keys, values and outputs of every layer, and
its weights, made when they are asked for.

    with recorded(model) as recording:
        model(**inputs)
    recording.layers[3].weights(heads=[0], rows=[-1])          # A (B, 1, 1, M), of a long input too

    A = softmax(cap(s q k^T) + bias),     out = A v,     dL/dA = dL/dout v^T

Memory is linear in tokens: neither A nor its gradient is kept, both follow for the rows that are wanted. (A mask that
the model writes out, for padding or windows, is as large as it is; all layers share it.) The model is as it was
afterwards.

Shape letters: B batch, N queries, M keys, C channels, H heads, K key heads, D head dim, E value dim; h heads and n
queries that are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.attention_interface import attended, attention_layers, register
from saccade.layers.wrapping import Report, changing

__all__ = ["Attends", "AttentionRecord", "Recording", "recorded"]

#: the name by which transformers' interface knows the attention that records
IMPLEMENTATION = "saccade_recording"
#: what a layer may give its attention that would change the weights, and that is not known here
_UNKNOWN = ("position_bias", "head_mask", "s_aux", "sinks", "indices", "block_indices")

#: the score of what is hidden
_HIDDEN = torch.finfo(torch.float32).min

Chosen = Sequence[int] | Tensor | None
#: (number of the layer, queries, keys, values) -> the three that are attended with
Change = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Attends(Protocol):
    """One call of anything that attends."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, N, M of its weights."""
        ...

    def weights(self, *, heads: Chosen = None, rows: Chosen = None) -> Tensor:
        """A (B, heads, rows, M); all where None."""
        ...

    def gradients(self, *, heads: Chosen = None, rows: Chosen = None) -> Tensor:
        """dL/dA, likewise, after a backward pass."""
        ...


@dataclass
class AttentionRecord:
    """One call of one attention layer.

    Attributes:
        name: path of the layer's module.
        number: of the layer.
        x_BNC: what the layer was given.
        q_BHND: queries, positions in them.
        k_BKMD, v_BKME: keys and values; K divides H.
        mask: (B or 1, H or 1, N, M), of bool what is seen, else what is added to the scores; None for all and nothing.
        scale: s.
        soft_cap: c of cap(x) = c tanh(x / c), None where there is none.
        out_BNHE: A v, before the output projection; its `grad` is there after a backward pass.
        causal: whether a query sees the keys up to itself alone; the last query is the last key's.
    """

    name: str
    number: int
    x_BNC: Tensor | None
    q_BHND: Tensor
    k_BKMD: Tensor
    v_BKME: Tensor
    mask: Tensor | None
    scale: float
    soft_cap: float | None
    out_BNHE: Tensor
    causal: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, N, M of the weights."""
        return *self.q_BHND.shape[:3], self.k_BKMD.shape[2]  # type: ignore[return-value]

    def scores(self, *, heads: Chosen = None, rows: Chosen = None) -> Tensor:
        """cap(s q k^T) + bias (B, heads, rows, M), in float32; what is hidden has a very negative one.

        Args:
            heads: numbers of those that are wanted; all where None.
            rows: likewise of the queries, from the end where negative.

        Raises:
            IndexError: if there is none of that number.
        """
        head_h, row_n = self._of(heads, self.q_BHND.shape[1]), self._of(rows, self.q_BHND.shape[2])
        q_BhnD = self.q_BHND[:, head_h][:, :, row_n].float()
        score_BhnM = q_BhnD @ self.k_BKMD[:, self._key_head(head_h)].float().mT * self.scale
        if self.soft_cap is not None:
            score_BhnM = self.soft_cap * (score_BhnM / self.soft_cap).tanh()
        if self.causal:
            N, M = self.q_BHND.shape[2], score_BhnM.shape[3]
            later_nM = torch.arange(M, device=row_n.device) > row_n[:, None] + (M - N)
            score_BhnM = score_BhnM.masked_fill(later_nM, _HIDDEN)
        if self.mask is None:
            return score_BhnM
        mask = self.mask if self.mask.shape[1] == 1 else self.mask[:, head_h]
        mask = mask if mask.shape[2] == 1 else mask[:, :, row_n]
        return score_BhnM.masked_fill(~mask, _HIDDEN) if mask.dtype == torch.bool else score_BhnM + mask.float()

    def weights(self, *, heads: Chosen = None, rows: Chosen = None) -> Tensor:
        """A (B, heads, rows, M), in float32; a row that may attend to nothing is 0.

        Args:
            heads, rows: as of `scores`.

        Raises:
            IndexError: if there is none of that number.
        """
        score_BhnM = self.scores(heads=heads, rows=rows)
        if self.mask is None:
            return score_BhnM.softmax(-1)
        least = _HIDDEN if self.mask.dtype == torch.bool else torch.finfo(self.mask.dtype).min
        hidden_BhnM = score_BhnM <= least / 2
        weight_BhnM = score_BhnM.masked_fill(hidden_BhnM, -torch.inf).softmax(-1)
        return weight_BhnM.masked_fill(hidden_BhnM.all(-1, keepdim=True), 0)

    def gradients(self, *, heads: Chosen = None, rows: Chosen = None) -> Tensor:
        """dL/dA (B, heads, rows, M), of the scalar whose `backward` was called; in float32.

        Args:
            heads, rows: as of `scores`.

        Raises:
            IndexError: if there is none of that number.
            RuntimeError: if nothing was called backward through this layer.
        """
        if self.out_BNHE.grad is None:
            raise RuntimeError(
                f"{self.name} has no gradient: call backward() on what the model said, inside `recorded`"
            )
        head_h, row_n = self._of(heads, self.q_BHND.shape[1]), self._of(rows, self.q_BHND.shape[2])
        grad_BhnE = self.out_BNHE.grad[:, row_n][:, :, head_h].transpose(1, 2).float()
        return grad_BhnE @ self.v_BKME[:, self._key_head(head_h)].detach().float().mT

    def _of(self, wanted: Chosen, count: int) -> Tensor:
        every = torch.arange(count, device=self.q_BHND.device)
        return every if wanted is None else every[torch.as_tensor(wanted, device=every.device)]

    def _key_head(self, head_h: Tensor) -> Tensor:
        return head_h // (self.q_BHND.shape[1] // self.k_BKMD.shape[1])


@dataclass
class Recording:
    """What `recorded` yields; it fills as the model runs.

    Attributes:
        layers: a record for each call of an attention layer, in the order of the calls.
    """

    layers: list[AttentionRecord] = field(default_factory=list)

    def of(self, name: str) -> list[AttentionRecord]:
        """The records of the layers whose path contains `name`, as "vision_model"."""
        return self.tower(name).layers

    def tower(self, name: str) -> Recording:
        """What was recorded of the layers whose path contains `name`."""
        return Recording([record for record in self.layers if name in record.name])

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        """What a layer's attention had, in transformer-lens's words: ("pattern", 3) or "blocks.3.attn.hook_pattern".

        "q", "k", "v" and "z" (before the output projection) are (B, N, H, D), "attn_scores" and "pattern" (B, H, N, M).

        Args:
            name: of what, and the number of the layer.

        Raises:
            KeyError: if there is none of that name or number, or, in several towers, more than one.
        """
        what, number = name if isinstance(name, tuple) else _hook(name)
        records = [record for record in self.layers if record.number == number]
        if what not in _WORDS or len(records) != 1:
            calls = f"{len(records)} calls of layer {number} were recorded; `tower` chooses one tower's"
            raise KeyError(f"{name!r}: {calls}; a layer has {', '.join(_WORDS)}")
        return _WORDS[what](records[0])

    def clear(self) -> None:
        """Forget what was recorded."""
        self.layers.clear()


_WORDS: dict[str, Callable[[AttentionRecord], Tensor]] = {
    "q": lambda record: record.q_BHND.transpose(1, 2),
    "k": lambda record: record.k_BKMD.transpose(1, 2),
    "v": lambda record: record.v_BKME.transpose(1, 2),
    "z": lambda record: record.out_BNHE,
    "attn_scores": lambda record: record.scores(),
    "pattern": lambda record: record.weights(),
}


def _hook(name: str) -> tuple[str, int]:
    """The word and the layer of "blocks.3.attn.hook_pattern"."""
    found = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_(\w+)", name)
    if found is None:
        raise KeyError(f"{name!r} is no name such as 'blocks.3.attn.hook_pattern'")
    return found[2], int(found[1])


@dataclass
class _Recorder:
    recording: Recording
    places: dict[int, tuple[str, int]]
    wanted: set[int]
    change: Change | None = None
    given: dict[int, Tensor] = field(default_factory=dict)


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded(
    model: nn.Module, *, layers: Sequence[int] | None = None, change: Change | None = None
) -> Iterator[Recording]:
    """Record every call of a transformers model's attention: decoder, encoder, ViT, CLIP, and those made of them.

    Gradients flow as without it, and reach the records where the model's output is called backward.

    Args:
        model: a model that uses transformers' attention interface.
        layers: numbers of the layers that are kept, from the end where negative; all where None.
        change: other queries (B, H, N, D), keys and values (B, K, M, D) of a layer, by its number, before it attends.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the model does not use the interface, has no such layer, or, in a call, an attention that is more
            than scores, softmax and values.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    >>> model = BertModel(BertConfig(vocab_size=9, **sizes)).eval()
    >>> with recorded(model) as recording:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> [record.name for record in recording.layers], recording.layers[0].weights().shape
    (['encoder.layer.0.attention.self', 'encoder.layer.1.attention.self'], torch.Size([1, 2, 3, 3]))
    """
    register(IMPLEMENTATION, _attention, "recording the attention of a model")
    places, modules = attention_layers(model), dict(model.named_modules())
    count = 1 + max(places.values())
    chosen = set(range(count)) if layers is None else {number + count * (number < 0) for number in layers}
    if strange := chosen - set(places.values()):
        raise ValueError(f"layers must be between 0 and {count - 1}, got {sorted(strange)}")
    known = {id(modules[name]): (name, number) for name, number in places.items()}
    recorder = _Recorder(Recording(), known, chosen, change)
    with changing(model, Report("recorded")) as changes, attended(model, IMPLEMENTATION):
        for name, number in places.items():
            if number in chosen:
                changes.before(modules[name], _keep_input)
        changes.finally_(_RECORDER.reset, _RECORDER.set(recorder))
        yield recorder.recording


def _keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    recorder = _RECORDER.get()
    x = args[0] if args else kwargs.get("hidden_states")
    if recorder is not None and isinstance(x, Tensor):
        recorder.given[id(module)] = x


@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: computes, and enters what it computed from in the recorder of the moment."""
    for name in _UNKNOWN:
        if extra.get(name) is not None:
            raise ValueError(f"{type(module).__name__} has {name!r} in its attention, which cannot be recorded")
    recorder = _RECORDER.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask, (N, M) = attention_mask, (query.shape[2], key.shape[2])
    wanted = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = mask is None and N > 1 and bool(wanted)
    if causal and N != M:
        causal, mask = False, torch.ones(1, 1, N, M, dtype=torch.bool, device=query.device).tril(M - N)
    name, number = ("", 0) if recorder is None else recorder.places.get(id(module), (type(module).__name__, 0))
    given = None if recorder is None else recorder.given.pop(id(module), None)
    if recorder is not None and recorder.change is not None:
        query, key, value = recorder.change(number, query, key, value)
    record = AttentionRecord(name, number, given, query, key, value, mask, scale, softcap, query, causal)
    if softcap is None:
        out_BHNE = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        weights = F.dropout(record.weights().to(value.dtype), dropout)
        out_BHNE = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    out_BNHE = out_BHNE.transpose(1, 2).contiguous()
    if out_BNHE.requires_grad:
        out_BNHE.retain_grad()
    if recorder is not None and number in recorder.wanted:
        record.out_BNHE = out_BNHE
        recorder.recording.layers.append(record)
    return out_BNHE, None
