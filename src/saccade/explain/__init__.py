"""Looking inside models and mechanisms, and ordering them: a folder a paper.

The package is a function too: `saccade.explain(model, inputs, target=None)` is `saccade.explain.explanation.explain`.
And it has what a user asks for by name: `recorded`, `run_with_cache`, `Attribution`, `Explanation`, `METHODS`.
"""

from __future__ import annotations

from saccade.callable_package import callable_package

#: name -> the module that has it
_LAZY = {
    "Attribution": "words",
    "run_with_cache": "words",
    "recorded": "recording",
    "Explanation": "explanation",
    "METHODS": "methods",
}

__getattr__ = callable_package(__name__, "explanation.explain", _LAZY)
