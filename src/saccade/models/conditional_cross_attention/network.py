"""A vision transformer whose last block is conditional: one embedding of an image for each attribute.

Shape letters: B batch, C channels, H height, W width, N tokens, D their width, K attributes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.vision_transformer import VisionTransformer
from saccade.models.backbone import check_images
from saccade.models.conditional_cross_attention.head import ConditionalBlock, ConditionalHead
from saccade.models.embedding import Embedder, EmbeddingOutput

PLACEMENTS = ("replace", "append")
#: where vision transformers have their layers, and their last norm
_LAYERS, _NORMS = ("blocks", "layers", "encoder.layer"), ("layernorm", "norm")


class ConditionalViT(Embedder):
    """CCA. It is built as a plain ViT, on tokens of a given `encoder`, or by `from_vit` from a trained one.

    Args:
        num_attributes: K.
        embedding_dim, condition, projection, dropout: of `ConditionalHead`.
        placement: "replace", the last of `depth` blocks is the conditional one, or "append", it comes after them.
        encoder: a network that gives tokens (B, N, D), or transformers' output with `last_hidden_state`, the class
            token first; D is `dim`. It is taken as it is, so `placement` and `depth` do not matter.
        frozen: the encoder is not trained and stays in evaluation.
        image_size, patch, dim, depth, num_heads, hidden: of the ViT.
        block: the conditional block, of width `dim`; a new one where None.

    Raises:
        ValueError: if a number is not positive, or an option is unknown.
    """

    slug = "conditional-cross-attention"

    def __init__(
        self,
        num_attributes: int = 8,
        *,
        embedding_dim: int = 340,
        placement: str = "replace",
        condition: str = "table",
        projection: str = "singleton",
        dropout: float = 0.1,
        encoder: nn.Module | None = None,
        frozen: bool = False,
        image_size: int = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        block: ConditionalBlock | None = None,
    ) -> None:
        super().__init__()
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        self.image_size = (image_size, image_size)
        self.encoder = encoder if encoder is not None else VisionTransformer(
            image_size=image_size, patch=patch, dim=dim, depth=depth - (placement == "replace"), num_heads=num_heads,
            hidden=hidden,
        )  # fmt: skip
        self.head = ConditionalHead(
            num_attributes, dim, num_heads=num_heads, hidden=hidden, dropout=dropout, embedding_dim=embedding_dim,
            condition=condition, projection=projection, block=block,
        )  # fmt: skip
        if frozen:
            self.freeze(self.encoder)

    @classmethod
    def from_vit(
        cls,
        vit: nn.Module,
        num_attributes: int,
        *,
        placement: str = "replace",
        dropout: float = 0.1,
        **arguments: Any,
    ) -> ConditionalViT:
        """On a trained vision transformer: transformers' ViTModel or Dinov2Model, or a `VisionTransformer`.

        Its last norm becomes the head's. Replaced, its last layer becomes the conditional block, with its weights; the
        size is that of the plain ViT then. The given one is left as it is.

        Args:
            vit: as it came.
            num_attributes: K.
            placement: see the class.
            dropout: of the block.
            arguments: the constructor's others.

        Raises:
            ValueError: if it has no layers of that kind.
        """
        encoder = copy.deepcopy(vit)
        layers = next((found for path in _LAYERS if isinstance(found := _at(encoder, path), nn.ModuleList)), None)
        if not layers:
            raise ValueError(f"{type(vit).__name__} has no layers of a vision transformer ({', '.join(_LAYERS)})")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        block = ConditionalBlock.from_layer(layers[-1], dropout=dropout)
        if placement == "replace":
            del layers[-1]
        else:
            block = ConditionalBlock(
                block.attention.dim, block.attention.num_heads, block.mlp.fc1.out_features, dropout=dropout
            )  # fmt: skip
        norm = None
        for name in _NORMS:
            if isinstance(getattr(encoder, name, None), nn.LayerNorm):
                norm = getattr(encoder, name)
                setattr(encoder, name, nn.Identity())
        model = cls(num_attributes, encoder=encoder, dim=block.attention.dim, dropout=dropout, block=block, **arguments)
        if norm is not None:
            model.head.norm = norm
        return model

    def tokens(self, x_BCHW: Tensor) -> Tensor:
        """The tokens (B, N, D) that the conditions see.

        Raises:
            ValueError: if the encoder gives none.
        """
        check_images(x_BCHW, 3)
        said = self.encoder(x_BCHW)
        tokens_BND = getattr(said, "last_hidden_state", said)
        if not isinstance(tokens_BND, Tensor):
            raise ValueError(f"the encoder must give tokens (batch, tokens, channels), got {type(said).__name__}")
        return tokens_BND

    def embed(self, x_BCHW: Tensor, condition: Tensor | None = None) -> EmbeddingOutput:
        embedding = F.normalize(self.head(self.tokens(x_BCHW), condition), dim=-1)
        return EmbeddingOutput(embedding) if condition is not None else EmbeddingOutput(embedding[:, 0], embedding)

    def forward(self, pixel_values: Tensor, condition: Tensor | None = None) -> EmbeddingOutput:
        """
        Args:
            pixel_values: images (B, 3, H, W), or sets of views of one thing (B, V, 3, H, W).
            condition: (B,) the attribute of each whose embedding is wanted, -1 for an unknown one; None gives the
                `spaces` of all, of which the first is the `embedding`.

        Raises:
            ValueError: if the images or the condition are not such.
        """
        if condition is None:
            return super().forward(pixel_values)
        views = pixel_values.shape[1] if pixel_values.ndim == 5 else 1
        if views < 1 or condition.shape != pixel_values.shape[:1]:
            raise ValueError(
                f"condition must be one number for each of {len(pixel_values)} images or sets of them, got "
                f"{tuple(condition.shape)} of {tuple(pixel_values.shape)}"
            )
        if pixel_values.ndim != 5:
            return self.embed(pixel_values, condition)
        return self.fuse(self.embed(pixel_values.flatten(0, 1), condition.repeat_interleave(views)), views)


def _at(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
