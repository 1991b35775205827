"""The residual networks of He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

Parameter names and order are torchvision's, so weights go both ways for ResNet-18 and -34. The second half of the file,
speed_up(), makes training faster.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResBlk(nn.Module):
    """The building block of ResNet-18 and -34: two 3x3 convolutions (Figure 5, left)."""

    expansion = 1  # output channels / channels

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut(x)), eq. (1), (2): (N, C, H, W) to (N, channels, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + self.downsample(x))


class BottleneckBlk(nn.Module):
    """The building block of ResNet-50, -101 and -152: 1x1, 3x3 and 1x1 convolutions (Figure 5, right)."""

    expansion = 4  # output channels / channels

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride, bias=False)  # torchvision strides conv2
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)
        # Starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1); in ResBlk that was less accurate.
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut(x)): (N, C, H, W) to (N, 4 channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(residual + self.downsample(x))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the identity, or the projection W_s of eq. (2) where the shape changes: option B of Table 3."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


Block = type[ResBlk] | type[BottleneckBlk]


class ResNet(nn.Module):
    """A network of Table 1: ResNet(ResBlk, [2, 2, 2, 2], 10) is ResNet-18 for 10 classes."""

    def __init__(self, block: Block, layers: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, 64, layers[0], stride=1)
        self.layer2 = self._stage(block, 64 * block.expansion, 128, layers[1], stride=2)
        self.layer3 = self._stage(block, 128 * block.expansion, 256, layers[2], stride=2)
        self.layer4 = self._stage(block, 256 * block.expansion, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, arXiv:1502.01852, eq. (14), as torchvision has it
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(block: Block, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [block(channels * block.expansion, channels) for _ in range(blocks - 1)]
        return nn.Sequential(block(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of normalised images x (N, 3, H, W), any H and W of at least 1 px."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


# The constructors below are Table 1's columns: the block, and how many of it make up conv2_x to conv5_x.
def ResNet18(block: Block = ResBlk, layers: Sequence[int] = (2, 2, 2, 2), num_classes: int = 10) -> ResNet:
    return ResNet(block, layers, num_classes)


def ResNet34(block: Block = ResBlk, layers: Sequence[int] = (3, 4, 6, 3), num_classes: int = 10) -> ResNet:
    return ResNet(block, layers, num_classes)


def ResNet50(block: Block = BottleneckBlk, layers: Sequence[int] = (3, 4, 6, 3), num_classes: int = 10) -> ResNet:
    return ResNet(block, layers, num_classes)


def ResNet101(block: Block = BottleneckBlk, layers: Sequence[int] = (3, 4, 23, 3), num_classes: int = 10) -> ResNet:
    return ResNet(block, layers, num_classes)


def ResNet152(block: Block = BottleneckBlk, layers: Sequence[int] = (3, 8, 36, 3), num_classes: int = 10) -> ResNet:
    return ResNet(block, layers, num_classes)


# What --arch takes. Add your network: a name, and a class or function that takes num_classes.
NETWORKS = dict(resnet18=ResNet18, resnet34=ResNet34, resnet50=ResNet50, resnet101=ResNet101, resnet152=ResNet152)


# The second half makes a training step 1.2 to 1.5 times as fast with AVX-512, and 1.3 to 1.7 times with AVX2, measured
# at 64 and 96 px on two cores of an Intel Xeon. Results change by rounding alone.
# Side in px of the largest map on which this beat oneDNN on x86. Torch has no oneDNN on ARM Macs.
LARGEST_MAP = {"AVX2": 24, "AVX512": 12, "no oneDNN": 24}
SMALLEST_BATCH = 32  # images; fewer were not measured


def speed_up(network: nn.Module) -> None:
    """Make the 3x3 convolutions of any `network` train by fewer multiplications, where that pays."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            module.__class__ = FastConv2d  # the same layer, with another forward()


class FastConv2d(nn.Conv2d):
    """A layer that returns what nn.Conv2d does, but for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        if fast_pays(self, x):
            return fast_conv3x3(x, self.weight)
        return super().forward(x)


def fast_pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether fast_conv3x3() computes what `conv` says, and was measured to be faster for x."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a graph is being recorded, in which the size of x stays open
    if not conv.training or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim != 4 or len(x) < SMALLEST_BATCH:
        return False
    if (conv.stride, conv.padding, conv.dilation, conv.groups) != ((1, 1), (1, 1), (1, 1), 1):
        return False
    if conv.padding_mode != "zeros" or conv.bias is not None or conv.weight.shape[1:] != (x.shape[1], 3, 3):
        return False
    size = x.shape[2]
    if x.shape[3] != size or (size != 2 and size % 3 != 0 and size % 4 != 0):
        return False  # the map does not divide into tiles
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return size <= LARGEST_MAP.get(torch.backends.cpu.get_cpu_capability() if onednn else "no oneDNN", 0)


# For a tile of m outputs, A, B and G with which A ((G w) * (B x)) is the convolution of x (m + 2,) with w (3,).
# 3 and 4 outputs take m + 2 multiplications instead of 3 m: Lavin and Gray 2015, arXiv:1509.09308, section 4, with the
# points 0, 1, -1, 2, infinity and, for 4, -2. 2 outputs take 3, because zeros surround a map of 2: Karatsuba's.
TILES = {
    2: ([[1, 1, 0], [1, 0, 1]], [[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]], [[0, 1, 0], [0, -1, 1], [1, -1, 0]]),
    3: (
        [[1, 1, 1, 1, 0], [0, 1, -1, 2, 0], [0, 1, 1, 4, 1]],
        [[2, -1, -2, 1, 0], [0, 2, 1, -1, 0], [0, -2, 3, -1, 0], [0, -1, 0, 1, 0], [0, 2, -1, -2, 1]],
        [[1 / 2, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 6, -1 / 6, 1 / 6], [1 / 6, 1 / 3, 2 / 3], [0, 0, 1]],
    ),
    4: (
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
        [[4, 0, -5, 0, 1, 0], [0, 4, 4, -1, -1, 0], [0, -4, 4, 1, -1, 0]]
        + [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1 / 4, 0, 0], [1 / 6, 1 / 6, 1 / 6], [1 / 6, -1 / 6, 1 / 6]]
        + [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
    ),
}


def fast_conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution (N, O, S, S) of x (N, I, S, S) with weight (O, I, 3, 3) and padding 1, all float32.

    S is 2, or a multiple of 3 or 4. The formula above is applied along both axes, and each of its products is a matrix
    product over the channels. The result is off by 4e-6 of its norm at most (float64 as the reference).
    """
    n, inputs, outputs = len(x), x.shape[1], len(weight)
    a, b, g = map_matrices(x)
    k, p = len(g), len(b)  # products of one tile, and of all tiles along an axis
    tiles = p // k
    v = on_both_axes(b, x.permute(0, 2, 3, 1)).reshape(n * tiles, k * p, inputs).transpose(0, 1)
    u = torch.kron(g, g) @ weight.permute(2, 3, 0, 1).reshape(9, outputs * inputs)
    # Tiles down the map join the batch, because they share their kernels; along a row the kernels are repeated.
    u = u.reshape(k, 1, k, outputs, inputs).expand(-1, tiles, -1, -1, -1).reshape(k * p, outputs, inputs)
    products = torch.bmm(v, u.mT).transpose(0, 1).reshape(n, p, p, outputs)
    return on_both_axes(a, products).permute(0, 3, 1, 2)


def map_matrices(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (S, P) and B (P, S) for all tiles along an axis of x (N, I, S, S), and G (K, 3) for one of them."""
    size = x.shape[2]
    tile = 2 if size == 2 else (4 if size % 4 == 0 else 3)
    a, b, g = (x.new_tensor(matrix) for matrix in TILES[tile])
    rows = [F.pad(b, (start, size - tile - start)) for start in range(0, size, tile)]
    return torch.block_diag(*[a] * len(rows)), torch.cat(rows)[:, 1:-1], g  # 1:-1, because the border is 0


def on_both_axes(matrix: Tensor, x: Tensor) -> Tensor:
    """Return x (N, S, S, C) with `matrix` (P, S) applied along both S: (N, P, P, C)."""
    (p, size), (n, _, _, channels) = matrix.shape, x.shape
    x = torch.bmm(matrix.expand(n, -1, -1), x.reshape(n, size, size * channels))
    return torch.bmm(matrix.expand(n * p, -1, -1), x.reshape(n * p, size, channels)).reshape(n, p, p, channels)
