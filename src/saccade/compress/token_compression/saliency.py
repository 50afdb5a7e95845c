"""What the encoder's class token, or the prompt's text, looks at in an image; and how that changes from layer to layer.

Shape letters: B batch, N tokens of the prompt, H heads, M keys, P patches of an encoder, n tokens of an image,
D width.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.vision_language import attend_openly, attention_modules, weights_of
from saccade.layers.wrapping import Changes, Report, changing

#: what models of transformers call their encoder of images
_ENCODERS = ("vision_tower", "vision_model", "visual")


def watch_encoder(
    changes: Changes[Any], model: nn.Module, layer: int | None, tell: Callable[[list[Tensor]], None]
) -> None:
    """Have what is looked at in a layer of the encoder told, (P,) for each image: a mean over heads.

    Of the class token's weights where the patches are a square and one token more, else the mean over all queries.

    Args:
        changes: within which it lasts.
        model: a vision-language model of transformers.
        layer: that whose features are used where None.
        tell: is called with the scores.

    Raises:
        ValueError: if the model has no encoder; in the call, if it gives no weights.
    """
    found = [getattr(module, name) for module in model.modules() for name in _ENCODERS if hasattr(module, name)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {', '.join(_ENCODERS)}: ask for saliency='text'")
    attend_openly(changes, found[0])
    features = getattr(getattr(model, "config", None), "vision_feature_layer", -1)
    features = features if isinstance(features, int) else features[-1]
    # hidden state 0 is what the first layer reads; number -2 is what the last layer but one gives
    number = layer if layer is not None else (features if features < 0 else features - 1)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        weights = weights_of(output, number, "ask for saliency='text'").detach().float().mean(1)
        patches = weights.shape[-1] - 1
        tell(list(weights[:, 0, 1:] if isqrt(patches) ** 2 == patches else weights.mean(1)))

    changes.after(attention_modules(found[0])[number], look)


def behind(image_BN: Tensor) -> Tensor:
    """The tokens behind the last image token of each row.

    Args:
        image_BN: bool, which tokens are an image's.
    """
    last = image_BN.shape[1] - 1 - image_BN.flip(1).int().argmax(1)
    return torch.arange(image_BN.shape[1], device=image_BN.device) > last[:, None]


def text_saliency(model: nn.Module, decoder: Any, x_BND: Tensor, text_BN: Tensor, call: dict[str, Any]) -> list[Tensor]:
    """Of each layer of the decoder the mean weight (B, N) that heads and text give to each token.

    Args:
        model: of which the decoder is.
        decoder: is run once over all tokens, without a cache.
        x_BND: the embeddings.
        text_BN: bool, whose weights count.
        call: the other arguments of the decoder's call.
    """
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        weights_BNM = weights_of(output, len(found)).detach().float().mean(1)
        found.append((weights_BNM * text_BN[..., None]).sum(1) / text_BN.sum(1, keepdim=True))

    given = {k: v for k, v in call.items() if k not in ("past_key_values", "inputs_embeds", "use_cache")}
    with changing(model, Report("look")) as changes, torch.no_grad():
        attend_openly(changes, decoder)
        for module in attention_modules(decoder):
            changes.after(module, look)
        decoder(inputs_embeds=x_BND, use_cache=False, **given)
    return found


def volatility(layers: list[list[Tensor]], budget: Callable[[int], int]) -> float | None:
    """1 - |A and B| / |A or B| of the best m of neighbouring layers, a mean over layers and images; None of one layer.

    Args:
        layers: of each the scores (n,) of the images.
        budget: n -> m.
    """
    found = []
    for above, below in zip(layers, layers[1:]):
        for one, other in zip(above, below):
            m = budget(len(one))
            both = len(set(one.topk(m).indices.tolist()) & set(other.topk(m).indices.tolist()))
            found.append(1 - both / (2 * m - both))
    return sum(found) / len(found) if found else None


def pooled(score_P: Tensor, tokens: int) -> Tensor:
    """Scores of an encoder's patches as those (n,) of the fewer tokens that the projector makes of them, squares each.

    Args:
        score_P: of the patches.
        tokens: n.

    Raises:
        ValueError: if the tokens are no squares of patches.
    """
    patches = score_P.shape[0]
    if patches == tokens:
        return score_P
    side, small = isqrt(patches), isqrt(tokens)
    if side * side != patches or small * small != tokens or side % small:
        raise ValueError(
            f"{patches} patches of the encoder are not squares of the {tokens} tokens: ask for saliency='text'"
        )
    step = side // small
    return score_P.view(small, step, small, step).mean((1, 3)).flatten()
