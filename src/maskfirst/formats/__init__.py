"""Standard files in which segmentations are kept; each format is read and written in one file."""

from maskfirst.errors import UserError


class FormatError(UserError):
    """A file that does not keep to its format, in one line: the file, the place in it, what is wrong, the remedy."""
