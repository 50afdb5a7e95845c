"""A part of ours as an attention layer of a transformers language model: how it is called, and its cache.

Shape letters: B batch, N tokens, M tokens so far, C channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.vision_language import named
from saccade.ops import masks
from saccade.ops.masks import Mask
from saccade.ops.sequences import documents_of

__all__ = ["Converted", "Made", "Masks"]


class Masks:
    """What a language model was told of padding, and of sequences that are packed into rows, in the call that runs: a
    hook before its decoder keeps it.

    Args:
        decoder: the stack of blocks.

    Attributes:
        real_BM: real tokens, those in the cache too; None where all are.
        ids_BN: the number of each token's sequence; None where a row is one, and where there is a cache, as
            transformers has it.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.real_BM: Tensor | None = None
        self.ids_BN: Tensor | None = None
        self.hook = decoder.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        call = named(module, args, kwargs) if args else kwargs
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                "a converted layer takes padding alone: attention_mask must be (batch, tokens); static caches, for "
                "which generate makes masks of its own, are not for it"
            )
        self.real_BM = None if mask is None or bool(mask.all()) else mask.bool()
        self.ids_BN = None
        if mask is None and isinstance(positions, Tensor) and positions.ndim == 2:
            self.ids_BN = documents_of(positions)

    def of(self, has_cache: bool) -> Tensor | Mask | None:
        """What a part is given as its mask.

        Args:
            has_cache: whether the layer has one in this call.
        """
        if self.real_BM is not None or self.ids_BN is None or has_cache:
            return self.real_BM
        return masks.documents(self.ids_BN, self.ids_BN)


#: what a part is made of: its slug and its arguments
Made = tuple[str, Mapping[str, Any]]


class Converted(nn.Module):
    """A causal part that is called as transformers calls an attention layer.

    Args:
        part: of the catalogue, self-attention of (B, N, C).
        layer_idx: the layer's number in the model's cache.
        masks: of the model.
        made: the part's slug and arguments, by which it can be made again.
    """

    def __init__(self, part: Any, layer_idx: int, masks: Masks, made: Made) -> None:
        super().__init__()
        self.part, self.layer_idx, self.masks, self.made = part, layer_idx, masks, made
        self._caches: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # what was kept of others' caches is theirs, and weak references cannot be written
        return {name: value for name, value in self.__dict__.items() if name != "_caches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._caches = weakref.WeakKeyDictionary()

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """(B, N, C), and no weights.

        Raises:
            ValueError: if the cache was shortened, or holds other rows than before; or the part's, of a mask.
        """
        mask, cache = self.masks.of(past_key_values is not None), None
        if past_key_values is not None:
            cache = self._cache(past_key_values, hidden_states)
        out = self.part(hidden_states, **({} if mask is None else {"mask": mask}), cache=cache)
        return out, None

    def held(self, theirs: Any) -> int:
        """Bytes of what the part keeps beside a cache of the model's."""
        return int(self._caches[theirs].nbytes) if theirs in self._caches else 0

    def _cache(self, theirs: Any, x_BNC: Tensor) -> Any:
        past = theirs.get_seq_length(self.layer_idx)
        if past == 0 or theirs not in self._caches:
            self._caches[theirs] = self.part.new_cache(len(x_BNC), device=x_BNC.device, dtype=x_BNC.dtype)
        cache = self._caches[theirs]
        if cache.length != past:
            raise ValueError(
                f"a converted layer has seen {cache.length} tokens and the cache says {past}: caches that are "
                "shortened, as by assisted decoding, or copied, are not for it"
            )
        row_B = torch.arange(len(x_BNC), dtype=torch.int16, device=x_BNC.device)
        if past and not torch.equal(theirs.layers[self.layer_idx].keys[:, 0, 0, 0], row_B):
            raise ValueError("the cache's rows were reordered: a converted layer takes no beam search")
        tokens = row_B.view(-1, 1, 1, 1).expand(-1, 1, x_BNC.shape[1], 1)
        theirs.update(tokens, tokens, self.layer_idx)
        return cache
