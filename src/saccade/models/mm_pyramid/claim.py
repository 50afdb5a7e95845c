"""The paper's claim at laptop size: levels help long events, and attention across streams what only the other shows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.models.mm_pyramid.network import MMPyramid
from saccade.models.moments import event_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: steps, classes, channels, how much an event adds to each channel of the noise
_STEPS, _CLASSES, _DIM, _STRENGTH = 16, 4, 12, 0.4
#: lengths of events; the last is long
_LENGTHS = (1, 2, 4, 8)


def _drawn(count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sound, picture, length, what happens when (B, T, K), and which streams show it (B, 2): one, or both.

    An event happens in either stream whichever shows it.
    """
    patterns_MKD = _STRENGTH * torch.randn(2, _CLASSES, _DIM, generator=torch.Generator().manual_seed(0)).sign()
    label_B = torch.randint(_CLASSES, (count,), generator=generator)
    length_B = torch.tensor(_LENGTHS)[torch.randint(len(_LENGTHS), (count,), generator=generator)]
    start_B = (torch.rand(count, generator=generator) * (_STEPS - length_B + 1)).long()
    step_T = torch.arange(_STEPS)
    there_BT = (step_T >= start_B[:, None]) & (step_T < (start_B + length_B)[:, None])
    truth_BTK = there_BT[..., None] & F.one_hot(label_B, _CLASSES).bool()[:, None]
    shows_B2 = torch.tensor([[True, False], [False, True], [True, True]])[
        torch.randint(3, (count,), generator=generator)
    ]
    signal = [(truth_BTK & shows_B2[:, m, None, None]).float() @ patterns_MKD[m] for m in (0, 1)]
    audio, video = (x + torch.randn(x.shape, generator=generator) for x in signal)
    return audio, video, torch.cat([truth_BTK.float(), length_B[:, None, None].expand(-1, _STEPS, 1)], -1), shows_B2


def _f1(said: Tensor, truth: Tensor) -> float:
    return float(2 * (said & truth).sum() / (said.sum() + truth.sum()).clamp(min=1))


def _claim(lab: Lab) -> ClaimResult:
    """Events of 1 to 8 of 16 steps, heard, seen, or both, in noise: four levels, one level, four without the other
    stream."""
    held = _drawn(lab.size(1024, 8), lab.held_out())
    truth_BTK, length_B, shows_B2 = held[2][..., :-1].bool(), held[2][:, 0, -1], held[3]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        audio, video, truth, _ = batch
        said = model(audio, video).probabilities
        return event_loss(said, truth[:, :, None, :-1].expand_as(said))

    def measure(trial: Trial) -> dict[str, float]:
        with torch.no_grad():
            said = cast(MMPyramid, trial.model)(held[0], held[1]).probabilities >= 0.5
        both = truth_BTK[:, :, None].expand_as(said)
        found = {f"f1_length_{n}": _f1(said[length_B == n], both[length_B == n]) for n in _LENGTHS}
        by_stream_said, by_stream_true = said.transpose(1, 2), both.transpose(1, 2)
        return {
            **found,
            "f1_shown": _f1(by_stream_said[shows_B2], by_stream_true[shows_B2]),
            "f1_shown_by_the_other": _f1(by_stream_said[~shows_B2], by_stream_true[~shows_B2]),
        }

    sizes: dict[str, Any] = {
        "num_classes": _CLASSES, "hidden": lab.size(32, 8), "audio_dim": _DIM, "video_dim": _DIM, "motion_dim": 0,
        "frames": 1, "num_heads": 4, "feedforward": lab.size(32, 8), "drop": 0.1,
    }  # fmt: skip
    trials = lab.forms(
        {
            "four": partial(MMPyramid, **sizes, levels=4),
            "one": partial(MMPyramid, **sizes, levels=1),
            "alone": partial(MMPyramid, **sizes, levels=4, cross=False),
        },
        lambda generator: _drawn(lab.size(32, 2), generator),
        measure,
        220, loss=loss, lr=2e-3, task="localise",
    )  # fmt: skip
    measured = trials.means()
    longer = measured["four_f1_length_8"] - measured["one_f1_length_8"]
    other = measured["four_f1_shown_by_the_other"] - measured["alone_f1_shown_by_the_other"]
    return ClaimResult(
        {**measured, "levels_gain_f1_length_8": longer, "cross_gain_f1_shown_by_the_other": other},
        holds=longer > 0.03 and other > 0.3,
    )


CLAIM = Claim(
    paper="audio-visual events of any length are localised and parsed by a pyramid of windows with cross-modal fusion",
    expected="of long events four levels find more than one (F1 at least 0.03 higher), and without attention to the "
    "other stream what only that one shows is lost (0.3)",
    run=_claim,
)
