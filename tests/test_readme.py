"""The README's commands and code, as printed there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torchvision
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

import train
from model import ResNet18

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^python train\.py (.*)$", README, re.MULTILINE)


def block(word: str) -> str:
    """Return the only block of Python that has `word`."""
    (found,) = [b for b in BLOCKS if word in b]
    return found


@pytest.fixture
def trained(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train a run for the README's lines to use; make its folder the current one."""
    train.train("resnet18", 1, h=train.Hyperparameters(image_sizes=(48,), batch_size=10, accumulation=1, peak_lr=0.02))
    monkeypatch.chdir(tmp_path)
    return small / "resnet18-001.pt"


def test_every_block_is_tested() -> None:
    assert len(BLOCKS) == 4
    assert [c.split()[-2:] for c in COMMANDS] == [["--epochs", "30"], ["resnet18", "--resume"]]


def test_commands(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, asked = train.train, []

    def short(*, epochs: int, **options: object) -> list:
        asked.append(epochs)
        return run(epochs=2, **options)

    monkeypatch.setattr(train, "train", short)
    first, second = (command.split() for command in COMMANDS)
    assert train.main(first) == 0 and asked == [30]
    assert train.main(second) == 0
    assert "is finished" in capsys.readouterr().out


def test_sweep(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("for lr in").replace("epochs=5", "epochs=1"), {})
    table = re.findall(r"^(0\.\d+): \d\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    assert table == ["0.03", "0.05", "0.08"]
    assert len(list(small.glob("*.pt"))) == 3


def test_prediction_equals_the_evaluation(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = train.load(trained)
    images = train.load_data(validate=False)[1]
    mean, std = torch.tensor(checkpoint["mean"]), torch.tensor(checkpoint["std"])
    net = ResNet18()
    net.load_state_dict(checkpoint["model"])
    batches = train.test_batches(images, train.Hyperparameters(), lambda p: train.to_input(p, mean, std, 48))
    _, accuracy, logits, _ = train.run_epoch("Test", net, batches, 1, train.Hyperparameters())
    assert accuracy == checkpoint["history"][-1]["test_acc"]
    for i in (0, 7, 33):
        to_pil_image(images.pixels[i].permute(2, 0, 1)).save("picture.png")
        names: dict = {}
        exec(block("Image.open"), names)
        torch.testing.assert_close(names["logits"][0], logits[i], rtol=1e-3, atol=1e-3)
        assert capsys.readouterr().out.splitlines()[-1] == tiny.CLASSES[logits[i].argmax()]
    to_pil_image(torch.randint(256, (4, 50, 301), dtype=torch.uint8)).save("picture.png")
    exec(block("Image.open"), {})
    assert capsys.readouterr().out.strip() in tiny.CLASSES


def test_backbone_takes_a_training_step(trained: Path) -> None:
    names = {"net": ResNet18()}
    names["net"].load_state_dict(train.load(trained)["model"])
    exec(block("FasterRCNN"), names)
    image = torch.rand(3, 64, 64)
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([3])}
    detector, segmenter = names["detector"], names["segmenter"]
    detector.transform.min_size, detector.transform.max_size = (64,), 64
    steps = {
        detector: lambda: sum(detector([image], [target]).values()),
        segmenter: lambda: F.cross_entropy(segmenter(torch.stack([image] * 2))["out"], torch.ones(2, 64, 64).long()),
    }
    for network, loss in steps.items():
        network.train()
        weight = names["net"].layer4[1].conv2.weight
        before = weight.detach().clone()
        loss().backward()
        torch.optim.SGD(network.parameters(), 0.1).step()
        assert not torch.equal(weight, before)
        network.zero_grad()
        network.eval()
    with torch.no_grad():
        assert set(detector([image])[0]) == {"boxes", "labels", "scores"}
        assert segmenter(image[None])["out"].shape == (1, 11, 64, 64)


def test_imagenet_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: made)
    names: dict = {}
    exec(block("DEFAULT"), names)
    assert torch.equal(names["net"].layer4[1].conv2.weight, made.layer4[1].conv2.weight)
    assert names["net"](torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_import_has_no_side_effects(project: Path) -> None:
    result = subprocess.run([sys.executable, "-c", "import train"], cwd=project, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert not (project / "checkpoints").exists()
