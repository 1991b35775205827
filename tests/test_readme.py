"""The README's commands and code, as printed there."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torchvision
from conftest import OPTIMIZER, ROOT
from torchvision.transforms.v2.functional import to_pil_image

import train

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
README = (ROOT / "README.md").read_text(encoding="utf-8")
FINE_TUNE, SWEEP, CLASSIFY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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


def test_fine_tuning_changes_the_new_layer_alone(small: Path, edit: Callable, monkeypatch: Patch) -> None:
    made, weights = torchvision.models.resnet18(), torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(torchvision.models, "get_model", lambda arch, weights: made)
    sgd = f"        self.optimizer = {re.search('`(torch.optim.SGD.*?)`', README)[1]}\n"
    module = edit({"        self.model = NETWORKS[arch](num_classes=len(CLASSES))\n": FINE_TUNE, OPTIMIZER: sgd})
    module.train("resnet18", 1, h=module.Hyperparameters((32,), batch_size=25, accumulation=2))
    new, tuned = module.Run("resnet18", 1, 0, module.Hyperparameters()), module.resumed(small / "resnet18-001.pt")
    changed = {name for name, p in new.model.named_parameters() if not torch.equal(p, tuned.model.get_parameter(name))}
    assert changed == {"fc.weight", "fc.bias"} and torch.equal(tuned.model.conv1.weight, made.conv1.weight)
    for name, values in (("MEAN", weights.transforms().mean), ("STD", weights.transforms().std)):
        assert f"`{name}`, to {', '.join(map(str, values))}" in README


def test_the_curve_shows_the_table() -> None:
    rows = re.findall(r"^(?:resnet18|plain loop).* \| (\d+) \| (0.*) \| \d+$", README, re.MULTILINE)
    shown = re.findall(r"(\d+) epochs: (.*)</text>", (ROOT / ".github" / "accuracy.svg").read_text(encoding="utf-8"))
    means = [(epochs, f"{100 * fmean(map(float, accuracies.split(', '))):.1f}") for epochs, accuracies in rows]
    assert len(rows) == 5 and shown == means
