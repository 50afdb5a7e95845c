"""OAT: the encoder of objects, the decoder of fixations, and the attention that points at objects.

Shape letters: B images, N objects, S = N + 1 tokens with the target, T steps, P pointers, K = N + 2 answers,
C channels, H, W picture of an object, A coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.layers.positions import sinusoids
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.complete import batch
from saccade.models.oat.tokens import Appearance, Places
from saccade.models.scanpath import ScanpathNetwork, ScanpathOutput
from saccade.ops import looking
from saccade.ops.constants import numbers
from saccade.ops.heads import check_heads


class Layer(nn.Module):
    """Post-norm: LN(x + attention(x)), in the decoder LN(x + attention(x, memory)), LN(x + MLP(x)).

    Args:
        dim, num_heads, hidden, dropout: of the transformer.
        decodes: whether there is a memory, and no token sees a later one.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float, decodes: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"rope": False, "qkv_bias": True, "proj_bias": True, "attn_drop": dropout}
        self.attention = SoftmaxAttention(dim, num_heads, decodes, **options)
        self.cross = SoftmaxAttention(dim, num_heads, **options) if decodes else None
        self.mlp = MLP(dim, hidden, activation="relu", drop=dropout)
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim) if decodes else None
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x_BTC: Tensor,
        there_BT: Tensor | None = None,
        memory_BSC: Tensor | None = None,
        there_BS: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        x_BTC = self.norm1(x_BTC + self.drop(self.attention(x_BTC, mask=there_BT, cache=cache)))
        if self.cross is not None and self.norm2 is not None:
            x_BTC = self.norm2(x_BTC + self.drop(self.cross(x_BTC, memory_BSC, mask=there_BS)))
        return self.norm3(x_BTC + self.mlp(x_BTC))


class ObjectAttention(nn.Module):
    """Logits (B, T, K) of each source token, and of nothing: products of projections, read out over the pointers.

    Args:
        dim: C.
        pointers: P, projections of full width each; one needs no readout.
        key_dim: d_k, whose root divides the products.
    """

    def __init__(self, dim: int, pointers: int = 2, key_dim: int = 512) -> None:
        super().__init__()
        self.scale = key_dim**-0.5
        self.of_step, self.of_object = (nn.ModuleList(nn.Linear(dim, dim) for _ in range(pointers)) for _ in range(2))
        self.readout = nn.Linear(pointers, 1) if pointers > 1 else None

    def forward(self, steps_BTC: Tensor, memory_BSC: Tensor) -> Tensor:
        maps = [a(steps_BTC) @ b(memory_BSC).mT for a, b in zip(self.of_step, self.of_object)]
        maps_BTSP = torch.stack(maps, 3) * self.scale
        maps_BTKP = nn.functional.pad(maps_BTSP, (0, 0, 0, 1))
        return maps_BTKP[..., 0] if self.readout is None else self.readout(maps_BTKP)[..., 0]


class OAT(ScanpathNetwork):
    """Scanpaths of a search over objects.

    Args:
        grid: rows and columns of objects.
        dim: E, width of tokens.
        num_heads, hidden, dropout: of encoder and decoder.
        depth, decoder_depth: layers of each; the decoder has as many as the encoder where None.
        pointers, key_dim: of `ObjectAttention`.
        levels, flat: of `Appearance`.
        places: rows of the table of positions; the longer side of the grid where None.
        positions, sigma: of `Places`.
        blank: what pictures of no object are filled with.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "oat"
    authors_module = "oat"
    runs_alone = False

    def __init__(
        self,
        grid: tuple[int, int] = (2, 11),
        *,
        dim: int = 512,
        num_heads: int = 4,
        hidden: int = 512,
        depth: int = 4,
        decoder_depth: int | None = None,
        dropout: float = 0.1,
        pointers: int = 2,
        key_dim: int = 512,
        levels: int = 0,
        flat: int = 1440,
        places: int | None = None,
        positions: str = "distance",
        sigma: float = 2.0,
        blank: float = 1.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if min(*grid, hidden, depth, pointers, key_dim) < 1 or dim % 2:
            raise ValueError(
                f"grid, hidden, depth, pointers and key_dim must be positive and dim even, got {grid}, {hidden}, "
                f"{depth}, {pointers}, {key_dim} and {dim}"
            )
        self.grid, self.dim, self.blank = (int(grid[0]), int(grid[1])), dim, blank
        self.appearance = Appearance(dim // 2, levels, flat)
        self.places = Places(dim // 2, max(grid) if places is None else places, positions, sigma)
        sizes = (dim, num_heads, hidden, dropout)
        self.encoder = nn.ModuleList(Layer(*sizes, decodes=False) for _ in range(depth))
        self.decoder = nn.ModuleList(
            Layer(*sizes, decodes=True) for _ in range(depth if decoder_depth is None else decoder_depth)
        )
        self.drop, self.point = nn.Dropout(dropout), ObjectAttention(dim, pointers, key_dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def tokens(self, images_BSCHW: Tensor, coordinates_BSA: Tensor) -> Tensor:
        """[appearance; position] of pictures (B, S, 3, H, W) at (row, column, is it the target), (B, S, C)."""
        seen_BSC = self.appearance(images_BSCHW)
        return torch.cat([seen_BSC, self.places(coordinates_BSA).to(seen_BSC.dtype)], 2)

    def encode(self, tokens_BSC: Tensor, there_BS: Tensor | None = None) -> Tensor:
        """What the decoder points at, (B, S, C): objects that have seen each other and the target, the last."""
        for layer in self.encoder:
            tokens_BSC = layer(tokens_BSC, there_BS)
        return tokens_BSC

    def decode(
        self,
        tokens_BTC: Tensor,
        memory_BSC: Tensor,
        there_BT: Tensor | None = None,
        there_BS: Tensor | None = None,
        caches: Sequence[Any] | None = None,
    ) -> Tensor:
        """Logits (B, T, K) after each of the fixations.

        Args:
            tokens_BTC: of fixations, without their time.
            memory_BSC: of `encode`.
            there_BT, there_BS: bool, which tokens there are.
            caches: of each layer, for fixations that follow those before.
        """
        start = 0 if not caches else caches[0].length
        time_T = torch.arange(start, start + tokens_BTC.shape[1], device=tokens_BTC.device).float()
        x_BTC = self.drop(tokens_BTC + sinusoids(time_T, self.dim).to(tokens_BTC.dtype))
        for number, layer in enumerate(self.decoder):
            x_BTC = layer(x_BTC, there_BT, memory_BSC, there_BS, None if caches is None else caches[number])
        return self.point(x_BTC, memory_BSC)

    def forward(
        self, objects: Tensor, targets: Tensor, fixations: Tensor, *, cells: Tensor | None = None
    ) -> ScanpathOutput:
        """Logits (B, T + 1, N + 2) of what is looked at after the start, and after each of T fixations.

        Args:
            objects: pictures (B, N, 3, H, W) in [0, 1], row by row.
            targets: (B,), the number of the object that is searched for.
            fixations: (B, T), numbers of objects; N (stop) and N + 1 (nothing) fill up.
            cells: (B, N) or (N,), the place of each object in the grid; in order where None.

        Raises:
            ValueError: if the inputs do not fit together, or the grid.
        """
        places_BN2 = self._checked(objects, targets, cells)
        if fixations.ndim != 2 or len(fixations) != len(objects):
            raise ValueError(f"fixations must be ({len(objects)}, steps), got {tuple(fixations.shape)}")
        number = objects.shape[1]
        _within("fixations", fixations, number + 1)
        memory_BSC = self.encode(self._source(objects, targets, places_BN2))
        tokens_BTC = torch.cat([self._first(objects), self._fixated(objects, targets, places_BN2, fixations)], 1)
        there_BT = nn.functional.pad(fixations <= number, (1, 0), value=True)
        return ScanpathOutput(self.decode(tokens_BTC, memory_BSC, there_BT))

    @torch.no_grad()
    def generate(
        self,
        objects: Tensor,
        targets: Tensor,
        *,
        cells: Tensor | None = None,
        most: int | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> ScanpathOutput:
        """Scanpaths, fixation after fixation, until the network says stop.

        Args:
            objects, targets, cells: as in `forward`.
            most: fixations at most, 2 N where None.
            sample: draw from the softmax instead of taking the largest.
            generator: of the draws.

        Raises:
            ValueError: as `forward`.
        """
        places_BN2 = self._checked(objects, targets, cells)
        batch_size, number = objects.shape[:2]
        memory_BSC = self.encode(self._source(objects, targets, places_BN2))
        caches = [layer.attention.new_cache(batch_size) for layer in self.decoder]  # type: ignore[operator, union-attr]
        token_B1C, steps, logits = self._first(objects), [], []
        ended_B = torch.zeros(batch_size, dtype=torch.bool, device=objects.device)
        for step in range(2 * number if most is None else most):
            said_BK = self.decode(token_B1C, memory_BSC, caches=caches)[:, -1].float()
            logits.append(said_BK)
            open_BK = said_BK[:, : number + (step > 0)]  # never nothing, and no stop at the start
            if sample:
                next_B = torch.multinomial(open_BK.softmax(1), 1, generator=generator)[:, 0]
            else:
                next_B = open_BK.argmax(1)
            next_B = torch.where(ended_B, number, next_B)
            ended_B = ended_B | (next_B == number)
            steps.append(next_B)
            if ended_B.all():
                break
            token_B1C = self._fixated(objects, targets, places_BN2, next_B[:, None])
        places_BT = torch.stack(steps, 1)
        inside_BT = places_BT.clamp(max=number - 1)
        cell_BT2 = places_BN2.gather(1, inside_BT[..., None].expand(-1, -1, 2)).flip(2).float() + 0.5
        points = cell_BT2 / cell_BT2.new_tensor([self.grid[1], self.grid[0]])
        return ScanpathOutput(
            torch.stack(logits, 1), places=places_BT, points=points, lengths=(places_BT < number).sum(1)
        )

    def see(self, images: Sequence[Tensor], targets: Sequence[int] | Tensor | None = None) -> ScanpathOutput:
        if targets is None or len(targets) != len(images):
            raise ValueError(f"targets must say what is searched for in each of {len(images)} images, got {targets}")
        rows, columns = self.grid
        x_BCHW = batch(images)
        height, width = x_BCHW.shape[2] // rows, x_BCHW.shape[3] // columns
        if min(height, width) < 1:
            raise ValueError(f"images must have a pixel for each of {rows} x {columns} objects, got {x_BCHW.shape[2:]}")
        cut = x_BCHW[..., : rows * height, : columns * width].unflatten(3, (columns, width))
        objects = cut.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        output = self.generate(objects, torch.as_tensor(targets, device=x_BCHW.device))
        output.images = list(images)
        return output

    def predict(
        self, files: str | Path | Sequence[str | Path], targets: Sequence[int] | Tensor | None = None
    ) -> ScanpathOutput:
        """How pictures of shelves are searched, without gradients.

        Args:
            files: an image, or several of one size, that `grid` cuts into objects.
            targets: of each, the number of the object that is searched for, row by row.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if there is none, one is no image, sizes differ, or there is not a target for each.
        """
        return self.on_files(files, lambda images: self.see(images, targets))

    def _checked(self, objects: Tensor, targets: Tensor, cells: Tensor | None) -> Tensor:
        """The row and column of each object, (B, N, 2)."""
        if objects.ndim != 5 or objects.shape[2] != 3 or not objects.shape[1]:
            raise ValueError(f"objects must be (batch, objects, 3, height, width), got {tuple(objects.shape)}")
        batch_size, number = objects.shape[:2]
        rows, columns = self.grid
        if cells is None and number > rows * columns:
            raise ValueError(f"objects must be {rows * columns} at most in a grid of {rows} x {columns}, got {number}")
        if targets.shape != (batch_size,):
            raise ValueError(f"targets must be ({batch_size},), got {tuple(targets.shape)}")
        _within("targets", targets, number - 1)
        if cells is None:
            cells = torch.arange(number, device=objects.device)
        elif cells.shape[-1] != number:
            raise ValueError(f"cells must be a place for each of {number} objects, got {tuple(cells.shape)}")
        return torch.stack([cells // columns, cells % columns], -1).expand(batch_size, number, 2)

    def _source(self, objects: Tensor, targets: Tensor, places_BN2: Tensor) -> Tensor:
        """Tokens of objects, and of the target once more, with its flag."""
        every = torch.cat([objects, _chosen(objects, targets[:, None])], 1)
        places = torch.cat([places_BN2, _chosen(places_BN2, targets[:, None])], 1)
        flag_BS1 = torch.zeros_like(places[..., :1])
        flag_BS1[:, -1] = 1
        return self.tokens(every, torch.cat([places, flag_BS1], 2))

    def _first(self, objects: Tensor) -> Tensor:
        """The token before the first fixation, in the middle of the grid."""
        middle = numbers([self.grid[0] // 2, self.grid[1] // 2, 0], objects, torch.long)
        return self.tokens(torch.full_like(objects[:, :1], self.blank), middle.expand(len(objects), 1, -1))

    def _fixated(self, objects: Tensor, targets: Tensor, places_BN2: Tensor, fixations: Tensor) -> Tensor:
        """Tokens of fixations; those of no object are blank, at place 0."""
        number = objects.shape[1]
        real_BT = fixations < number
        index_BT = fixations.clamp(max=number - 1)
        images = torch.where(real_BT[..., None, None, None], _chosen(objects, index_BT), self.blank)
        places = _chosen(places_BN2, index_BT) * real_BT[..., None]
        flag_BT1 = (fixations == targets[:, None]).long()[..., None]
        return self.tokens(images, torch.cat([places, flag_BT1], 2))


def _within(name: str, numbers: Tensor, last: int) -> None:
    if numbers.numel() and looking.can_look(numbers):  # elsewhere an embedding checks itself
        least, most = int(numbers.min()), int(numbers.max())
        if least < 0 or most > last:
            raise ValueError(f"{name} must be from 0 to {last}, got {least} to {most}")


def _chosen(x_BN: Tensor, index_BT: Tensor) -> Tensor:
    """x at the indices of each row, (B, T, ...)."""
    rows = torch.arange(len(x_BN), device=x_BN.device)[:, None]
    return x_BN[rows, index_BT]
