"""OneFormer: a head on given maps, told each task in turn; its texts and the loss of them; tokens of a text."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from maskfirst.build import Experiment
from maskfirst.convert import oneformer
from maskfirst.convert.pickles import open_checkpoint
from maskfirst.convert.rename import rename
from maskfirst.criteria.contrastive import contrastive
from maskfirst.data.vocabulary import from_names
from maskfirst.frames import Frame, resize
from maskfirst.proposers.mask2former import LEVELS, may_see
from maskfirst.proposers.oneformer import START, OneFormer
from maskfirst.proposers.texts import TextBranch, Texts, byte_pairs
from maskfirst.recipe import Recipe
from maskfirst.types import Batch, Segments

from .arrays import Compared, Given, given, read_arrays
from .foreign import Settings
from .mask2former import FEATURES, MASKS
from .rows import EXACT, Row, Tolerance, compare, equal

TEXT = Tolerance(atol=2e-5)
LOSS = Tolerance(atol=1e-5)


def head(folder: Path, path: Path) -> Iterator[Row]:
    """All that a head makes of the same maps for three tasks, and the same by the shorter way of inference."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    for key in ("kind", "source", "sizes", "seed", "note", "min_attn_mask_margin", "all_masked_rows"):
        told.take(key, None)
    channels, strides = told.need("in_channels"), told.need("strides")
    wanted = [text.removeprefix("The task is ") for text in told.need("tasks")]
    width, classes = told.need("hidden_dim"), told.need("num_classes")
    told.only("conv_dim", width)
    told.only("mask_dim", width)
    told.only("use_task_norm", True)
    length = told.need("task_seq_len")
    tree = {
        "vocabulary": [f"class {index}" for index in range(classes)],
        "proposer": {
            "kind": "oneformer",
            "backbone": given(list(channels.values()), list(strides.values())),
            "queries": told.need("num_queries"),
            "width": width,
            "heads": told.need("nheads"),
            "encoder_layers": told.need("enc_layers"),
            "encoder_feedforward": told.need("enc_ffn"),
            "class_layers": told.need("class_dec_layers"),
            "decoder_layers": told.need("dec_layers"),
            "decoder_feedforward": told.need("dec_ffn"),
        },
        "namer": {"kind": "class_head"},
        "criterion": {"kind": "set"},
    }
    told.done()
    weights = open_checkpoint(folder / "state.safetensors").tensors
    model = Experiment(Recipe(tree, path.name)).segmenter().eval()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict(rename(weights, oneformer.rules(weights), shapes).tensors)
    proposer = model.proposer
    assert isinstance(proposer, OneFormer)
    assert isinstance(proposer.backbone, Given)
    arrays = read_arrays(folder / "io.npz")
    compared = Compared("io.npz", arrays)
    maps = [compared.take(f"in_{name}") for name in channels]
    proposer.backbone.maps = [each.expand(len(wanted), -1, -1, -1) for each in maps]
    rows = [proposer.task.rows[index] for index in proposer.task.places(wanted)]
    yield compare("io.npz", "task_ids", torch.stack(rows), compared.take("task_ids")[:, :length], EXACT)
    height, breadth = (side * proposer.stride for side in maps[0].shape[-2:])
    frame = Frame((height, breadth), (height, breadth), (height, breadth))
    empty = torch.zeros(0)
    nothing = Segments(torch.zeros(0, height, breadth).bool(), empty.long(), empty, empty.bool())
    pixels = torch.zeros(len(wanted), 3, height, breadth)
    bare = Batch(pixels, tuple(wanted), (frame,) * len(wanted), ("",) * len(wanted))
    trained = Batch(pixels, bare.tasks, bare.frames, bare.keys, (nothing,) * len(wanted))
    with torch.inference_mode():
        yield compared.row("task_token", proposer.task(wanted), FEATURES)
        with torch.autocast("cpu", torch.bfloat16):
            same = proposer.task(wanted)
        yield compare("io.npz", "task_token, in bf16", same, arrays["task_token"], FEATURES)
        features, encoded = proposer.pixel_decoder(maps)
        yield compared.row("mask_features", features[0], FEATURES)
        for index, each in enumerate(encoded):
            yield compared.row(f"ms_{index}", each[0], FEATURES)
        proposals, names = model(bare)
        yield equal("io.npz", "guesses without truth", len(proposals.earlier), 0)
        yield compare("io.npz", "pred_masks, without truth", proposals.masks, arrays["pred_masks"], MASKS)
        yield compare("io.npz", "pred_logits, without truth", names.logits, arrays["pred_logits"], FEATURES)
        proposals, names = model(trained)
        begun = proposals.extras[START]
        yield compared.row("class_transformer_out", begun[:, :-1], FEATURES)
        yield compared.row("contrastive_logits", begun, FEATURES)
        yield compared.row("pred_masks", proposals.masks, MASKS)
        yield compared.row("pred_logits", names.logits, FEATURES)
        yield equal("io.npz", "earlier guesses", len(proposals.earlier), len(proposer.layers))
        for index, guess in enumerate((*proposals.earlier, proposals)):
            if index < len(proposals.earlier):
                yield compared.row(f"aux{index}_logits", model.namer(guess, trained).logits, FEATURES)
            if f"aux{index}_masks" in arrays:
                yield compared.row(f"aux{index}_masks", guess.masks, MASKS)
            if f"attn_mask_{index}" in arrays:
                size = encoded[index % LEVELS].shape[-2:]
                shrunk = resize(features, (size[0], size[1])).flatten(2).expand(len(wanted), -1, -1)
                blocked = compared.take(f"attn_mask_{index}")
                opened = blocked & ~blocked.all(-1, keepdim=True)
                ours = ~may_see(proposer.mask_embed(guess.queries), shrunk)[:, 0]
                yield compare("io.npz", f"attn_mask_{index}", ours, opened, EXACT)
    yield from compared.rest()


def texts(folder: Path, path: Path) -> Iterator[Row]:
    """The text encoder with what stands behind it, where there are weights, and the loss with its gradients."""
    told = Settings(json.loads(path.read_text(encoding="utf-8")), path.name)
    told.take("kind", None)
    context, width, heads = told.need("n_ctx"), told.need("width"), told.need("heads")
    compared = Compared("io.npz", read_arrays(folder / "io.npz"))
    queries = compared.left["contrastive_logits"].shape[1]
    branch = TextBranch(
        Texts(width, told.need("layers"), context),
        from_names(["class"]),
        queries,
        told.need("hidden"),
        told.need("context_length"),
        told.need("vocab"),
    ).eval()
    yield equal(path.name, "heads", width // 64, heads)
    begun = branch.log_scale.exp().item()
    yield compare(path.name, "temperature_init", 1 / begun, told.need("temperature_init"), LOSS)
    told.done()
    # What the repository holds has the loss's scale without the other weights.
    scale = compared.take("logit_scale") if "logit_scale" in compared.left else torch.tensor(begun).log()
    if "text_ids" in compared.left:
        weights = open_checkpoint(folder / "state.safetensors").tensors
        shapes = {f"{oneformer.TEXTS}{key}": tensor.shape for key, tensor in branch.state_dict().items()}
        renamed = rename(weights, oneformer.text_rules(), shapes).tensors
        branch.load_state_dict({key.removeprefix(oneformer.TEXTS): tensor for key, tensor in renamed.items()})
        ids, scale = compared.take("text_ids"), branch.log_scale.detach()
        with torch.inference_mode():
            yield compared.row("text_encoder_out", branch.encoder(ids.flatten(0, 1)), TEXT)
            yield compare("io.npz", "texts, of the branch", branch(ids), compared.left["texts"], TEXT)
    leaves = [compared.take(key).requires_grad_() for key in ("contrastive_logits", "texts")]
    leaves.append(scale.clone().requires_grad_())
    loss = contrastive(*leaves)
    yield compared.row("loss_contrastive", loss, LOSS)
    loss.backward()
    for key, leaf in zip(("grad_contrastive_logits", "grad_texts", "grad_logit_scale"), leaves, strict=True):
        yield compared.row(key, leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), LOSS)
    yield from compared.rest()


def tokens(folder: Path, path: Path) -> Iterator[Row]:
    """Texts and their tokens, by CLIP's token file of the extra."""
    pairs = byte_pairs(None)
    for text, numbers in json.loads(path.read_text(encoding="utf-8")).items():
        yield equal(path.name, text, pairs.row(text, len(numbers)), numbers)


FILES = {r"tokens\.json": tokens}
"""File name -> what compares it."""
