"""Which training-free mechanism, at which setting, is worth it here? Measured on the user's own model and inputs.

Every mechanism of `saccade.integrations.mechanisms` runs at each of its settings, beside dense attention on the same
inputs. What comes out is a frontier: for each speed the smallest deviation, and a recommendation, which is the fastest
setting whose deviation stays within a tolerance.

    deviation = sum |out - dense| / sum |dense|,   speed-up = dense time / time

of the model's output (logits, else last hidden state), or of the attention's where only shapes are given.
"""

from saccade.integrations.advise.advice import Advice, Trial
from saccade.integrations.advise.advising import Keep, advise, check, trials
from saccade.integrations.advise.inputs import positions

__all__ = ["Advice", "Keep", "Trial", "advise", "check", "positions", "trials"]
