"""Alignment: made features are to lie among each other, and among those of real masks, as the classes' vectors do.

He, Ding & Jiang, "Primitive Generation and Semantic-related Alignment for Universal Zero-Shot Segmentation" (PADing), 2023.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

VARIANCES = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
"""Of the Gaussians that features are compared by."""
SMALLEST = 1e-12
"""Of a squared discrepancy."""
TEMPERATURE = 0.1
"""What similarities are divided by before they are shares."""
SHARPNESS = 0.07
"""What the similarity `scaled` divides cosines by."""


def discrepancy(made: Float[Tensor, "M D"], real: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """How far the distribution of some features is from that of others: 0 where they are the same ones.

    Maximum mean discrepancy (Gretton et al., 2012), biased, by a sum of Gaussians. Meant for as many features on both sides,
    as in training; the published code hands the weights out by `real` first, which is kept, and shows only where M is not N.
    """
    features = torch.cat([made, real])
    squares = (features**2).sum(1)
    distances = squares[:, None] + squares - 2 * features @ features.T
    weights = torch.cat(
        [features.new_full((len(real),), 1 / len(real)), features.new_full((len(made),), -1 / len(made))]
    )
    kernel = torch.stack([(-distances / (2 * variance)).exp() for variance in VARIANCES]).sum(0)
    # A square root has no slope at 0.
    return (weights @ kernel @ weights).clamp(min=SMALLEST).sqrt()


def cosine(x: Float[Tensor, "M D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "M N"]:
    """Of every pair of rows."""
    return F.normalize(x) @ F.normalize(y).T


def scaled(x: Float[Tensor, "M D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "M N"]:
    """Cosines as CLIP makes probabilities of them."""
    return cosine(x, y) / SHARPNESS


def dot(x: Float[Tensor, "M D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "M N"]:
    """Products, that long features have more of."""
    return x @ y.T


Similarity = Callable[[Tensor, Tensor], Tensor]
SIMILARITIES: Mapping[str, Similarity] = {"cosine": cosine, "euclidean": torch.cdist, "dot": dot, "scaled": scaled}


def divergence(found: Float[Tensor, "M N"], wanted: Float[Tensor, "M N"]) -> Float[Tensor, ""]:
    """Kullback-Leibler of the shares that each row is, sharpened; a mean over all numbers, not over rows, as published."""
    if not found.numel():
        return 0.0 * (found.sum() + wanted.sum())
    logs, goal = (found / TEMPERATURE).log_softmax(1), (wanted / TEMPERATURE).log_softmax(1)
    return (goal.exp() * (goal - logs)).sum() / found.numel()


def alignment(
    features: Float[Tensor, "M D"],
    others: Float[Tensor, "N D"],
    classes: Float[Tensor, "M E"],
    other_classes: Float[Tensor, "N E"],
    similarity: Similarity = cosine,
) -> Float[Tensor, ""]:
    """How unlike the features' similarities are to those of their classes' vectors."""
    return divergence(similarity(features, others), similarity(classes, other_classes))
