"""Networks that make one vector of an image, a text, or both, so that what belongs together is found.

Shape letters: B batch, L words, C channels, H height, W width, Q queries, G items of a gallery, k of them, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saccade.models.embedding import Embedder, EmbeddingOutput


class Retriever(Embedder):
    """Base of the networks that embed images, texts, and images with texts; a subclass gives `vector`.

    Args of the call are transformers': `pixel_values` (B, C, H, W), `input_ids` (B, L) and `attention_mask` (B, L).
    """

    def vector(self, pixel_values: Tensor | None, input_ids: Tensor | None, mask_BL: Tensor | None) -> EmbeddingOutput:
        """The vector of documents of which something is there.

        Args:
            pixel_values: images, or None.
            input_ids: words, or None.
            mask_BL: bool, True = real word; of `input_ids`.

        Raises:
            ValueError: if the network cannot do with what there is.
        """
        raise NotImplementedError

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> EmbeddingOutput:
        """
        Args:
            pixel_values: images (B, C, H, W), or sets of views of one thing (B, V, C, H, W) where there is no text.
            input_ids: words (B, L).
            attention_mask: (B, L), not 0 = real word; all are where None.

        Raises:
            ValueError: if there is neither image nor text, a mask without text, or batches differ.
        """
        mask_BL = documents(pixel_values, input_ids, attention_mask)
        if pixel_values is not None and pixel_values.ndim == 5 and input_ids is None:
            return super().forward(pixel_values)
        return self.vector(pixel_values, input_ids, mask_BL)

    def embed(self, x_BCHW: Tensor) -> EmbeddingOutput:
        """Images without text."""
        return self.vector(x_BCHW, None, None)


def documents(pixel_values: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Which words are real, of documents that have an image, a text, or both.

    Args:
        pixel_values, input_ids, attention_mask: as `Retriever` is called.

    Raises:
        ValueError: as there.
    """
    if pixel_values is None and input_ids is None:
        raise ValueError("a document must have an image or a text: give pixel_values, input_ids or both")
    if pixel_values is not None and input_ids is not None and len(pixel_values) != len(input_ids):
        raise ValueError(f"there must be an image for each text, got {len(pixel_values)} and {len(input_ids)}")
    return words_there(input_ids, attention_mask)


def words_there(input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Which words are real, bool (B, L); None where there is no text.

    Raises:
        ValueError: if the ids are no (batch, words), the mask has another shape or no text, or a text has no word.
    """
    if input_ids is None:
        if attention_mask is not None:
            raise ValueError("attention_mask is given without input_ids")
        return None
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, words), got {tuple(input_ids.shape)}")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} as input_ids, got {tuple(attention_mask.shape)}"
        )
    return attention_mask != 0


def nearest(query_QD: Tensor, gallery: Tensor | Mapping[str, Tensor], k: int = 5) -> Tensor | list[list[str]]:
    """The `k` items of the gallery that are nearest to each query, the nearest first.

    Args:
        query_QD: of unit length.
        gallery: (G, D) of unit length, or vectors (D,) by the items' names.
        k: how many; all where the gallery has fewer.

    Returns:
        numbers (Q, k), or names where the gallery has names.

    Raises:
        ValueError: if widths differ, the gallery is empty or `k` is not positive.

    >>> nearest(torch.tensor([[0.0, 1.0]]), {"east": torch.tensor([1.0, 0.0]), "north": torch.tensor([0.0, 1.0])}, k=1)
    [['north']]
    """
    if not len(gallery) or k < 1:
        raise ValueError(f"gallery must have items and k be positive, got {len(gallery)} items and k = {k}")
    vectors_GD = gallery if isinstance(gallery, Tensor) else torch.stack(list(gallery.values()))
    if query_QD.ndim != 2 or vectors_GD.ndim != 2 or query_QD.shape[1] != vectors_GD.shape[1]:
        raise ValueError(
            f"queries and gallery must be (items, width) of one width, got {tuple(query_QD.shape)} and "
            f"{tuple(vectors_GD.shape)}"
        )
    found_Qk = (query_QD @ vectors_GD.T).topk(min(k, len(vectors_GD)), dim=1).indices
    if isinstance(gallery, Tensor):
        return found_Qk
    names = list(gallery)
    return [[names[number] for number in row] for row in found_Qk.tolist()]
