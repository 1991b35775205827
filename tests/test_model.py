"""The networks against torchvision's, the paper's table and torch.autograd."""

import copy
import itertools

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter

import model
from model import LAYER_TABLE, Conv2d, ResBlk, ResNet, ResNet18, ResNet34, ResNet50, TapConvolution, winograd_matrices


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.fixture
def always_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the bounds that say where Winograd's convolution pays."""
    for name, value in {"WINOGRAD_CHANNELS": 1, "WINOGRAD_BATCH": 1, "LARGEST_WINOGRAD_MAP": 24}.items():
        monkeypatch.setattr(model, name, value)


@pytest.mark.parametrize(
    ("arch", "parameters", "multiply_adds"),  # parameters: torchvision's; multiply-adds: Table 1's last row
    [
        ("resnet18", 11_689_512, 1.8e9),
        ("resnet34", 21_797_672, 3.6e9),
        ("resnet50", 25_557_032, 3.8e9),
        ("resnet101", 44_549_160, 7.6e9),
        ("resnet152", 60_192_808, 11.3e9),
    ],
)
def test_size_is_the_papers(arch: str, parameters: int, multiply_adds: float) -> None:
    with torch.device("meta"):
        net = ResNet(*LAYER_TABLE[arch], num_classes=1000)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.035)


@pytest.mark.parametrize(("ours", "theirs"), [(ResNet18, "resnet18"), (ResNet34, "resnet34")])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_equals_torchvision(ours: type[ResNet], theirs: str, size: int, always_winograd: None) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.get_model(theirs, num_classes=10)
    net = ours()
    assert list(net.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in net.named_modules()] == [name for name, _ in reference.named_modules()]
    net.load_state_dict(reference.state_dict())
    net = net.to(memory_format=torch.channels_last)
    x, labels = torch.randn(8, 3, size, size), torch.arange(8)
    twins = [copy.deepcopy(m).double() for m in (net, reference)]
    for module, images in ((net, x), (reference, x), (twins[0], x.double()), (twins[1], x.double())):
        F.cross_entropy(module(images), labels).backward()
    single, reference_single, double, reference_double = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (net, reference, *twins)
    )
    assert relative_error(double, reference_double) < 1e-9
    # In float32, where taps and Winograd are at work, rounding alone turns a ReLU on or off here and there.
    assert relative_error(single, reference_single) < 0.02
    net.eval(), reference.eval()
    with torch.no_grad():
        assert relative_error(net(x), reference(x)) < 1e-5


def test_feature_maps_equal_torchvisions() -> None:
    reference = torchvision.models.resnet18()
    net = ResNet18(num_classes=1000)
    net.load_state_dict(reference.state_dict())
    layers = {f"layer{i}": f"{i}" for i in range(1, 5)}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = (IntermediateLayerGetter(m.eval(), layers)(x) for m in (net, reference))
    assert [f.shape for f in ours.values()] == [
        (1, c, 64 // s, 96 // s) for c, s in [(64, 4), (128, 8), (256, 16), (512, 32)]
    ]
    for name in ours:
        assert relative_error(ours[name], theirs[name]) < 1e-5


def test_constructors() -> None:
    nets = [ResNet18(), ResNet18(ResBlk, [2, 2, 2, 2], 10), ResNet(ResBlk, [2, 2, 2, 2])]
    assert len({str(net) for net in nets}) == 1
    assert ResNet18(num_classes=1000).fc.out_features == 1000


def test_bottleneck_has_its_stride_on_the_first_convolution() -> None:
    block = ResNet50().layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((2, 2), (1, 1), (2, 2))
    assert ResNet50().layer1[0].downsample[0].stride == (1, 1)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 33), (224, 224)])
def test_any_image_size(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert ResNet18().eval()(torch.randn(2, 3, *size)).shape == (2, 10)


def test_he_initialisation() -> None:
    torch.manual_seed(0)
    weight = ResNet18().layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


def test_bottleneck_starts_as_its_shortcut() -> None:
    block, x = ResNet50().layer2[1].eval(), torch.rand(2, 512, 4, 4)
    assert torch.equal(block(x), x)


GRID = list(itertools.product([(1, 1), (2, 2), (1, 3), (4, 4), (3, 2)], [1, 2], [1, 3], [1, 2, 7], [False, True]))


@pytest.mark.parametrize(("size", "stride", "kernel", "batch", "last"), GRID)
def test_tap_gradients_equal_autograds(
    size: tuple[int, int], stride: int, kernel: int, batch: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "LARGEST_TAP_MAP", 4)
    monkeypatch.setattr(model, "TAP_CHANNELS", 1)
    size = (size[0] * stride, size[1] * stride)
    assert_gradients_equal_autograds("TapConvolution", size, stride, kernel, batch, last, tolerance=1e-5)


def assert_gradients_equal_autograds(
    name: str, size: tuple[int, int], stride: int, kernel: int, batch: int, last: bool, tolerance: float
) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    conv = Conv2d(5, 6, kernel, stride, padding=kernel // 2, bias=False).to(memory_format=layout)
    # In float64: torch 2.14.1's float32 weight gradient of a strided 1x1 convolution of 5 channels is wrong on AVX2.
    reference = nn.Conv2d(5, 6, kernel, stride, padding=kernel // 2, bias=False).to(torch.float64, memory_format=layout)
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(batch, 5, *size).to(memory_format=layout)
    results = []
    for module in (conv, reference):
        leaf = x.to(module.weight.dtype, copy=True).requires_grad_()
        out = module(leaf)
        out.backward(torch.sin(torch.arange(out.numel()).to(out.dtype)).reshape(out.shape))
        results.append((out.detach().double(), leaf.grad.double(), module.weight.grad.double()))
        assert (name in out.grad_fn.name()) == (module is conv)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 9, 12, 24])
def test_winograd_gradients_equal_autograds(size: int, batch: int, last: bool, always_winograd: None) -> None:
    assert_gradients_equal_autograds("WinogradConvolution", (size, size), 1, 3, batch, last, tolerance=5e-5)


@pytest.mark.parametrize(
    ("size", "multiplications"), [(1, 1), (2, 3), (3, 5), (4, 6), (6, 10), (8, 12), (12, 18), (16, 24), (24, 36)]
)
def test_winograd_multiplies_less(size: int, multiplications: int) -> None:
    a, b, g = (matrix.double() for matrix in winograd_matrices(size))
    x, kernel = torch.randn(size, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    products = (g @ kernel).repeat(len(b) // len(g)) * (b @ x)
    assert len(products) == multiplications
    expected = F.conv1d(x[None, None], kernel[None, None], padding=1)[0, 0]
    torch.testing.assert_close(a @ products, expected, rtol=1e-6, atol=1e-6)  # the matrices are float32


def test_winograd_is_as_exact_as_the_docstring_says(always_winograd: None) -> None:
    torch.manual_seed(0)
    conv = Conv2d(128, 128, 3, padding=1, bias=False)
    x = torch.randn(32, 128, 8, 8, requires_grad=True)
    doubles = [t.detach().double().requires_grad_() for t in (x, conv.weight)]
    out, reference = conv(x), F.conv2d(*doubles, padding=1)
    grad = torch.randn_like(out)
    ours = out, *torch.autograd.grad(out, (x, conv.weight), grad)
    theirs = reference, *torch.autograd.grad(reference, doubles, grad.double())
    assert max(relative_error(a.double(), b) for a, b in zip(ours, theirs, strict=True)) < 3e-6


def test_tap_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: TapConvolution.apply(x, w, (2, 1), (1, 1)), (x, weight))


@pytest.mark.parametrize(("stride", "name"), [(1, "Winograd"), (2, "Tap")])
def test_second_derivative_raises(
    stride: int, name: str, monkeypatch: pytest.MonkeyPatch, always_winograd: None
) -> None:
    monkeypatch.setattr(model, "LARGEST_TAP_MAP", 4)
    monkeypatch.setattr(model, "TAP_CHANNELS", 1)
    conv = Conv2d(2, 2, 3, stride, padding=1, bias=False)
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    assert name in conv(x).grad_fn.name()
    (grad,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("options", "dtype", "size"),
    [
        ({"dilation": 2, "padding": 2}, torch.float32, 4),
        ({"groups": 2, "padding": 1}, torch.float32, 4),
        ({"bias": True, "padding": 1}, torch.float32, 4),
        ({"padding": "same"}, torch.float32, 4),
        ({"padding": 1, "padding_mode": "reflect"}, torch.float32, 4),
        ({"padding": 1}, torch.float64, 4),
        ({"padding": 1}, torch.float32, 5),
        ({"padding": 1}, torch.float32, 28),
    ],
)
def test_every_other_case_is_the_librarys(
    options: dict, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch, always_winograd: None
) -> None:
    monkeypatch.setattr(model, "LARGEST_TAP_MAP", 4)
    monkeypatch.setattr(model, "TAP_CHANNELS", 1)
    conv = Conv2d(2, 2, 3, **{"bias": False} | options).to(dtype)
    name = conv(torch.randn(1, 2, size, size, dtype=dtype)).grad_fn.name()
    assert "TapConvolution" not in name and "WinogradConvolution" not in name
    conv.weight.requires_grad_(False)
    assert conv(torch.randn(1, 2, 2, 2, dtype=dtype)).requires_grad is ("bias" in options)


def test_winograd_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "LARGEST_WINOGRAD_MAP", 24)

    def used(images: int, channels: int, height: int = 4, width: int = 4) -> bool:
        conv = Conv2d(channels, channels, 3, padding=1, bias=False)
        return "Winograd" in str(conv(torch.zeros(images, channels, height, width)).grad_fn)

    images, channels = model.WINOGRAD_BATCH, model.WINOGRAD_CHANNELS
    assert used(images, channels)
    assert not used(images - 1, channels) and not used(images, channels - 1) and not used(images, channels, 4, 8)
    with torch.no_grad():
        assert not used(images, channels)
