"""What a mechanism keeps of the past while it decodes.

Shape letters: B batch, K key heads, N new tokens, D head dim, E width of values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """What every cache says of itself; how it is filled is between it and its layer."""

    @property
    def length(self) -> int:
        """Tokens seen."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        ...


class KVCache:
    """All keys and values so far, in buffers that double when they are full. For inference.

    Attributes:
        length: tokens seen.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BKND: Tensor, v_BKNE: Tensor) -> tuple[Tensor, Tensor]:
        """Add N tokens; returns views of all keys (B, K, length, D) and values (B, K, length, E)."""
        self._keys = self._grown(self._keys, k_BKND)
        self._values = self._grown(self._values, v_BKNE)
        end = self.length + k_BKND.shape[2]
        self._keys[:, :, self.length : end] = k_BKND.detach()
        self._values[:, :, self.length : end] = v_BKNE.detach()
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def take_rows(self, index: Tensor) -> KVCache:
        """A cache of the sequences at `index`, as beam search goes on with."""
        new = KVCache()
        new.length = self.length
        new._keys, new._values = (None if held is None else held[index] for held in (self._keys, self._values))
        return new

    def crop(self, length: int) -> None:
        """Forget all but the first tokens.

        Args:
            length: how many stay; at most those that there are.

        Raises:
            ValueError: if there are not so many.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be from 0 to {self.length}, got {length}")
        self.length = length

    def _grown(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        need = self.length + new.shape[2]
        if buffer is not None and buffer.shape[0] != new.shape[0]:
            raise ValueError(f"the cache holds {buffer.shape[0]} sequences, got {new.shape[0]}")
        if buffer is not None and buffer.shape[2] >= need:
            return buffer
        room = max(need, 2 * (0 if buffer is None else buffer.shape[2]), 64)
        grown = torch.empty(*new.shape[:2], room, new.shape[3], dtype=new.dtype, device=new.device)
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held (not of the room to grow)."""
        held = [buffer[:, :, : self.length] for buffer in (self._keys, self._values) if buffer is not None]
        return sum(part.numel() * part.element_size() for part in held)


class NamedCache:
    """Tensors over all tokens so far, by name; for mechanisms that keep other things than keys and values."""

    def __init__(self) -> None:
        self._stores: dict[str, KVCache] = {}

    def append(self, name: str, x_BKND: Tensor) -> Tensor:
        """Add N tokens to what is called `name`; returns a view of all its tokens (B, K, length, D)."""
        return self._stores.setdefault(name, KVCache()).append(x_BKND, x_BKND[..., :0])[0]

    @property
    def length(self) -> int:
        """Tokens seen."""
        return max((store.length for store in self._stores.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held (not of the room to grow)."""
        return sum(store.nbytes for store in self._stores.values())


@dataclass
class StateCache:
    """A state of the same size however many tokens there were: a tensor, or tuples of tensors.

    Attributes:
        state: None before the first token.
        length: tokens seen.
        batch_size: how many sequences it is for, where that is known.
    """

    state: Any = None
    length: int = 0
    batch_size: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return _nbytes(self.state)


def _nbytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_nbytes, state)) if isinstance(state, (tuple, list)) else 0


@dataclass
class LayerCaches:
    """A cache for each layer of a stack.

    Attributes:
        layers: the caches; None for a layer that keeps nothing.
        length: tokens seen.
    """

    layers: list[Any] = field(default_factory=list)
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(cache.nbytes for cache in self.layers if cache is not None)

    def take_rows(self, index: Tensor) -> LayerCaches:
        """Caches of the sequences at `index`; each layer's must be one that has `take_rows`."""
        return LayerCaches([None if cache is None else cache.take_rows(index) for cache in self.layers], self.length)
