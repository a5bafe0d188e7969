"""Primitives: features of a class that no picture has shown, put together from learnt parts by what the class is told by.

He, Ding & Jiang, "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation" (PADing), 2023.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskfirst.proposers.mask2former import PostNormLayer

Draw = Callable[[Tensor], Tensor]
"""Noise N(0, 1) in the shape of a tensor."""


class NoisyLayer(PostNormLayer):
    """Noise comes on top of what a request has found among the primitives.

    A request is a sequence of its own, so that it attends to itself alone; that, too, is as published.
    """

    def forward(
        self, requests: Float[Tensor, "N D"], primitives: Float[Tensor, "P D"], noise: Float[Tensor, "N D"]
    ) -> Float[Tensor, "N D"]:
        alone = requests[:, None]
        x = self.norm1(requests + self.dropout(self.self_attention(alone, alone, alone)[:, 0]))
        # Requests that attend to the same primitives do not see each other.
        found = self.cross_attention(x[None], primitives[None], primitives[None])[0]
        x = self.norm2(x + self.dropout(found) + noise)
        return self.fed(x)


class Generator(nn.Module):
    """Makes a feature of each request, another one at every call. `noise`: its standard deviation, 0 for none.

    `draw` may be exchanged, to replay what was recorded.
    """

    def __init__(
        self, width: int, primitives: int, layers: int, heads: int, feedforward: int, dropout: float, noise: float
    ) -> None:
        super().__init__()
        self.primitives = nn.Parameter(torch.randn(primitives, width))
        self.layers = nn.ModuleList(NoisyLayer(width, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.noise = noise
        self.draw: Draw = torch.randn_like

    def forward(self, requests: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        for layer in self.layers:
            requests = layer(requests, self.primitives, self.noise * self.draw(requests))
        return self.norm(requests)
