"""Sequence mechanisms: a folder a paper."""
