"""The measures of gaze under the name that training has for them; they stand in `saccade.explain.gaze`."""

from saccade.explain.gaze import *  # noqa: F403
from saccade.explain.gaze import __all__ as __all__
