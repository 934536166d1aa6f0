"""A thin ResNet for CPUs."""

from typing import ClassVar

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class SlimResNet(ResNet):
    """torchvision's ResNet with its widths divided so that the first stage has `width` channels instead of 64."""

    small_stem: ClassVar[dict] = {"kernel_size": 3, "stride": 2, "padding": 1}  # a quarter of the pixels: for CPUs

    def __init__(self, layers: list[int], width: int, **kwargs):
        self.slim_width = width
        super().__init__(BasicBlock, layers, **kwargs)
        # The parent built its stem before the first stage could be slimmed.
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes = self.slim_width
        return super()._make_layer(block, planes * self.slim_width // 64, blocks, stride, dilate)
