"""The README's commands and code, as printed there."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import to_pil_image

import train

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SWEEP, CLASSIFY, FINE_TUNE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_commands(tmp_path: Path, monkeypatch: Patch) -> None:
    asked = []
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(train, "train", lambda **arguments: asked.append(arguments))
    (run := tmp_path / "resnet18-001.pt").write_text("a checkpoint")
    for command in re.findall(r"python train\.py (--[^`\n]*)", README):
        train.main(command.split())
    assert {"arch": "resnet18", "epochs": 30} in asked and {"resume": run} in asked


def test_sweep(small: Path, capsys: Capture) -> None:
    exec(SWEEP.replace("epochs=5", "epochs=1").replace("resnet18", "resnet10"), {})
    table = re.findall(r"^(0\.\d+): \d\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    assert table == ["0.03", "0.05", "0.08"] and len(list(small.glob("*.pt"))) == 3


def test_prediction_equals_the_evaluation(small: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setitem(train.NETWORKS, "resnet18", train.NETWORKS["resnet10"])
    train.train("resnet18", 1, h=train.Hyperparameters(image_sizes=(48,), batch_size=10, accumulation=1, peak_lr=0.02))
    monkeypatch.chdir(tmp_path)
    _, images = train.load_data(train.Hyperparameters())
    logits = train.evaluate(train.resumed(small / "resnet18-001.pt").model, images.pixels, 48)
    for i in (0, 7, 33):
        to_pil_image(images.pixels[i].permute(2, 0, 1)).save("picture.png")
        names: dict = {}
        exec(CLASSIFY, names)
        torch.testing.assert_close(names["logits"][0], logits[i], rtol=1e-3, atol=1e-3)
        assert capsys.readouterr().out.splitlines()[-1] == train.CLASSES[logits[i].argmax()]


def test_fine_tuning_changes_the_new_layer_alone(monkeypatch: Patch) -> None:
    made = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: made)
    names: dict = {}
    exec(FINE_TUNE, names)
    net = names["net"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    logits = net(torch.randn(2, 3, 64, 64))
    torch.nn.functional.cross_entropy(logits, torch.tensor([3, 9])).backward()
    optimizer.step()
    state = net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in made.state_dict().items() if name[:2] != "fc")
    assert net.fc.weight.grad.any() and logits.shape == (2, 10)
