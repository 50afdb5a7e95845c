"""Keys and values of which every head holds another number: one after the other in whole pages, none padded to another.

    row r = (sequence, key head) holds length_r tokens in ceil(length_r / p) pages of p places, from its first page on

A token is its key, its value, its true position, and the numbers that a policy keeps of it. What is held is what was
kept: storage is laid out anew when tokens go or come, but for one token that comes to every row, which is written into
a place that is free.

Shape letters: B batch, K key heads, D head dim, E width of values, F numbers of a token, R = B K rows, P pages,
p places of a page, M places of the row that holds most, N tokens that come, A = M + N,
C sequences to go on with.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PAGE", "RaggedTokens"]

#: places of a page
PAGE = 16


class RaggedTokens:
    """The tokens of B x K rows.

    Args:
        k_BKND, v_BKNE: for their shapes, types and device; nothing is stored of them.
        numbers: F.

    Attributes:
        keys_PpD, values_PpE: what lies in places that hold no token is finite.
        position_Pp: int32; of places that hold no token, anything.
        numbers_PpF: float32.
        length_BK: tokens of each row.
        pages_BK: pages of each row.
    """

    def __init__(self, k_BKND: Tensor, v_BKNE: Tensor, numbers: int = 0) -> None:
        B, K, _, D = k_BKND.shape
        self.keys_PpD = k_BKND.new_zeros(0, PAGE, D)
        self.values_PpE = v_BKNE.new_zeros(0, PAGE, v_BKNE.shape[3])
        self.position_Pp = torch.zeros(0, PAGE, dtype=torch.int32, device=k_BKND.device)
        self.numbers_PpF = torch.zeros(0, PAGE, numbers, device=k_BKND.device)
        self._lay_out(torch.zeros(B, K, dtype=torch.long, device=k_BKND.device))

    def _lay_out(self, length_BK: Tensor) -> None:
        self.pages_BK = -(-length_BK // PAGE)
        ends = self.pages_BK.flatten().cumsum(0)
        #: the first place of each row
        self._first_BK1 = PAGE * (ends.view_as(length_BK) - self.pages_BK)[..., None]
        most = int(self.pages_BK.max()) if length_BK.numel() else 0
        self.width, self.pages = PAGE * most, int(self.pages_BK.sum())
        #: the same number of pages in every row: what lies in pages is what lies in rows
        self.is_even = self.pages == most * length_BK.numel()
        self._count(length_BK)
        self.owner_P = None
        if not self.is_even:
            rows = torch.arange(length_BK.numel(), device=length_BK.device)
            self.owner_P = rows.repeat_interleave(self.pages_BK.flatten())

    def _count(self, length_BK: Tensor) -> None:
        self.length_BK = length_BK
        #: which places hold a token, and whether all do
        self.filled_Pp = self.paged(torch.arange(self.width, device=length_BK.device) < length_BK[..., None])
        self.is_full = bool(self.filled_Pp.all())

    @property
    def filled_BKM(self) -> Tensor:
        """Which places of each row hold a token."""
        if self.is_even:
            return self.in_rows(self.filled_Pp)
        return torch.arange(self.width, device=self.length_BK.device) < self.length_BK[..., None]

    def in_rows(self, x_Pp: Tensor) -> Tensor:
        """(B, K, M, ...) of what is held of each place (P, p, ...): a view where all rows have as many pages."""
        if self.is_even:
            return x_Pp.reshape(*self.length_BK.shape, self.width, *x_Pp.shape[2:])
        return x_Pp.flatten(0, 1)[self._place_BKM()]

    def paged(self, x_BKM: Tensor) -> Tensor:
        """(P, p, ...) of what is said of each row's places, (B, K, M, ...)."""
        if self.is_even:
            return x_BKM.reshape(self.pages, PAGE, *x_BKM.shape[3:])
        within = torch.arange(self.width, device=x_BKM.device) < PAGE * self.pages_BK[..., None]
        return x_BKM[within].view(self.pages, PAGE, *x_BKM.shape[3:])

    def evenly(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and owner of pages: as long as a row, without owner, where all rows have as many; else as is."""
        if self.is_even:
            R, keys, values = self.length_BK.numel(), self.keys_PpD, self.values_PpE
            return keys.view(R, self.width, keys.shape[2]), values.view(R, self.width, values.shape[2]), None
        return self.keys_PpD, self.values_PpE, self.owner_P

    def _place_BKM(self) -> Tensor:
        """Where the places of each row lie; those that it does not have lie in its first, or in any."""
        place = torch.arange(self.width, device=self.length_BK.device)
        return self._first_BK1 + torch.where(place < PAGE * self.pages_BK[..., None], place, -self._first_BK1)

    def keep(self, keep_BKA: Tensor, k_BKND: Tensor, v_BKNE: Tensor, position_BN: Tensor, numbers_BKNF: Tensor) -> None:
        """Lay out anew what stays of the tokens held, and of those that come.

        Args:
            keep_BKA: bool, of each row's places (False where there is no token) and of the new tokens.
            k_BKND, v_BKNE, position_BN, numbers_BKNF: the new tokens.
        """
        old = keep_BKA[..., : self.width]
        length_BK = keep_BKA.sum(-1)
        from_old = self._place_BKM().expand_as(old)[old]
        b, k, n = keep_BKA[..., self.width :].nonzero(as_tuple=True)
        held = self._of_places
        order_BKA = keep_BKA.cumsum(-1) - 1
        self._lay_out(length_BK)
        to_BKA = order_BKA + self._first_BK1
        to_old, to_new = to_BKA[..., : old.shape[2]][old], to_BKA[b, k, old.shape[2] + n]

        def moved(x: Tensor, new: Tensor) -> Tensor:
            out = x.new_zeros(self.pages * PAGE, *x.shape[2:])
            out[to_old] = x.flatten(0, 1)[from_old]
            out[to_new] = new.detach().to(x.dtype)
            return out.unflatten(0, (self.pages, PAGE))

        self.keys_PpD, self.values_PpE = moved(held[0], k_BKND[b, k, n]), moved(held[1], v_BKNE[b, k, n])
        self.position_Pp = moved(held[2], position_BN[b, n])
        self.numbers_PpF = moved(held[3], numbers_BKNF[b, k, n])

    def put(self, place_BK: Tensor, k_BK1D: Tensor, v_BK1E: Tensor, position_B1: Tensor, numbers_BK1F: Tensor) -> None:
        """Write one new token into a place of each row: over the one that lies there, or behind the last.

        Args:
            place_BK: the place within the row; at its length where the token comes to the others; -1 for rows that do
                not take it.
            k_BK1D, v_BK1E, position_B1, numbers_BK1F: the tokens.
        """
        to_R, takes_R = (self._first_BK1[..., 0] + place_BK).flatten(), (place_BK >= 0).flatten()
        position_BK = position_B1.expand_as(place_BK)
        new = [k_BK1D[:, :, 0], v_BK1E[:, :, 0], position_BK.to(torch.int32), numbers_BK1F[:, :, 0]]
        all_take = bool(takes_R.all())
        for held_Pp, x_BK in zip(self._of_places, new):
            x_R = x_BK.detach().flatten(0, 1)
            if all_take:
                held_Pp.flatten(0, 1).index_copy_(0, to_R, x_R)
            else:
                held_Pp.flatten(0, 1).index_copy_(0, to_R[takes_R], x_R[takes_R])
        grows_BK = place_BK == self.length_BK
        if bool(grows_BK.any()):
            self._count(self.length_BK + grows_BK)

    def take_rows(self, index_C: Tensor) -> None:
        """Go on with the sequences at `index_C`, as beam search does.

        Args:
            index_C: numbers of sequences; C of them, which may repeat.
        """
        first_BK, page = self._first_BK1[..., 0] // PAGE, torch.arange(self.width // PAGE, device=index_C.device)
        mine_CK = self.pages_BK[index_C]
        pages = (first_BK[index_C][..., None] + page)[page < mine_CK[..., None]]
        self.keys_PpD, self.values_PpE = self.keys_PpD[pages], self.values_PpE[pages]
        self.position_Pp, self.numbers_PpF = self.position_Pp[pages], self.numbers_PpF[pages]
        self._lay_out(self.length_BK[index_C])

    def fitting(self, nbytes: float) -> int:
        """How many tokens each row can have, all the same, where all rows together may take so many bytes."""
        one = 1 + sum(x.element_size() * x.shape[2:].numel() for x in self._of_places)
        tables = 3 * self.length_BK.element_size()
        pages = (nbytes / max(1, self.length_BK.numel()) - tables) // (PAGE * one + self.length_BK.element_size())
        return PAGE * max(0, int(pages))

    @property
    def _of_places(self) -> tuple[Tensor, ...]:
        return self.keys_PpD, self.values_PpE, self.position_Pp, self.numbers_PpF

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, places that hold no token counted."""
        held = [*self._of_places, self.filled_Pp, self.length_BK, self.pages_BK, self._first_BK1]
        held += [] if self.owner_P is None else [self.owner_P]
        return sum(x.untyped_storage().nbytes() for x in held)
