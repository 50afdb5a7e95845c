"""Four processes that tests call functions in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no packages

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks(function, ...)` runs `function(mesh, ...)` in all processes, which are started once."""
    found = Ranks()
    yield found
    found.stop()
