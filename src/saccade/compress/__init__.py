"""Fewer tokens in a model or its KV cache: a folder a paper."""
