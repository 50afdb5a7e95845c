"""The teacher: where CLIP sees what a phrase says. CLIP is as before afterwards.

Shape letters: B batch, P phrases, D of an embedding, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.adapt.superclass_disentanglement.maps import cam, quantile_stretched
from saccade.layers.watching import as_map, evaluating

#: of the cosine between image and phrase
_SCALE = 100.0


def clip_maps(
    clip: nn.Module,
    pixel_values: Tensor,
    phrases: Mapping[str, Tensor],
    *,
    layer: str | None = None,
    quantiles: tuple[float, float] = (0.01, 0.99),
) -> Tensor:
    """M: Grad-CAM of the cosine between image and phrase, each from its quantiles to [0, 1], the mean over phrases.

        phrases = tokenizer(["a bird"], return_tensors="pt")
        maps = clip_maps(clip, pixel_values, phrases)

    No gradient is left in CLIP, and neither hook nor mode changed.

    Args:
        clip: a `CLIPModel` of transformers, or another with its `get_image_features` and `get_text_features`.
        pixel_values: images (B, 3, height, width) as CLIP takes them.
        phrases: `input_ids` (P, tokens), and `attention_mask` where they differ in length.
        layer: the module whose map (B, C, H, W), or tokens of a square, is F, as `named_modules` has it. None: the
            input of the last attention of a ViT, which alone still reaches the class token. (The paper's is the last
            block of CLIP's ResNet-50, which transformers does not have.)
        quantiles: that become 0 and 1; (0.01, 1.0) for Spawrious.

    Returns:
        (B, H, W) in [0, 1], without gradients.

    Raises:
        ValueError: if there is no such module, or it gives no map.
    """
    modules = dict(clip.named_modules())
    name = _last_norm(modules) if layer is None else layer
    if name not in modules:
        raise ValueError(f"clip has no module {name!r}; it has {', '.join(list(modules)[1:7])} ...")
    kept: list[Tensor] = []

    def free(module: nn.Module, inputs: Any, said: Any) -> Any:
        """A leaf in the place of what the module gave, so that weights need no gradients."""
        out = said[0] if isinstance(said, tuple) else said
        kept.append(out.detach().requires_grad_())
        return (kept[-1], *said[1:]) if isinstance(said, tuple) else kept[-1]

    with evaluating(clip):
        with torch.no_grad():
            text_PD = F.normalize(_vector(clip.get_text_features(**phrases)), dim=-1)  # type: ignore[operator]
        hook = modules[name].register_forward_hook(free)
        try:
            with torch.enable_grad():
                image_BD = F.normalize(_vector(clip.get_image_features(pixel_values=pixel_values)), dim=-1)  # type: ignore[operator]
        finally:
            hook.remove()
    if not kept:
        raise ValueError(f"clip's {name} must be part of what sees images")
    maps = []
    with torch.enable_grad():
        features_BCHW = as_map(kept[-1], name)
        for of_phrase in (_SCALE * image_BD @ text_PD.T).sum(0):
            (slope,) = torch.autograd.grad(of_phrase, kept[-1], retain_graph=True)
            found_BHW = cam(as_map(slope, name), features_BCHW)
            maps.append(quantile_stretched(found_BHW.detach(), quantiles))
    return torch.stack(maps).mean(0)


def _vector(said: Any) -> Tensor:
    """What older and newer versions of transformers return."""
    return said if isinstance(said, Tensor) else said.pooler_output


def _last_norm(modules: Mapping[str, nn.Module]) -> str:
    """The norm before the last attention of what sees images.

    Raises:
        ValueError: if there is none by that name.
    """
    found = [name for name in modules if name.startswith("vision_model.") and name.endswith(".layer_norm1")]
    if not found:
        raise ValueError("layer must be named for a clip without vision_model...layer_norm1")
    return found[-1]
