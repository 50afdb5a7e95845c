"""Joint attention: people as tokens that meet, and the field that draws the map of a token.

Shape letters: B images, P people, F attributes, M = P + 1 tokens, L blocks, K tokens whose maps are drawn, C channels,
N points, H, W map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.mlp import MLP
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.ops.heads import check_heads

#: layers between the field's first and last, and those of the embedding
FIELDS = {"shallow": 0, "middle": 2, "deep": 4}
EMBEDDINGS = {"mlp": 3, "linear": 1}


def grid_points(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The points (H W, 2) of a map, row by row: u = column / W and v = row / H.

    Args:
        height, width: H and W.
        device: where they are made.
    """
    v_H, u_W = (torch.arange(n, device=device).float() / n for n in (height, width))
    return torch.stack([u_W.expand(height, -1), v_H[:, None].expand(-1, width)], 2).flatten(0, 1)


class Field(nn.Module):
    """From a token to a map of any resolution: MLP([token; u; v]) at each point, with ReLU between.

    Args:
        dim: C.
        middle: layers between the first and the last.
    """

    def __init__(self, dim: int, middle: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim + 2, dim), nn.Linear(dim, 1)
        layers = [layer for _ in range(middle) for layer in (nn.Linear(dim, dim), nn.ReLU())]
        self.middle = nn.Sequential(*layers)

    def forward(self, token_BKC: Tensor, points_N2: Tensor) -> Tensor:
        """The map's values, (B, K, N).

        Args:
            token_BKC: of any number.
            points_N2: u and v, anywhere.
        """
        dim = token_BKC.shape[2]
        of_token, of_point = self.first.weight.split((dim, 2), 1)
        by_token_BKC = F.linear(token_BKC, of_token, self.first.bias)
        by_point_NC = F.linear(points_N2.to(by_token_BKC.dtype), of_point)
        x_BKNC = (by_token_BKC[:, :, None] + by_point_NC).relu()
        return self.last(self.middle(x_BKNC))[..., 0]


class Interaction(nn.Module):
    """y = x + MHA(x), then y + FC(y); the norm after it is its owner's.

    Args:
        dim: C.
        num_heads: of the attention.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True)
        self.mlp = MLP(dim, dim, activation="relu")

    def forward(self, x_BMC: Tensor, there_BM: Tensor) -> Tensor:
        y_BMC = x_BMC + self.attention(x_BMC, mask=there_BM)
        return y_BMC + self.mlp(y_BMC)

    def weights(self, x_BMC: Tensor, there_BM: Tensor) -> Tensor:
        """Who attends to whom, the mean over heads, (B, M, M)."""
        tokens, heads = x_BMC.shape[1], self.attention.num_heads
        values = torch.eye(tokens, dtype=x_BMC.dtype, device=x_BMC.device).expand(len(x_BMC), heads, -1, -1)
        return self.attention.mix(x_BMC, values, mask=there_BM).mean(1)


class JointMaps(nn.Module):
    """The map of what people look at together, and of what each of them does, from their attributes alone.

    Args:
        attributes: F.
        dim: C, a multiple of the heads.
        depth: L blocks.
        num_heads: of each.
        embedding: "mlp", three layers, or "linear".
        field: of `FIELDS`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        attributes: int,
        dim: int = 16,
        depth: int = 2,
        num_heads: int = 2,
        *,
        embedding: str = "mlp",
        field: str = "middle",
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        for name, value, known in (("embedding", embedding, EMBEDDINGS), ("field", field, FIELDS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if attributes < 1 or depth < 0:
            raise ValueError(f"attributes must be positive and depth not negative, got {attributes} and {depth}")
        layers: list[nn.Module] = [nn.Linear(attributes, dim)]
        for _ in range(EMBEDDINGS[embedding] - 1):
            layers += [nn.ReLU(), nn.Linear(dim, dim)]
        self.attributes, self.embed = attributes, nn.Sequential(*layers)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Interaction(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if depth else None
        self.field = Field(dim, FIELDS[field])

    def start(self, people_BPF: Tensor, there_BP: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens (B, M, C), the joint one last, and which are there (B, M).

        Raises:
            ValueError: if the attributes are not as many as the network takes, or the mask is of another shape.
        """
        if people_BPF.ndim != 3 or people_BPF.shape[2] != self.attributes:
            raise ValueError(f"people must be (batch, people, {self.attributes}), got {tuple(people_BPF.shape)}")
        if there_BP is None:
            there_BP = torch.ones(people_BPF.shape[:2], dtype=torch.bool, device=people_BPF.device)
        if there_BP.shape != people_BPF.shape[:2] or there_BP.dtype != torch.bool:
            raise ValueError(f"there must be bool {tuple(people_BPF.shape[:2])}, got {tuple(there_BP.shape)}")
        embedded_BPC = self.embed(people_BPF)
        token_B1C = self.token.expand(len(people_BPF), 1, -1).to(embedded_BPC.dtype)
        return torch.cat([embedded_BPC, token_B1C], 1), F.pad(there_BP, (0, 1), value=True)

    def tokens(self, people_BPF: Tensor, there_BP: Tensor | None = None) -> Tensor:
        """People and the joint token after they have met, (B, M, C); the joint one is the last."""
        x_BMC, there_BM = self.start(people_BPF, there_BP)
        for block in self.blocks:
            assert self.norm is not None
            x_BMC = self.norm(block(x_BMC, there_BM))
        return x_BMC

    def weights(self, people_BPF: Tensor, there_BP: Tensor | None = None) -> Tensor:
        """Who attends to whom in each block, the mean over heads, (B, L, M, M)."""
        x_BMC, there_BM = self.start(people_BPF, there_BP)
        found = []
        for block in self.blocks:
            assert isinstance(block, Interaction) and self.norm is not None
            found.append(block.weights(x_BMC, there_BM))
            x_BMC = self.norm(block(x_BMC, there_BM))
        return torch.stack(found, 1)

    def forward(self, people_BPF: Tensor, there_BP: Tensor | None, points_N2: Tensor, each: bool = True) -> Tensor:
        """Values at points: of each person and of all together, (B, M, N), or of these alone (B, 1, N).

        Args:
            people_BPF: attributes.
            there_BP: bool; all are there where None.
            points_N2: u and v.
            each: False leaves single people out.
        """
        tokens_BMC = self.tokens(people_BPF, there_BP)
        return self.field(tokens_BMC if each else tokens_BMC[:, -1:], points_N2)
