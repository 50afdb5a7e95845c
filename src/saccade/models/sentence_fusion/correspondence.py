"""Points of correspondence: markers around mentions, who belongs to which chain, and who sees whom.

Shape letters: B batch, T words of source and summary together, N sees, M is seen, K chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: start and end of a mention in words, end exclusive; a chain of them; markers in the vocabulary's unused places
Mention = tuple[int, int]
Chain = Sequence[Mention]
MARKERS = (1, 2, 3, 4, 5, 6)


class Linked(NamedTuple):
    """A source in pieces of words.

    Attributes:
        ids: of the pieces, markers among them.
        words: of each piece the number of its word, -1 for markers.
    """

    ids: list[int]
    words: list[int]


def link(
    words: Sequence[str],
    chains: Sequence[Chain],
    pieces: Callable[[str], Sequence[int]],
    *,
    max_chains: int = 3,
    markers: Sequence[int] = MARKERS,
    first_chain_only: bool = False,
    first_mentions_of: int | None = None,
    published_ends: bool = False,
) -> Linked:
    """Trans-Linking: the source's pieces with markers around the mentions of the first chains.

    Args:
        words: of both sentences.
        chains: of mentions.
        pieces: the ids of a word's pieces, one at least.
        max_chains: how many chains are marked; 0 marks none.
        markers: START and END of the first chain, of the second ...
        first_chain_only: mark chain 0 alone.
        first_mentions_of: where sentence 2 begins: of each chain its first mention in either sentence is marked; of a
            chain that has none in one of them all are.
        published_ends: ends stand before the last piece of the word behind the mention, as in the published code.

    Raises:
        ValueError: if a mention is not in the text, or there are too few markers.

    >>> link(["Ann", "sang"], [[(0, 1)]], lambda word: [10 + len(word)]).ids
    [1, 13, 2, 14]
    """
    check_chains(chains, len(words))
    marked = list(chains)[: min(max_chains, 1) if first_chain_only else max_chains]
    if 2 * len(marked) > len(markers):
        raise ValueError(f"markers must be two for each of {len(marked)} chains, got {len(markers)}")
    if first_mentions_of is not None:
        marked = [_firsts(chain, first_mentions_of) for chain in marked]
    ids: list[int] = []
    of_word: list[int] = []

    def add(new: Sequence[int], word: int) -> None:
        ids.extend(new)
        of_word.extend([word] * len(new))

    for i in range(len(words) + 1):
        ends = [markers[2 * k + 1] for k, chain in enumerate(marked) for mention in chain if mention[1] == i]
        starts = [markers[2 * k] for k, chain in enumerate(marked) for mention in chain if mention[0] == i]
        word = list(pieces(words[i])) if i < len(words) else []
        if published_ends and len(word) > 1 and ends:
            add(starts, -1)
            add(word[:-1], i)
            add(ends, -1)
            add(word[-1:], i)
        else:
            add(ends + starts, -1)
            add(word, i)
    return Linked(ids, of_word)


def _firsts(chain: Chain, second: int) -> Chain:
    """The first mention in either sentence; all where one has none."""
    sides = [[mention for mention in chain if (mention[0] >= second) == side] for side in (False, True)]
    return [side[0] for side in sides] if all(sides) else chain


def unlinked(ids: Sequence[int], markers: Sequence[int] = MARKERS) -> list[int]:
    """Without markers.

    Args:
        ids: of pieces.
        markers: that are left out.
    """
    return [number for number in ids if number not in markers]


def check_chains(chains: Sequence[Chain], words: int) -> None:
    """
    Raises:
        ValueError: if a mention is empty or not in the text.
    """
    for chain in chains:
        for start, end in chain:
            if not 0 <= start < end <= words:
                raise ValueError(
                    f"mentions must be (start, end) with 0 <= start < end <= {words}, got ({start}, {end})"
                )


def chain_members(source: Linked, chains: Sequence[Chain]) -> list[list[int]]:
    """Of each chain the places of its pieces in the source; markers are in none.

    Args:
        source: in pieces.
        chains: of mentions in words.
    """
    return [
        [place for place, word in enumerate(source.words) if any(start <= word < end for start, end in chain)]
        for chain in chains
    ]


def prepared(
    sources: Sequence[Linked],
    chains: Sequence[Sequence[Chain]],
    summaries: Sequence[Sequence[int]] | None = None,
    *,
    begin: int = 101,
    sep: int = 102,
    pad: int = 0,
    longest: int = 128,
) -> dict[str, Tensor]:
    """A batch as the network takes it: `input_ids`, `source_lengths`, `attention_mask`, `chains`.

    Args:
        sources: of `link`.
        chains: of each.
        summaries: ids of each; None for sources alone, to be generated from.
        begin, sep, pad: [CLS], [SEP] and [PAD] of the vocabulary.
        longest: T at most; what is longer is cut, a source so that [SEP] still closes it.

    Raises:
        ValueError: if there are not as many of each.
    """
    if len(chains) != len(sources) or (summaries is not None and len(summaries) != len(sources)):
        raise ValueError(f"chains and summaries must be {len(sources)}, one for each source")
    rows, lengths = [], []
    for number, source in enumerate(sources):
        row = [begin, *source.ids[: longest - 2], sep]
        lengths.append(len(row))
        rows.append((row if summaries is None else [*row, *summaries[number], sep])[:longest])
    T, K = max(map(len, rows)), max(1, *map(len, chains))
    ids_BT = torch.full((len(rows), T), pad)
    real_BT, member_BKT = torch.zeros(len(rows), T, dtype=torch.bool), torch.zeros(len(rows), K, T, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.tensor(row)
        real_BT[b, : len(row)] = True
        for k, places in enumerate(chain_members(sources[b], chains[b])):
            member_BKT[b, k, [1 + place for place in places if 1 + place < lengths[b] - 1]] = True
    return {
        "input_ids": ids_BT,
        "source_lengths": torch.tensor(lengths),
        "attention_mask": real_BT,
        "chains": member_BKT,
    }


def visible(source_lengths_B: Tensor, real_BT: Tensor) -> Tensor:
    """Who sees whom, bool (B, N, M): all see the source, words of the summary those before them and themselves.

    Padding sees nothing, and is not seen.

    Args:
        source_lengths_B: of the first segment, with [CLS] and [SEP].
        real_BT: bool, False is padding.
    """
    place_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    source_B1M = place_T < source_lengths_B[:, None, None]
    past_NM = place_T[:, None] >= place_T
    summary_BN1 = place_T[:, None] >= source_lengths_B[:, None, None]
    return (source_B1M | (past_NM & summary_BN1)) & real_BT[:, None] & real_BT[:, :, None]


def shared_weights(chains_BKT: Tensor, visible_BNM: Tensor) -> Tensor:
    """Trans-ShareRepr's weights (B, N, M): even over the visible words of all chains of a word; of words that are in
    none over all visible ones; 0 where nothing is visible.

    Args:
        chains_BKT: bool, which words belong to a chain.
        visible_BNM: of `visible`.
    """
    together_BNM = (chains_BKT[:, :, :, None] & chains_BKT[:, :, None]).any(1)
    alone_BN1 = ~chains_BKT.any(1)[..., None]
    weights_BNM = ((together_BNM | alone_BN1) & visible_BNM).float()
    return weights_BNM / weights_BNM.sum(-1, keepdim=True).clamp(min=1)
