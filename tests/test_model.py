"""The networks against torchvision's, the paper's table and the library's convolution in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import model
from model import LAYER_TABLE, Conv1x1, Conv3x3, ResBlk, ResNet, ResNet18, ResNet34, ResNet50, matrices


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def is_librarys(out: Tensor) -> bool:
    return "Convolution" in out.grad_fn.name()


@pytest.fixture
def always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the bounds that say where the fast convolutions pay."""
    monkeypatch.setattr(model, "LARGEST_MAP", dict.fromkeys([(1, 1), (1, 2), (3, 1), (3, 2)], 24))
    monkeypatch.setattr(model, "SMALLEST_BATCH", 1)


# Table 1's last row
MULTIPLY_ADDS = {"resnet18": 1.8e9, "resnet34": 3.6e9, "resnet50": 3.8e9, "resnet101": 7.6e9, "resnet152": 11.3e9}


@pytest.mark.parametrize(("arch", "multiply_adds"), MULTIPLY_ADDS.items())
def test_size_is_the_papers_and_torchvisions(arch: str, multiply_adds: float) -> None:
    with torch.device("meta"):
        net = getattr(model, arch.replace("resnet", "ResNet"))(num_classes=1000)
        assert str(net) == str(ResNet(*LAYER_TABLE[arch], num_classes=1000))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 224, 224))
        reference = torchvision.models.get_model(arch)
    ours, theirs = ([(k, v.shape) for k, v in m.state_dict().items()] for m in (net, reference))
    assert ours == theirs
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.035)


@pytest.mark.parametrize(("ours", "theirs"), [(ResNet18, "resnet18"), (ResNet34, "resnet34")])
@pytest.mark.parametrize("size", [32, 48, 64])
def test_equals_torchvision(ours: Callable[[], ResNet], theirs: str, size: int, always_fast: None) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.get_model(theirs, num_classes=10)
    net = ours()
    modules = [name for name, module in net.named_modules() if not isinstance(module, nn.Identity)]
    assert modules == [name for name, _ in reference.named_modules()]
    reference.load_state_dict(net.state_dict())
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
    # In float32, where the fast convolutions are at work, rounding alone turns a ReLU on or off here and there.
    assert relative_error(single, reference_single) < 0.03
    net.eval(), reference.eval()
    with torch.no_grad():
        assert relative_error(net(x), reference(x)) < 1e-5


def test_feature_maps_equal_torchvisions() -> None:
    reference, net = torchvision.models.resnet50(), ResNet50(num_classes=1000)
    net.load_state_dict(reference.state_dict())
    for first, *_ in (reference.layer2, reference.layer3, reference.layer4):
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)  # as the paper has them
    layers, x = {f"layer{i}": f"{i}" for i in range(1, 5)}, torch.randn(1, 3, 64, 96)
    ours, theirs = (IntermediateLayerGetter(m.eval(), layers)(x) for m in (net, reference))
    assert max(relative_error(ours[i], theirs[i]) for i in ours) < 1e-5


def test_detector_on_top_takes_a_training_step() -> None:
    net, image = ResNet18(), torch.rand(3, 64, 64)
    pyramid = BackboneWithFPN(net, {f"layer{i}": f"{i}" for i in range(1, 5)}, [64, 128, 256, 512], 256)
    detector = FasterRCNN(pyramid, num_classes=11, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([3])}
    sum(detector([image], [target]).values()).backward()
    assert net.layer1[0].conv1.weight.grad.any() and "boxes" in detector.eval()([image])[0]


def test_trace_export_and_func_work_in_eval_mode(always_fast: None) -> None:
    torch.manual_seed(0)
    net = ResNet18().eval()
    reference = torchvision.models.resnet18(num_classes=10).eval()
    reference.load_state_dict(net.state_dict())
    x, other, labels = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 48, 32), torch.arange(3)
    assert relative_error(torch.jit.trace(net, x)(other), reference(other)) < 1e-5
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(net, (torch.randn(2, 3, 48, 32),), dynamic_shapes=dynamic)
    assert relative_error(exported.module()(other), reference(other)) < 1e-5
    matrices.cache_clear()  # an export in training mode must leave no stand-ins for tensors in it
    torch.export.export(twin := copy.deepcopy(net).train(), (x,))
    assert type(twin(x)) is Tensor

    def gradients(module: nn.Module) -> Tensor:
        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(module, parameters, image[None]), label[None])

        per_image = vmap(grad(loss), in_dims=(None, 0, 0))(dict(module.named_parameters()), other, labels)
        return torch.cat([g.flatten() for g in per_image.values()])

    assert relative_error(gradients(net), gradients(reference)) < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 33), (224, 224)])
@pytest.mark.parametrize("train", [False, True])
def test_any_image_size(size: tuple[int, int], train: bool, always_fast: None) -> None:
    assert ResNet18().train(train)(torch.randn(2, 3, *size)).shape == (2, 10)


def test_constructors_and_initialisation() -> None:
    assert str(ResNet18()) == str(ResNet18(ResBlk, [2, 2, 2, 2], 10)) == str(ResNet(ResBlk, [2, 2, 2, 2]))
    torch.manual_seed(0)
    net = ResNet18()
    stds = [conv.weight.std().item() for conv in (net.conv1, net.layer4[0].conv1)]
    assert stds == pytest.approx([(2 / (49 * 64)) ** 0.5, (2 / (9 * 512)) ** 0.5], rel=0.03)
    x = torch.rand(2, 512, 4, 4)
    assert torch.equal(ResNet50().eval().layer2[1](x), x)  # a bottleneck starts as its shortcut


CASES = [(Conv3x3, 1, size) for size in (1, 2, 3, 4, 6, 8, 9, 12, 24)]
CASES += [(Conv3x3, 2, size) for size in (1, 2, 3, 4, 7)]
CASES += [(Conv1x1, 1, 3), (Conv1x1, 2, 4), (Conv1x1, 2, 5)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("layer", "stride", "size"), CASES)
def test_derivatives_equal_the_librarys(layer: type, stride: int, size: int, last: bool, always_fast: None) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    conv = layer(5, 6, stride).to(memory_format=layout)
    kernel = conv.kernel_size[0]
    # In float64: torch 2.14.1's float32 weight gradient of a strided 1x1 convolution of 5 channels is wrong on AVX2.
    reference = nn.Conv2d(5, 6, kernel, stride, padding=kernel // 2, bias=False).to(torch.float64, memory_format=layout)
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(7, 5, size, size).to(memory_format=layout)
    results = []
    for module in (conv, reference):
        leaf = x.to(module.weight.dtype, copy=True).requires_grad_()
        out = module(leaf)
        assert is_librarys(out) is (module is reference)
        first = torch.autograd.grad(out.square().mean(), (leaf, module.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (leaf, module.weight))
        results.append((out, *first, *second))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours.double(), theirs) < 1e-5


# By size of the map and stride; the library takes 3 for each output.
PRODUCTS = {(1, 1): 1, (2, 1): 3, (3, 1): 5, (4, 1): 6, (6, 1): 10, (8, 1): 12, (12, 1): 18, (24, 1): 36}
PRODUCTS |= {(2, 2): 2, (4, 2): 5}


@pytest.mark.parametrize(("size", "stride"), PRODUCTS)
def test_fewer_multiplications(size: int, stride: int) -> None:
    a, b, g = (matrix.double() for matrix in matrices(size, stride))
    x, kernel = torch.randn(size, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    products = (g @ kernel).repeat(len(b) // len(g)) * (b @ x)
    assert len(products) == PRODUCTS[size, stride]
    expected = F.conv1d(x[None, None], kernel[None, None], stride=stride, padding=1)[0, 0]
    torch.testing.assert_close(a @ products, expected, rtol=1e-6, atol=1e-6)  # the matrices are float32


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (12, 1), (4, 2)])
def test_exact_as_the_docstring_says(size: int, stride: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(32, 128, size, size, requires_grad=True), Conv3x3(128, 128).weight
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, reference = model.fast_conv3x3(x, weight, stride), F.conv2d(*doubles, stride=stride, padding=1)
    seed = torch.randn_like(out)
    ours = out, *torch.autograd.grad(out, (x, weight), seed)
    theirs = reference, *torch.autograd.grad(reference, doubles, seed.double())
    assert max(relative_error(a.double(), b) for a, b in zip(ours, theirs, strict=True)) < 3e-6


@pytest.mark.parametrize(("kernel", "layer"), [(1, Conv1x1), (3, Conv3x3)])
def test_fast_only_where_it_pays(kernel: int, layer: type[nn.Conv2d], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "LARGEST_MAP", {(kernel, 1): 8, (kernel, 2): 2})

    def fast(images: int, height: int, width: int, stride: int = 1, **kind: object) -> bool:
        return not is_librarys(layer(4, 4, stride).to(**kind)(torch.zeros(images, 4, height, width, **kind)))

    images = model.SMALLEST_BATCH
    assert fast(images, 4, 4) and fast(images, 8, 8) and fast(images, 4, 4, stride=2)
    assert not fast(images - 1, 4, 4) and not fast(images, 9, 9) and not fast(images, 5, 5, stride=2)
    assert not fast(images, 4, 8) and not fast(images, 4, 4, dtype=torch.float64)
    assert fast(images, 5, 5) is (kernel == 1) and not fast(images, 4, 4, device="meta")  # 5 does not divide into tiles
    with torch.autocast("cpu", torch.bfloat16):
        assert is_librarys(layer(4, 4)(torch.zeros(images, 4, 4, 4)))
    conv, x = layer(4, 4), torch.randn(images, 4, 4, 4)
    assert is_librarys(conv.eval()(x))
    with torch.no_grad():
        assert torch.equal(conv.train()(x), F.conv2d(x, conv.weight, padding=kernel // 2))
    monkeypatch.setattr(model, "LARGEST_MAP", {})  # as on an instruction set that was not measured
    assert is_librarys(conv(x))
