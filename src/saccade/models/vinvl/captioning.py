"""Captions by OSCAR+: word by word, each in the place of a [MASK] that stands after those that are said.

Tags and regions see each other alone, so that their states are made once; of each word that is said they are kept.

Shape letters: B images, N rows, L words so far, M tags and regions, T tags, R regions, F width of a region, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.layers.bert import BertBlock
from saccade.models.beams import Said, State, search
from saccade.models.captioning import CaptionOutput
from saccade.models.vinvl.oscar import OscarPlus


@torch.no_grad()
def caption(
    model: OscarPlus,
    region_vectors: Tensor,
    tags: Tensor | None = None,
    *,
    begin: int = 101,
    end: int = 102,
    mask: int = 103,
    pad: int = 0,
    real: Tensor | None = None,
    longest: int = 40,
    most: int = 20,
    beams: int = 1,
    length_power: float = 0.0,
) -> CaptionOutput:
    """The likeliest captions that a beam search finds, of a model that was trained with `captioning_mask`.

    Args:
        model: in evaluation.
        region_vectors: (B, R, F).
        tags: words of the second part (B, T); none where None.
        begin, end, mask, pad: numbers of [CLS], [SEP], [MASK] and [PAD].
        real: real tags and regions, bool (B, T + R); all where None.
        longest: places of the caption in training, behind which tags stand.
        most: words at most, with the one that ends a caption.
        beams, length_power: see `saccade.models.beams.search`.

    Raises:
        ValueError: if shapes do not fit, or there are fewer places than words.
    """
    state = start(model, region_vectors, tags, real=real, longest=longest)
    if not 1 <= most < longest or beams < 1:
        raise ValueError(f"most must be from 1 to {longest - 1} and beams positive, got {most} and {beams}")
    words_B = torch.full((len(region_vectors),), begin, device=region_vectors.device)
    found = search(
        advance(model, mask), state, words_B, end=end, pad=pad, most=most, beams=beams, length_power=length_power,
        never=sorted({begin, mask, pad} - {end}),
    )  # fmt: skip
    return CaptionOutput(None, **found._asdict())


def start(
    model: OscarPlus,
    region_vectors: Tensor,
    tags: Tensor | None = None,
    *,
    real: Tensor | None = None,
    longest: int = 40,
) -> State:
    """The state before the first word: what each block makes of tags and regions, nothing of words, and what is real.

    Args:
        model, region_vectors, tags, real, longest: as in `caption`.

    Raises:
        ValueError: if shapes do not fit.
    """
    x_NMC = model.embed_regions(region_vectors)
    if tags is not None:
        places_T = torch.arange(longest, longest + tags.shape[1], device=tags.device)
        x_NMC = torch.cat([_embedded(model, tags, places_T, 1), x_NMC], 1)
    real_NM = torch.ones(x_NMC.shape[:2], dtype=torch.bool, device=x_NMC.device) if real is None else real
    if real_NM.shape != x_NMC.shape[:2]:
        raise ValueError(f"real must be {tuple(x_NMC.shape[:2])}, got {tuple(real_NM.shape)}")
    others = []
    for block in model.bert.blocks:
        others.append(x_NMC)
        x_NMC = block(x_NMC, mask=real_NM)
    return others, [x_NMC[:, :0] for _ in others], real_NM


def advance(model: OscarPlus, mask: int) -> Callable[[Tensor, State], tuple[Said, State]]:
    """What `search` asks of the next word, and the state then.

    Args:
        model: in evaluation.
        mask: number of [MASK].
    """

    def step(words_N: Tensor, state: State) -> tuple[Said, State]:
        others, past, real_NM = state
        said = past[0].shape[1] if past else 0
        ids_N2 = torch.stack([words_N, torch.full_like(words_N, mask)], 1)
        x_N2C = _embedded(model, ids_N2, torch.arange(said, said + 2, device=ids_N2.device), 0)
        first_NL = real_NM.new_ones(len(words_N), said + 1)
        rows = [torch.cat([first_NL, real_NM.new_full((len(words_N), 1), sees), real_NM], 1) for sees in (False, True)]
        sees_N12M, kept = torch.stack(rows, 1)[:, None], []
        for block, others_NMC, past_NLC in zip(model.bert.blocks, others, past, strict=True):
            assert isinstance(block, BertBlock)
            kept.append(torch.cat([past_NLC, x_N2C[:, :1]], 1))
            around_NMC = torch.cat([past_NLC, x_N2C, others_NMC], 1)
            x_N2C = block.attention_norm(x_N2C + block.attention(x_N2C, around_NMC, mask=sees_N12M))
            x_N2C = block.mlp_norm(x_N2C + block.mlp(x_N2C))
        return Said(model.words(x_N2C[:, 1])), (others, kept, real_NM)

    return step


def _embedded(model: OscarPlus, ids_NL: Tensor, places_L: Tensor, part: int) -> Tensor:
    """Words at places of their own, of the first or the second part."""
    table = model.bert.embeddings
    places = table.positions.num_embeddings
    if len(places_L) and int(places_L[-1]) >= places:
        raise ValueError(f"the model has {places} places for words, and one stands at {int(places_L[-1])}")
    x_NLC = table.words(ids_NL) + table.positions.weight[places_L]
    if table.types is not None:
        x_NLC = x_NLC + table.types.weight[part]
    return table.norm(x_NLC)
