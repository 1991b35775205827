"""The residual networks of He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

Parameter names and order are torchvision's, so weights go both ways (of bottlenecks in name only, see conv1), and its
detection and segmentation models take these networks as a backbone. Conv1x1 and Conv3x3 are nn.Conv2d made fast.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResBlk(nn.Module):
    """The building block of ResNet-18 and -34: two 3x3 convolutions (Figure 5, left)."""

    expansion = 1  # output channels / channels

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x)), eq. (1) and (2): (N, C, H, W) to (N, channels, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + self.downsample(x))


class BottleneckBlk(nn.Module):
    """The building block of ResNet-50, -101 and -152: 1x1, 3x3 and 1x1 convolutions (Figure 5, right)."""

    expansion = 4  # output channels / channels

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = Conv1x1(in_channels, channels, stride)  # stride as in the paper; torchvision has it on conv2
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = Conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)
        # Starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1); in ResBlk that was less accurate.
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x)): (N, C, H, W) to (N, 4 channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(residual + self.downsample(x))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the identity, or the projection W_s of eq. (2) where the shape changes: option B of Table 3."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(Conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


Block = type[ResBlk] | type[BottleneckBlk]
# Table 1 of the paper: the block, and how many of it make up conv2_x, conv3_x, conv4_x and conv5_x.
LAYER_TABLE: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "resnet18": (ResBlk, (2, 2, 2, 2)),
    "resnet34": (ResBlk, (3, 4, 6, 3)),
    "resnet50": (BottleneckBlk, (3, 4, 6, 3)),
    "resnet101": (BottleneckBlk, (3, 4, 23, 3)),
    "resnet152": (BottleneckBlk, (3, 8, 36, 3)),
}


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
        # ReLU after the pooling gives the same values, on a quarter of the positions.
        x = self.relu(self.maxpool(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


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


# From here on nothing changes what the network computes, only how fast it trains.

# Side of the largest output map on which the fast way beat the library, by instruction set and (kernel, stride).
LARGEST_MAP = {
    "AVX2": {(1, 1): 4, (1, 2): 4, (3, 1): 24, (3, 2): 2},
    "AVX512": {(1, 1): 4, (1, 2): 4, (3, 1): 12, (3, 2): 2},
}.get(torch.backends.cpu.get_cpu_capability(), {})
SMALLEST_BATCH = 32  # images; of fewer it was not measured


def fast_pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether the fast way was measured to beat the library for x (N, C, H, W): training in float32 on a CPU."""
    if not (conv.training and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():  # because what stands in for tensors there must not stay in matrices()' cache
        return False
    if x.dtype != torch.float32 or x.device.type != "cpu" or len(x) < SMALLEST_BATCH or x.shape[2] != x.shape[3]:
        return False
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    return (x.shape[2] - 1) // stride + 1 <= LARGEST_MAP.get((kernel, stride), 0)  # side of the output map


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution without bias; in training a linear layer at every position, on small maps."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (N, O, H / stride, W / stride) of x (N, I, H, W)."""
        if not fast_pays(self, x):
            return super().forward(x)
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 and without bias; in training by fewer multiplications, on small maps."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (N, O, H / stride, W / stride) of x (N, I, H, W)."""
        size, stride = x.shape[2], self.stride[0]
        if fast_pays(self, x) and (stride > 1 or size <= 2 or size % 3 == 0 or size % 4 == 0):  # else no tiles
            return fast_conv3x3(x, self.weight, stride)
        return super().forward(x)


def fast_conv3x3(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Return the convolution (N, O, S', S') of x (N, I, S, S) with weight (O, I, 3, 3), with padding 1, all float32.

    Along each axis it is A ((G w) * (B x)) as `matrices` has them, so each of the P x P products is a matrix product
    over the channels. Results differ from the library's as sums in another order do: by 3e-6 of their norm at most
    (float64 as the reference).
    """
    (n, inputs, size, _), outputs = x.shape, len(weight)
    a, b, g = matrices(size, stride)
    p, k = len(b), len(g)
    tiles = p // k
    v = on_both_axes(b, x.permute(0, 2, 3, 1)).view(n * tiles, k * p, inputs).transpose(0, 1)
    # Tiles down the map share their kernels and so join the batch; along a row the kernels are repeated.
    u = torch.kron(g, g) @ weight.permute(2, 3, 0, 1).reshape(9, outputs * inputs)
    u = u.view(k, 1, k, outputs, inputs).expand(-1, tiles, -1, -1, -1).reshape(k * p, outputs, inputs)
    products = torch.bmm(v, u.mT).transpose(0, 1).reshape(n, p, p, outputs)
    return on_both_axes(a, products).permute(0, 3, 1, 2)


def on_both_axes(matrix: Tensor, x: Tensor) -> Tensor:
    """Return x (N, S, S, C) with `matrix` (P, S) applied along both S: (N, P, P, C)."""
    (p, size), (n, _, _, channels) = matrix.shape, x.shape
    x = torch.bmm(matrix.expand(n, -1, -1), x.reshape(n, size, size * channels))
    return torch.bmm(matrix.expand(n * p, -1, -1), x.view(n * p, size, channels)).view(n, p, p, channels)


@functools.cache
def matrices(size: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (outputs, P), B (P, size) and G (K, 3), float32, with conv(x, w) = A ((G w, repeated) * (B x)).

    That is a convolution with a kernel w (3,) and a zero on either side of x (size,), in P multiplications.
    Stride 2, and a map of 1: one for each pair of an output and a tap that meets the map.
    Stride 1: P / K tiles of m = 3 or 4 outputs, with m + 2 each instead of 3 m: the Toom-Cook product of polynomials
    transposed, by the Vandermonde matrix of m + 1 points and infinity (Winograd 1980; Lavin and Gray 2015,
    arXiv:1509.09308, section 4). On a map of 2 the zeros at the border leave 3 of 4, Karatsuba's.
    """
    if stride > 1 or size == 1:
        outputs = (size - 1) // stride + 1
        pairs = [(i, tap) for i in range(outputs) for tap in range(3) if 0 <= i * stride + tap - 1 < size]
        out, tap = torch.tensor(pairs).T
        selections = torch.eye(outputs)[:, out], torch.eye(size)[out * stride + tap - 1], torch.eye(3)[tap]
        return tuple(matrix.float() for matrix in selections)  # whatever torch's default dtype is
    if size == 2:
        karatsuba = [[1, 1, 0], [1, 0, 1]], [[1, 1], [0, 1], [1, 0]], [[0, 1, 0], [0, -1, 1], [1, -1, 0]]
        return tuple(torch.tensor(matrix).float() for matrix in karatsuba)
    tile = 4 if size % 4 == 0 else 3
    points = torch.tensor([0, 1, -1, 2, -2], dtype=torch.float64)[: tile + 1]

    def vandermonde(columns: int) -> Tensor:
        infinity = torch.arange(columns) == columns - 1
        return torch.cat([points[:, None] ** torch.arange(columns), infinity[None]])

    interpolation = vandermonde(tile + 2).inverse().T
    b = torch.zeros(size // tile, tile + 2, size + 2, dtype=torch.float64)
    for i, rows in enumerate(b):
        rows[:, i * tile : i * tile + tile + 2] = interpolation
    a = torch.block_diag(*[vandermonde(tile).T] * len(b))
    return a.float(), b[..., 1:-1].flatten(0, 1).float(), vandermonde(3).float()
