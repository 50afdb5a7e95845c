"""On a diffusion model of diffusers: its cross attention while it runs, and which of its weights are trained.

Shape letters: B batch, H heads, P pixels, T words, C channels, D head dim, J subjects.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from saccade.layers.low_rank import LowRank
from saccade.layers.pretrained import SoftmaxLayer, read_softmax
from saccade.layers.wrapping import Report, changing

#: the cross attention of Stable Diffusion's layers at a quarter of the latent's sides, five of them
LAYERS = ("down_blocks.2.attentions.*attn2", "up_blocks.1.attentions.*attn2")
#: what is trained
TRAINED = ("kv", "lora", "full")
_KV = ("*attn2.to_k", "*attn2.to_v")
_LORA = tuple(f"*attn?.to_{letter}" for letter in ("q", "k", "v", "out.0"))


@contextmanager
def cross_maps(model: nn.Module, layers: Sequence[str] = LAYERS) -> Iterator[list[Tensor]]:
    """Attention to the words (B, H, P, T) of the named layers in the model's last call, with gradients.

        with cross_maps(unet) as maps:
            predicted = unet(noisy, time, encoder_hidden_states=words).sample
        loss = refinement(maps, masks, tokens)

    Hooks read what a layer is given and compute its map beside it, so that its own kernel stays as it is. They are
    removed at the end, after an exception too.

    Args:
        model: whose layers are called with pixels (B, P, C) and `encoder_hidden_states` (B, T, C').
        layers: patterns of names, as `named_modules` has them; maps are in the order of the calls.

    Raises:
        ValueError: if no layer is named so, or one is no plain softmax attention; in the call, if one gets no words.
    """
    found = [(name, module, read_softmax(module)) for name, module in _named(model, layers, nn.Module)]
    maps: list[Tensor] = []
    with changing(model, Report("far")) as changes:
        changes.before(model, lambda *called: maps.clear())
        for name, module, layer in found:
            changes.before(module, partial(_read, maps, name, layer))
        yield maps


def trainable(model: nn.Module, form: str = "kv", *, rank: int = 32, alpha: float = 32.0) -> list[nn.Parameter]:
    """Freeze a model but for what is tuned, which is returned; the words' own vectors come beside (`only_rows`).

        kv     keys and values of the cross attention (rate 1e-5)
        lora   W + alpha / rank B A at queries, keys, values and outputs of all attention (1e-4, 2000 steps)
        full   all (2e-6, 400 steps, after 400 of the words' vectors alone at 5e-4)

    Args:
        model: whose attention is named as in diffusers.
        form: one of `TRAINED`.
        rank, alpha: of `lora`.

    Raises:
        ValueError: if there is no such form, or the model has no such attention.
    """
    if form not in TRAINED:
        raise ValueError(f"form must be one of {', '.join(TRAINED)}, got {form!r}")
    model.requires_grad_(form == "full")
    if form == "full":
        return list(model.parameters())
    linears = [module for _, module in _named(model, _KV if form == "kv" else _LORA, nn.Linear)]
    if form == "kv":
        return [parameter for linear in linears for parameter in linear.requires_grad_().parameters()]
    added = []
    for linear in linears:
        lower = LowRank(linear.weight, rank, alpha)  # type: ignore[arg-type]
        parametrize.register_parametrization(linear, "weight", lower)
        added += list(lower.parameters())
    return added


def only_rows(embedding: nn.Embedding, rows: Sequence[int]) -> Any:
    """Only these words' vectors have a gradient from now on; the handle's `remove()` ends it.

    Args:
        embedding: whose weight is trained.
        rows: numbers of the placeholders.
    """
    kept = torch.zeros(embedding.num_embeddings, 1)
    kept[list(rows)] = 1
    return embedding.weight.requires_grad_().register_hook(lambda gradient: gradient * kept.to(gradient))


def add_words(tokenizer: Any, text_encoder: nn.Module, words: Mapping[str, str]) -> list[int]:
    """Placeholders that a tokenizer and a text encoder of transformers know from now on; their numbers.

    Args:
        tokenizer, text_encoder: of the diffusion model.
        words: placeholder -> the class's word, whose vector it starts from.

    Raises:
        ValueError: if the tokenizer has a placeholder already, or makes several pieces of a class's word.
    """
    pieces = {word: tokenizer.encode(start, add_special_tokens=False) for word, start in words.items()}
    several = [words[word] for word, ids in pieces.items() if len(ids) != 1]
    if several:
        raise ValueError(f"a class's word must be one token, and the tokenizer makes several of {several[0]!r}")
    if tokenizer.add_tokens(list(words)) != len(words):
        raise ValueError(f"placeholders must be new to the tokenizer, got {', '.join(words)}")
    text_encoder.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    numbers = [int(tokenizer.convert_tokens_to_ids(word)) for word in words]
    with torch.no_grad():
        weight = text_encoder.get_input_embeddings().weight  # type: ignore[operator]
        for number, (start,) in zip(numbers, pieces.values(), strict=True):
            weight[number] = weight[start]
    return numbers


def word_places(input_ids_BT: Tensor, words_BJ: Tensor) -> Tensor:
    """Where each subject's word first stands in its prompt, (B, J): `tokens` of `refinement`.

    Args:
        input_ids_BT: of the prompts.
        words_BJ: number of the placeholder of each subject; -1 for none, whose place is 0.

    Raises:
        ValueError: if a prompt lacks its placeholder, as where the tokenizer does not know it.
    """
    is_BJT = input_ids_BT[:, None] == words_BJ[..., None]
    lacking = words_BJ[~is_BJT.any(2) & (words_BJ >= 0)]
    if len(lacking):
        raise ValueError(f"prompts must have their placeholders, and one lacks number {int(lacking[0])}: see add_words")
    return is_BJT.to(torch.uint8).argmax(2)


def _named(model: nn.Module, patterns: Sequence[str], kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    found = [
        (name, module)
        for pattern in patterns
        for name, module in model.named_modules()
        if fnmatch.fnmatch(name, pattern) and isinstance(module, kind)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that is named like {' or '.join(patterns)}")
    return found


def _read(
    maps: list[Tensor],
    name: str,
    layer: SoftmaxLayer,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    pixels_BPC = args[0] if args else kwargs["hidden_states"]
    words_BTC = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    if words_BTC is None:
        raise ValueError(f"{name} must be cross attention, and gets no encoder_hidden_states")
    q_BHPD, k_BHTD = (
        F.linear(x, weight, bias).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for x, (weight, bias) in ((pixels_BPC, layer.q), (words_BTC, layer.k))
    )
    maps.append((q_BHPD @ k_BHTD.mT * layer.head_dim**-0.5).softmax(-1))
