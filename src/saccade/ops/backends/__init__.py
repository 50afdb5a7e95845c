"""The paths that `attend` can take; `saccade.ops.planning` says what a backend is."""
