"""How networks start, module by module; call the functions with `network.apply(...)`."""

from __future__ import annotations

from torch import nn


def start_transformer(module: nn.Module) -> None:
    """Image transformers: linear layers truncated normal 0.02, convolutions normal by their fan-out, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def start_convolution(module: nn.Module) -> None:
    """Convolutions Kaiming normal by their fan-out (He et al., arXiv 1502.01852)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def start_language_model(module: nn.Module) -> None:
    """Linear layers and embeddings normal 0.02, biases 0, as GPT-2's."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
