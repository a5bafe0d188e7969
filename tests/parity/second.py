"""SegViT a second time: plain functions on the original's keys, straight from its description, for fixtures of any shape.

It shares no line with the package; what it makes of random weights has the form of the original's fixtures, so that the
single head, other depths, sizes and losses can be compared too. Its numbers are not the original's.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from .variant import draw

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A small SegViT. `head`: the original's class; `shrink`: of a vit_shrink, else None."""

    head: str
    side: int = 64
    patch: int = 16
    width: int = 24
    depth: int = 3
    heads: int = 3
    taps: tuple[int, ...] = (0, 2)
    shrink: int | None = None
    head_width: int = 16
    head_heads: int = 2
    layers: int = 2
    classes: int = 5
    dec_layers: int = 3
    use_proj: bool = True
    eps: float = 1e-6
    crop: int = 64
    stride: int = 40
    loss: tuple[tuple[str, float], ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        backbone = {
            "type": "VisionTransformer" if self.shrink is None else "vit_shrink",
            "img_size": [self.side, self.side],
            "patch_size": self.patch,
            "in_channels": 3,
            "embed_dims": self.width,
            "num_layers": self.depth,
            "num_heads": self.heads,
            "out_indices": list(self.taps),
            "final_norm": False,
            "norm_cfg": {"type": "LN", "eps": self.eps, "requires_grad": True},
            "with_cls_token": False,
            "interpolate_mode": "bicubic",
        }
        if self.shrink is not None:
            backbone["shrink_idx"] = self.shrink
        head = {
            "type": self.head,
            "img_size": self.side,
            "in_channels": self.width,
            "channels": self.width,
            "num_classes": self.classes,
            "num_layers": self.layers,
            "num_heads": self.head_heads,
            "use_stages": len(self.taps),
            "embed_dims": self.head_width,
            "loss_decode": {
                "type": "ATMLoss",
                "num_classes": self.classes,
                "dec_layers": self.dec_layers,
                **dict(self.loss),
            },
        }
        if not self.use_proj:
            head["use_proj"] = False
        test = {"mode": "slide", "crop_size": [self.crop] * 2, "stride": [self.stride] * 2}
        return {
            "type": "EncoderDecoder",
            "pretrained": None,
            "backbone": backbone,
            "decode_head": head,
            "test_cfg": test,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, in the network's order."""
        width, narrow = self.width, self.head_width
        found: dict[str, tuple[int, ...]] = {
            "backbone.cls_token": (1, 1, width),
            "backbone.pos_embed": (1, (self.side // self.patch) ** 2 + 1, width),
        }

        def linear(name: str, out: int, into: tuple[int, ...]) -> None:
            found[f"{name}weight"] = (out, *into)
            found[f"{name}bias"] = (out,)

        def norm(name: str, size: int) -> None:
            found[f"{name}.weight"], found[f"{name}.bias"] = (size,), (size,)

        linear("backbone.patch_embed.projection.", width, (3, self.patch, self.patch))
        for block in (f"backbone.layers.{index}" for index in range(self.depth)):
            norm(f"{block}.ln1", width)
            linear(f"{block}.attn.attn.in_proj_", 3 * width, (width,))
            linear(f"{block}.attn.attn.out_proj.", width, (width,))
            norm(f"{block}.ln2", width)
            linear(f"{block}.ffn.layers.0.0.", 4 * width, (width,))
            linear(f"{block}.ffn.layers.1.", width, (4 * width,))

        def decoder(stack: str, plain: bool) -> None:
            for layer in (f"{stack}.layers.{index}" for index in range(self.layers)):
                linear(f"{layer}.self_attn.in_proj_", 3 * narrow, (narrow,))
                linear(f"{layer}.self_attn.out_proj.", narrow, (narrow,))
                if plain:
                    linear(f"{layer}.multihead_attn.in_proj_", 3 * narrow, (narrow,))
                    linear(f"{layer}.multihead_attn.out_proj.", narrow, (narrow,))
                else:
                    for part in ("q", "k", "v", "proj"):
                        linear(f"{layer}.multihead_attn.{part}.", narrow, (narrow,))
                linear(f"{layer}.linear1.", 4 * narrow, (narrow,))
                linear(f"{layer}.linear2.", narrow, (4 * narrow,))
                for index in (1, 2, 3):
                    norm(f"{layer}.norm{index}", narrow)

        shrunk = self.head == "TPNATMHead"
        for stage in range(1, len(self.taps) + 1):
            if self.use_proj:
                linear(f"decode_head.input_proj_{stage}.", narrow, (width,))
                norm(f"decode_head.proj_norm_{stage}", narrow)
            decoder(f"decode_head.decoder_{stage}", plain=shrunk)
        found["decode_head.q.weight"] = ((self.side // self.patch) ** 2 if shrunk else self.classes, narrow)
        inner = "decode_head.atm." if shrunk else "decode_head."
        if shrunk:
            found[f"{inner}q.weight"] = (self.classes, narrow)
            decoder(f"{inner}decoder_1", plain=False)
        linear(f"{inner}class_embed.", self.classes + 1, (narrow,))
        return found


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}weight"].T + w[f"{name}bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """What is seen, and the scaled similarity before the softmax, averaged over heads."""
    size = q.shape[-1] // heads
    q, k, v = (x.reshape(*x.shape[:2], heads, size) for x in (q, k, v))
    scores = torch.einsum("bqhd,bnhd->bhqn", q, k) / math.sqrt(size)
    seen = torch.einsum("bhqn,bnhd->bqhd", scores.softmax(-1), v)
    return seen.flatten(2), scores.mean(1)


def packed(w: Weights, name: str, query: Tensor, memory: Tensor, heads: int) -> Tensor:
    weights, biases = w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (x @ weight.T + bias for x, weight, bias in zip((query, memory, memory), weights, biases, strict=True))
    return linear(w, f"{name}.out_proj.", attend(q, k, v, heads)[0])


def features(shape: Shape, w: Weights, image: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Tokens after the tapped blocks, and their grids."""
    image = F.pad(image, (0, -image.shape[-1] % shape.patch, 0, -image.shape[-2] % shape.patch))
    kernel, bias = (w[f"backbone.patch_embed.projection.{part}"] for part in ("weight", "bias"))
    maps = F.conv2d(image, kernel, bias, stride=shape.patch)
    grid = (maps.shape[-2], maps.shape[-1])
    side = shape.side // shape.patch
    table = w["backbone.pos_embed"][:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    if grid != (side, side):
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    x = (maps + table).flatten(2).transpose(1, 2)
    taps, grids = [], []
    for index in range(shape.depth):
        block = f"backbone.layers.{index}"
        inside = x
        if index == shape.shrink:
            x = x.reshape(len(x), *grid, -1)[:, ::2, ::2].flatten(1, 2)
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        query, memory = (norm(w, f"{block}.ln1", each, shape.eps) for each in (x, inside))
        x = x + packed(w, f"{block}.attn.attn", query, memory, shape.heads)
        hidden = linear(w, f"{block}.ffn.layers.0.0.", norm(w, f"{block}.ln2", x, shape.eps))
        x = x + linear(w, f"{block}.ffn.layers.1.", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        if index in shape.taps:
            taps.append(x)
            grids.append(grid)
    return taps, grids


def layer(shape: Shape, w: Weights, name: str, t: Tensor, m: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
    """A decoder layer: the tokens after it, and its similarity (of a plain one, nothing)."""
    t = norm(w, f"{name}.norm1", t + packed(w, f"{name}.self_attn", t, t, shape.head_heads), 1e-5)
    cross = f"{name}.multihead_attn"
    if plain:
        seen, similarity = packed(w, cross, t, m, shape.head_heads), t.new_zeros(0)
    else:
        q, k, v = (linear(w, f"{cross}.{part}.", x) for part, x in (("q", t), ("k", m), ("v", m)))
        seen, similarity = attend(q, k, v, shape.head_heads)
        seen = linear(w, f"{cross}.proj.", seen)
    t = norm(w, f"{name}.norm2", t + seen, 1e-5)
    return norm(
        w, f"{name}.norm3", t + linear(w, f"{name}.linear2.", linear(w, f"{name}.linear1.", t).relu()), 1e-5
    ), similarity


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@dataclass
class Answer:
    """Guesses as (class logits, masks on the grid), the last one counting, and by name what was seen on the way."""

    guesses: list[tuple[Tensor, Tensor]]
    noted: dict[str, Tensor]


def answer(shape: Shape, w: Weights, image: Tensor) -> Answer:
    taps, grids = features(shape, w, image)
    noted = {
        f"feat{i}": t if shape.shrink is not None else t.mT.unflatten(2, g)
        for i, (t, g) in enumerate(zip(taps, grids, strict=True))
    }
    head, guesses, batch = "decode_head", [], len(image)

    def enter(tokens: Tensor, stage: int) -> Tensor:
        if not shape.use_proj:
            return tokens
        return norm(w, f"{head}.proj_norm_{stage}", linear(w, f"{head}.input_proj_{stage}.", tokens), 1e-5)

    if shape.head == "TPNATMHead":
        places = w[f"{head}.q.weight"].expand(batch, -1, -1)
        for stage, tokens in enumerate(taps):
            memory = enter(tokens, stage + 1)
            for index in range(shape.layers):
                places, _ = layer(shape, w, f"{head}.decoder_{stage + 1}.layers.{index}", places, memory, plain=True)
            noted[f"qu{stage}"] = places
        head, memories, grid, stacks = f"{head}.atm", [places], (shape.side // shape.patch,) * 2, 1
    else:
        entered = [enter(tokens, stage + 1) for stage, tokens in enumerate(reversed(taps))]
        grid, stacks = grids[-1], len(taps)
        memories = entered if shape.head == "ATMHead" else [sum(entered[1:], entered[0])] * stacks
    t = w[f"{head}.q.weight"].expand(batch, -1, -1)
    total = torch.zeros(())
    for stage in range(stacks):
        seen = []
        for index in range(shape.layers):
            name = f"{head}.decoder_{stage + 1}.layers.{index}"
            t, similarity = layer(shape, w, name, t, memories[stage], plain=False)
            seen.append((f"att_d{stage}_l{index}", t, similarity, similarity))
        if shape.head == "ATMHead":
            *_, (_, t, similarity, _) = seen
            total = total + similarity
            seen = [(f"att_stage{stage}", t, similarity, total)]
        for name, query, similarity, masks in seen:
            noted[f"{name}_query"], noted[f"{name}_sim"] = query, similarity
            guesses.append((linear(w, f"{head}.class_embed.", query), masks.unflatten(2, grid)))
    return Answer(guesses, noted)


def read_out(shape: Shape, w: Weights, image: Tensor) -> Tensor:
    logits, masks = answer(shape, w, image).guesses[-1]
    inside = bilinear(masks, (shape.side, shape.side)).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", logits.softmax(-1)[..., :-1], inside)


def slide(shape: Shape, w: Weights, image: Tensor, goal: tuple[int, int]) -> Tensor:
    height, width = image.shape[-2:]
    total = torch.zeros(1, shape.classes, height, width)
    visits = torch.zeros(height, width)

    def starts(length: int) -> list[int]:
        count = max(length - shape.crop + shape.stride - 1, 0) // shape.stride + 1
        return [max(min(i * shape.stride, length - shape.crop), 0) for i in range(count)]

    for y in starts(height):
        for x in starts(width):
            part = image[..., y : y + shape.crop, x : x + shape.crop]
            size = (part.shape[-2], part.shape[-1])
            total[..., y : y + size[0], x : x + size[1]] += bilinear(read_out(shape, w, part), size)
            visits[y : y + size[0], x : x + size[1]] += 1
    return bilinear(total / visits, goal)


def losses(shape: Shape, guesses: list[tuple[Tensor, Tensor]], label: Tensor, weights: Tensor) -> dict[str, Tensor]:
    factors = {"cls_weight": 1.0, "mask_weight": 20.0, "dice_weight": 1.0, "loss_weight": 1.0} | dict(shape.loss)
    *earlier, last = guesses
    final = (last[0], bilinear(last[1], (shape.side, shape.side)))
    found = {}
    counted = {"": final} | {f"_{index}": guess for index, guess in enumerate(earlier[: shape.dec_layers - 1])}
    for suffix, (logits, masks) in counted.items():
        present = [[c for c in range(shape.classes) if (each == c).any()] for each in label]
        named = torch.full(logits.shape[:2], shape.classes)
        for image, classes in enumerate(present):
            named[image, classes] = torch.tensor(classes, dtype=torch.long)
        chosen = -logits.log_softmax(-1).gather(-1, named[..., None])[..., 0]
        share = weights[named]
        pairs = [(i, c) for i, classes in enumerate(present) for c in classes]
        count = max(len(pairs), 1)
        large = bilinear(masks, (label.shape[-2], label.shape[-1]))
        focal, dice = large.sum() * 0, large.sum() * 0
        for i, c in pairs:
            x, t = large[i, c], (label[i] == c).float()
            right = torch.where(t > 0, x, -x)
            side = torch.where(t > 0, 0.25, 0.75)
            focal = focal - (side * (1 - right.sigmoid()) ** 2 * F.logsigmoid(right)).mean()
            s = x.sigmoid()
            dice = dice + 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
        found[f"loss_ce{suffix}"] = factors["cls_weight"] * (share * chosen).sum() / share.sum()
        found[f"loss_mask{suffix}"] = factors["mask_weight"] * focal / count
        found[f"loss_dice{suffix}"] = factors["dice_weight"] * dice / count
    return {name: factors["loss_weight"] * value for name, value in found.items()}


def make(folder: Path, name: str, shape: Shape, seed: int) -> None:
    """Writes `name`.json, .npz and .safetensors."""
    seeds = {"backbone": seed, "head": seed + 1, "images": seed + 2}
    w = draw(seeds, {key: torch.Size(size) for key, size in shape.shapes().items()})
    stock = torch.ones(shape.classes + 1)
    stock[-1] = 0.1
    buffers = {"decode_head.loss_decode.criterion.empty_weight": stock}
    if shape.head == "TPNATMHead":
        buffers["decode_head.atm.loss_decode.criterion.empty_weight"] = stock.clone()
    save_file(w | buffers, folder / f"{name}.safetensors")
    generator = torch.Generator().manual_seed(seeds["images"])
    side, larger, wide = shape.side, shape.side * 3 // 2, (shape.side + shape.patch, 2 * shape.side - shape.patch)
    images = {f"img{side}": (2, side, side), f"img{larger}": (1, larger, larger), f"img{wide[0]}x{wide[1]}": (1, *wide)}
    arrays = {key: torch.randn(n, 3, h, x, generator=generator) for key, (n, h, x) in images.items()}
    label = torch.randint(0, shape.classes, (2, 1, side // 8, side // 8), generator=generator)
    label = label.repeat_interleave(8, -1).repeat_interleave(8, -2)
    label[0, :, : side // 4] = 255
    label[1][label[1] == 1] = 0
    told: dict[str, Any] = {}
    # In double precision from here on, so that only what is compared with it has rounded.
    w, stock = {key: tensor.double() for key, tensor in w.items()}, stock.double()
    arrays = {key: array.double() for key, array in arrays.items()}
    with torch.no_grad():
        base = arrays[f"img{side}"]
        found = answer(shape, w, base)
        arrays |= found.noted
        *earlier, last = found.guesses
        for index, (logits, masks) in enumerate(earlier):
            arrays[f"aux{index}_pred_logits"], arrays[f"aux{index}_pred_masks"] = logits, masks
        arrays["pred_logits"], arrays["pred_masks"] = last[0], bilinear(last[1], (side, side))
        arrays["pred"] = read_out(shape, w, base)
        arrays[f"encdec{larger}"] = bilinear(read_out(shape, w, arrays[f"img{larger}"]), (larger, larger))
        rectangle = arrays[f"img{wide[0]}x{wide[1]}"]
        arrays[f"slide{wide[0]}x{wide[1]}_prob"] = slide(shape, w, rectangle, (50, 71)).softmax(1)
        views = [
            slide(shape, w, image.flip(-1) if flipped else image, (40, 40)).flip([-1] if flipped else []).softmax(1)
            for image in (rectangle, arrays[f"img{larger}"])
            for flipped in (False, True)
        ]
        arrays["tta_prob"] = torch.stack(views).mean(0)
        arrays["tta_argmax"] = arrays["tta_prob"][0].argmax(0).to(torch.uint8)
        known = label[:, 0] != 255
        accuracy = (arrays["pred"].argmax(1) == label[:, 0])[known].float().mean() * 100
    arrays["empty_weight_rand"] = torch.rand(shape.classes + 1, generator=generator).double() + 0.1
    leaves = {key: tensor.requires_grad_() for key, tensor in w.items()}
    guesses = answer(shape, leaves, base).guesses
    for case, weights in (("losses_rand_empty_weight", arrays["empty_weight_rand"]), ("losses", stock)):
        terms = losses(shape, guesses, label[:, 0], weights)
        total = torch.stack(list(terms.values())).sum()
        told[case] = {key: float(value.detach()) for key, value in terms.items()}
        told[case] |= {"acc_seg": float(accuracy), "total": float(total.detach())}
    parts = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {
        key: torch.zeros_like(leaf) if part is None else part
        for (key, leaf), part in zip(leaves.items(), parts, strict=True)
    }
    told["losses_grad_l2"] = {key: float(gradient.norm()) for key, gradient in gradients.items()}
    arrays |= {f"grad:{key}": gradient for key, gradient in gradients.items() if key.endswith("q.weight")}
    arrays["label"] = label.to(torch.uint8)
    rounded = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in arrays.items()}
    numbers = {key: tensor.detach().numpy() for key, tensor in rounded.items()}
    np.savez(folder / f"{name}.npz", **numbers)  # pyright: ignore[reportArgumentType]
    description = {
        "variant": name,
        "config": shape.config,
        "backbone_weights": f"{name}.safetensors",
        "seeds": seeds,
        "param_count": sum(tensor.numel() for tensor in w.values()),
        "losses": told,
        "arrays": {key: [list(array.shape), str(array.dtype)] for key, array in numbers.items()},
    }
    (folder / f"{name}.json").write_text(json.dumps(description), encoding="utf-8")
