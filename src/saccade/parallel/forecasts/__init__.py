"""What a call costs on a sequence in parts, worked out without a rank: `plan`.

A forecast is called `forecast(ranks, function, **call)`, where `call` are all arguments of the function by name, of the
whole sequence. It asks what its row asks who is sent what, so that bytes are those that the row will count, but for the
lengths that ranks ask each other where the context was given none. FLOPs are multiply-adds counted as two.
"""

from saccade.parallel.forecasts.rehearsal import plan

__all__ = ["plan"]
