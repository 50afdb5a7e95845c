"""A draft for a language model, trained here: what the model itself says behind windows of a text is learned from.

    target = Target(model, train_N, held_N);  draft = trained(target, network, steps=400, folder=...)

What the target said is kept in `folder`, chunk by chunk, and the draft's training from time to time, so that whoever
was interrupted goes on where they were.

Shape letters: B texts, P tokens of a prompt, N tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from saccade.layers.packed import can_pack, packed
from saccade.layers.proposals import Drafter, Speculated
from saccade.layers.speculation import Speculative
from saccade.models.dream import DreamDraft, DreamDrafter, Sample, fit_draft, record
from saccade.ops.autocast import has_bfloat16
from saccade.ops.folder import write_bytes
from saccade.train.data import generator_at
from saccade.train.progress import track

__all__ = [
    "LESSON",
    "Decoded",
    "Target",
    "decoded",
    "draft_arguments",
    "drafter",
    "giving_attentions",
    "quick_products",
    "start_as",
    "trained",
]

#: texts that are made at a time
ROWS = 24
#: steps between two checkpoints
CHECKPOINT = 25
#: how a draft is taught on a small machine, of `fit_draft`
LESSON: dict[str, Any] = {"over": "sum", "p_weight": 0.3, "noise": 0.05, "second": False, "clip": 1.0}


@dataclass
class Target:
    """A language model of transformers, and what it says behind windows of a text.

    Attributes:
        model: the target.
        train_N, held_N: a text's tokens, to learn from and to judge on.
        prompt, new: tokens of a window, and of what the model says behind it.
        folder: where what it said is kept; None keeps it in memory alone.
    """

    model: Any
    train_N: Tensor
    held_N: Tensor
    prompt: int = 24
    new: int = 72
    folder: Path | None = None
    _chunks: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def narrow(self) -> Any:
        """The model in bfloat16 where the machine multiplies in it: what it says to be learned from comes sooner."""
        return copy.deepcopy(self.model).to(torch.bfloat16) if has_bfloat16() else self.model

    @cached_property
    def vocabulary(self) -> Tensor:
        """The tokens that the text to learn from has; others are not proposed."""
        return self.train_N.unique()

    @property
    def head_arguments(self) -> dict[str, Any]:
        """`draft_arguments` of the model."""
        return draft_arguments(self.model)

    def prompts(self, count: int, generator: torch.Generator, judge: bool = False) -> Tensor:
        """Windows of the text, (count, P)."""
        text_N = self.held_N if judge else self.train_N
        first_B = torch.randint(len(text_N) - self.prompt, (count,), generator=generator)
        return text_N[first_B[:, None] + torch.arange(self.prompt)]

    def sample(self, number: int, rows: Tensor) -> Sample:
        """Rows of a chunk of texts to learn from."""
        held = self._chunk(number)
        embeds = self.model.get_input_embeddings()(held["ids"][rows])
        features, mid = (held[name][rows].to(embeds.dtype) for name in ("features", "mid"))
        return Sample(embeds, features, mid, torch.ones(embeds.shape[:2], dtype=torch.bool))

    @torch.no_grad()
    def _chunk(self, number: int) -> dict[str, Tensor]:
        if number in self._chunks:
            return self._chunks[number]
        file = None if self.folder is None else self.folder / f"texts-{number}.safetensors"
        if file is not None and file.is_file():
            held = load_file(file)
        else:
            prompts = self.prompts(ROWS, generator_at(0, number, 0))
            model = self.narrow
            with quick_products(model, rows=ROWS):
                ids = model.generate(
                    prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=self.new,
                    min_new_tokens=self.new, do_sample=False, pad_token_id=0,
                )  # fmt: skip
            with giving_attentions(model):
                said = record(model, input_ids=ids)
            held = {"ids": ids, "features": said.features.bfloat16(), "mid": said.mid.bfloat16()}
            if file is not None:
                write_bytes(file, save({name: tensor.contiguous() for name, tensor in held.items()}))
        self._chunks[number] = held
        return held


def draft_arguments(model: Any) -> dict[str, Any]:
    """A draft's constructor arguments that are its target's own.

    Args:
        model: of transformers, of LLaMA's layout.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)}
    return {
        "dim": config.hidden_size,
        "hidden": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "eps": config.rms_norm_eps,
        "rope_base": float(rope["rope_theta"]),
    }


def quick_products(model: nn.Module, rows: int = 8) -> AbstractContextManager[Any]:
    """`packed`, where the model's matrices can be packed; else nothing.

    Args:
        model: any network.
        rows: of the products, about.
    """
    packs = any(type(module) is nn.Linear and can_pack(module.weight) for module in model.modules())
    return packed(model, rows=rows) if packs else nullcontext()


class giving_attentions:
    """The model's attention in the form that gives its weights, for a while.

    Args:
        model: of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.former = model, model.config._attn_implementation

    def __enter__(self) -> None:
        self.model.set_attn_implementation("eager")

    def __exit__(self, *raised: object) -> None:
        self.model.set_attn_implementation(self.former)


@torch.no_grad()
def start_as(draft: DreamDraft, model: Any) -> DreamDraft:
    """Begin as the target's first and last layer, with gates half open; what reads features looks for its own token.

    The target's embedding and features agree where a feature foretold a token, as its head is often its embedding; so
    queries and keys of the middle layer begin as one projection.

    Args:
        draft: of the target's width, heads and inner width; is changed.
        model: the target, of LLaMA's layout.

    Raises:
        ValueError: if it has another layout.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None or not hasattr(layers[0], "self_attn") or not hasattr(layers[0].mlp, "gate_proj"):
        raise ValueError(f"the target must have LLaMA's layers, got {type(decoder).__name__}")
    size = decoder.get_input_embeddings().weight.square().mean(-1).sqrt().mean()
    for block, theirs in ((draft.first, layers[0]), (draft.last, layers[-1])):
        block.mlp.load_state_dict(theirs.mlp.state_dict())
        block.post_attention_layernorm.load_state_dict(theirs.post_attention_layernorm.state_dict())
        ours: Any = block.self_attn
        ours.out_proj.load_state_dict(theirs.self_attn.o_proj.state_dict())
        scale = theirs.input_layernorm.weight / size  # the draft's first layer has no norm
        if isinstance(block.input_layernorm, nn.RMSNorm):
            block.input_layernorm.load_state_dict(theirs.input_layernorm.state_dict())
            scale = torch.ones_like(scale)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(ours, name).weight.copy_(getattr(theirs.self_attn, name).weight * scale)
    draft.norm.load_state_dict(decoder.norm.state_dict())
    read = draft.features.cross_attn
    nn.init.orthogonal_(read.k_proj.weight)
    by_head = read.k_proj.weight.unflatten(0, (read.num_kv_heads, 1, -1))
    groups = read.num_heads // read.num_kv_heads
    read.q_proj.weight.copy_(by_head.expand(-1, groups, -1, -1).flatten(0, 2))
    draft.features.cross_attn_attn_gate.fill_(0.5)
    draft.features.cross_attn_mlp_gate.fill_(0.5)
    return draft


def trained(
    target: Target,
    draft: DreamDraft,
    *,
    steps: int = 1200,
    batch: int = 8,
    passes: int = 6,
    lr: float = 1e-3,
    seed: int = 0,
) -> DreamDraft:
    """Train a draft in place, or go on with its training, or read it from the target's folder where it is done.

    Args:
        target: who is imitated.
        draft: of `start_as`.
        steps, batch, lr: of the training.
        passes: how often each text is learned from; the fewer, the more texts there must be.
        seed: of all that is random.
    """
    file = None if target.folder is None else target.folder / f"draft-{seed}-{steps}-{batch}-{passes}.pt"
    optimizer, done = torch.optim.AdamW(draft.parameters(), lr, (0.9, 0.95), weight_decay=0.0), 0
    if file is not None and file.is_file():
        kept = torch.load(file, weights_only=True)
        draft.load_state_dict(kept["draft"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["done"]
    chunks = max(1, -(-steps * batch // (ROWS * passes)))

    def samples(first: int, last: int) -> Iterator[Sample]:
        for step in track(range(first, last), f"training the draft, from step {first} of {steps}"):
            generator = generator_at(seed, step, 0)
            number = int(torch.randint(chunks, (), generator=generator))
            yield target.sample(number, torch.randperm(ROWS, generator=generator)[:batch])

    while done < steps:
        last = min(steps, done + CHECKPOINT)
        fit_draft(
            draft, target.model, samples(done, last), lr=lr, warmup=min(20, steps // 10), steps=steps,
            vocabulary=target.vocabulary, optimizer=optimizer, done=done,
            autocast=torch.bfloat16 if has_bfloat16() else None, **LESSON,
        )  # fmt: skip
        done = last
        if file is not None:
            half = file.with_suffix(".half")
            torch.save({"draft": draft.state_dict(), "optimizer": optimizer.state_dict(), "done": done}, half)
            half.replace(file)
    return draft.eval()


@dataclass
class Decoded:
    """Greedy texts, and what they took.

    Attributes:
        texts: the tokens, prompts and all, a text each.
        seconds: in all.
        tokens: that are new.
        report: of the speculation; None without.
    """

    texts: list[Tensor]
    seconds: float
    tokens: int
    report: Speculated | None = None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def decoded(model: Any, prompts_BP: Tensor, new: int, drafter: Drafter | None = None, **options: Any) -> Decoded:
    """Greedy texts behind prompts, one after the other.

    Args:
        model: of transformers.
        prompts_BP: tokens.
        new: tokens for each.
        drafter: speculates; None generates plainly.
        **options: of `generate`.
    """
    wrapper = None if drafter is None else Speculative(model, drafter)
    report = None if wrapper is None else wrapper.__enter__()
    texts, start = [], time.perf_counter()
    try:
        for prompt in prompts_BP:
            given = {"attention_mask": torch.ones_like(prompt[None]), "pad_token_id": 0, **options}
            texts.append(model.generate(prompt[None], max_new_tokens=new, do_sample=False, **given)[0])
        seconds = time.perf_counter() - start
    finally:
        if wrapper is not None:
            wrapper.__exit__()
    return Decoded(texts, seconds, sum(len(text) - prompts_BP.shape[1] for text in texts), report)


def drafter(draft: DreamDraft, target: Target, **tree: Any) -> DreamDrafter:
    """The draft as it is used on a machine without much arithmetic: small trees, and the text's own vocabulary.

    It is a copy in bfloat16 where the machine multiplies in it: no proposal changes what the target says.

    Args:
        draft: the network.
        target: for its text.
        **tree: what is to differ from `SMALL_TREE`.
    """
    quick = copy.deepcopy(draft).to(torch.bfloat16) if has_bfloat16() else draft
    return DreamDrafter(quick, vocabulary=target.vocabulary, **{**SMALL_TREE, **tree})


#: two cores pay for each node of a pass, so that trees are small
SMALL_TREE: dict[str, Any] = {"total_tokens": 6, "depth": 2, "top_k": 3}
