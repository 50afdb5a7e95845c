"""Multimodal and image fusion, a file a paper."""
