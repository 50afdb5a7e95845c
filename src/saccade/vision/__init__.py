"""Attention on feature maps and blocks of backbones: a folder a paper."""
