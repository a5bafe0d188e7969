"""Linear layers as convolutions are linear layers, forward and backward, and only where that is faster."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.ops import linear

SHAPE = (3, 40, 64)
OUT = 1200


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is convolved, on a machine where that pays."""
    seen: list[tuple[int, ...]] = []
    convolve = F.conv2d

    def conv2d(maps: Tensor, *args: Tensor, **settings: int) -> Tensor:
        seen.append(tuple(maps.shape))
        return convolve(maps, *args, **settings)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(F, "conv2d", conv2d)
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_layer(bias: bool, convolutions: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    layer, maps = nn.Linear(SHAPE[-1], OUT, bias=bias), torch.randn(SHAPE, requires_grad=True)
    # Rows that lie apart, as those of a part of the tokens do.
    for given in (maps, maps[:, 3:]):
        weights = torch.randn(*given.shape[:-1], OUT)
        results = []
        for context in (linear.fast_linear, torch.enable_grad):
            with context():
                found = layer(given)
            results.append([found, *torch.autograd.grad((found * weights).sum(), [maps, *layer.parameters()])])
        for own, other in zip(*results, strict=True):
            assert own.shape == other.shape
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert convolutions == [(1, 64, 1, 120), (1, 64, 1, 111)]


def test_what_is_not_won_stays_as_it_is(convolutions: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, maps = nn.Linear(SHAPE[-1], OUT), torch.randn(SHAPE)
    with linear.fast_linear(), torch.inference_mode():
        layer(maps[:, :2])
        layer.double()(maps.double())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(maps).dtype == torch.bfloat16
        layer.to("meta")(maps.to("meta"))
        assert convolutions == []
        nn.Linear(SHAPE[-1], OUT)(maps)
        assert len(convolutions) == 1
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with linear.fast_linear():
        nn.Linear(SHAPE[-1], OUT)(maps)
    assert len(convolutions) == 1


def test_layers_are_themselves_again_after_the_block(convolutions: list[tuple[int, ...]]) -> None:
    with linear.fast_linear():
        pass
    nn.Linear(SHAPE[-1], OUT)(torch.randn(SHAPE))
    assert convolutions == []
