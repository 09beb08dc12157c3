"""Images in, batches out: folders and embedded sets, named transforms, and an order that can be repeated exactly."""

from lexel.data.arrays import crop_back, pad_to_multiple, to_display, to_images, to_uint8
from lexel.data.batches import Batch, ordered_batches, training_batches
from lexel.data.files import PIXEL_LIMIT, UnreadableImage, first_reason, read_image
from lexel.data.folder import NoSplit
from lexel.data.images import ArrayImages, FileImages, ImageSet
from lexel.data.options import OpenOptions
from lexel.data.sources import SOURCES, open_images
from lexel.data.transforms import TRANSFORMS, Transform

__all__ = [
    "PIXEL_LIMIT",
    "SOURCES",
    "TRANSFORMS",
    "ArrayImages",
    "Batch",
    "FileImages",
    "ImageSet",
    "NoSplit",
    "OpenOptions",
    "Transform",
    "UnreadableImage",
    "crop_back",
    "first_reason",
    "open_images",
    "ordered_batches",
    "pad_to_multiple",
    "read_image",
    "to_display",
    "to_images",
    "to_uint8",
    "training_batches",
]
