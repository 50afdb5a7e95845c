"""What is said of a class in both states."""

from __future__ import annotations

NORMAL = ("{}", "a {}", "the {}")
ABNORMAL = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
TEMPLATES = ("{}.", "a photo of {}.")


def sentences(name: str) -> tuple[list[str], list[str]]:
    """The sentences of the normal state, and those of the other.

    >>> [len(state) for state in sentences("bottle")]
    [6, 10]
    >>> sentences("bottle")[1][1]
    'a photo of a damaged bottle.'

    Args:
        name: of a class.
    """
    normal, abnormal = (
        [template.format(state.format(name)) for state in states for template in TEMPLATES]
        for states in (NORMAL, ABNORMAL)
    )
    return normal, abnormal
