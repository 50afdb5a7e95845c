"""The decoder: first state, selector, LSTM and deep output, word after word.

Shape letters: B images, T words, V vocabulary, R regions, D their width, W width of words, H width of the LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.models.beams import Said
from saccade.models.captioning import Captioner, CaptionOutput, in_order
from saccade.models.show_attend_tell.attention import RegionAttention, draw_region
from saccade.models.show_attend_tell.losses import doubly_stochastic, reinforced, until_end, word_costs

#: deviation of weights that are not square
_STD = 0.01


class Looking(NamedTuple):
    """What the decoder carries from word to word.

    Attributes:
        regions, prepared: (B, R, D), annotation vectors and what attention makes of them.
        present: (B, R), which there are; None for all.
        draws: (B,), whether regions are drawn.
        hidden, memory: (B, H), of the LSTM.
    """

    regions: Tensor
    prepared: Tensor
    present: Tensor | None
    draws: Tensor
    hidden: Tensor
    memory: Tensor


class HalvingDropout(nn.Module):
    """Half of the numbers are set to 0 in training, and all are halved otherwise; nothing is scaled up."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 0.5)) if self.training else x * 0.5


class ShowAttendTell(Captioner):
    """Captions by attention to the regions of an image.

    Args:
        vocab_size: V.
        dim: D.
        word_dim, hidden: widths of words and of the LSTM.
        attention: "soft" or "hard".
        deep: see `RegionAttention`.
        initial: further layers between the mean of the regions and the first state.
        final: further layers before the logits.
        selector: scale what is seen by beta.
        prev2out, ctx2out: the word before, and what is seen, stand in the output too.
        dropout: `HalvingDropout` of the state, of the output, and of further layers.
        alpha_c: lambda of the doubly stochastic penalty.
        entropy_c: of the entropy of hard attention.
        semi_sampling: how often a batch in training has regions drawn, where attention is hard.
        temperature: see `RegionAttention`.
        stem: widths of convolutions that make regions of images; their last is D. Without, regions are given, or an
            encoder by `on`.
        begin, end, pad: words, see `saccade.models.captioning`.

    Raises:
        ValueError: if a number is out of range, there is no such attention, or the stem has another width.
    """

    slug = "show-attend-tell"
    authors_module = "soft_attention"

    def __init__(
        self,
        vocab_size: int = 10000,
        dim: int = 512,
        *,
        word_dim: int = 512,
        hidden: int = 1800,
        attention: str = "soft",
        deep: int = 1,
        initial: int = 1,
        final: int = 0,
        selector: bool = True,
        prev2out: bool = True,
        ctx2out: bool = True,
        dropout: bool = True,
        alpha_c: float = 1.0,
        entropy_c: float = 0.002,
        semi_sampling: float = 0.5,
        temperature: float = 1.0,
        stem: Sequence[int] = (),
        begin: int = -1,
        end: int = 0,
        pad: int = 0,
    ) -> None:
        super().__init__()
        if min(vocab_size, dim, word_dim, hidden) < 1 or min(deep, initial, final) < 0:
            raise ValueError(
                f"vocab_size, dim, word_dim and hidden must be positive, and deep, initial and final not negative, got "
                f"{vocab_size}, {dim}, {word_dim}, {hidden}, {deep}, {initial} and {final}"
            )
        if attention not in ("soft", "hard"):
            raise ValueError(f"attention must be soft or hard, got {attention!r}")
        if not 0 <= semi_sampling <= 1 or not temperature > 0:
            raise ValueError(
                f"semi_sampling must be in [0, 1] and temperature positive, got {semi_sampling} and {temperature}"
            )
        if stem and stem[-1] != dim:
            raise ValueError(f"stem must end in dim ({dim}), got {tuple(stem)}")
        self.vocab_size, self.dim, self.begin, self.end, self.pad = vocab_size, dim, begin, end, pad
        self.hard, self.alpha_c, self.entropy_c, self.semi_sampling = (
            attention == "hard",
            alpha_c,
            entropy_c,
            semi_sampling,
        )
        self.see_through(stem, patch=16, placed=True)
        self.words = nn.Embedding(vocab_size, word_dim)
        self.initial = nn.ModuleList(nn.Linear(dim, dim) for _ in range(initial))
        self.to_hidden, self.to_memory = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.attention = RegionAttention(dim, hidden, deep=deep, temperature=temperature)
        self.selector = nn.Linear(hidden, 1) if selector else None
        self.of_word, self.of_hidden, self.of_seen = (
            nn.Linear(width, 4 * hidden, bias=bias) for width, bias in ((word_dim, True), (hidden, False), (dim, False))
        )
        self.hidden_out = nn.Linear(hidden, word_dim)
        self.seen_out = nn.Linear(dim, word_dim) if ctx2out else None
        self.prev2out = prev2out
        self.final = nn.ModuleList(nn.Linear(word_dim, word_dim) for _ in range(final))
        self.logits = nn.Linear(word_dim, vocab_size)
        self.drop = HalvingDropout() if dropout else nn.Identity()
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_STD)
            elif isinstance(module, nn.Linear):
                _start(module, 4 if name in ("of_word", "of_hidden") else 1)

    def start(self, pixel_values: Tensor | None, present: Tensor | None = None) -> Looking:
        """h = tanh(W_s a) and c = tanh(W_m a) of the regions' mean, after further layers.

        Args:
            pixel_values: images, or regions (B, R, D).
            present: (B, R), bool, which regions there are.

        Raises:
            ValueError: if they do not fit the network, or each other, or there are none.
        """
        if pixel_values is None:
            raise ValueError("ShowAttendTell needs pixel_values, images or their regions, got none")
        regions_BRD = self.regions(pixel_values, self.dim)
        if present is None:
            x_BD = regions_BRD.mean(1)
        elif present.shape != regions_BRD.shape[:2] or present.dtype != torch.bool:
            raise ValueError(
                f"present must be {tuple(regions_BRD.shape[:2])} bool, got {tuple(present.shape)} {present.dtype}"
            )
        else:
            there_BR1 = present[..., None].to(regions_BRD.dtype)
            x_BD = (regions_BRD * there_BR1).sum(1) / there_BR1.sum(1).clamp(min=1)
        for layer in self.initial:
            x_BD = self.drop(layer(x_BD).relu())
        draws_B = torch.zeros(len(x_BD), dtype=torch.bool, device=x_BD.device)
        if self.hard and self.training:  # one throw for the whole batch
            draws_B = draws_B | (torch.rand((), device=x_BD.device) < self.semi_sampling)
        prepared_BRD = self.attention.prepare(regions_BRD)
        return Looking(
            regions_BRD, prepared_BRD, present, draws_B, self.to_hidden(x_BD).tanh(), self.to_memory(x_BD).tanh()
        )

    def advance(self, words_B: Tensor, state: Looking, chosen_BR: Tensor | None = None) -> tuple[Said, Looking]:
        """One word.

        Args:
            words_B: the word before, -1 for none.
            state: of `start`, or of the call before.
            chosen_BR: what weighs the regions in place of the attention, as one that was drawn.
        """
        word_BW = self.words(words_B.clamp(min=0)) * (words_B >= 0)[:, None]
        alpha_BR = self.attention(state.prepared, state.hidden, state.present)
        if chosen_BR is None and self.hard:
            chosen_BR = torch.where(state.draws[:, None], draw_region(alpha_BR), alpha_BR)
            chosen_BR = chosen_BR.detach() if self.training else chosen_BR
        weights_BR = alpha_BR if chosen_BR is None else chosen_BR.to(alpha_BR.dtype)
        seen_BD = (weights_BR[:, None] @ state.regions)[:, 0]
        beta_B = None
        if self.selector is not None:
            beta_B = self.selector(state.hidden).sigmoid()[:, 0]
            seen_BD = seen_BD * beta_B[:, None]
        gates_B4H = self.of_word(word_BW) + self.of_hidden(state.hidden) + self.of_seen(seen_BD)
        i_BH, f_BH, o_BH, g_BH = gates_B4H.chunk(4, 1)
        memory_BH = f_BH.sigmoid() * state.memory + i_BH.sigmoid() * g_BH.tanh()
        hidden_BH = o_BH.sigmoid() * memory_BH.tanh()
        out_BW = self.hidden_out(self.drop(hidden_BH))
        if self.prev2out:
            out_BW = out_BW + word_BW
        if self.seen_out is not None:
            out_BW = out_BW + self.seen_out(seen_BD)
        out_BW = self.drop(out_BW.tanh())
        for layer in self.final:
            out_BW = self.drop(layer(out_BW).relu())
        said = Said(self.logits(out_BW), alpha_BR, beta_B, chosen_BR if self.hard else None)
        return said, state._replace(hidden=hidden_BH, memory=memory_BH)

    def forward(
        self,
        pixel_values: Tensor | None,
        captions: Tensor,
        *,
        mask: Tensor | None = None,
        samples: Tensor | None = None,
        present: Tensor | None = None,
    ) -> CaptionOutput:
        """The logits of each word of captions, and what was looked at before it.

        Args:
            pixel_values: images (B, 3, H, W), or their regions (B, R, D).
            captions: (B, T), words.
            mask: (B, T), bool, which words there are; the state passes by others. All where None.
            samples: (B, T, R), regions that were drawn, for hard attention; drawn here where None.
            present: (B, R), bool, which regions there are; all where None.

        Raises:
            ValueError: if these do not fit together, or the network.
        """
        self.check_captions(pixel_values, captions)
        for name, given, shape in (("mask", mask, captions.shape), ("samples", samples, captions.shape)):
            if given is not None and given.shape[:2] != shape:
                raise ValueError(f"{name} must be {tuple(shape)} for these captions, got {tuple(given.shape)}")
        if samples is not None and not self.hard:
            raise ValueError('samples are for attention="hard", this is soft')
        state, found = self.start(pixel_values, present), []
        for step, word_B in enumerate(self.begun(captions).unbind(1)):
            said, after = self.advance(word_B, state, None if samples is None else samples[:, step])
            found.append(said)
            state = after if mask is None else _passed(state, after, mask[:, step])
        return in_order(found)

    def penalty(self, said: CaptionOutput, captions: Tensor) -> Tensor:
        """The doubly stochastic penalty and, of hard attention, `reinforced` by words; for each word of a caption.

        Args:
            said: of `forward`.
            captions: that it was given.
        """
        assert said.logits is not None and said.attention is not None
        mask_BT = until_end(captions, self.end)
        loss = self.alpha_c * doubly_stochastic(said.attention, mask_BT)
        if said.chosen is not None:
            costs_BT = word_costs(said.logits, captions, mask_BT)
            loss = loss + reinforced(said.attention, said.chosen, costs_BT, entropy=self.entropy_c) / len(captions)
        return loss / mask_BT.sum(1).float().mean()


def _passed(before: Looking, after: Looking, there_B: Tensor) -> Looking:
    """The state after a word that not all captions have."""
    there_B1 = there_B[:, None].bool()
    return after._replace(
        hidden=torch.where(there_B1, after.hidden, before.hidden),
        memory=torch.where(there_B1, after.memory, before.memory),
    )


@torch.no_grad()
def _start(layer: nn.Linear, gates: int) -> None:
    """Orthogonal where a weight, or each gate's, is square, and normal 0.01 else; biases 0."""
    for weight in layer.weight.chunk(gates):
        if weight.shape[0] == weight.shape[1]:
            nn.init.orthogonal_(weight)
        else:
            nn.init.normal_(weight, std=_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
