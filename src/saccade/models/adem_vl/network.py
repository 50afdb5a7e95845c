"""A language model of LLaMA's blocks that sees through CLIP, in each block beside its feed-forward network.

    h' = h + attention(norm(h)),     h'' = h' + feed_forward(u) + alpha fused(u),     u = norm(h')

Shape letters: B batch, T tokens, D their width or that of a head, P inserted tokens, N patches or rows of beams,
C their width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.cache import LayerCaches
from saccade.layers.clip import ClipVision
from saccade.layers.llama import Llama, LlamaAttention, LlamaBlock, LlamaLM
from saccade.models.adem_vl.fusion import VisualFusion, VisualMemory
from saccade.models.beams import Said
from saccade.models.captioning import Captioner, CaptionOutput


class NeighbourAttention(LlamaAttention):
    """LLaMA's attention with the rotary positions of its own release: channel 2i turns with channel 2i + 1."""

    def rotate(self, x_BHND: Tensor, positions: Tensor) -> Tensor:
        return super().rotate(torch.cat([x_BHND[..., 0::2], x_BHND[..., 1::2]], -1), positions)


class AdaptedMLP(nn.Module):
    """A block's MLP with an adapter beside it: mlp(x) + scale W2 dropout(gelu(W1 x)).

    Args:
        mlp: of the block.
        dim: of x.
        hidden: of the adapter.
        scale: its factor.
        drop: its dropout.
    """

    def __init__(self, mlp: nn.Module, dim: int, hidden: int = 12, *, scale: float = 0.1, drop: float = 0.1) -> None:
        super().__init__()
        self.mlp, self.scale, self.drop = mlp, scale, nn.Dropout(drop)
        self.down, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.scale * self.up(self.drop(F.gelu(self.down(x))))


class FusedBlock(LlamaBlock):
    """A block of LLaMA beside whose feed-forward network text takes of an image, without parameters of its own for it.

    Args:
        attention, dim, hidden, arguments: as of `LlamaBlock`.
    """

    def forward(
        self,
        x_BNC: Tensor,
        *,
        fusion: Callable[[Tensor, VisualMemory], Tensor] | None = None,
        memory: VisualMemory | None = None,
        **attention: Any,
    ) -> Tensor:
        """
        Args:
            x_BNC: the stream.
            fusion, memory: of the image; nothing is fused where either is None.
            attention: what else the attention takes.
        """
        x_BNC = x_BNC + self.self_attn(self.input_layernorm(x_BNC), **attention)
        u_BNC = self.post_attention_layernorm(x_BNC)
        y_BNC = x_BNC + self.mlp(u_BNC)
        return y_BNC if fusion is None or memory is None else y_BNC + fusion(u_BNC, memory)


@dataclass
class _State:
    """What a caption that is being written knows: the image, what is yet to be inserted, the cache."""

    memory: VisualMemory
    prompt_BPD: Tensor | None
    cache: LayerCaches

    def take_rows(self, index: Tensor) -> _State:
        prompt = None if self.prompt_BPD is None else self.prompt_BPD[index]
        return _State(self.memory.take_rows(index), prompt, self.cache.take_rows(index))


class ADEMVL(Captioner):
    """Images (B, 3, H, W), or CLIP's tokens (B, 1 + N, C), and words -> logits of the next word.

    Args:
        vocab_size: V.
        dim, layers, num_heads, hidden: of the language model; `hidden` is 8 D / 3 where None.
        norm_eps: of its norms.
        rope: "neighbours", as weights of LLaMA's own release, or "halves", as transformers'.
        image_size, patch, clip_dim, clip_layers, clip_heads: of CLIP's image tower; its last block is left out, so
            that one less is built.
        adapter_dim: of the adapters in it; 0 for none.
        projector_dim, scales, alpha, beta, drop_ratio, class_prompt: of `VisualFusion`.
        adapter_scale: s of CLIP's adapters.
        begin, end, pad: words; see `Captioner`.

    Raises:
        ValueError: if heads do not divide, patches do not fill the image, or a number is out of range.
    """

    slug = "adem-vl"

    def __init__(
        self,
        vocab_size: int = 32000,
        dim: int = 4096,
        layers: int = 32,
        num_heads: int = 32,
        hidden: int | None = 11008,
        *,
        norm_eps: float = 1e-6,
        rope: str = "neighbours",
        image_size: int = 224,
        patch: int = 14,
        clip_dim: int = 1024,
        clip_layers: int = 24,
        clip_heads: int = 16,
        adapter_dim: int = 12,
        adapter_scale: float = 0.1,
        projector_dim: int = 128,
        scales: Sequence[int] = (256, 64),
        alpha: float = 0.1,
        beta: float = 0.01,
        drop_ratio: float = 0.1,
        class_prompt: bool = True,
        begin: int = 1,
        end: int = 2,
        pad: int = 0,
    ) -> None:
        super().__init__()
        if rope not in ("neighbours", "halves"):
            raise ValueError(f"rope must be neighbours or halves, got {rope!r}")
        if layers < 1 or clip_layers < 1:
            raise ValueError(f"layers and clip_layers must be positive, got {layers} and {clip_layers}")
        self.see_through()
        self.vocab_size, self.begin, self.end, self.pad = vocab_size, begin, end, pad
        self.image_size = (image_size, image_size)
        attention = NeighbourAttention if rope == "neighbours" else LlamaAttention
        blocks = [FusedBlock(attention(dim, num_heads), dim, hidden, eps=norm_eps) for _ in range(layers)]
        self.language = LlamaLM(Llama(vocab_size, dim, blocks=blocks, eps=norm_eps))
        self.vision = ClipVision(
            image_size=image_size, patch=patch, dim=clip_dim, depth=clip_layers - 1, num_heads=clip_heads,
            embed_dim=None,
        )  # fmt: skip
        seeing: Any = self.vision.blocks if adapter_dim else ()
        for block in seeing:
            block.mlp = AdaptedMLP(block.mlp, clip_dim, adapter_dim, scale=adapter_scale)
        self.fusion = VisualFusion(
            dim, clip_dim, hidden=projector_dim, scales=scales, alpha=alpha, beta=beta, drop_ratio=drop_ratio,
            class_prompt=class_prompt,
        )  # fmt: skip

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of what the paper trains: adapters, projectors and the shared embeddings."""
        for name, parameter in self.named_parameters():
            if name.startswith("fusion.") or ".mlp.down." in name or ".mlp.up." in name:
                yield name, parameter

    def freeze(self) -> ADEMVL:
        """Let only `learned` want gradients."""
        self.requires_grad_(False)
        for _, parameter in self.learned():
            parameter.requires_grad_(True)
        return self

    def seen(
        self, pixel_values: Tensor | None, batch: int, present_B: Tensor | None = None
    ) -> tuple[VisualMemory, Tensor | None]:
        """What all blocks look at, and the class token's embedding (B, 1, D), None where there is none.

        Args:
            pixel_values: images, their tokens by CLIP, or None for texts without images.
            batch: B.
            present_B: 1 where a text has an image; all have one where None.

        Raises:
            ValueError: if they are neither images nor such tokens, or not as many as the texts.
        """
        if pixel_values is None:
            return self.fusion.without_image(batch), None
        tokens_BNC = pixel_values
        if pixel_values.ndim == 4:
            tokens_BNC = self.vision.tokens(pixel_values)
        if tokens_BNC.ndim != 3 or tokens_BNC.shape[2] != self.vision.dim or len(tokens_BNC) != batch:
            raise ValueError(
                f"pixel_values must be {batch} images (batch, 3, height, width) or tokens (batch, 1 + patches, "
                f"{self.vision.dim}), got {tuple(pixel_values.shape)}"
            )
        projector = self.fusion.class_projector
        prompt_B1D = None if projector is None else projector(tokens_BNC[:, :1])
        return self.fusion.remember(tokens_BNC[:, 1:], present_B), prompt_B1D

    def say(self, embeds_BTD: Tensor, memory: VisualMemory, cache: LayerCaches | None = None) -> Tensor:
        """Logits (B, T, V) of what follows each token."""
        return self.language(embeds_BNC=embeds_BTD, fusion=self.fusion, memory=memory, cache=cache)

    def words(self, ids: Tensor) -> Tensor:
        """Embeddings of words."""
        return self.language.model.embed_tokens(ids)

    def forward(self, pixel_values: Tensor | None, captions: Tensor) -> CaptionOutput:
        """The logits of each word of captions: the class token stands behind the first word, `begin`.

        Args:
            pixel_values: images (B, 3, H, W), CLIP's tokens (B, 1 + N, C), or None: texts without images.
            captions: (B, T), words.

        Raises:
            ValueError: if images and captions do not fit together, or the network.
        """
        self.check_captions(pixel_values, captions)
        memory, prompt = self.seen(pixel_values, len(captions))
        given = self.begun(captions)
        parts = [self.words(given[:, :1])] if self.begin >= 0 else []
        parts += [] if prompt is None else [prompt]
        if not parts:
            raise ValueError("without a first word (begin) a caption needs an image and its class token")
        embeds_BTD = torch.cat([*parts, self.words(given[:, 1:])], 1)
        return CaptionOutput(self.say(embeds_BTD, memory)[:, len(parts) - 1 :])

    def start(self, pixel_values: Tensor | None) -> _State:
        if pixel_values is None:
            raise ValueError("pixel_values must be images or their tokens; a text without one is for forward or read")
        memory, prompt = self.seen(pixel_values, len(pixel_values))
        return _State(memory, prompt, self.language.model.new_cache(len(pixel_values)))

    def advance(self, words_N: Tensor, state: _State) -> tuple[Said, _State]:
        parts = [self.words(words_N.clamp(min=0))[:, None]] if self.begin >= 0 or state.cache.length else []
        if state.cache.length == 0 and state.prompt_BPD is not None:
            parts.append(state.prompt_BPD)
        if not parts:
            raise ValueError("without a first word (begin) a caption needs an image and its class token")
        logits_NTV = self.say(torch.cat(parts, 1), state.memory, state.cache)
        return Said(logits_NTV[:, -1]), state

    def read(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        present: Tensor | None = None,
        image_words: Tensor | None = None,
        no_image_words: Tensor | None = None,
        labels: Tensor | None = None,
        ignore: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of instructions and answers, and the loss of the answers, as the authors train.

        Behind the first word come `image_words` ("Image: ") and the class token, or `no_image_words` ("Image: N/A");
        what is pushed beyond the length of `input_ids`, or lies after the last label, is cut off.

        Args:
            input_ids: (B, T), the first of each the word that begins a text.
            pixel_values: an image for each text, of those without one anything; or None.
            present: (B,), 1 where a text has an image; all have one where None.
            image_words, no_image_words: ids (P,).
            labels: (B, T), the words that count, at their own places, and `ignore` elsewhere.
            ignore: of labels.

        Returns:
            logits (B, T', V), of what follows each token, and the loss; None without labels.

        Raises:
            ValueError: if images and texts do not fit together, `present` says that there are images and there are
                none, or no label is left.
        """
        B, T = input_ids.shape
        if pixel_values is None and present is not None and bool(present.any()):
            raise ValueError("present says that texts have images, got no pixel_values")
        memory, prompt = self.seen(pixel_values, B, present)
        if pixel_values is None:
            present = input_ids.new_zeros(B)
        text_BTD = self.words(input_ids)
        there = [True] * B if present is None else [bool(each) for each in present.tolist()]
        inserted = []
        for row, has_image in enumerate(there):
            words = image_words if has_image else no_image_words
            parts = [text_BTD[:0, 0] if words is None else self.words(words)] if self.fusion.class_projector else []
            inserted.append(torch.cat(parts + ([prompt[row]] if has_image and prompt is not None else []), 0)
                            if parts else text_BTD[:0, 0])  # fmt: skip
        embeds_BTD = torch.stack(
            [torch.cat([text[:1], new, text[1:]])[:T] for text, new in zip(text_BTD, inserted, strict=True)]
        )
        if labels is None:
            return self.say(embeds_BTD, memory), None
        moved_BT = torch.stack(
            [
                torch.cat([label[:1], label.new_full((len(new),), ignore), label[1:]])[:T]
                for label, new in zip(labels, inserted, strict=True)
            ]
        )
        counts_T = (moved_BT != ignore).any(0)
        if not counts_T.any():
            raise ValueError(f"labels must have words that count within {T} tokens, all lie beyond or are {ignore}")
        length = int(counts_T.nonzero()[-1]) + 1
        logits_BTV = self.say(embeds_BTD[:, :length], memory)
        loss = F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), moved_BT[:, 1:length].flatten(), ignore_index=ignore
        )
        return logits_BTV, loss
