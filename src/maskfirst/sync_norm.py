"""Batch norms over processes: their statistics in training are those of the pictures of all that train together.

Peng et al., "MegDet: A Large Mini-Batch Object Detector", CVPR 2018, for the batch norm of Ioffe and Szegedy, 2015.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskfirst import ranks
from maskfirst.errors import UserError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Total(torch.autograd.Function):
    """The sum over the processes; and of its gradients, as the sum of every process hangs on the values of this one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return ranks.total(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ranks.total(gradient.clone())


class CPUSyncNorm(_BatchNorm):
    """On CPUs what torch's SyncBatchNorm is on GPUs, the only place that it and DistributedDataParallel allow."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Maps of any number of axes."""

    def forward(self, input: Float[Tensor, "B C *axes"]) -> Float[Tensor, "B C *axes"]:
        if not (self.training and distributed.is_initialized()):
            return super().forward(input)
        shape = (1, -1, *(1,) * (input.ndim - 2))
        axes = [axis for axis in range(input.ndim) if axis != 1]
        # A sum in 16 bits would lose most of its digits.
        maps = input.to(torch.promote_types(input.dtype, torch.float32))
        sums = _Total.apply(torch.cat([maps.sum(axes), maps.new_tensor([maps[:, 0].numel()])]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # From the mean of all, as the difference of two large sums would lose the digits of a small spread.
        centred = maps - mean.view(shape)
        variance = _Total.apply(centred.square().sum(axes)) / count
        self._track(mean, variance * (count / (count - 1)))
        normed = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normed = normed * self.weight.view(shape)
        if self.bias is not None:
            normed = normed + self.bias.view(shape)
        return normed.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Float[Tensor, " C"], variance: Float[Tensor, " C"]) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronise(module: nn.Module, device: torch.device) -> None:
    """Lets processes share every batch norm inside of `module`, which lies on `device`; parameters and buffers stay the same.

    Raises UserError where one is of a class of its own, such as timm's with an activation within.
    """
    shared = nn.SyncBatchNorm if device.type == "cuda" else CPUSyncNorm
    for place, norm in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(norm, _BatchNorm) or type(norm) is shared:
            continue
        if type(norm) not in PLAIN:
            raise UserError(
                f"{place} is a {type(norm).__name__}, and processes can share the statistics of plain batch norms only; "
                "train in one process, or build the model with others"
            )
        other = shared(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(other, name, getattr(norm, name))
        module.set_submodule(place, other.train(norm.training))
