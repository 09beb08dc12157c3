"""The entropy of the grey values of a picture's patches, by which DQ-VAE can tell fine regions from coarse ones."""

import torch
from torch import Tensor

GREY = (0.2989, 0.5870, 0.1140)  # of red, green and blue
BINS, DEVIATION = 32, 0.01  # between -1 and 1, and of the kernel that shares a value out among them


@torch.no_grad()
def patch_entropy(images: Tensor, patch: int) -> Tensor:
    """The entropy of the histogram of grey values of every patch (https://arxiv.org/abs/2305.11718), in nats.

        threshold = patch_entropy(images, 16).quantile(0.5)  # half of the regions of these images are above

    Args:
        images: (B, C, H, W) in [-1, 1]; grey is the usual mean of three channels, the plain one of others.
        patch: pixels of a side, which divides H and W.

    Returns:
        float64 (B, H / patch, W / patch), at most log(32): the same for an image in any batch.
    """
    exact = images.double()
    weights = exact.new_tensor(GREY if images.shape[1] == len(GREY) else [1 / images.shape[1]] * images.shape[1])
    grey = (exact * weights[:, None, None]).sum(1)
    patches = grey.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3)  # (B, h, w, patch * patch)
    centres = [2 * number / (BINS - 1) - 1 for number in range(BINS)]
    heights = [(-0.5 * ((patches - centre) / DEVIATION).square()).exp().mean(3) for centre in centres]
    shares = torch.stack(heights, 3)
    shares = shares / shares.sum(3, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(3)
