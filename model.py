"""The residual networks of He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

Module names, their order and the parameter names are torchvision's, so weights go both ways, and torchvision's
detection and segmentation models take these networks as a backbone.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

# Where the weight gradient by taps, timed alone, was measured to be faster than the library's: from this many output
# channels, up to this output map (rows, columns), by instruction set. AVX2: 1.02 to 74 times, AVX-512: 1.01 to 9 times.
# tests/benchmark.py times the layers as they are used. Larger maps have too little padding to skip; other instruction
# sets were not measured.
TAP_CHANNELS = 256
LARGEST_TAP_MAP = {"AVX2": 4, "AVX512": 3}.get(torch.backends.cpu.get_cpu_capability(), 0)
# Where 3x3 convolutions by fewer multiplications were measured to be faster than the above, forward and backward
# together, at 128 images. AVX2: 1.0 to 1.4 times with 64 channels, 1.25 times and more from 128 on, where moving the
# data for the transforms costs less beside the products. AVX-512: a step of ResNet-18 1.20, 1.24 and 1.20 times at 32,
# 64 and 96 px, but 1.15 at 64 and 96 px if maps of 16 and 24 take part. Other instruction sets were not measured.
WINOGRAD_CHANNELS = 64
WINOGRAD_BATCH = 64  # images; of 32, some layers were slower
LARGEST_WINOGRAD_MAP = {"AVX2": 24, "AVX512": 12}.get(torch.backends.cpu.get_cpu_capability(), 0)


class TapConvolution(torch.autograd.Function):
    """Convolution whose weight gradient is one matrix product per kernel tap.

    With G the gradient of the output and X the input, as rows of channels at those output positions whose input for
    the tap (i, j) lies inside the map: dW[:, :, i, j] = G^T X. The library takes the padding along: on a 1x1 map that
    is nine taps where one counts. Forward and input gradient are the library's.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        """Return the convolution (N, O, H', W') of x (N, I, H, W) with weight (O, I, h, w)."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable  # so that a second derivative raises
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        """Return the gradients of x and weight, in their shapes, for grad (N, O, H', W')."""
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = nn.grad.conv2d_input(x.shape, weight, grad, ctx.stride, ctx.padding)
        x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
        (out_channels, in_channels, height, width), (rows, columns) = weight.shape, x.shape[1:3]
        # Channels last, as the weight is in training: the optimizer then need not convert it. No need of zeros: the
        # product over no position is 0.
        grad_weight = weight.new_empty(out_channels, height, width, in_channels)
        for i in range(height):
            out_y, in_y = positions_inside(i, rows, grad.shape[1], ctx.stride[0], ctx.padding[0])
            for j in range(width):
                out_x, in_x = positions_inside(j, columns, grad.shape[2], ctx.stride[1], ctx.padding[1])
                g = grad[:, out_y, out_x].reshape(-1, out_channels)
                torch.mm(g.T, x[:, in_y, in_x].reshape(-1, in_channels), out=grad_weight[:, i, j])
        return grad_x, grad_weight.permute(0, 3, 1, 2), None, None


def positions_inside(tap: int, size: int, out_size: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Return, along one axis, the output positions whose input for this kernel tap is no padding, and those inputs."""
    first = max(0, -((tap - padding) // stride))
    end = max(first, min(out_size, (size - 1 - tap + padding) // stride + 1))
    start = first * stride + tap - padding
    return slice(first, end), slice(start, start + (end - first) * stride, stride)


@functools.cache
def winograd_matrices(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (size, P), B (P, size) and G (K, 3), float32, with conv(x, w) = A ((G w) * (B x)) for x (size,).

    That is a convolution with a kernel w (3,) and a zero on either side of x, in P multiplications instead of 3 size;
    G w serves all P / K tiles. Tiles of m outputs take m + 2 multiplications: with V the Vandermonde matrix of m + 1
    points and infinity, the Toom-Cook product of polynomials transposed (Winograd 1980; Lavin and Gray 2015,
    arXiv:1509.09308, section 4). On maps of 1 and 2 the zeros leave 1 and 3, the latter Karatsuba's.
    """
    if size <= 2:
        one = [[1]], [[1]], [[0, 1, 0]]
        karatsuba = [[1, 1, 0], [1, 0, 1]], [[1, 1], [0, 1], [1, 0]], [[0, 1, 0], [0, -1, 1], [1, -1, 0]]
        return tuple(torch.tensor(matrix).float() for matrix in (one if size == 1 else karatsuba))
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


def on_both_axes(matrix: Tensor, x: Tensor) -> Tensor:
    """Return x (N, S, S, C), contiguous, with `matrix` (P, S) applied along both S: (N, P, P, C)."""
    (p, size), (n, _, _, channels) = matrix.shape, x.shape
    x = torch.bmm(matrix.expand(n, -1, -1), x.reshape(n, size, size * channels))
    return torch.bmm(matrix.expand(n * p, -1, -1), x.view(n * p, size, channels)).view(n, p, p, channels)


class WinogradConvolution(torch.autograd.Function):
    """3x3 convolution of stride 1 and padding 1 on a square map, in a quarter to a third of the multiplications.

    Every step is a matrix product, on channels-last rows; the padding is in the matrices. The results differ from the
    library's as float32 sums in another order do: by 3e-6 of their norm at most (float64 as the reference).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution (N, O, S, S) of x (N, I, S, S) with weight (O, I, 3, 3)."""
        (n, inputs, size, _), outputs = x.shape, len(weight)
        a, b, g = winograd_matrices(size)
        p, k = len(b), len(g)
        tiles = p // k
        v = on_both_axes(b, x.permute(0, 2, 3, 1)).view(n * tiles, k * p, inputs).transpose(0, 1)
        u = torch.kron(g, g) @ weight.permute(2, 3, 0, 1).reshape(9, outputs * inputs)
        u = u.view(k, 1, k, outputs, inputs).expand(-1, tiles, -1, -1, -1).reshape(k * p, outputs, inputs)
        ctx.save_for_backward(v, u)
        product = torch.bmm(v, u.mT).transpose(0, 1).reshape(n, p, p, outputs)
        return on_both_axes(a, product).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable  # so that a second derivative raises
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of x and weight, in their shapes, for grad (N, O, S, S): the same steps transposed."""
        v, u = ctx.saved_tensors
        n, outputs, size, _ = grad.shape
        a, b, g = winograd_matrices(size)
        p, k, inputs = len(b), len(g), v.shape[2]
        tiles = p // k
        product = on_both_axes(a.T, grad.permute(0, 2, 3, 1)).view(n * tiles, k * p, outputs).transpose(0, 1)
        grad_u = torch.bmm(product.mT, v).view(k, tiles, k, outputs * inputs).sum(1)
        grad_weight = torch.kron(g, g).T @ grad_u.view(k * k, outputs * inputs)
        grad_weight = grad_weight.view(3, 3, outputs, inputs).permute(2, 3, 0, 1)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight
        grad_v = torch.bmm(product, u).transpose(0, 1).reshape(n, p, p, inputs)
        return on_both_axes(b.T, grad_v).permute(0, 3, 1, 2), grad_weight


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d, trained faster on small maps: see WinogradConvolution and TapConvolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what torch.nn.Conv2d returns for x (N, C, H, W)."""
        if not torch.is_grad_enabled() or not self._is_plain(x):
            return super().forward(x)
        if self._winograd_is_faster(x):
            return WinogradConvolution.apply(x, self.weight)
        if self._taps_are_faster(x):
            return TapConvolution.apply(x, self.weight, self.stride, self.padding)
        return super().forward(x)

    def _is_plain(self, x: Tensor) -> bool:
        plain = self.bias is None and self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if not plain or isinstance(self.padding, str) or not self.weight.requires_grad or x.ndim != 4:
            return False
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or x.device.type != "cpu":
            return False
        return not torch.is_autocast_enabled("cpu")

    def _winograd_is_faster(self, x: Tensor) -> bool:
        if (self.kernel_size, self.stride, self.padding) != ((3, 3), (1, 1), (1, 1)):
            return False
        if min(self.in_channels, self.out_channels) < WINOGRAD_CHANNELS or len(x) < WINOGRAD_BATCH:
            return False
        size = x.shape[2]
        tiled = size in (1, 2) or size % 3 == 0 or size % 4 == 0
        return tiled and x.shape[3] == size and 0 < size <= LARGEST_WINOGRAD_MAP

    def _taps_are_faster(self, x: Tensor) -> bool:
        if self.out_channels < TAP_CHANNELS:
            return False
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        return all((size + 2 * pad - kernel) // stride < LARGEST_TAP_MAP for size, kernel, stride, pad in sizes)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    """Return a 3x3 convolution that keeps the map's size at stride 1; no bias, batch normalisation has one."""
    return Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> Conv2d:
    """Return a 1x1 convolution without bias."""
    return Conv2d(in_channels, out_channels, 1, stride, bias=False)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the projection W_s of eq. (2) where the shape changes, else None, the identity: option B of Table 3."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class ResBlk(nn.Module):
    """The building block of ResNet-18 and -34: two 3x3 convolutions (Figure 5, left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x)), eq. (1) and (2): (N, C, H, W) to (N, channels, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + (x if self.downsample is None else self.downsample(x)))


class BottleneckBlk(nn.Module):
    """The building block of ResNet-50, -101 and -152: 1x1, 3x3 and 1x1 convolutions (Figure 5, right).

    The stride is on the first 1x1 convolution, as in the paper; torchvision has it on the 3x3.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv1x1(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x)): (N, C, H, W) to (N, 4 channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(residual + (x if self.downsample is None else self.downsample(x)))


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
        self.conv1 = Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
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
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, arXiv:1502.01852, the backward case of eq. (14), as torchvision has it.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BottleneckBlk):
                # Each block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1): ResNet-50's
                # first epoch reached 0.22 so and 0.12 without; ResNet-18's sixth lost 0.01, so ResBlk has it not.
                nn.init.zeros_(module.bn3.weight)

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


def _constructor(arch: str) -> Callable[..., ResNet]:
    """Return a function that builds `arch`, with its row of Table 1 as defaults."""

    def construct(
        block: Block = LAYER_TABLE[arch][0], layers: Sequence[int] = LAYER_TABLE[arch][1], num_classes: int = 10
    ) -> ResNet:
        return ResNet(block, layers, num_classes)

    return construct


ResNet18 = _constructor("resnet18")
ResNet34 = _constructor("resnet34")
ResNet50 = _constructor("resnet50")
ResNet101 = _constructor("resnet101")
ResNet152 = _constructor("resnet152")
