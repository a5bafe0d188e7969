"""Layers that are run another way are the same layers, and are run so only where that is faster."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskfirst.ops import cpu

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
        for context in (cpu.fast_on_cpu, torch.enable_grad):
            with context():
                found = layer(given)
            results.append([found, *torch.autograd.grad((found * weights).sum(), [maps, *layer.parameters()])])
        for own, other in zip(*results, strict=True):
            assert own.shape == other.shape
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert convolutions == [(1, 64, 1, 120), (1, 64, 1, 111)]


def test_what_is_not_won_stays_as_it_is(convolutions: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, maps = nn.Linear(SHAPE[-1], OUT), torch.randn(SHAPE)
    with cpu.fast_on_cpu(), torch.inference_mode():
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
    with cpu.fast_on_cpu():
        nn.Linear(SHAPE[-1], OUT)(maps)
    assert len(convolutions) == 1


def test_layers_are_themselves_again_after_the_block(convolutions: list[tuple[int, ...]]) -> None:
    with cpu.fast_on_cpu():
        pass
    nn.Linear(SHAPE[-1], OUT)(torch.randn(SHAPE))
    assert convolutions == []


@pytest.mark.parametrize(("scores", "runs"), [(2 * 50 * 50, 3), (8 * 50, 6 * 7)], ids=["two heads", "eight queries"])
def test_attention_in_bf16_is_attention_without_its_fused_kernel(
    convolutions: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, scores: int, runs: int
) -> None:
    monkeypatch.setattr(cpu, "SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 3, count, 16, generator=generator) for count in (50, 50, 50)]
    parts = [each.bfloat16() for each in whole]
    expected = F.scaled_dot_product_attention(*whole)
    seen: list[torch.dtype] = []
    softmax, of_tensor = torch.softmax, Tensor.softmax

    def counted(scores: Tensor, axis: int, *, out: Tensor) -> Tensor:
        seen.append(scores.dtype)
        return softmax(scores, axis, out=out)

    def counted_of_tensor(scores: Tensor, axis: int) -> Tensor:
        seen.append(scores.dtype)
        return of_tensor(scores, axis)

    monkeypatch.setattr(torch, "softmax", counted)
    monkeypatch.setattr(Tensor, "softmax", counted_of_tensor)
    with torch.inference_mode(), cpu.fast_on_cpu():
        found = F.scaled_dot_product_attention(*parts)
        assert len(seen) == runs
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
        # What torch's kernel alone can do is left to it.
        F.scaled_dot_product_attention(*parts, is_causal=True)
        F.scaled_dot_product_attention(*parts, torch.ones(50, 50, dtype=torch.bool))
        F.scaled_dot_product_attention(*parts, attn_mask=torch.ones(50, 50, dtype=torch.bool))
        F.scaled_dot_product_attention(*whole)
        assert len(seen) == runs
        F.scaled_dot_product_attention(*parts, attn_mask=None, dropout_p=0.0)
        assert len(seen) == 2 * runs
    with cpu.fast_on_cpu():
        # To be differentiated, and all at once.
        F.scaled_dot_product_attention(*parts)
        assert len(seen) == 2 * runs + 1
        # Too many to be kept.
        monkeypatch.setattr(cpu, "KEPT", 2 * 3 * 50 * 50 - 1)
        F.scaled_dot_product_attention(*parts)
    assert len(seen) == 2 * runs + 1


def test_attention_in_bf16_learns_as_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 3, 50, 16, generator=generator, requires_grad=True) for _ in range(3)]
    parts = [each.detach().bfloat16().requires_grad_() for each in whole]
    toward = torch.randn(2, 3, 50, 16, generator=generator)
    (F.scaled_dot_product_attention(*whole) * toward).sum().backward()
    with cpu.fast_on_cpu():
        (F.scaled_dot_product_attention(*parts).float() * toward).sum().backward()
    for exact, found in zip(whole, parts, strict=True):
        assert exact.grad is not None
        assert found.grad is not None
        torch.testing.assert_close(found.grad.float(), exact.grad, rtol=0.03, atol=0.03)
