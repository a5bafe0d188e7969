"""Objects: some criteria train whether a proposal is an object at all, which not every namer can say."""

from maskfirst.errors import UserError
from maskfirst.types import Names


def require_void(names: Names, criterion: str) -> None:
    """Raises UserError where the namer takes everything for an object, as the loss of one that is none would be infinite."""
    if names.logits.numel() and bool(names.logits[..., -1].isneginf().all()):
        raise UserError(
            f"criterion {criterion} trains which proposals are no object, and this namer takes all for one; put it second "
            "in a `blend`, or train it alone by `phase: {kind: points}`"
        )
