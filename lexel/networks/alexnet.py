"""The convolutions of AlexNet (https://arxiv.org/abs/1404.5997), under the tensor names of torchvision's weights."""

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Five convolutions; 3x3 max poolings of stride 2 after the first and the second."""

    TAP_WIDTHS = (64, 192, 384, 256, 256)
    SMALLEST_SIDE = 31  # leaves one position after the second pooling

    def __init__(self) -> None:
        super().__init__()
        # The positions in the list are the numbers in the tensors' names: features.0, 3, 6, 8, 10.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """The five activations after a rectifier: tensors (B, TAP_WIDTHS[i], ., .) for images (B, 3, H, W).

        Images are standardised per channel as for ImageNet; each side is at least SMALLEST_SIDE.
        """
        outputs = []
        for layer in self.features:
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                outputs.append(images)
        return outputs
