"""A network of our own: the encoder of a U-Net, with a classifier on its deepest map."""

from torch import Tensor, nn

import segprop


class Level(nn.Module):
    """Two convolutions, and before them half the size of the map where there is a level above."""

    def __init__(self, inputs: int, outputs: int, *, shrink: bool) -> None:
        super().__init__()
        self.shrink = nn.MaxPool2d(2) if shrink else nn.Identity()
        self.convs = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(self.shrink(x))


def unet_encoder(width: int = 8, levels: int = 3, channels: int = 1, classes: int = 10) -> segprop.Chain:
    """Return the encoder as a chain: a block a level, twice as wide as the one above; the classifier is its head."""
    widths = [channels, *(width << level for level in range(levels))]
    blocks = {f"level{level}": Level(widths[level], widths[level + 1], shrink=level > 0) for level in range(levels)}
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    return segprop.Chain(blocks, head)
