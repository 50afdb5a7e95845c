"""FEAT's network: clips of latents and a diffusion step in, the noise in them out.

Shape letters: B batch, F frames, N patches of a frame, C channels, L channels of latents, H height, W width, p patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.complete import batch
from saccade.models.diffusion import Denoised, Diffusion
from saccade.models.feat.mixer import SILU_SCALE, ChannelBlock, WKVBlock
from saccade.models.restoration import Restorer, SuperResolved

#: sinusoids of the diffusion step, and their longest period
_SINUSOIDS, _PERIOD = 256, 10_000.0
#: the diffusion step to which `predict` adds noise
_SHOWN = 200


class StepEmbedding(nn.Module):
    """Sinusoids of the diffusion step and two linear maps: (B,) -> (B, C).

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(_SINUSOIDS, dim), nn.Linear(dim, dim)

    def forward(self, step_B: Tensor) -> Tensor:
        half = _SINUSOIDS // 2
        rate = torch.exp(-math.log(_PERIOD) / half * torch.arange(half, device=step_B.device))
        angle = step_B[:, None].float() * rate
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)) / SILU_SCALE)


class FEAT(Restorer):
    """The denoiser; `depth` / 2 times a block of space, of time and of channels.

    Args:
        in_channels: L, of the latents; 3 takes images themselves.
        dim: C.
        depth: WKV blocks, half of them over space; even.
        num_heads: of channel attention, divides C.
        patch: p.
        expansion: of the gated convolutions.
        learn_variance: the network says the variance of a step back too.
        skip: a 1 x 1 convolution of the input is added to the output.
        distance, chunks: of WKV, see `saccade.ops.wkv`.

    Attributes:
        vae: what `predict` turns images into latents with, where L is not 3; None until one is given by `use_vae`.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "feat"
    vae: Any

    def __init__(
        self,
        in_channels: int = 4,
        *,
        dim: int = 512,
        depth: int = 18,
        num_heads: int = 8,
        patch: int = 2,
        expansion: float = 4.0,
        learn_variance: bool = True,
        skip: bool = True,
        distance: str = "kernel",
        chunks: int = 16,
    ) -> None:
        super().__init__()
        if min(in_channels, dim, patch) < 1 or depth < 2 or depth % 2:
            raise ValueError(
                f"in_channels, dim and patch must be positive and depth even, got {in_channels}, {dim}, {patch} and "
                f"{depth}"
            )
        self.in_channels, self.patch, self.learn_variance = in_channels, patch, learn_variance
        self.use_vae(None)
        out_channels = in_channels * (2 if learn_variance else 1)
        self.embed = nn.Conv2d(in_channels, dim, patch, patch)
        self.step_embedding = StepEmbedding(dim)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if skip else None
        options: dict[str, Any] = {"expansion": expansion, "distance": distance, "chunks": chunks}
        self.space = nn.ModuleList(WKVBlock(dim, "space", **options) for _ in range(depth // 2))
        self.time = nn.ModuleList(WKVBlock(dim, "time", **options) for _ in range(depth // 2))
        self.channels = nn.ModuleList(ChannelBlock(dim, num_heads, expansion=expansion) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.modulation, self.head = nn.Linear(dim, 2 * dim), nn.Linear(dim, patch * patch * out_channels)
        self.apply(_start)
        for linear in (self.step_embedding.fc1, self.step_embedding.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.xavier_uniform_(self.embed.weight.data.flatten(1))
        silent = [self.modulation, self.head, *(block.modulation for block in (*self.space, *self.time))]
        for linear in silent:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, latents: Tensor, step: Tensor, *, stills: int = 0) -> Denoised:
        """Clips of noisy latents (B, F, L, H, W) and the diffusion step of each, (B,).

        Args:
            latents: H and W are multiples of the patch.
            step: 0 .. 999.
            stills: so many frames at the end are images of their own, which time does not mix.

        Raises:
            ValueError: if shapes do not fit, or all frames are still.
        """
        self._check(latents, step, stills)
        clip, p = latents.shape[1] - stills, self.patch
        size = (latents.shape[3] // p, latents.shape[4] // p)
        c_BC = self.step_embedding(step)
        x_BFNC = self.embed(latents.flatten(0, 1)).flatten(2).mT.unflatten(0, latents.shape[:2])
        res_BFNC = x_BFNC
        for space, time, channels in zip(self.space, self.time, self.channels, strict=True):
            x_BFNC = space(x_BFNC, c_BC, size, res_BFNC)
            moving = time(x_BFNC[:, :clip], c_BC, size, res_BFNC[:, :clip])
            x_BFNC = torch.cat([moving, x_BFNC[:, clip:]], 1) if stills else moving
            x_BFNC = channels(x_BFNC, c_BC, size)
        shift, scale = self.modulation(F.silu(c_BC) / SILU_SCALE)[:, None, None].chunk(2, -1)
        y = self.head(self.norm(x_BFNC) * (1 + scale) + shift).unflatten(-1, (p, p, -1)).unflatten(2, size)
        # (B, F, h, w, p, p, L) -> (B, F, L, H, W)
        y = y.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)
        if self.skip is not None:
            y = y + self.skip(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        return Denoised(*y.chunk(2, 2)) if self.learn_variance else Denoised(y)

    def use_vae(self, vae: Any) -> None:
        """Let `predict` see images through an autoencoder; it is no part of this network, whose weights are its own.

        Args:
            vae: an object with `encode(images)` and `decode(latents)`, each giving a tensor, or as diffusers'
                AutoencoderKL does; latents are scaled by its `config.scaling_factor`, its stride is 8. None for none.
        """
        self.__dict__["vae"] = vae

    def see(self, images: Sequence[Tensor]) -> SuperResolved:
        """The images as the frames of a clip: noise of diffusion step 200 is added, and taken off again at once."""
        if self.vae is None and self.in_channels != 3:
            raise ValueError(
                f"this network takes latents of {self.in_channels} channels: to see images it needs use_vae(...)"
            )
        H, W = images[0].shape[1:]
        frames = _filled(batch(images), self.patch * (1 if self.vae is None else 8))
        x = (frames * 2 - 1 if self.vae is None else self._encoded(frames * 2 - 1))[None]
        diffusion, step = Diffusion(), torch.tensor([_SHOWN], device=x.device)
        # the same noise for each frame, whichever and however many there are
        noise = torch.randn(x.shape[2:], generator=torch.Generator().manual_seed(0)).to(x).expand(x.shape)
        noisy = diffusion.noised(x, noise, step)
        clean = diffusion.cleaned(noisy, self(noisy, step).noise, step)[0]
        seen = clean if self.vae is None else self._decoded(clean)
        return SuperResolved((seen / 2 + 0.5).clamp(0, 1)[..., :H, :W], list(images))

    def _encoded(self, frames: Tensor) -> Tensor:
        found = self.vae.encode(frames)
        latents: Tensor = found.latent_dist.mode() if hasattr(found, "latent_dist") else found
        return latents * self._scale()

    def _decoded(self, latents: Tensor) -> Tensor:
        found = self.vae.decode(latents / self._scale())
        frames: Tensor = getattr(found, "sample", found)
        return frames

    def _scale(self) -> float:
        return float(getattr(getattr(self.vae, "config", None), "scaling_factor", 1.0))

    def _check(self, latents: Tensor, step: Tensor, stills: int) -> None:
        if latents.ndim != 5 or latents.shape[2] != self.in_channels:
            raise ValueError(
                f"latents must be (batch, frames, {self.in_channels}, height, width), got {tuple(latents.shape)}"
            )
        if min(latents.shape[3:]) < 1 or any(side % self.patch for side in latents.shape[3:]):
            raise ValueError(f"height and width must be multiples of {self.patch}, got {tuple(latents.shape[3:])}")
        if step.shape != latents.shape[:1]:
            raise ValueError(f"step must be a number for each clip ({len(latents)},), got {tuple(step.shape)}")
        if not 0 <= stills < latents.shape[1]:
            raise ValueError(f"stills must be at least 0 and fewer than the frames ({latents.shape[1]}), got {stills}")


def _filled(image_B3HW: Tensor, multiple: int) -> Tensor:
    """The edge again on the right and below, until both sides are multiples."""
    down, right = (-side % multiple for side in image_B3HW.shape[2:])
    return F.pad(image_B3HW, (0, right, 0, down), mode="replicate")


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
