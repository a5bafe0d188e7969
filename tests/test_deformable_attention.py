"""Deformable attention: both ways of it give one sum of bilinear samples, at borders and far outside, and its gradients.

Around it, a layer whose queries and tokens lie on maps of their own.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskfirst.backbones import deformable
from maskfirst.backbones.deformable import DeformableAttention, places_on
from maskfirst.ops import deformable_attention as ops
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


def test_runs_of_queries_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    value, locations, weights = given(-0.3, 1.3)
    arguments = (value, SIZES, to_places(locations, SIZES), weights)
    whole = deformable_attention(*arguments)
    for samples in (1, 2 * 2 * 3 * 4 * 4):
        monkeypatch.setattr(ops, "SAMPLES", samples)
        with torch.inference_mode():
            assert torch.equal(deformable_attention(*arguments), whole)


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


def layer(width: int = 8, heads: int = 2, levels: int = 3, ratio: float = 1.0) -> DeformableAttention:
    """One whose weights are away from where they are initialised."""
    torch.manual_seed(0)
    made = DeformableAttention(width, heads, levels, 2, ratio)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def test_places_of_a_map_on_others() -> None:
    places = places_on([(2, 4), (1, 2)], [(1, 2), (1, 1)], torch.device("cpu"))
    assert places.tolist() == [[[0.5, 0.5], [0.0, 0.0]], [[2.5, 0.5], [1.0, 0.0]], [[1.5, 0.5], [0.5, 0.0]]]


@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
def test_queries_of_other_maps_read_values_of_another_width(ratio: float) -> None:
    attention = layer(ratio=ratio).double()
    random = torch.Generator().manual_seed(1)
    queries, tokens = (torch.randn(2, n, 8, generator=random, dtype=torch.float64) for n in (11, 30))
    places = torch.randn(11, 3, 2, generator=random, dtype=torch.float64) * 3
    offsets = attention.offsets(queries).view(2, 11, 2, 3, 2, 2)
    weights = attention.weights(queries).view(2, 11, 2, 6).softmax(-1).view(2, 11, 2, 3, 2)
    value = attention.value(tokens)
    assert value.shape[-1] == 8 * ratio
    size = torch.tensor([(w, h) for h, w in SIZES])[:, None]
    locations = (places[:, None, :, None] + offsets + 0.5) / size
    expected = attention.output(by_grid_sample(value.unflatten(-1, (2, -1)), locations, weights))
    torch.testing.assert_close(attention(queries, tokens, SIZES, places), expected)


def test_where_it_looks_is_single_precision_whatever_the_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, noted = layer(), []

    def note(value: Tensor, sizes: object, places: Tensor, weights: Tensor) -> Tensor:
        noted.append((value, places, weights))
        return deformable_attention(value, SIZES, places, weights)

    monkeypatch.setattr(deformable, "deformable_attention", note)
    queries, tokens, places = torch.randn(1, 5, 8), torch.randn(1, 30, 8), torch.randn(5, 3, 2)
    plain = attention(queries, tokens, SIZES, places)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(queries, tokens, SIZES, places)
        mixed.sum().backward()
    assert {tensor.dtype for call in noted for tensor in call} == {torch.float32}
    for call in noted[1:]:
        assert torch.equal(call[1], noted[0][1])
        assert torch.equal(call[2], noted[0][2])
    torch.testing.assert_close(mixed.float(), plain, rtol=0.05, atol=0.05)
    # In the backward pass it looks anew.
    assert len(noted) == 3


def test_what_is_read_must_be_shared_out_among_heads() -> None:
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        DeformableAttention(8, 3, 1, 4)
    with pytest.raises(ValueError, match=r"values of 0.25 of width 8, 2, are not divisible by 4 heads"):
        DeformableAttention(8, 4, 1, 4, 0.25)
