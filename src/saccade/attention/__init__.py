"""Sequence mechanisms, a file a paper."""
