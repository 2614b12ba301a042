"""What goes wrong with a checkpoint that is converted."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file or tensor and the way out."""
