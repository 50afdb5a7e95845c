"""Computational patterns: tensors in, tensors out, no papers."""
