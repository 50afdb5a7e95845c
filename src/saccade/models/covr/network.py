"""CoVR's networks: the text encoder that looks at a shifted reference, and the whole with its vision tower.

Shape letters: B batch, P image tokens, V vision width, L words, C text width, E width of the embedding, H, W image,
F frames of a video, Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue.names import Names
from saccade.layers.bert import BERT, Bert
from saccade.layers.vision_transformer import VisionTransformer
from saccade.models.backbone import check_images
from saccade.models.embedding import EmbeddingOutput
from saccade.models.retrieval import Retriever, documents, words_there

if TYPE_CHECKING:
    from typing_extensions import Self


class ComposedQuery(nn.Module):
    """z = norm(W_t h_0), h = BERT(modification text, looking at I + W_p g_0), g = BERT(description).

    Args:
        vocabulary, dim, depth, num_heads, hidden, positions, drop: of `saccade.layers.bert.Bert`.
        vision_dim: V.
        embed_dim: E.
        encode_token: the word that stands first where the encoder looks at an image; None leaves what is there.
        encode_description: put it first in descriptions too, as the authors do when they test.

    Raises:
        ValueError: if `encode_token` is no word, or is needed and None, or as `Bert` does.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 30524,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        positions: int = 512,
        vision_dim: int = 1024,
        embed_dim: int = 256,
        drop: float = 0.1,
        encode_token: int | None = 30523,
        encode_description: bool = False,
    ) -> None:
        super().__init__()
        if encode_token is not None and not 0 <= encode_token < vocabulary:
            raise ValueError(f"encode_token must be one of {vocabulary} words, got {encode_token}")
        if encode_description and encode_token is None:
            raise ValueError("encode_description needs an encode_token, got None")
        self.encode_token, self.encode_description = encode_token, encode_description
        self.text = Bert(
            vocabulary, dim=dim, depth=depth, num_heads=num_heads, hidden=hidden, context_dim=vision_dim,
            positions=positions, types=0, drop=drop,
        )  # fmt: skip
        self.prompt_proj, self.text_proj = nn.Linear(dim, vision_dim), nn.Linear(dim, embed_dim)

    def describe(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """The embedding p (B, V) of a description.

        Args:
            ids_BL: words.
            mask_BL: bool, True = real word.
        """
        ids_BL = self.grounded(ids_BL) if self.encode_description else ids_BL
        return self.prompt_proj(self.text(ids_BL, mask=mask_BL)[:, 0])

    def forward(
        self,
        tokens_BPV: Tensor | None,
        ids_BL: Tensor,
        mask_BL: Tensor | None = None,
        description_BL: Tensor | None = None,
        description_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """W_t h_0 (B, E), of which the query is the direction.

        Args:
            tokens_BPV: of the reference; None asks by the text alone.
            ids_BL, mask_BL: the modification text.
            description_BL, description_mask_BL: what describes the reference; None shifts nothing.
        """
        if tokens_BPV is None:
            return self.text_proj(self.text(ids_BL, mask=mask_BL)[:, 0])
        if description_BL is not None:
            tokens_BPV = tokens_BPV + self.describe(description_BL, description_mask_BL)[:, None]
        return self.text_proj(self.text(self.grounded(ids_BL), tokens_BPV, mask=mask_BL)[:, 0])

    def grounded(self, ids_BL: Tensor) -> Tensor:
        """The words with `encode_token` first."""
        if self.encode_token is None:
            return ids_BL
        return torch.cat([torch.full_like(ids_BL[:, :1], self.encode_token), ids_BL[:, 1:]], 1)


class CoVR(Retriever):
    """A vector for a reference with a modification text, and one for what it may be.

    An image, or the frames of a video, without text is something to be found: the direction of W_v times its class
    token, of several frames their mean direction. With a text it is a query, of a video its middle frame is looked at.
    A text alone is a query too.

    Args:
        vision: tokens (B, P, V) of images, the class token first, or transformers' vision tower of that width; a ViT
            of these sizes where None.
        image_size, patch, vision_dim, vision_depth, vision_heads: of the ViT; `image_size` is also the side to which
            files are scaled.
        frozen: what embeds targets is not trained, as in the paper.
        embed_dim: E.
        **text: of `ComposedQuery`.
    """

    slug = "covr"
    authors_module = "composed_query"
    authors_part = "query"

    def __init__(
        self,
        *,
        vision: nn.Module | None = None,
        image_size: int = 384,
        patch: int = 16,
        vision_dim: int = 1024,
        vision_depth: int = 24,
        vision_heads: int = 16,
        embed_dim: int = 256,
        frozen: bool = True,
        **text: Any,
    ) -> None:
        super().__init__()
        self.image_size = (image_size, image_size)
        if vision is None:
            trunk = VisionTransformer(
                image_size=image_size, patch=patch, dim=vision_dim, depth=vision_depth, num_heads=vision_heads
            )
            vision = nn.Sequential(trunk, nn.LayerNorm(vision_dim, 1e-6))
        self.vision, self.vision_proj = vision, nn.Linear(vision_dim, embed_dim)
        self.query = ComposedQuery(vision_dim=vision_dim, embed_dim=embed_dim, **text)
        if frozen:
            self.freeze(self.vision, self.vision_proj)

    def tokens(self, x_BCHW: Tensor) -> Tensor:
        """Image tokens (B, P, V), the class token first.

        Raises:
            ValueError: if these are no colour images.
        """
        check_images(x_BCHW, 3)
        said = self.vision(x_BCHW)
        return getattr(said, "last_hidden_state", said)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        description_ids: Tensor | None = None,
        description_mask: Tensor | None = None,
    ) -> EmbeddingOutput:
        """
        Args:
            pixel_values: images (B, 3, H, W), or videos (B, F, 3, H, W).
            input_ids, attention_mask: the modification text (B, L).
            description_ids, description_mask: what describes the reference, of any length.

        Raises:
            ValueError: if there is neither image nor text, a description without both, or shapes do not fit.
        """
        there = words_there(description_ids, description_mask)
        if there is not None and (pixel_values is None or input_ids is None):
            raise ValueError("a description needs the reference and the text: give pixel_values and input_ids too")
        if input_ids is None:
            return super().forward(pixel_values, None, attention_mask)
        mask_BL = documents(pixel_values, input_ids, attention_mask)
        return self.vector(pixel_values, input_ids, mask_BL, description_ids, there)

    def vector(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor | None,
        mask_BL: Tensor | None,
        description_ids: Tensor | None = None,
        description_mask: Tensor | None = None,
    ) -> EmbeddingOutput:
        tokens_BPV = None
        if pixel_values is not None:
            video = pixel_values.ndim == 5
            if video and not pixel_values.shape[1]:
                raise ValueError(f"a video must have a frame at least, got pixel_values {tuple(pixel_values.shape)}")
            tokens_BPV = self.tokens(pixel_values[:, pixel_values.shape[1] // 2] if video else pixel_values)
        if input_ids is None:
            assert tokens_BPV is not None
            features_BE = self.vision_proj(tokens_BPV[:, 0])
        else:
            features_BE = self.query(tokens_BPV, input_ids, mask_BL, description_ids, description_mask)
        return EmbeddingOutput(F.normalize(features_BE, dim=-1), features=features_BE)

    @classmethod
    def from_blip(cls, blip: Any, **arguments: Any) -> Self:
        """CoVR as its training starts: BLIP, with a new map for descriptions.

        Args:
            blip: transformers' `BlipForImageTextRetrieval`; its vision tower is taken over, the rest is copied.
            **arguments: of the constructor, like `encode_token`.

        Raises:
            ValueError: if this is no such model.
        """
        lacking = [
            name for name in ("vision_model", "text_encoder", "vision_proj", "text_proj") if not hasattr(blip, name)
        ]
        if lacking:
            raise ValueError(
                f"blip must be a BlipForImageTextRetrieval, this {type(blip).__name__} has no {lacking[0]}"
            )
        text, vision = blip.config.text_config, blip.config.vision_config
        sizes = {
            "vocabulary": text.vocab_size,
            "dim": text.hidden_size,
            "depth": text.num_hidden_layers,
            "num_heads": text.num_attention_heads,
            "hidden": text.intermediate_size,
            "positions": text.max_position_embeddings,
            "vision_dim": vision.hidden_size,
            "embed_dim": blip.text_proj.out_features,
            "image_size": vision.image_size,
            "encode_token": text.vocab_size - 1,
        }
        model = cls(vision=blip.vision_model, **{**sizes, **arguments})
        names = Names({**BERT.table, "pooler.{rest*}": None})
        model.query.text.load_state_dict(names(blip.text_encoder.state_dict()))
        for ours, theirs in ((model.vision_proj, blip.vision_proj), (model.query.text_proj, blip.text_proj)):
            ours.load_state_dict(theirs.state_dict())
        return model


def video_scores(query_QE: Tensor, frames_BFE: Tensor, temperature: float | None = 0.1) -> Tensor:
    """z_q . z_v (Q, B), z_v the direction of the frames' mean, weighed by how near each is to the query.

    Args:
        query_QE: of unit length.
        frames_BFE: of unit length.
        temperature: of the softmax over frames; None weighs them equally.

    Raises:
        ValueError: if the shapes do not fit, or the temperature is not positive.
    """
    if frames_BFE.ndim != 3 or query_QE.ndim != 2 or frames_BFE.shape[2] != query_QE.shape[1]:
        raise ValueError(
            "query must be (queries, width) and frames (videos, frames, width), got "
            f"{tuple(query_QE.shape)} and {tuple(frames_BFE.shape)}"
        )
    if temperature is None:
        return query_QE @ F.normalize(frames_BFE.mean(1), dim=-1).T
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    near_QBF = torch.einsum("qe,bfe->qbf", query_QE, frames_BFE)
    weight_QBF = (near_QBF / temperature).softmax(-1)
    mean_QBE = torch.einsum("qbf,bfe->qbe", weight_QBF, frames_BFE)
    return torch.einsum("qe,qbe->qb", query_QE, F.normalize(mean_QBE, dim=-1))
