"""mmseg's UPerHead and its auxiliary FCNHead, the heads of many a checkpoint, in our names.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018.
"""

from collections.abc import Sequence

from maskfirst.convert.rename import Move, Rule

HEAD = "proposer."
_NORM = r"\.bn\.(?P<kind>weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCKS = {
    r"decode_head\.psp_modules\.(\d)\.1": rf"{HEAD}pooled.\1",
    r"decode_head\.bottleneck": f"{HEAD}bottleneck",
    r"decode_head\.lateral_convs\.(\d)": rf"{HEAD}laterals.\1",
    r"decode_head\.fpn_convs\.(\d)": rf"{HEAD}smooth.\1",
    r"decode_head\.fpn_bottleneck": f"{HEAD}join",
    r"auxiliary_head\.convs\.0": f"{HEAD}auxiliary.0",
}
"""Each a convolution and its batch norm."""
_CLASSIFIERS = {
    r"decode_head\.conv_seg": f"{HEAD}classifier",
    r"auxiliary_head\.conv_seg": f"{HEAD}auxiliary.2",
}


def rules() -> Sequence[Rule]:
    """From the keys of both heads to those of the proposer `upernet`; those of its backbone have rules of their own."""
    return [
        *(Move(rf"{theirs}\.conv\.weight", f"{own}.convolution.weight") for theirs, own in _BLOCKS.items()),
        *(Move(theirs + _NORM, rf"{own}.norm.\g<kind>") for theirs, own in _BLOCKS.items()),
        *(Move(rf"{theirs}\.(?P<kind>weight|bias)", rf"{own}.\g<kind>") for theirs, own in _CLASSIFIERS.items()),
    ]
