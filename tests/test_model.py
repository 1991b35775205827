"""The networks against torchvision's, the paper's table and the library's convolution in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

import model
from model import LAYER_TABLE, Conv3x3, ResBlk, ResNet, ResNet18, ResNet34, ResNet50


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def is_librarys(out: Tensor) -> bool:
    return "Convolution" in out.grad_fn.name()


@pytest.fixture
def always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the bounds that say where the fast convolutions pay."""
    monkeypatch.setattr(model, "LARGEST_MAP", dict.fromkeys(["AVX2", "AVX512", "DEFAULT", "no oneDNN"], 24))
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


def test_detector_on_top_takes_a_training_step() -> None:
    net, image = ResNet18(), torch.rand(3, 64, 64)
    pyramid = BackboneWithFPN(net, {f"layer{i}": f"{i}" for i in range(1, 5)}, [64, 128, 256, 512], 256)
    detector = FasterRCNN(pyramid, num_classes=11, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([3])}
    sum(detector([image], [target]).values()).backward()
    assert net.layer1[0].conv1.weight.grad.any() and "boxes" in detector.eval()([image])[0]


def twins() -> tuple[ResNet, nn.Module]:
    """Return ResNet-18 and torchvision's with the same weights."""
    torch.manual_seed(0)
    net, reference = ResNet18(), torchvision.models.resnet18(num_classes=10)
    reference.load_state_dict(net.state_dict())
    return net, reference


@pytest.mark.parametrize("train", [False, True])
def test_graphs_recorded_at_one_size_and_used_at_another(train: bool, always_fast: None) -> None:
    net, reference = (module.train(train) for module in twins())
    x, other = torch.randn(4, 3, 64, 64), torch.randn(6, 3, 32, 32)
    graphs = [(torch.jit.trace(copy.deepcopy(net), x, check_trace=False), other)]
    for strict in (False, True):
        dynamic = {"x": {0: torch.export.Dim("batch", min=2)}}
        exported = torch.export.export(copy.deepcopy(net), (x,), dynamic_shapes=dynamic, strict=strict)
        graphs.append((exported.module(), torch.cat([x, x + 1])))
    for graph, images in graphs:
        assert relative_error(graph(images), copy.deepcopy(reference)(images)) < 1e-3
    twin = copy.deepcopy(net)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert twin(mode.from_tensor(x)).shape == (4, 10)
    assert type(out := net(x)) is Tensor and relative_error(out, reference(x)) < 1e-3  # nothing stayed behind


@pytest.mark.parametrize("train", [False, True])
def test_features_equal_torchvisions(train: bool, always_fast: None) -> None:
    deep, reference = ResNet50(num_classes=10), torchvision.models.resnet50(num_classes=10)
    deep.load_state_dict(reference.state_dict())
    for first, *_ in (reference.layer2, reference.layer3, reference.layer4):
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)  # as the paper has them
    for pair in (twins(), (deep, reference)):
        ours, theirs = (create_feature_extractor(m, ["layer1", "layer4.1.relu", "fc"]).train(train) for m in pair)
        a, b = (extract(torch.ones(4, 3, 64, 96).cumsum(3)) for extract in (ours, theirs))
        assert a.keys() == b.keys() and all(relative_error(a[name], b[name]) < 1e-3 for name in b)


def test_transforms_of_the_fast_layer(always_fast: None) -> None:
    torch.manual_seed(0)
    conv, reference = Conv3x3(3, 4), nn.Conv2d(3, 4, 3, padding=1, bias=False)
    reference.load_state_dict(conv.state_dict())
    weights, x, v = dict(conv.named_parameters()), torch.randn(6, 5, 3, 4, 4), torch.randn(5, 3, 4, 4)

    def results(module: nn.Module) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
            return functional_call(module, parameters, images).pow(3).sum()

        per_batch = vmap(grad(loss), in_dims=(None, 0))(weights, x)["weight"]
        tangents = [jvp(lambda images: loss(weights, images), (x[i],), (v,))[1] for i in (0, 1)]
        second = hessian(loss)(weights, x[0])["weight"]["weight"]
        return [per_batch, *tangents, second, module(x[0])]

    for ours, theirs in zip(results(conv), results(reference), strict=True):
        assert relative_error(ours, theirs) < 1e-4


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


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8, 9, 12, 24])
def test_derivatives_equal_the_librarys(size: int, last: bool, always_fast: None) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    conv = Conv3x3(64, 128).to(memory_format=layout)
    reference = nn.Conv2d(64, 128, 3, padding=1, bias=False).to(torch.float64, memory_format=layout)
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(7, 64, size, size).to(memory_format=layout)
    results = []
    for module in (conv, reference):
        leaf = x.to(module.weight.dtype, copy=True).requires_grad_()
        out = module(leaf)
        assert is_librarys(out) is (module is reference)
        first = torch.autograd.grad(out.square().mean(), (leaf, module.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (leaf, module.weight))
        results.append((out, *first, *second))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and relative_error(ours.double(), theirs) < 1e-5
    assert relative_error(results[0][0].double(), results[1][0]) < 4e-6  # as the docstring says


def test_a_default_dtype_changes_nothing(always_fast: None) -> None:
    conv, x = Conv3x3(4, 4), torch.randn(32, 4, 8, 8)
    torch.set_default_dtype(torch.float64)
    try:
        out = conv(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, conv(x)) and not is_librarys(out)


EDITS = [
    {"dilation": (2, 2), "padding": (2, 2)},  # as torchvision's segmentation models have it
    {"dilation": (2, 2)},
    {"padding": (0, 0)},
    {"stride": (1, 2)},
    {"padding_mode": "reflect", "_reversed_padding_repeated_twice": [1, 1, 1, 1]},
    {"groups": 2, "weight": nn.Parameter(torch.ones(4, 2, 3, 3))},
    {"weight": nn.Parameter(torch.ones(4, 4, 5, 5)), "padding": (2, 2)},
    {"bias": nn.Parameter(torch.ones(4))},
]


@pytest.mark.parametrize("images", [4, 64])
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_an_edited_layer_is_obeyed(edit: dict[str, object], images: int, always_fast: None) -> None:
    conv, reference, x = Conv3x3(4, 4), nn.Conv2d(4, 4, 3, padding=1, bias=False), torch.randn(images, 4, 8, 8)
    reference.load_state_dict(conv.state_dict())
    for name, value in edit.items():
        setattr(conv, name, value), setattr(reference, name, value)
    assert torch.equal(conv(x), reference(x)) and torch.equal(conv.eval()(x), reference(x))


MAPS = {("AVX2", True): 24, ("AVX512", True): 12, ("DEFAULT", True): 0, ("DEFAULT", False): 24}


@pytest.mark.parametrize(("instructions", "onednn"), MAPS)
def test_fast_where_it_was_measured_to_pay(instructions: str, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    sizes = [size for size in range(1, 30) if not is_librarys(Conv3x3(2, 2)(torch.zeros(32, 2, size, size)))]
    tiled = [2, *(size for size in range(3, 30) if size % 3 == 0 or size % 4 == 0)]
    assert sizes == [size for size in tiled if size <= MAPS[instructions, onednn]]


def test_fast_in_training_alone(always_fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = Conv3x3(4, 4), torch.randn(8, 4, 4, 4)
    assert not is_librarys(conv(x)) and is_librarys(conv(x[:, :, :2]))
    assert torch.equal(conv(x[0]), F.conv2d(x[0], conv.weight, padding=1))
    assert is_librarys(copy.deepcopy(conv).double()(x.double())) and is_librarys(Conv3x3(4, 4, 2)(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_librarys(conv(x))
    with torch.no_grad():
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, padding=1))
    with pytest.raises(RuntimeError, match="expected input"):
        conv(x[:, :3])
    assert is_librarys(conv.eval()(x))
    monkeypatch.setattr(model, "SMALLEST_BATCH", 9)
    assert is_librarys(conv.train()(x))
