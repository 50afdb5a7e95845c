"""Fusion of modalities: a folder a paper."""
