"""Foreign configs: a mmseg config of SegViT told as one of our recipes; what it asks beyond that is not covered."""

from collections.abc import Mapping, Sequence
from typing import Any

from maskfirst.build import Experiment
from maskfirst.recipe import Recipe
from maskfirst.segmenter import Segmenter


class NotCoveredError(Exception):
    """A fixture that holds or asks for something that this runner does not compare."""


class Settings:
    """A section of a config, read key by key; what is left unread in the end is not covered."""

    def __init__(self, content: Mapping[str, Any], place: str) -> None:
        self.content = dict(content)
        self.place = place

    def need(self, key: str) -> Any:
        if key not in self.content:
            raise NotCoveredError(f"{self.place} lacks '{key}'")
        return self.content.pop(key)

    def take(self, key: str, default: Any) -> Any:
        return self.content.pop(key, default)

    def only(self, key: str, *values: Any) -> None:
        """`values`: what the key may say; the first is what it means where it is not there."""
        value = self.take(key, values[0])
        if value not in values:
            raise NotCoveredError(f"{self.place}.{key}: {value!r}; known: {', '.join(map(repr, values))}")

    def done(self) -> None:
        if self.content:
            raise NotCoveredError(f"{self.place}: unknown keys {', '.join(self.content)}")


HEADS = {"ATMHead": "atm", "ATMSingleHead": "atm_single", "TPNATMHead": "atm_shrunk"}


def recipe_tree(config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the same model. Pictures of the fixtures are normalised already, so it does nothing to them."""
    top = Settings(config, "config")
    top.only("type", "EncoderDecoder")
    for key in ("pretrained", "init_cfg", "train_cfg", "neck", "auxiliary_head"):
        top.only(key, None, {})
    trunk, shrink, taps = _backbone(top.need("backbone"))
    head = Settings(top.need("decode_head"), "decode_head")
    kind, side, classes = head.need("type"), head.need("img_size"), head.need("num_classes")
    if kind not in HEADS:
        raise NotCoveredError(f"decode_head.type: {kind!r}; known: {', '.join(HEADS)}")
    stages = head.need("use_stages")
    if not 1 <= stages <= len(taps):
        raise NotCoveredError(f"decode_head.use_stages: {stages} of {len(taps)} out_indices")
    backbone: dict[str, Any] = {"kind": "taps", "depths": taps[:stages], "trunk": trunk}
    if shrink is not None:
        backbone |= {"kind": "shrunk_taps", "shrink": shrink}
    proposer = {
        "kind": HEADS[kind],
        "backbone": backbone,
        "width": head.need("embed_dims"),
        "heads": head.need("num_heads"),
        "layers": head.need("num_layers"),
    }
    if kind == "ATMSingleHead":
        proposer["project"] = head.take("use_proj", True)
    else:
        head.only("use_proj", True)
    loss = Settings(head.need("loss_decode"), "decode_head.loss_decode")
    criterion, proposer["earlier"] = _loss(loss, classes)
    head.only("in_channels", trunk["width"])
    head.only("ignore_index", 255)
    for key in ("CE_loss", "crop_train", "align_corners"):
        head.only(key, False)
    head.only("shrink_ratio", None)
    # Nothing reads these.
    for key in ("channels", "dropout_ratio", "norm_cfg", "act_cfg"):
        head.take(key, None)
    head.done()
    test = Settings(top.need("test_cfg"), "test_cfg")
    inference: dict[str, Any] = {"multiple": 1}
    if test.need("mode") == "slide":
        inference |= {"window": _pair(test.need("crop_size")), "stride": _pair(test.need("stride"))}
    test.done()
    top.done()
    return {
        "size": _pair(side),
        "vocabulary": [f"class {index}" for index in range(classes)],
        "proposer": proposer,
        "namer": {"kind": "class_head"},
        "criterion": criterion,
        "inference": inference,
    }


def out_indices(config: Mapping[str, Any]) -> list[int]:
    """The blocks after which the backbone hands out features, shallow to deep."""
    return _taps(config["backbone"]["out_indices"], config["backbone"]["num_layers"])


def segmenter(tree: dict[str, Any], source: str) -> Segmenter:
    """The model of a recipe, freshly initialised, in evaluation."""
    return Experiment(Recipe(tree, source)).segmenter().eval()


def loss_criterion(config: Mapping[str, Any], classes: int) -> tuple[dict[str, Any], int]:
    """The recipe of an ATMLoss, and how many earlier guesses it weighs."""
    return _loss(Settings(config, "loss"), classes)


def _loss(loss: Settings, classes: int) -> tuple[dict[str, Any], int]:
    loss.only("type", "ATMLoss")
    loss.only("num_classes", classes)
    loss.only("use_point", False)
    scale = loss.take("loss_weight", 1.0)
    weights = {
        "name_weight": loss.take("cls_weight", 1.0) * scale,
        "mask_weight": loss.take("mask_weight", 20.0) * scale,
        "dice_weight": loss.take("dice_weight", 1.0) * scale,
    }
    # It holds weights for that many guesses, the last among them, and drops the losses of the others.
    earlier = loss.need("dec_layers") - 1
    loss.done()
    return {"kind": "fixed"} | weights, earlier


def _backbone(content: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, list[int]]:
    vit = Settings(content, "backbone")
    kind = vit.need("type")
    if kind not in ("VisionTransformer", "vit_shrink"):
        raise NotCoveredError(f"backbone.type: {kind!r}; known: 'VisionTransformer', 'vit_shrink'")
    depth = vit.need("num_layers")
    taps = _taps(vit.need("out_indices"), depth)
    shrink = vit.need("shrink_idx") if kind == "vit_shrink" else None
    norm = Settings(vit.take("norm_cfg", {"type": "LN"}), "backbone.norm_cfg")
    norm.only("type", "LN")
    norm.take("requires_grad", True)
    trunk = {
        "kind": "vit",
        "model": "vit_base_patch16_224",
        "size": _pair(vit.need("img_size")),
        "width": vit.need("embed_dims"),
        "depth": depth,
        "heads": vit.need("num_heads"),
        "patch": vit.take("patch_size", 16),
        "norm_eps": norm.take("eps", 1e-5),
        "drop_path": vit.take("drop_path_rate", 0.0),
        "drop_path_on": "mlp",
        "final_norm": False,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    }
    norm.done()
    if vit.need("with_cls_token"):
        raise NotCoveredError("backbone.with_cls_token: True; SegViT's encoder has none")
    vit.only("interpolate_mode", "bicubic")
    vit.only("in_channels", 3)
    vit.only("mlp_ratio", 4, 4.0)
    vit.only("num_fcs", 2)
    vit.only("qkv_bias", True)
    vit.only("act_cfg", {"type": "GELU"})
    for key in ("final_norm", "patch_norm", "output_cls_token", "norm_eval"):
        vit.only(key, False)
    for key in ("pretrained", "init_cfg"):
        vit.only(key, None)
    # Of training alone, or of memory alone.
    for key in ("drop_rate", "attn_drop_rate", "with_cp"):
        vit.take(key, None)
    vit.done()
    return trunk, shrink, taps


def _taps(indices: int | Sequence[int], depth: int) -> list[int]:
    listed = [indices] if isinstance(indices, int) else indices
    return sorted(index % depth for index in listed)


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
