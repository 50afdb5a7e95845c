"""Speculative decoding of any causal language model of transformers: somebody proposes, the model verifies in one pass.

A drafter proposes a tree of tokens behind the last one. The model reads all of it at once, under a mask of the tree;
what it would have said itself is accepted, and one token of its own comes behind (`saccade.ops.trees`). The output is
the model's own: its greedy sequence, or a sample of its own distribution. Keys and values of what was not accepted are
forgotten. A round costs the model one pass, whatever was accepted.

    with Speculative(model, drafter) as report:
        model.generate(**inputs, max_new_tokens=64)

Shape letters: B batch, P tokens of the prompt, N new tokens, T nodes of a tree, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.proposals import Drafter, Proposal, Speculated
from saccade.layers.wrapping import changing
from saccade.ops import masks
from saccade.ops.trees import choose_child, depths

__all__ = ["Speculative", "compact", "last_attention", "tree_masks"]


class Speculative:
    """A model that generates with a drafter, within a `with` or by `generate`; afterwards it is as before.

    Args:
        model: a causal language model of transformers, with a vision tower or without.
        drafter: who proposes.
        name: in the report.

    Raises:
        ValueError: if the model is no such model; in `generate`, if it cannot be decoded so.
    """

    def __init__(self, model: nn.Module, drafter: Drafter, name: str = "speculation") -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "generate") or not hasattr(model, "get_decoder"):
            raise ValueError(f"model must be a causal language model of transformers, got {type(model).__name__}")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"speculation needs a model without an encoder, got {type(model).__name__}")
        self.model, self.drafter, self.name = model, drafter, name
        self._stack = ExitStack()

    def __enter__(self) -> Speculated:
        report = Speculated(self.name)
        changes = self._stack.enter_context(changing(self.model, report))
        seen = _Seen(self.model)
        decoder = self.model.get_decoder()  # type: ignore[operator]
        changes.before(decoder, seen.before)
        changes.after(decoder, seen.after)
        usual: Callable[..., Any] = self.model.generate  # type: ignore[assignment]

        def generate(*args: Any, **inputs: Any) -> Any:
            return usual(*args, custom_generate=_Decoding(self.drafter, seen, report), **inputs)

        changes.put(self.model, "generate", generate)
        return report

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """`model.generate(...)` with the drafter."""
        with self:
            return self.model.generate(*args, **inputs)  # type: ignore[operator]


@dataclass
class _Seen:
    """What went into the decoder and came out of it in the last pass."""

    model: Any
    embeds: Tensor | None = None
    positions: Tensor | None = None
    hidden: Tensor | None = None

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.embeds, self.positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.hidden = output[0]

    def embedded(self, ids: Tensor) -> Tensor:
        """The embeddings of the last pass, or else those of its tokens."""
        return self.model.get_input_embeddings()(ids) if self.embeds is None else self.embeds

    def next_position(self, length: int) -> int:
        """Behind the last one of the last pass; positions of several axes, as of images, count on together."""
        return length if self.positions is None else int(self.positions.max()) + 1


@dataclass
class _Decoding:
    """What `generate` calls in the place of its own loop."""

    drafter: Drafter
    seen: _Seen
    report: Speculated

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[..., Tensor],
        stopping_criteria: Callable[..., Tensor],
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **inputs: Any,
    ) -> Tensor:
        if getattr(generation_config, "num_beams", 1) > 1:
            raise ValueError(f"speculation has no beam search: num_beams must be 1, got {generation_config.num_beams}")
        if generation_config.return_dict_in_generate:
            raise ValueError("speculation gives tokens alone: return_dict_in_generate must be False")
        given = {
            name: value
            for name, value in inputs.items()
            if value is not None and name not in ("past_key_values", "use_cache", "cache_position")
        }
        rows = input_ids.shape[0]
        if rows > 1 and (more := given.keys() - {"attention_mask", "position_ids", "logits_to_keep"}):
            raise ValueError(
                f"speculation takes several texts alone, and one with {', '.join(sorted(more))}; got {rows}"
            )
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length():
            raise ValueError("speculation begins with an empty cache: past_key_values must not be given")
        texts = []
        for row in range(rows):
            text = _Text(self, model, input_ids[row : row + 1], logits_processor, stopping_criteria)
            text.sample, text.streamer = bool(generation_config.do_sample), streamer
            texts.append(text.run(type(cache)(), _of_row(given, row) if rows > 1 else given))
        longest, pad = max(map(len, texts)), getattr(generation_config, "_pad_token_tensor", None)
        filled = [F.pad(x, (0, longest - len(x)), value=0 if pad is None else int(pad)) for x in texts]
        if streamer is not None:
            streamer.end()
        return torch.stack(filled)


def _of_row(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """What one row is called with; positions are counted anew, since padding before it is left out."""
    named = {name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}
    mask = inputs.get("attention_mask")
    return named if mask is None else {**named, "attention_mask": mask[row : row + 1]}


class _Text:
    """One text that grows."""

    def __init__(
        self,
        decoding: _Decoding,
        model: Any,
        ids_1N: Tensor,
        process: Callable[..., Tensor],
        stop: Callable[..., Tensor],
    ) -> None:
        self.drafter, self.seen, self.report = decoding.drafter, decoding.seen, decoding.report
        self.model, self.process, self.stop = model, process, stop
        self.plain = len(process) == 0  # type: ignore[arg-type]
        self.sample, self.streamer = False, None
        self.length = ids_1N.shape[1]
        self.room_1N = F.pad(ids_1N, (0, 256))

    @property
    def ids(self) -> Tensor:
        """All of it, (1, N)."""
        return self.room_1N[:, : self.length]

    def add(self, token: int) -> bool:
        """One token more; whether it is the last one."""
        if self.length == self.room_1N.shape[1]:
            self.room_1N = F.pad(self.room_1N, (0, self.length))
        self.room_1N[0, self.length] = token
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(self.ids[0, -1:].cpu())
        return bool(self.stop(self.ids, None).all())

    def say(self, logits_V: Tensor, children: Sequence[int]) -> tuple[int, int]:
        """The model's next token behind all that there is, and which of the proposed ones it is, or -1."""
        # transformers decides on float32, on a copy
        scores_1V = self.process(self.ids, logits_V[None].to(torch.float32, copy=True))
        if self.sample:
            proposed = torch.tensor([list(children)], dtype=torch.long, device=scores_1V.device)
            drawn, child = choose_child(scores_1V.softmax(-1), proposed)
            return int(drawn), int(child)
        token = int(scores_1V.argmax())
        return token, children.index(token) if token in children else -1

    def run(self, cache: Any, inputs: dict[str, Any]) -> Tensor:
        """The whole text (N,)."""
        prompt = self.ids
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):  # padding before a row is nothing that counts
            prompt = prompt[:, mask[0].bool()]
            inputs = {name: x for name, x in inputs.items() if name not in ("attention_mask", "position_ids")}
        source: dict[str, Any] = {} if "inputs_embeds" in inputs else {"input_ids": prompt}
        if wants := self.drafter.wants_attention:
            source["output_attentions"] = True
        said = self.model(**source, **inputs, past_key_values=cache, use_cache=True)
        attention = last_attention(said)[0] if wants else None
        embeds, features = self.seen.embedded(prompt), self.seen.hidden
        position = self.seen.next_position(embeds.shape[1])
        _check(cache)
        token, _ = self.say(said.logits[0, -1], ())
        over = self.add(token)
        tokens, kept = prompt[0].tolist(), self.drafter.begin(self.model, prompt, attention)
        if kept is not None:
            embeds, features = embeds[:, kept], features[:, kept]  # type: ignore[index]
            tokens = [tokens[place] for place in kept.tolist()]
        new, past = [token], cache.get_seq_length()
        embeds = torch.cat([embeds, self._embedded([token])], 1)
        while not over:
            tree = self.drafter.propose([*tokens, *new], embeds, features)  # type: ignore[arg-type]
            accepted, new, over = self._round(tree, cache, past, position)
            compact(cache, past, accepted)
            past, position = past + len(accepted), position + len(accepted)
            tokens, embeds = [], self._embedded(new)
            features = self.seen.hidden[:, accepted]  # type: ignore[index]
        return self.ids[0]

    def _round(self, tree: Proposal, cache: Any, past: int, position: int) -> tuple[list[int], list[int], bool]:
        """The accepted nodes, the tokens that are new, and whether the text is at its end."""
        nodes, device = len(tree.tokens), self.room_1N.device
        parents = torch.tensor(tree.parents)
        places = position + depths(parents).to(device)[None]
        if self.seen.positions is not None and self.seen.positions.ndim == 3:
            places = places.expand(self.seen.positions.shape[0], 1, nodes)
        said = self.model(
            input_ids=torch.tensor([tree.tokens], device=device),
            attention_mask=None if tree.is_chain else tree_masks(self.model, parents, past),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        self.report.rounds, self.report.proposed = self.report.rounds + 1, self.report.proposed + nodes - 1
        self.report.calls += 1
        logits_TV = said.logits[0]
        greedy = logits_TV.argmax(-1).tolist() if self.plain and not self.sample else None
        children: list[list[int]] = [[] for _ in range(nodes)]
        for node, parent in enumerate(tree.parents[1:], 1):
            children[parent].append(node)
        accepted, new, over = [0], [], False
        while True:
            node = accepted[-1]
            proposed = [tree.tokens[child] for child in children[node]]
            if greedy is None:
                token, child = self.say(logits_TV[node], proposed)
            else:
                token = greedy[node]
                child = proposed.index(token) if token in proposed else -1
            new.append(token)
            over = self.add(token)
            self.report.tokens += 1
            if over or child < 0:
                return accepted, new, over
            accepted.append(children[node][child])

    def _embedded(self, tokens: list[int]) -> Tensor:
        return self.model.get_input_embeddings()(torch.tensor([tokens], device=self.room_1N.device))


def compact(cache: Any, past: int, accepted: Sequence[int]) -> None:
    """Forget the keys and values of the nodes of a tree that were not accepted, in place.

    Args:
        cache: of transformers.
        past: tokens before the tree.
        accepted: the nodes that stay, in ascending order.

    Raises:
        ValueError: if there is none.
    """
    if not accepted:
        raise ValueError("accepted must hold a node at least")
    end = past + len(accepted)
    moved = list(accepted) != list(range(len(accepted)))
    for layer in cache.layers:
        if moved:
            places = past + torch.tensor(accepted, device=layer.keys.device)
            layer.keys[:, :, past:end] = layer.keys[:, :, places]
            layer.values[:, :, past:end] = layer.values[:, :, places]
        layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]


def last_attention(said: Any) -> Tensor:
    """The weights (B, H, N, N) of the last layer, in what a model said.

    Args:
        said: the output of a model of transformers.

    Raises:
        ValueError: if it has none, and how to get it.
    """
    weights = getattr(said, "attentions", None)
    if not weights or weights[-1] is None:
        raise ValueError("the model gives no attentions: load it with attn_implementation='eager'")
    return weights[-1]


def _check(cache: Any) -> None:
    """Raise ValueError unless a cache can be shortened to any of its tokens."""
    for layer in getattr(cache, "layers", ()):
        if not isinstance(getattr(layer, "keys", None), Tensor) or getattr(layer, "is_sliding", False):
            raise ValueError(
                f"speculation needs a cache of all keys and values in each layer, got {type(layer).__name__}"
            )


def tree_masks(model: Any, parents: Tensor, past: int) -> Tensor | dict[str, Tensor]:
    """What the model's attention adds to its scores: (1, 1, T, past + T), by kind of layer where there are several.

    Args:
        model: of transformers.
        parents: of the nodes of a tree.
        past: tokens before it.

    Raises:
        ValueError: if its attention takes no such mask.
    """
    config = model.config.get_text_config()
    implementation = str(getattr(config, "_attn_implementation", "sdpa"))
    if "flash" in implementation or "flex" in implementation:
        raise ValueError(
            f"a tree needs attn_implementation='sdpa' or 'eager', got {implementation!r}; a chain (top_k=1) does not"
        )
    nodes = len(parents)
    dense = masks.tree(parents, past).dense(nodes, past + nodes, model.device)
    kinds = set(getattr(config, "layer_types", None) or ())
    lowest = torch.finfo(model.dtype).min

    def additive(sees: Tensor) -> Tensor:
        return torch.zeros(sees.shape, dtype=model.dtype, device=sees.device).masked_fill(~sees, lowest)

    if not kinds - {"full_attention"}:
        return additive(dense)
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"speculation knows full and sliding attention, the model has {', '.join(sorted(kinds))}")
    places = torch.cat([torch.arange(past), past + depths(parents)]).to(model.device)
    near = (places[past:, None] - places) < config.sliding_window
    return {"full_attention": additive(dense), "sliding_attention": additive(dense & near)}
