"""SupER: an encoder's latent vector in two halves, one held to what the superclass is, the other to what it is not.

Shape letters: B batch, D width of the latent vector, K classes, C channels of the encoder's map, h, w of it, H height,
W width of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.adapt.superclass_disentanglement.maps import grad_cam, stretched
from saccade.adapt.superclass_disentanglement.parts import LatentClassifier, LatentDecoder, spread_penalty
from saccade.layers.objective import Objective
from saccade.layers.resize import resize
from saccade.layers.resnet import ResNetTrunk
from saccade.layers.watching import as_map
from saccade.ops.feature_maps import check_map


@dataclass
class Disentangled:
    """What the parts say of images.

    Attributes:
        reconstruction: (B, 3, H, W) in [0, 1].
        mean, log_variance: (B, D) of the latent vector.
        relevant, irrelevant: (B, K), logits of the two classifiers.
        features: (B, C, h, w) of the encoder.
        relevant_map, irrelevant_map: (B, h, w) in [0, 1], where the evidence of each for the label lies.
    """

    reconstruction: Tensor
    mean: Tensor
    log_variance: Tensor
    relevant: Tensor
    irrelevant: Tensor
    features: Tensor
    relevant_map: Tensor
    irrelevant_map: Tensor


class SupER(nn.Module):
    """The objective, with the encoder that it trains, and the classifier that is used afterwards (`classify`).

        loss = w_rec MSE(recon, x) + beta KL + w_cls (CE(p_rel, y) + CE(p_irr, y))
             + w_att (MSE(cam_rel, M) + MSE(cam_irr, 1 - M)) + w_l2 R

    Args:
        num_classes: K.
        encoder: images to a map (B, C, h, w): any network that gives a map, maps of which the last is taken, tokens of
            a square, or transformers' output with such a `last_hidden_state`. It is used through its call alone. A
            ResNet where None.
        channels: C; where None what the encoder says (`channels`, or transformers' configuration).
        depth, width: of the ResNet.
        latent: D, even.
        widths: of the classifiers' hidden layers.
        decoder_channels: of the decoder after its first map, which has C; the result has `grid` times 2 to the power of
            their number + 1.
        grid: side of the decoder's first map.
        reconstruction, beta, classes, attention, penalty: w_rec, beta, w_cls, w_att, w_l2.
        threshold: tau; the maps are held to 0 only, where M < tau and where M > tau. None holds them to M and 1 - M.
        drop: dropout of the classifiers.
        in_channels: of the images.

    Raises:
        ValueError: if a number is out of range, or the encoder does not say its channels.
    """

    def __init__(
        self,
        num_classes: int = 2,
        encoder: nn.Module | None = None,
        channels: int | None = None,
        *,
        depth: int = 50,
        width: int = 64,
        latent: int = 512,
        widths: Sequence[int] = (256, 128),
        decoder_channels: Sequence[int] = (1024, 512, 256, 128),
        grid: int = 7,
        reconstruction: float = 1.0,
        beta: float = 1.0,
        classes: float = 1.0,
        attention: float = 40.0,
        penalty: float = 1000.0,
        threshold: float | None = None,
        drop: float = 0.5,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if latent < 2 or latent % 2:
            raise ValueError(f"latent must be positive and even, got {latent}")
        if min(num_classes, grid, in_channels, *widths, *decoder_channels) < 1:
            raise ValueError("num_classes, grid and all numbers of channels must be positive")
        self.encoder = ResNetTrunk(depth, width=width, in_channels=in_channels) if encoder is None else encoder
        C = _channels(self.encoder) if channels is None else channels
        self.in_channels, self.middle, self.threshold = in_channels, latent // 2, threshold
        self.weights = {
            "reconstruction": reconstruction, "kl": beta, "relevant": classes, "irrelevant": classes,
            "alignment": attention, "anti_alignment": attention, "penalty": penalty,
        }  # fmt: skip
        self.mean, self.log_variance = nn.Linear(C, latent), nn.Linear(C, latent)
        self.relevant, self.irrelevant = (LatentClassifier(self.middle, widths, num_classes, drop) for _ in range(2))
        self.decoder = LatentDecoder(latent, (C, *decoder_channels), grid, in_channels)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        maps: Tensor,
        *,
        target: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Objective:
        """
        Args:
            pixel_values: images (B, 3, H, W).
            labels: (B,), a class each.
            maps: M, (B, h, w) in [0, 1], of the teacher; brought to the size of the encoder's map.
            target: what is to be reconstructed; the images where None, brought to the decoder's size.
            noise: (B, D) of the latent vector; drawn in training, none in evaluation, where None.

        Raises:
            ValueError: if they do not fit together.
        """
        if maps.ndim != 3 or labels.shape != pixel_values.shape[:1] or len(maps) != len(labels):
            raise ValueError(
                f"labels and maps must be (batch,) and (batch, height, width) for {len(pixel_values)} images, "
                f"got {tuple(labels.shape)} and {tuple(maps.shape)}"
            )
        said = self.say(pixel_values, labels, noise=noise)
        terms = self.terms(said, labels, maps, pixel_values if target is None else target)
        return Objective(torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(), terms)

    @torch.compiler.disable
    def say(self, pixel_values: Tensor, labels: Tensor, *, noise: Tensor | None = None) -> Disentangled:
        """All that the loss is made of; arguments and errors as in the call."""
        features = self.features(pixel_values)
        outside = torch.is_grad_enabled()
        with torch.enable_grad():  # the maps are gradients, wherever they are asked for
            if not features.requires_grad:
                features = features.detach().requires_grad_()
            mean, log_variance = self.latent(features)
            logits = self.relevant(mean[:, : self.middle]), self.irrelevant(mean[:, self.middle :])
            found = [
                stretched(grad_cam(each.gather(1, labels[:, None]).sum(), features, differentiable=outside))
                for each in logits
            ]
        z = mean
        if noise is not None or self.training:
            z = mean + (torch.randn_like(mean) if noise is None else noise) * (0.5 * log_variance).exp()
        parts = [self.decoder(z), mean, log_variance, *logits, features, *found]
        return Disentangled(*(parts if outside else [part.detach() for part in parts]))

    def terms(self, said: Disentangled, labels: Tensor, maps: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name, without their weights.

        Args:
            said: of `say`.
            labels, maps, target: as in the call.
        """
        maps, target = resize(maps[:, None], said.features)[:, 0], resize(target, said.reconstruction)
        mean, log_variance = said.mean, said.log_variance
        if self.threshold is None:
            align, anti_align = F.mse_loss(said.relevant_map, maps), F.mse_loss(said.irrelevant_map, 1 - maps)
        else:
            align = _mean_square(said.relevant_map, maps < self.threshold)
            anti_align = _mean_square(said.irrelevant_map, maps > self.threshold)
        return {
            "reconstruction": F.mse_loss(said.reconstruction, target),
            "kl": -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean(),
            "relevant": F.cross_entropy(said.relevant, labels),
            "irrelevant": F.cross_entropy(said.irrelevant, labels),
            "alignment": align,
            "anti_alignment": anti_align,
            "penalty": spread_penalty(self.relevant),
        }

    def features(self, pixel_values: Tensor) -> Tensor:
        """F, (B, C, h, w).

        Raises:
            ValueError: if they are no batch of images, or the encoder gives no map of its channels.
        """
        check_map(pixel_values, self.in_channels)
        said: Any = self.encoder(pixel_values)
        for name in ("last_hidden_state", "feature_maps", "features"):
            said = getattr(said, name, said)
        features = as_map(said[-1] if isinstance(said, (list, tuple)) else said, "the encoder")
        check_map(features, self.mean.in_features)
        return features

    def latent(self, features_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2, (B, D), of the mean over positions; the second is kept in [-10, 10]."""
        pooled_BC = features_BCHW.mean((2, 3))
        return self.mean(pooled_BC), self.log_variance(pooled_BC).clamp(-10, 10)

    def classify(self, pixel_values: Tensor) -> Tensor:
        """The logits (B, K) that count: of the relevant half, without noise. The rest is thrown away after training.

        Raises:
            ValueError: as `features`.
        """
        return self.relevant(self.latent(self.features(pixel_values))[0][:, : self.middle])


def _mean_square(maps_BHW: Tensor, where_BHW: Tensor) -> Tensor:
    """Over the chosen positions; 0 where there are none."""
    return (maps_BHW.square() * where_BHW).sum() / where_BHW.sum().clamp(min=1)


def _channels(encoder: nn.Module) -> int:
    said: Any = getattr(encoder, "channels", None)
    config = getattr(encoder, "config", None)
    for name in ("hidden_sizes", "hidden_size", "num_features"):
        if said is None:
            said = getattr(config, name, None)
    if isinstance(said, (list, tuple)) and said:
        said = said[-1]
    if not isinstance(said, int):
        raise ValueError(f"channels must be given for an encoder that does not say them, got {type(encoder).__name__}")
    return said
