"""Names of version 0.1; the autoencoders are in `lexel.autoencoders`."""

from lexel.autoencoders.convolutional import Attention

__all__ = ["Attention"]
