"""Deformable attention: both ways of it give one sum of bilinear samples, at borders and far outside, and its gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskfirst.ops.deformable_attention import deformable_attention, deformable_attention_by_gather, to_places
from maskfirst.ops.sine_positions import sine_positions

SIZES = [(5, 3), (2, 7), (1, 1)]
WAYS = (deformable_attention, deformable_attention_by_gather)
Way = Callable[..., Tensor]


def by_grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Map by map and head by head, as the definition has it."""
    heads = []
    for head in range(value.shape[2]):
        total = torch.zeros(*locations.shape[:2], value.shape[3], dtype=value.dtype)
        tokens = value[:, :, head].split([h * w for h, w in SIZES], 1)
        for level, (map_tokens, size) in enumerate(zip(tokens, SIZES, strict=True)):
            maps = map_tokens.transpose(1, 2).unflatten(2, size)
            samples = F.grid_sample(maps, 2 * locations[:, :, head, level] - 1, align_corners=False)
            total = total + (samples * weights[:, None, :, head, level]).sum(-1).transpose(1, 2)
        heads.append(total)
    return torch.cat(heads, -1)


def given(low: float, high: float, kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in SIZES)
    value = torch.randn(2, tokens, 2, 3, generator=random, dtype=torch.float64)
    locations = torch.rand(2, 11, 2, len(SIZES), 4, 2, generator=random, dtype=torch.float64) * (high - low) + low
    weights = torch.rand(2, 11, 2, len(SIZES), 4, generator=random, dtype=torch.float64)
    return value.to(kind), locations.to(kind), weights.to(kind)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("span", [(0.2, 0.8), (-0.3, 1.3), (-40.0, 40.0)])
@pytest.mark.parametrize(("kind", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_grid_sample_and_so_are_its_gradients(
    way: Way, span: tuple[float, float], kind: torch.dtype, atol: float
) -> None:
    ours = [tensor.requires_grad_() for tensor in given(*span, kind)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    output = way(ours[0], SIZES, to_places(ours[1], SIZES), ours[2])
    reference = by_grid_sample(*theirs)
    torch.testing.assert_close(output, reference, rtol=atol, atol=atol)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(kind)
    gradients = torch.autograd.grad(output, ours, cotangent)
    for gradient, expected in zip(gradients, torch.autograd.grad(reference, theirs, cotangent), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=10 * atol, atol=10 * atol)


@pytest.mark.parametrize("way", WAYS)
def test_places_count_from_the_first_centre(way: Way) -> None:
    value = torch.arange(15.0).view(1, 15, 1, 1)
    one = torch.ones(1, 1, 1, 1, 1)

    def seen(x: float, y: float) -> float:
        return way(value, [(5, 3)], torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2), one).item()

    assert seen(2.0, 3.0) == 11.0
    assert seen(1.5, 3.0) == 10.5
    assert seen(1.0, 2.25) == 7.75
    # Half outside, on every side; whole outside.
    assert seen(-0.5, 1.0) == 1.5
    assert seen(2.5, 1.0) == 2.5
    assert seen(1.0, -0.5) == 0.5
    assert seen(1.0, 4.5) == 6.5
    assert seen(3.0, 1.0) == seen(-1.0, 1.0) == seen(1.0, 5.0) == seen(1.0, -1.0) == seen(3.0, 5.0) == 0.0


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_a_number_stays_where_it_is_asked_for(way: Way) -> None:
    value, locations, weights = given(0.0, 1.0)
    locations[0, 3, 1, 2, 0, 0] = torch.nan
    locations[1, 5, 0, 0, 1, 1] = torch.inf
    output = way(value, SIZES, to_places(locations, SIZES), weights)
    assert output[0, 3, 3:].isnan().all()
    assert output.isnan().sum() == 3


def test_the_exportable_way_is_of_operators_that_every_exporter_knows() -> None:
    value, locations, weights = given(-0.1, 1.1, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
            return deformable_attention_by_gather(value, SIZES, places, weights)

    arguments = (value, to_places(locations, SIZES), weights)
    program = torch.export.export(Module(), arguments).run_decompositions()
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in operators if "embedding_bag" in name or "grid_sampler" in name}
    torch.testing.assert_close(program.module()(*arguments), deformable_attention(value, SIZES, *arguments[1:]))


def test_sine_positions_follow_their_formula() -> None:
    codes = sine_positions((3, 5), 8, torch.device("cpu")).view(3, 5, 8)
    turn = 2 * torch.pi
    y, x = 2 / (3 + 1e-6) * turn, 5 / (5 + 1e-6) * turn
    slow = 10000 ** (2 / 4)
    angles = torch.tensor([y, y / slow, x, x / slow])
    expected = torch.stack([angles.sin(), angles.cos()], 1).flatten()
    torch.testing.assert_close(codes[1, 4], expected)
    with pytest.raises(ValueError, match="a width that 4 divides, got 6"):
        sine_positions((3, 5), 6, torch.device("cpu"))
