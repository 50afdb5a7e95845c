"""A fusion behind a text encoder, what it is compared with, and what training needs.

Shape letters: B batch, L words, F variables, C channels, O outputs, N rows of data.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.fusion.consumer_cross_attention.fusion import Preference, check_text, masked_mean

TEXTS, TABLES = ("pooled", "mean", None), ("linear", "mlp", None)
#: pictures and faces that are no words
_PICTURES = re.compile(r"[:;=8][-o^']?[)(\]\[dDpP/\\|]|[\U0001F000-\U0001FAFF\u2600-\u27BF\uFE0F\u200D]")
_PUNCTUATION = {"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."}


class Reference(nn.Module):
    """The reference models: text alone, table alone, or both side by side before dense layers.

    | | `text` | `table` |
    |---|---|---|
    | text only | "pooled" or "mean" | None |
    | table only | None | "linear" or "mlp" |
    | feature fusion | "pooled" or "mean" | "mlp" |

    Args:
        dim: C.
        variables: F.
        text: BERT's pooler of the first word, or the mean of all words.
        table: the variables as they are, or an MLP of them.
        hidden: width of the dense layers.
        outputs: O.
        drop: dropout.

    Raises:
        ValueError: if a form is not offered, or neither is read.
    """

    def __init__(
        self,
        dim: int = 768,
        variables: int = 16,
        *,
        text: str | None = "mean",
        table: str | None = "mlp",
        hidden: int = 64,
        outputs: int = 1,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        if text not in TEXTS or table not in TABLES or text is table is None:
            raise ValueError(
                f"text must be pooled, mean or None, table linear, mlp or None, not both None; got {text!r}, {table!r}"
            )
        self.dim, self.text, self.table = dim, text, table
        self.pooler = nn.Linear(dim, dim) if text == "pooled" else None
        self.mlp = nn.Sequential(nn.Linear(variables, hidden), nn.ReLU()) if table == "mlp" else None
        width = (dim if text else 0) + {"linear": variables, "mlp": hidden, None: 0}[table]
        dense = [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(drop), nn.Linear(hidden, outputs)]
        self.head = nn.Linear(width, outputs) if table == "linear" else nn.Sequential(*dense)

    def forward(self, text: Tensor | None, table: Tensor | None, *, mask: Tensor | None = None) -> Preference:
        """Arguments as those of `ConsumerFusion`; what is not read may be None."""
        features = []
        if self.text is not None:
            if text is None:
                raise ValueError("this reference reads the text, got None")
            check_text(text, self.dim, mask)
            features.append(masked_mean(text, mask) if self.pooler is None else self.pooler(text[:, 0]).tanh())
        if self.table is not None:
            if table is None:
                raise ValueError("this reference reads the table, got None")
            known = table.nan_to_num(0.0)
            features.append(known if self.mlp is None else self.mlp(known))
        features_BC = torch.cat(features, 1)
        return Preference(self.head(features_BC), features_BC)


class ConsumerModel(nn.Module):
    """A text encoder and a fusion, or reference, behind it.

    Args:
        encoder: gives `last_hidden_state` of (input_ids, attention_mask), as encoders of transformers do.
        fusion: `ConsumerFusion` or `Reference` of the encoder's width.
        freeze: leave the encoder as it is.
    """

    def __init__(self, encoder: nn.Module, fusion: nn.Module, *, freeze: bool = False) -> None:
        super().__init__()
        self.encoder, self.fusion, self.frozen = encoder, fusion, freeze
        if freeze:
            encoder.requires_grad_(False)

    def forward(self, input_ids: Tensor, table: Tensor, attention_mask: Tensor | None = None) -> Preference:
        """
        Args:
            input_ids: (B, L).
            table: (B, F).
            attention_mask: (B, L), 0 is padding.

        Raises:
            ValueError: if the encoder gives no hidden states, or shapes do not fit.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            said = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        hidden = getattr(said, "last_hidden_state", None)
        if hidden is None:
            raise ValueError("encoder must give last_hidden_state, as AutoModel's encoders do")
        return self.fusion(hidden, table, mask=None if attention_mask is None else attention_mask.bool())

    def train(self, mode: bool = True) -> ConsumerModel:
        """As of any module, but for a frozen encoder."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def parameter_groups(model: ConsumerModel, *, encoder_lr: float = 2e-5, lr: float = 1e-4) -> list[dict[str, Any]]:
    """What an optimiser takes: the encoder at a lower rate, unless it is frozen, and the rest.

    Args:
        model: whose parameters are meant.
        encoder_lr, lr: of either.
    """
    tuned = [p for p in model.encoder.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": list(model.fusion.parameters()), "lr": lr}]
    return [{"params": tuned, "lr": encoder_lr}, *groups] if tuned else groups


def preference_loss(said: Preference, rating_B: Tensor) -> Tensor:
    """Squared error of a rating, or cross-entropy of stars.

    Args:
        said: of a fusion.
        rating_B: the rating; for several outputs the number of the class, from 0.

    Raises:
        ValueError: if there are not as many ratings as predictions.
    """
    if rating_B.shape != said.prediction.shape[:1]:
        raise ValueError(f"ratings must be ({len(said.prediction)},), got {tuple(rating_B.shape)}")
    if said.prediction.shape[1] == 1:
        return F.mse_loss(said.prediction[:, 0].float(), rating_B.float())
    return F.cross_entropy(said.prediction.float(), rating_B.long())


def leave_one_out(value_N: Tensor, group_N: Tensor) -> Tensor:
    """Each row's mean of its group without itself (a place's stars without the review at hand); NaN where it is alone.

    Args:
        value_N: such as stars.
        group_N: int64, from 0, such as the number of the place.

    >>> leave_one_out(torch.tensor([1.0, 5.0, 3.0, 4.0]), torch.tensor([0, 0, 0, 1])).tolist()
    [4.0, 2.0, 3.0, nan]
    """
    size = int(group_N.max()) + 1
    total = value_N.new_zeros(size).index_add_(0, group_N, value_N)
    count = group_N.bincount(minlength=size)
    return (total[group_N] - value_N) / (count[group_N] - 1)


def cleaned(text: str) -> str:
    """A review in one line: no line breaks, no emoticons, one form of quotes and dashes, no repeated punctuation.

    Args:
        text: of a review.

    >>> cleaned("Great!!!\\n“Best” coffee :-) in town…")
    'Great! "Best" coffee in town.'
    """
    text = "".join(_PUNCTUATION.get(c, c) for c in unicodedata.normalize("NFC", text))
    text = re.sub(r"([!?.,])\1+", r"\1", _PICTURES.sub(" ", text))
    return " ".join(text.split())
