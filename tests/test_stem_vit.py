"""The small ViT under a convolutional stem: what bf16 may round, and maps that fit their strides."""

import torch

from maskfirst.backbones.stem_vit import StemViT


def tiny() -> StemViT:
    torch.manual_seed(0)
    return StemViT((32, 48), channels=(4, 8, 16), residuals=(1, 1), width=16, depth=1, heads=2, channels_out=8).eval()


def test_bf16_sees_a_quarter_of_a_grey_level_in_the_picture() -> None:
    backbone = tiny()
    seen: list[torch.Tensor] = []
    backbone.stem4[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pixels = torch.full((1, 3, 32, 48), 254.0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        backbone(pixels)
        backbone(pixels + 0.25)
        # Normalised, to about 2.2, both round to one bf16 number.
        assert ((pixels - backbone.pixels.shift) / backbone.pixels.scale).bfloat16()[0, 0, 0, 0] == (
            (pixels + 0.25 - backbone.pixels.shift) / backbone.pixels.scale
        ).bfloat16()[0, 0, 0, 0]
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[1])


def test_maps_have_their_strides_for_sizes_that_nothing_divides() -> None:
    backbone = tiny()
    with torch.inference_mode():
        maps = backbone(torch.rand(2, 3, 37, 50) * 255)
    padded = (48, 64)
    expected = [(2, 8, padded[0] // stride, padded[1] // stride) for stride in backbone.strides]
    assert [tuple(found.shape) for found in maps] == expected
