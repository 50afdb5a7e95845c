"""The joint encoder: instruction, images and text as one sequence through one transformer, one vector out.

Shape letters: B batch, I images of an item, P tokens of an image, L words, N all tokens, D width, E width of the
embedding, C channels, H, W image.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.layers.vision_transformer import VisionTransformer
from saccade.models.backbone import check_images
from saccade.models.embedding import EmbeddingOutput
from saccade.models.joint_fusion_encoder.pooling import POOLINGS, packed
from saccade.models.retrieval import Retriever, documents, words_there


class JointTower(nn.Module):
    """A vision-language transformer in small: words and projected image tokens in one sequence -> its states.

    Args:
        vocabulary: words.
        dim, depth, num_heads, hidden: D and of the blocks.
        causal: whether a token sees the later ones too.
        image_size, patch, vision_dim, vision_depth, vision_heads: of the vision tower.
        drop: of the blocks.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        hidden: int | None,
        causal: bool,
        image_size: int,
        patch: int,
        vision_dim: int,
        vision_depth: int,
        vision_heads: int,
        drop: float,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.words.weight, std=0.02)
        self.vision = VisionTransformer(
            image_size=image_size, patch=patch, dim=vision_dim, depth=vision_depth, num_heads=vision_heads
        )
        self.projector = nn.Sequential(nn.LayerNorm(vision_dim), nn.Linear(vision_dim, dim))
        self.blocks = nn.ModuleList(
            PreNormBlock(SoftmaxAttention(dim, num_heads, causal=causal), dim, hidden, drop=drop, attention_drop=drop)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def look(self, x_BCHW: Tensor) -> Tensor:
        """Visual tokens (B, P, D) of images."""
        return self.projector(self.vision(x_BCHW))

    def forward(self, x_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """The last states, real tokens being first; `mask_BN` says which they are."""
        for block in self.blocks:
            x_BND = block(x_BND, mask=mask_BN)
        return self.norm(x_BND)


class JointFusionEncoder(Retriever):
    """One vector of any of instruction, images and text.

    With a `backbone` the items are as its processor makes them: `input_ids` hold the instruction, the places of the
    images and the text, and what else the processor gives (`image_grid_thw` ...) goes into the call by name. Without
    one, a `JointTower` takes images (B, 3, H, W), or several an item in their order (B, I, 3, H, W), and the words of
    instruction and text on their own; `image_mask` says which images are there.

    Args:
        backbone: a vision-language model of transformers, with its head or without (`model.model` spares the logits).
        pooling: "last" real token's state, or the "mean" of real tokens'.
        attention: "causal", or "bidirectional", which a backbone must be itself.
        embed_dim: E, of a linear map of the pooled state; None has none.
        vocabulary, dim, depth, num_heads, hidden, image_size, patch, vision_dim, vision_depth, vision_heads, drop: of
            the `JointTower`.

    Raises:
        ValueError: if a word is unknown, or the backbone is asked to see later tokens or does not say its width.
    """

    slug = "joint-fusion-encoder"

    def __init__(
        self,
        *,
        backbone: nn.Module | None = None,
        pooling: Literal["last", "mean"] = "last",
        attention: Literal["causal", "bidirectional"] = "causal",
        embed_dim: int | None = None,
        vocabulary: int = 32000,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        image_size: int = 224,
        patch: int = 16,
        vision_dim: int = 768,
        vision_depth: int = 12,
        vision_heads: int = 12,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention must be causal or bidirectional, got {attention!r}")
        self.pooling, self.image_size = pooling, (image_size, image_size)
        self.backbone, self.tower = backbone, None
        if backbone is None:
            self.tower = JointTower(
                vocabulary, dim=dim, depth=depth, num_heads=num_heads, hidden=hidden, causal=attention == "causal",
                image_size=image_size, patch=patch, vision_dim=vision_dim, vision_depth=vision_depth,
                vision_heads=vision_heads, drop=drop,
            )  # fmt: skip
        else:
            if attention != "causal":
                raise ValueError("a backbone keeps its own attention: load one that was trained bidirectional")
            dim = _width(backbone)
        self.head = None if embed_dim is None else nn.Linear(dim, embed_dim)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        **more: Any,
    ) -> EmbeddingOutput:
        """
        Args:
            pixel_values: (B, 3, H, W) or (B, I, 3, H, W); of a backbone as its processor gives them.
            input_ids, attention_mask: (B, L), the text, or all of the sequence of a backbone.
            image_mask: (B,) or (B, I), which images are there; all are where None.
            instruction_ids, instruction_mask: what stands before the images.
            **more: what else a backbone takes.

        Raises:
            ValueError: if there is nothing to be embedded, or shapes do not fit.
        """
        if self.backbone is not None:
            return self.by_backbone(pixel_values, input_ids, attention_mask, image_mask, instruction_ids, more)
        if more:
            raise ValueError(f"{', '.join(more)}: only a backbone takes these, and there is none")
        documents(pixel_values, input_ids, attention_mask)
        return self.joined(
            self.said(instruction_ids, instruction_mask),
            self.seen(pixel_values, image_mask),
            self.said(input_ids, attention_mask),
        )

    def embed(self, x_BCHW: Tensor) -> EmbeddingOutput:
        """Images without text."""
        return self(x_BCHW)

    def said(self, ids_BL: Tensor | None, mask_BL: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Tokens of words, and which are real."""
        real_BL = words_there(ids_BL, mask_BL)
        if ids_BL is None or real_BL is None:
            return None
        assert self.tower is not None
        return self.tower.words(ids_BL), real_BL

    def seen(self, pixel_values: Tensor | None, image_mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Visual tokens of all images of an item, one after the other, and which are there."""
        if pixel_values is None:
            if image_mask is not None:
                raise ValueError("image_mask is given without pixel_values")
            return None
        assert self.tower is not None
        x_BICHW = pixel_values if pixel_values.ndim == 5 else pixel_values[:, None]
        check_images(x_BICHW.flatten(0, 1), 3)
        shape = x_BICHW.shape[:2]
        there_BI = x_BICHW.new_ones(shape, dtype=torch.bool) if image_mask is None else image_mask.view(-1, shape[1])
        if there_BI.shape != shape:
            raise ValueError(f"image_mask must be {tuple(shape)}, got {tuple(there_BI.shape)}")
        tokens_BIPD = self.tower.look(x_BICHW.flatten(0, 1)).unflatten(0, shape)
        real_BIP = (there_BI != 0)[..., None].expand(-1, -1, tokens_BIPD.shape[2])
        return tokens_BIPD.flatten(1, 2), real_BIP.flatten(1)

    def joined(self, *parts: tuple[Tensor, Tensor] | None) -> EmbeddingOutput:
        """One vector of the parts that there are, in this order."""
        given = [part for part in parts if part is not None]
        sizes = [len(tokens) for tokens, _ in given]
        if len(set(sizes)) > 1:
            raise ValueError(f"there must be an image for each text, got batches of {', '.join(map(str, sizes))}")
        assert self.tower is not None
        tokens_BND, mask_BN = packed(*(torch.cat(list(x), 1) for x in zip(*given)))
        return self.pooled(self.tower(tokens_BND, mask_BN), mask_BN)

    def by_backbone(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        image_mask: Tensor | None,
        instruction_ids: Tensor | None,
        more: dict[str, Any],
    ) -> EmbeddingOutput:
        """`forward` where there is a backbone; arguments as there."""
        assert self.backbone is not None
        mask_BL = words_there(input_ids, attention_mask)
        if mask_BL is None or image_mask is not None or instruction_ids is not None:
            raise ValueError(
                "a backbone takes input_ids, in which its processor put instruction and images: "
                "give input_ids and attention_mask, and pixel_values where there are images"
            )
        if pixel_values is not None:
            more = {"pixel_values": pixel_values, **more}
        out = self.backbone(input_ids=input_ids, attention_mask=mask_BL.long(), output_hidden_states=True, **more)
        states = getattr(out, "hidden_states", None)
        if not states:
            raise ValueError(f"{type(self.backbone).__name__} gives no hidden_states: load it as a transformers model")
        return self.pooled(states[-1], mask_BL)

    def pooled(self, states_BND: Tensor, mask_BN: Tensor) -> EmbeddingOutput:
        """One vector of the last states."""
        features_BE = POOLINGS[self.pooling](states_BND, mask_BN)
        features_BE = features_BE if self.head is None else self.head(features_BE)
        return EmbeddingOutput(F.normalize(features_BE, dim=-1), features=features_BE)


def templated(instruction: str = "", text: str = "", images: int = 0, image_token: str = "<image>") -> str:
    """An item as one text, for a backbone's processor: instruction, images, text, of which any may be missing.

    Args:
        instruction: of queries; candidates have none.
        text: of the item.
        images: how many.
        image_token: the processor's word for an image.

    Raises:
        ValueError: if there is neither image nor text.

    >>> templated("Find the same in blue.", "a cup", 1)
    'Find the same in blue. <image> a cup'
    """
    if not text and not images:
        raise ValueError("an item must have an image or a text, got neither")
    return " ".join(word for word in (instruction, *[image_token] * images, text) if word)


def _width(backbone: Any) -> int:
    config = getattr(backbone, "config", None)
    for place in (getattr(config, "text_config", None), config):
        width = getattr(place, "hidden_size", None)
        if width is not None:
            return int(width)
    raise ValueError(f"backbone must be a transformers model, this {type(backbone).__name__} has no hidden_size")
