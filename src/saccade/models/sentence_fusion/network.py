"""The network: a BERT that sees as a language model with a prefix does, one of whose heads may be shared.

Shape letters: B batch, T words (N see, M are seen), C channels, H heads, D head dim, K chains, P places, V vocabulary,
R rows of the beam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Names, load_state
from saccade.layers.bert import BERT, Bert, BertBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.beams import Said, search
from saccade.models.captioning import CaptionOutput
from saccade.models.sentence_fusion.correspondence import shared_weights, visible
from saccade.ops.attend import attend
from saccade.ops.pattern import Pattern

if TYPE_CHECKING:
    from typing_extensions import Self

#: label of words that are not asked for
IGNORE = -100
#: log-probability of a word that would repeat three words
_REPEATED = -1000.0
#: transformers' `BertForMaskedLM` -> ours
_BERT = Names(
    {
        **BERT.within("bert.", "bert."),
        "cls.predictions.transform.dense.{leaf}": "dense.{leaf}",
        "cls.predictions.transform.LayerNorm.{leaf}": "norm.{leaf}",
        "cls.predictions.bias": "bias",
        "cls.predictions.decoder.{leaf}": None,  # tied
        "bert.pooler.{rest*}": None,
    }
)


class SharedAttention(SoftmaxAttention):
    """Softmax attention of which one head averages values by given weights; its queries and keys are not used.

    Args:
        dim, num_heads: of the layer.
        head: which one.
        **arguments: of `SoftmaxAttention`.

    Raises:
        ValueError: if there is no such head.
    """

    def __init__(self, dim: int, num_heads: int, head: int, **arguments: Any) -> None:
        super().__init__(dim, num_heads, **arguments)
        if not 0 <= head < num_heads:
            raise ValueError(f"share_head must be from 0 to {num_heads - 1}, got {head}")
        self.head = head

    def forward(self, x_BTC: Tensor, *, mask: Any = None, weights: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """`weights` (B, N, M) of the head; softmax as the others where None."""
        return self.steps(x_BTC, None, mask, None, weights=weights)

    def project(  # type: ignore[override]
        self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None, *, weights: Tensor | None
    ) -> tuple[Any, ...]:
        return *super().project(x_BNC, context_BMC, positions), weights

    def attend(  # type: ignore[override]
        self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, pattern: Pattern, weights: Tensor | None
    ) -> Tensor:
        if weights is None:
            return super().attend(q_BHND, k_BHMD, v_BHMD, pattern)
        drop = self.attn_drop if self.training else 0.0
        shared_B1ND = (F.dropout(weights.to(v_BHMD.dtype), drop) @ v_BHMD[:, self.head])[:, None]
        others = [h for h in range(self.num_heads) if h != self.head]
        if not others:
            return shared_B1ND
        q, k, v = (x[:, others] for x in (q_BHND, k_BHMD, v_BHMD))
        y = attend(q, k, v, mask=pattern.mask, dropout=drop)
        return torch.cat([y[:, : self.head], shared_B1ND, y[:, self.head :]], 1)


class SharedBlock(BertBlock):
    """BERT's block with a shared head; arguments as there, and which head."""

    def __init__(self, dim: int, num_heads: int, hidden: int | None, head: int, drop: float) -> None:
        super().__init__(dim, num_heads, hidden, drop=drop, attn_drop=drop)
        biases = {"qkv_bias": True, "proj_bias": True}
        self.attention = SharedAttention(dim, num_heads, head, rope=False, attn_drop=drop, **biases)

    def shared(self, x_BTC: Tensor, mask: Tensor, weights_BNM: Tensor) -> Tensor:
        """(B, T, C), the head averaging by these weights."""
        x_BTC = self.attention_norm(x_BTC + self.drop(self.attention(x_BTC, mask=mask, weights=weights_BNM)))
        return self.mlp_norm(x_BTC + self.drop(self.mlp(x_BTC)))


class SentenceFuser(nn.Module):
    """A sentence from two: BERT with a prefix mask, and its head for masked words.

    Args:
        vocabulary: V.
        dim: C.
        depth: blocks.
        num_heads: H.
        hidden: inner width of the MLPs, 4 C where None.
        positions: T at most.
        share_layer: whose head is shared, from 0; None shares none.
        share_head: which head, from 0.
        drop: dropout everywhere.

    Raises:
        ValueError: if there is no such layer or head, or sizes do not fit.
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        *,
        positions: int = 512,
        share_layer: int | None = None,
        share_head: int = 4,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.bert = Bert(
            vocabulary, dim=dim, depth=depth, num_heads=num_heads, hidden=hidden, positions=positions, drop=drop
        )
        if share_layer is not None:
            if not 0 <= share_layer < depth:
                raise ValueError(f"share_layer must be from 0 to {depth - 1}, got {share_layer}")
            self.bert.blocks[share_layer] = SharedBlock(dim, num_heads, hidden, share_head, drop)
        self.dense, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim, 1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    @classmethod
    def from_bert(cls, model: nn.Module, **changes: Any) -> Self:
        """With the weights of transformers' `BertForMaskedLM`.

        Args:
            model: whose weights are copied.
            **changes: `share_layer`, `share_head`, `drop`.

        Raises:
            ValueError: if it has other weights than such a model.
        """
        config: Any = model.config
        made = cls(
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            positions=config.max_position_embeddings,
            **changes,
        )
        load_state(made, _BERT(model.state_dict()))
        return made

    def forward(
        self,
        input_ids: Tensor,
        source_lengths: Tensor,
        attention_mask: Tensor | None = None,
        chains: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> CaptionOutput:
        """What each word is taken for, in `logits`.

        Args:
            input_ids: (B, T), source and summary, some of it [MASK].
            source_lengths: (B,), of the source with [CLS] and [SEP].
            attention_mask: bool (B, T), False is padding.
            chains: bool (B, K, T), which words belong to a chain; none where None. Only a shared head reads them.
            positions: (B, P), the places that are asked for; all where None.

        Raises:
            ValueError: if shapes do not fit.
        """
        real_BT = self._checked(input_ids, source_lengths, attention_mask, chains)
        seen_BNM = visible(source_lengths, real_BT)
        place_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        x_BTC = self.bert.embeddings(input_ids, (place_T >= source_lengths[:, None]).long())
        for block in self.bert.blocks:
            if isinstance(block, SharedBlock):
                none = real_BT.new_zeros(len(real_BT), 1, real_BT.shape[1])
                weights = shared_weights(none if chains is None else chains, seen_BNM)
                x_BTC = block.shared(x_BTC, seen_BNM[:, None], weights)
            else:
                x_BTC = block(x_BTC, mask=seen_BNM[:, None])
        if positions is not None:
            x_BTC = x_BTC.gather(1, positions[..., None].expand(-1, -1, x_BTC.shape[2]))
        x_BTC = self.norm(F.gelu(self.dense(x_BTC)))
        return CaptionOutput(F.linear(x_BTC, self.bert.embeddings.words.weight, self.bias))

    @staticmethod
    def _checked(ids: Tensor, lengths: Tensor, real: Tensor | None, chains: Tensor | None) -> Tensor:
        """The mask of real words."""
        if ids.ndim != 2 or lengths.shape != ids.shape[:1]:
            raise ValueError(
                f"input_ids must be (batch, words) and source_lengths (batch,), got {tuple(ids.shape)} and "
                f"{tuple(lengths.shape)}"
            )
        if real is not None and real.shape != ids.shape:
            raise ValueError(f"attention_mask must be {tuple(ids.shape)}, got {tuple(real.shape)}")
        if chains is not None and (chains.dtype != torch.bool or chains.ndim != 3 or chains.shape[::2] != ids.shape):
            expected = f"({ids.shape[0]}, chains, {ids.shape[1]})"
            raise ValueError(f"chains must be bool {expected}, got {tuple(chains.shape)} {chains.dtype}")
        return torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        source_lengths: Tensor,
        chains: Tensor | None = None,
        *,
        beams: int = 5,
        least: int = 10,
        most: int = 40,
        mask: int = 103,
        sep: int = 102,
        pad: int = 0,
        never: Sequence[int] = (),
    ) -> CaptionOutput:
        """The summaries, by beam search: [MASK] behind what is written is what is asked, again and again.

        Args:
            input_ids: (B, T), sources alone, as `prepared` makes them.
            source_lengths: (B,).
            chains: bool (B, K, T).
            beams: of the search, 1 is greedy.
            least, most: words of a summary.
            mask, sep, pad: [MASK], [SEP] and [PAD] of the vocabulary.
            never: words that are not said, such as markers.

        Raises:
            ValueError: if shapes do not fit, or the summary would be longer than there are positions.
        """
        self._checked(input_ids, source_lengths, None, chains)
        B, T = len(input_ids), int(source_lengths.max()) + most + 1
        longest = self.bert.embeddings.positions.num_embeddings
        if longest < T or beams < 1 or most < 1:
            raise ValueError(
                f"beams and most must be positive, source, most and one {longest} words at most, got {beams}, {most} "
                f"and {T}"
            )
        room = input_ids.new_full((B, T), pad)
        width = min(T, input_ids.shape[1])
        room[:, :width] = input_ids[:, :width]
        K = 1 if chains is None else chains.shape[1]
        members = torch.zeros(B, K, T, dtype=torch.bool, device=input_ids.device)
        if chains is not None:
            members[..., :width] = chains[..., :width]

        def advance(word_R: Tensor, state: Any) -> tuple[Said, Any]:
            ids_RT, length_R, place_R, member_RKT = state
            asked_R1 = place_R[:, None] + 1
            ids_RT = ids_RT.scatter(1, place_R[:, None], word_R[:, None]).scatter(
                1, asked_R1, torch.full_like(asked_R1, mask)
            )
            real_RT = torch.arange(T, device=ids_RT.device) <= asked_R1
            said = self(ids_RT, length_R, real_RT, member_RKT, asked_R1)
            assert said.logits is not None
            logs_RV = said.logits[:, 0].float().log_softmax(1)
            logs_RV = logs_RV.masked_fill(_repeating(ids_RT, length_R, place_R, logs_RV.shape[1]), _REPEATED)
            early_R = place_R + 1 - length_R < least
            logs_RV[:, sep] = logs_RV[:, sep].masked_fill(early_R, -torch.inf)
            return Said(logs_RV), (ids_RT, length_R, place_R + 1, member_RKT)

        start = (room, source_lengths, source_lengths - 1, members)
        training = self.training
        try:
            self.eval()
            found = search(
                advance,
                start,
                input_ids.gather(1, source_lengths[:, None] - 1)[:, 0],
                end=sep,
                pad=pad,
                most=most,
                beams=beams,
                length_power=1.0,
                never=(*never, mask),
            )
        finally:
            self.train(training)
        return CaptionOutput(words=found.words, lengths=found.lengths, scores=found.scores)


def _repeating(ids_RT: Tensor, length_R: Tensor, place_R: Tensor, vocabulary: int) -> Tensor:
    """Which words would make three in a row of the summary come twice, bool (R, V).

    Args:
        ids_RT: with the summary from `length_R` to `place_R`.
    """
    R, T = ids_RT.shape
    if T < 3:
        return torch.zeros(R, vocabulary, dtype=torch.bool, device=ids_RT.device)
    three_RT3 = ids_RT.unfold(1, 3, 1)
    last_two = ids_RT.gather(1, torch.stack([place_R - 1, place_R], 1).clamp(min=0))
    begin_T = torch.arange(three_RT3.shape[1], device=ids_RT.device)
    inside_RT = (begin_T >= length_R[:, None]) & (begin_T + 2 <= place_R[:, None])
    same_RT = (three_RT3[..., :2] == last_two[:, None]).all(-1) & inside_RT
    counts = torch.zeros(R, vocabulary, device=ids_RT.device)
    return counts.scatter_add_(1, three_RT3[..., 2], same_RT.float()) > 0


def masked(
    input_ids: Tensor,
    source_lengths: Tensor,
    attention_mask: Tensor,
    generator: torch.Generator,
    *,
    mask: int = 103,
    share: float = 0.7,
) -> tuple[Tensor, Tensor]:
    """Input with words of the summary replaced by [MASK], and labels: those words, `IGNORE` elsewhere.

    The last word, [SEP], is always asked for.

    Args:
        input_ids, source_lengths, attention_mask: of `prepared`, with summaries.
        generator: of which words.
        mask: [MASK].
        share: of the summary's words.

    Raises:
        ValueError: if the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    place_T = torch.arange(input_ids.shape[1], device=input_ids.device)
    drawn = torch.rand(input_ids.shape, generator=generator).to(input_ids.device) < share
    last_B1 = attention_mask.sum(1, keepdim=True) - 1
    asked = (drawn | (place_T == last_B1)) & (place_T >= source_lengths[:, None]) & attention_mask.bool()
    return input_ids.masked_fill(asked, mask), input_ids.masked_fill(~asked, IGNORE)


def fusion_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """sum w ce / (sum w + 1e-5), w = 1 where a word is asked for.

    Args:
        logits: (B, T, V).
        labels: (B, T), `IGNORE` where none is asked for.
    """
    asked = (labels != IGNORE).sum()
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (asked + 1e-5)
