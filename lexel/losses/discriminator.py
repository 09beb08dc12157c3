"""Discriminators that judge an image patch by patch."""

from torch import Tensor, nn

from lexel.errors import UsageError


class PatchDiscriminator(nn.Module):
    """PatchGAN (https://arxiv.org/abs/1611.07004): each logit judges one patch (70x70 pixels with three layers).

    4x4 convolutions: `layers` of stride 2 that double the width up to eight times, then one more of stride 1, then one
    to a single channel. With the default arguments, 2,765,633 parameters and (B, 1, 30, 30) logits for 256x256 images,
    tensor for tensor the discriminator of the published tokenizers. Small images want fewer layers: 2 at 64 pixels,
    1 at 32.

    Args:
        layers: convolutions of stride 2, at least 1.
        width: channels after the first convolution.
    """

    def __init__(self, layers: int = 3, width: int = 64) -> None:
        super().__init__()
        if layers < 1 or width < 1:
            raise UsageError(f"a discriminator needs layers and width of at least 1, got {layers} and {width}")
        self.layers = layers
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for number in range(1, layers + 1):
            wider = width * min(2**number, 8)
            parts += [
                nn.Conv2d(channels, wider, 4, stride=2 if number < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        parts.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        for part in self.main:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)
                nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, h, w), high for patches taken for real, for images (B, 3, H, W) in [-1, 1].

        Raises:
            UsageError: a side of the images is smaller than 3 * 2^layers, which leaves no patch.
        """
        smallest = 3 * 2**self.layers
        if min(images.shape[-2:]) < smallest:
            raise UsageError(
                f"a discriminator of {self.layers} layers needs images of at least {smallest}x{smallest} pixels, "
                f"got {images.shape[-2]}x{images.shape[-1]}; give it fewer layers"
            )
        return self.main(images)
