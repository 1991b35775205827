"""The networks against torchvision's, the paper's table and the library's convolution in float64."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import model
from model import NETWORKS, FastConv2d, ResBlk, ResNet, ResNet18, ResNet50, fast_pays, speed_up

# Table 1's last row
MULTIPLY_ADDS = {"resnet18": 1.8e9, "resnet34": 3.6e9, "resnet50": 3.8e9, "resnet101": 7.6e9, "resnet152": 11.3e9}


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def networks(arch: str = "resnet18") -> tuple[ResNet, nn.Module]:
    """Return our network, as it trains, and torchvision's, with the same weights."""
    torch.manual_seed(0)
    net, reference = NETWORKS[arch](), torchvision.models.get_model(arch, num_classes=10)
    speed_up(net)
    reference.load_state_dict(net.state_dict())
    return net, reference


def layers(inputs: int, outputs: int, **options: object) -> tuple[FastConv2d, nn.Conv2d]:
    """Return our layer and the library's, with the same weights."""
    torch.manual_seed(0)
    reference = nn.Conv2d(inputs, outputs, 3, **{"padding": 1, "bias": False} | options)
    speed_up(nn.Sequential(conv := copy.deepcopy(reference)))
    return conv, reference


@pytest.fixture
def always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the bounds that say where the fast convolutions pay."""
    monkeypatch.setattr(model, "LARGEST_MAP", dict.fromkeys(["AVX2", "AVX512", "DEFAULT", "no oneDNN"], 24))
    monkeypatch.setattr(model, "SMALLEST_BATCH", 1)


@pytest.mark.parametrize(("arch", "multiply_adds"), MULTIPLY_ADDS.items())
def test_size_is_the_papers_and_torchvisions(arch: str, multiply_adds: float) -> None:
    with torch.device("meta"):
        net = NETWORKS[arch](num_classes=1000)
        assert str(net) == str(getattr(model, arch.replace("resnet", "ResNet"))(num_classes=1000))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 224, 224))
        reference = torchvision.models.get_model(arch)
    ours, theirs = ([(k, v.shape) for k, v in m.state_dict().items()] for m in (net, reference))
    assert ours == theirs
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.035)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 33), (32, 32), (48, 48), (64, 64)])
def test_equals_torchvision(arch: str, size: tuple[int, int], always_fast: None) -> None:
    pair, x, labels = networks(arch), torch.randn(8, 3, *size), torch.arange(8)
    names = [[name for name, part in net.named_modules() if not isinstance(part, nn.Identity)] for net in pair]
    assert names[0] == names[1]
    # In float32, where the fast convolutions are at work, rounding alone turns a ReLU on or off here and there.
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 0.03)):
        gradients = []
        for net in pair:
            twin = copy.deepcopy(net).to(dtype, memory_format=torch.channels_last)
            F.cross_entropy(twin(x.to(dtype)), labels).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
        assert relative_error(*gradients) < bound
    with torch.no_grad():
        assert relative_error(*(net.eval()(x) for net in pair)) < 1e-5


def test_a_graph_recorded_at_one_size_and_used_at_another(always_fast: None) -> None:
    (net, reference), other = networks(), torch.randn(6, 3, 32, 32)
    traced = torch.jit.trace(copy.deepcopy(net), torch.randn(4, 3, 64, 64), check_trace=False)
    assert relative_error(traced(other), reference(other)) < 1e-3


@pytest.mark.parametrize("train", [False, True])
def test_features_equal_torchvisions(train: bool, always_fast: None) -> None:
    deep, reference = networks("resnet50")
    for first, *_ in (reference.layer2, reference.layer3, reference.layer4):
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)  # as the paper has them
    for pair in (networks(), (deep, reference)):
        nodes = ["relu", "layer1", "layer4.1.relu", "fc"]
        ours, theirs = (create_feature_extractor(net, nodes).train(train) for net in pair)
        a, b = (extract(torch.ones(4, 3, 64, 96).cumsum(3)) for extract in (ours, theirs))
        assert a.keys() == b.keys() and all(relative_error(a[name], b[name]) < 1e-3 for name in b)


def test_constructors_and_initialisation() -> None:
    assert str(ResNet18()) == str(ResNet18(ResBlk, [2, 2, 2, 2], 10)) == str(ResNet(ResBlk, [2, 2, 2, 2]))
    torch.manual_seed(0)
    net = ResNet18()
    stds = [conv.weight.std().item() for conv in (net.conv1, net.layer4[0].conv1)]
    assert stds == pytest.approx([(2 / (49 * 64)) ** 0.5, (2 / (9 * 512)) ** 0.5], rel=0.03)
    x = torch.rand(2, 512, 4, 4)
    assert torch.equal(ResNet50().eval().layer2[1](x), x)  # a bottleneck starts as its shortcut
    assert all(type(layer) is nn.Conv2d for layer in ResNet50().modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8, 9, 12, 24])
def test_derivatives_equal_the_librarys(size: int, layout: torch.memory_format, always_fast: None) -> None:
    conv, reference = layers(64, 128)
    x, results = torch.randn(7, 64, size, size), []
    for module, dtype in ((conv, torch.float32), (reference, torch.float64)):
        module.to(dtype, memory_format=layout)
        leaf = x.to(dtype, memory_format=layout, copy=True).requires_grad_()
        out = module(leaf)
        first = torch.autograd.grad(out.square().mean(), (leaf, module.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (leaf, module.weight))
        results.append((out, *first, *second))
        assert ("Convolution" in out.grad_fn.name()) is (module is reference)
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and relative_error(ours.double(), theirs) < 1e-5
    assert relative_error(results[0][0].double(), results[1][0]) < 4e-6  # as the docstring says


OPTIONS = [("dilation", 2), ("padding", 0), ("stride", 2), ("padding_mode", "reflect"), ("groups", 2), ("bias", True)]


@pytest.mark.parametrize("images", [4, 64])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_speed_up_obeys_a_network_of_ones_own(option: tuple[str, object], images: int, always_fast: None) -> None:
    (conv, reference), x = layers(4, 4, **dict([option])), torch.randn(images, 4, 8, 8)
    assert torch.equal(conv(x), reference(x)) and torch.equal(conv.eval()(x), reference(x))


def test_copies_stay_fast_and_a_parametrisation_is_left_alone(always_fast: None) -> None:
    (conv, reference), x = layers(4, 4), torch.randn(4, 4, 8, 8)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert fast_pays(twin, x) and torch.equal(twin(x), conv(x)) and not torch.equal(twin(x), reference(x))
    normalised = nn.utils.parametrizations.weight_norm(reference)
    out = normalised(x)
    speed_up(normalised)
    assert torch.equal(normalised(x), out)


MAPS = {("AVX2", True): 24, ("AVX512", True): 12, ("DEFAULT", True): 0, ("DEFAULT", False): 24}


@pytest.mark.parametrize(("instructions", "onednn"), MAPS)
def test_fast_where_it_was_measured_to_pay(instructions: str, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    conv, _ = layers(2, 2)
    sizes = [size for size in range(1, 30) if fast_pays(conv, torch.zeros(32, 2, size, size))]
    tiled = [2, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21, 24, 27, 28]
    assert sizes == [size for size in tiled if size <= MAPS[instructions, onednn]]
    assert not fast_pays(conv, torch.zeros(31, 2, 12, 12))


def check_plain(net: nn.Module) -> None:
    """Count, script and fuse a ResNet-18 as tools do with torchvision's, which look layers up by class."""
    assert all(type(layer) is nn.Conv2d for layer in net.modules() if isinstance(layer, nn.Conv2d))
    counts, counted = [], copy.deepcopy(net).eval()
    for layer in counted.modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            layer.register_forward_hook(lambda layer, _, out: counts.append(out.numel() * layer.weight[0].numel()))
    counted(torch.zeros(1, 3, 224, 224))
    assert 1.81e9 <= sum(counts) <= 1.82e9
    net, x = net.eval(), torch.randn(2, 3, 64, 64)
    pairs = [["conv1", "bn1", "relu"], ["layer1.0.conv1", "layer1.0.bn1"], ["layer4.1.conv2", "layer4.1.bn2"]]
    for tool in (torch.jit.script, lambda net: torch.ao.quantization.fuse_modules(net, pairs)):
        assert relative_error(tool(net)(x), net(x)) < 1e-5


def test_fast_in_training_alone(always_fast: None) -> None:
    (conv, _), x = layers(4, 4), torch.randn(8, 4, 4, 4)
    assert fast_pays(conv, x) and not fast_pays(conv, x[:, :, :2])
    assert torch.equal(conv(x[0]), F.conv2d(x[0], conv.weight, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, padding=1))
    with pytest.raises(RuntimeError, match="expected input"):
        conv(x[:, :3])
    assert not fast_pays(conv.double(), x.double()) and not fast_pays(conv.float().eval(), x)
    conv.train().groups = 2
    assert not fast_pays(conv, x)
