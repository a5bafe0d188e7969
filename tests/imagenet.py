"""Pictures as models trained on ImageNet want them, who do not normalise for themselves."""

from torch import Tensor, tensor


def normalised(pixels: Tensor) -> Tensor:
    """(B, 3, H, W), RGB 0..255, by the means and deviations of the channels."""
    mean, std = (tensor(values).view(3, 1, 1) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    return (pixels - mean) / std
