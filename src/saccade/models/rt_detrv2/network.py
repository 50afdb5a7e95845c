"""RT-DETRv2: backbone, hybrid encoder and decoder; what it gives in training; its sizes.

Shape letters: B batch, D queries of denoising, N other queries, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue.authors import load_state, read_checkpoint
from saccade.layers.deformable_attention import MSDeformableAttention
from saccade.layers.fusing import fuse_norms
from saccade.layers.norms import freeze_norms
from saccade.models.backbone import check_images, maps_of
from saccade.models.detection import Detection, Detector, Target
from saccade.models.rt_detrv2.backbones import DEPTHS, HGNETS, HGNetV2, ResNetVD
from saccade.models.rt_detrv2.decoder import Decoder
from saccade.models.rt_detrv2.denoising import Noised
from saccade.models.rt_detrv2.encoder import HybridEncoder
from saccade.models.rt_detrv2.losses import Criterion
from saccade.ops.export import output

if TYPE_CHECKING:
    from typing_extensions import Self

#: the backbones by name
BACKBONES: Mapping[str, Callable[..., nn.Module]] = {
    **{f"R{depth}": partial(ResNetVD, depth) for depth in DEPTHS},
    **{f"HGNetv2-{size}": partial(HGNetV2, size) for size in HGNETS},
}


@output
@dataclass
class Trained(Detection):
    """What RT-DETRv2 gives in training, for `Criterion`.

    Attributes:
        auxiliary: of the layers before the last.
        proposals: of the cells that became queries.
        denoised: of every layer on the queries of denoising; None where there are none.
        noised: these queries.
    """

    auxiliary: list[Detection] | None = None
    proposals: list[Detection] | None = None
    denoised: list[Detection] | None = None
    noised: Noised | None = None


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments of a configuration of transformers' RTDetrV2.

    Raises:
        ValueError: if it is of another model, or has what this one has not.
    """
    backbone = config.get("backbone_config") or {}
    bottleneck, width = backbone.get("layer_type") == "bottleneck", backbone.get("embedding_size", 0)
    expected = {
        "model_type": "rt_detr_v2", "normalize_before": False, "with_box_refine": True, "activation_function": "silu",
        "encoder_activation_function": "gelu", "decoder_activation_function": "relu", "layer_norm_eps": 1e-5,
        "batch_norm_eps": 1e-5, "positional_encoding_temperature": 10000, "encode_proj_layers": [2],
        "feat_strides": [8, 16, 32], "backbone_config.model_type": "rt_detr_resnet",
        "backbone_config.hidden_sizes": [(width << i) * (4 if bottleneck else 1) for i in range(4)],
        "backbone_config.downsample_in_bottleneck": False, "backbone_config.downsample_in_first_stage": False,
        "backbone_config.hidden_act": "relu", "backbone_config.out_indices": [2, 3, 4],
        "decoder_attention_heads": config.get("encoder_attention_heads"),
    }  # fmt: skip
    found = {**config, **{f"backbone_config.{name}": value for name, value in backbone.items()}}
    for name, value in expected.items():
        said = found.get(name)
        if (list(said) if isinstance(said, (list, tuple)) else said) != value:
            raise ValueError(f"the configuration must have {name} {value!r}, got {said!r}")
    ours = {
        "frozen_norms": "freeze_backbone_batch_norms", "encoder_dim": "encoder_hidden_dim",
        "encoder_hidden": "encoder_ffn_dim", "encoder_layers": "encoder_layers", "expansion": "hidden_expansion",
        "dim": "d_model", "hidden": "decoder_ffn_dim", "layers": "decoder_layers",
        "num_heads": "decoder_attention_heads", "num_queries": "num_queries", "num_levels": "num_feature_levels",
        "num_points": "decoder_n_points", "offset_scale": "decoder_offset_scale",
        "learned_content": "learn_initial_query", "num_denoising": "num_denoising",
        "label_noise": "label_noise_ratio", "box_noise": "box_noise_scale",
    }  # fmt: skip
    return {
        "num_classes": len(config["id2label"]),
        "backbone": "R50" if bottleneck else "R18",
        "backbone_width": width,
        "backbone_blocks": list(backbone["depths"]),
        "sampling": "discrete" if config["decoder_method"] == "discrete" else "bilinear",
        **{name: config[theirs] for name, theirs in ours.items()},
    }


class RTDETRv2(Detector):
    """A real-time detector without suppression; the default is RT-DETRv2-S.

    Args:
        num_classes: K.
        backbone: of `BACKBONES`; or any module that gives three maps at strides 8, 16 and 32, one of transformers too,
            which tells their `channels`.
        backbone_width: channels of a ResNet-vd's first stage.
        backbone_blocks: of each of its stages, in the place of its own.
        frozen_norms: the backbone's batch norms stay as they are; where None those of R50, R101 and HGNetv2.
        encoder_dim, encoder_hidden, encoder_layers: of the encoder's maps, and its attention layers and their MLPs.
        expansion: of the encoder's blocks, see `CSPRep`.
        depth: round(3 depth) RepVGG blocks in each.
        dim, hidden, layers: of the decoder.
        num_heads: of all attention.
        num_queries, num_levels, num_points, eval_layer: of the decoder, see `Decoder`.
        sampling, offset_scale, selection, learned_content: as well.
        num_denoising, label_noise, box_noise: as well.

    Raises:
        ValueError: if there is no such backbone, or a number is out of range.
    """

    slug = "rt-detrv2"

    def __init__(
        self,
        num_classes: int = 80,
        backbone: str | nn.Module = "R18",
        *,
        backbone_width: int = 64,
        backbone_blocks: Sequence[int] | None = None,
        frozen_norms: bool | None = None,
        encoder_dim: int = 256,
        encoder_hidden: int = 1024,
        encoder_layers: int = 1,
        expansion: float = 0.5,
        depth: float = 1.0,
        dim: int = 256,
        hidden: int = 1024,
        layers: int = 3,
        num_heads: int = 8,
        num_queries: int = 300,
        num_levels: int = 3,
        num_points: int | Sequence[int] = 4,
        eval_layer: int = -1,
        sampling: str = "bilinear",
        offset_scale: float = 0.5,
        selection: str = "default",
        learned_content: bool = False,
        num_denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone_name = backbone if isinstance(backbone, str) else type(backbone).__name__
        if isinstance(backbone, str):
            if backbone not in BACKBONES:
                raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, or a module, got {backbone!r}")
            own = {"width": backbone_width, "blocks": backbone_blocks} if backbone.startswith("R") else {}
            frozen = backbone not in ("R18", "R34") if frozen_norms is None else frozen_norms
            backbone = BACKBONES[backbone](**own)
        else:
            frozen = bool(frozen_norms)
        self.backbone = freeze_norms(backbone) if frozen else backbone
        channels = getattr(backbone, "channels", None)
        if not isinstance(channels, (list, tuple)):
            raise ValueError(f"backbone must tell the channels of its maps, got {type(backbone).__name__}")
        self.encoder = HybridEncoder(
            list(channels), encoder_dim, num_heads=num_heads, hidden=encoder_hidden, layers=encoder_layers,
            expansion=expansion, depth=depth, encoded=(len(channels) - 1,),
        )  # fmt: skip
        self.decoder = Decoder(
            num_classes, [encoder_dim] * len(channels), dim, num_queries=num_queries, num_levels=num_levels,
            num_points=num_points, num_heads=num_heads, hidden=hidden, layers=layers, eval_layer=eval_layer,
            sampling=sampling, offset_scale=offset_scale, selection=selection, learned_content=learned_content,
            num_denoising=num_denoising, label_noise=label_noise, box_noise=box_noise,
        )  # fmt: skip

    def forward(self, pixel_values: Tensor, targets: Sequence[Target] | None = None) -> Detection:
        """Images (B, 3, H, W) in [0, 1], of any size, best of multiples of 32.

        Args:
            pixel_values: the images.
            targets: of each image, from which training makes the queries of denoising.

        Raises:
            ValueError: if they are no batch of images, or the targets are not as many.
        """
        check_images(pixel_values, 3)
        if targets is not None and len(targets) != len(pixel_values):
            raise ValueError(f"targets must be one for each of {len(pixel_values)} images, got {len(targets)}")
        decoded = self.decoder(self.encoder(maps_of(self.backbone(pixel_values))), targets)
        if not self.training:
            return Detection(decoded.logits[-1], decoded.boxes[-1])
        first = 0 if decoded.noised is None else decoded.noised.labels_BD.shape[1]
        pairs = list(zip(decoded.logits, decoded.boxes))
        *auxiliary, last = (Detection(logits[:, first:], boxes[:, first:]) for logits, boxes in pairs)
        denoised = [Detection(logits[:, :first], boxes[:, :first]) for logits, boxes in pairs] if first else None
        proposals = [Detection(decoded.queries.logits_BNK, decoded.queries.boxes_BN4)]
        return Trained(
            last.logits, last.pred_boxes,
            auxiliary=auxiliary, proposals=proposals, denoised=denoised, noised=decoded.noised,
        )  # fmt: skip

    @classmethod
    def from_transformers(cls, source: Any) -> Self:
        """The network of a `RTDetrV2ForObjectDetection`, in evaluation.

        Args:
            source: a model of transformers, or the folder that its `save_pretrained` wrote.

        Raises:
            OSError: if the folder's files cannot be read.
            ValueError: if it is another model, or has what this one has not.
        """
        if isinstance(source, (str, Path)):
            config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
            state = read_checkpoint(Path(source) / "model.safetensors")
        else:
            config, state = source.config.to_dict(), source.state_dict()
        model = cls(**arguments_of(config))
        load_state(model, catalogue.port(cls.slug, cls.authors_module).convert(state))
        return model.eval()

    def loss(self, pixel_values: Tensor, targets: Sequence[Target]) -> Tensor:
        return sum(Criterion()(self(pixel_values, targets), targets).values(), pixel_values.new_zeros(()))

    def sample(self, sampling: str) -> Self:
        """Sample in this way from now on: "discrete" is how a bilinear model is tuned for hardware without bilinear
        sampling. The points' places are then no longer learned.

        Raises:
            ValueError: if there is no such sampling.
        """
        for module in self.modules():
            if isinstance(module, MSDeformableAttention):
                module.sample(sampling)
        return self

    def fuse(self) -> Self:
        """Make one convolution of each RepVGG block and of each convolution and its norm, in place, for use alone.

        Raises:
            ValueError: in training, where norms follow the batch.
        """
        if self.training:
            raise ValueError("fuse is for evaluation: call eval() first")
        self.encoder.fuse()
        fuse_norms(self)
        return self
