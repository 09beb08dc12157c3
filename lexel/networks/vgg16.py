"""The convolutions of VGG16 (https://arxiv.org/abs/1409.1556), under the tensor names of torchvision's weights."""

from torch import Tensor, nn

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions in five stages, with a 2x2 max pooling between stages."""

    TAP_WIDTHS = (64, 128, 256, 512, 512)
    SMALLEST_SIDE = 16  # four poolings leave one position

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        taps = []
        channels = 3
        for stage, widths in enumerate(WIDTHS):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # the positions in the list are the numbers in the tensors' names
        self.taps = tuple(taps)  # 3, 8, 15, 22, 29

    def forward(self, images: Tensor) -> list[Tensor]:
        """The last activations of each stage: five tensors (B, TAP_WIDTHS[i], ., .) for images (B, 3, H, W).

        Images are standardised per channel as for ImageNet; each side is at least SMALLEST_SIDE.
        """
        outputs = []
        for number, layer in enumerate(self.features):
            images = layer(images)
            if number in self.taps:
                outputs.append(images)
        return outputs
