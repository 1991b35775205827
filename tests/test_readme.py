"""The README's commands and code, as printed there."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import to_pil_image

import train
from model import ResNet18

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"python train\.py (--[^`\n;]*)", README)


def block(word: str) -> str:
    """Return the only block of Python that has `word`."""
    (found,) = [b for b in BLOCKS if word in b]
    return found


def test_commands(small: Path, monkeypatch: Patch, capsys: Capture) -> None:
    assert {"--arch resnet18 --epochs 30", "--resume"} <= set(COMMANDS)
    run, asked = train.train, []
    monkeypatch.setattr(train, "train", lambda arch, epochs: asked.append(epochs) or run(arch, 2))
    assert train.main("--arch resnet18 --epochs 30".split()) == 0 and asked == [30]
    printed = capsys.readouterr().out.splitlines()
    # The README's printed lines have the form of ours, whatever the numbers.
    example = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1].splitlines()
    forms = [[re.sub(r"[\d.,:]+", "0", line).split(" checkpoint")[0] for line in lines] for lines in (example, printed)]
    assert forms[0] == forms[1][:3]


def test_sweep(small: Path, capsys: Capture) -> None:
    exec(block("for lr in").replace("epochs=5", "epochs=1"), {})
    table = re.findall(r"^(0\.\d+): \d\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    assert table == ["0.03", "0.05", "0.08"] and len(list(small.glob("*.pt"))) == 3


def test_prediction_equals_the_evaluation(small: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    train.train("resnet18", 1, h=train.Hyperparameters(image_sizes=(48,), batch_size=10, accumulation=1, peak_lr=0.02))
    monkeypatch.chdir(tmp_path)
    net, (_, images) = ResNet18(), train.load_data(validate=False)
    net.load_state_dict(train.load(small / "resnet18-001.pt")["model"])
    logits = train.evaluate(net, images.pixels, 48)
    for i in (0, 7, 33):
        to_pil_image(images.pixels[i].permute(2, 0, 1)).save("picture.png")
        names: dict = {}
        exec(block("Image.open"), names)
        torch.testing.assert_close(names["logits"][0], logits[i], rtol=1e-3, atol=1e-3)
        assert capsys.readouterr().out.splitlines()[-1] == train.CLASSES[logits[i].argmax()]


def test_fine_tuning_changes_the_new_layer_alone(monkeypatch: Patch) -> None:
    made = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: made)
    new, linear = [], torch.nn.Linear
    monkeypatch.setattr(torch.nn, "Linear", lambda *sizes: new.append(linear(*sizes)) or new[-1])
    names: dict = {}
    exec(block("DEFAULT").replace("224", "32"), names)
    state = names["net"].state_dict()
    for name, value in made.named_parameters():
        assert name.startswith("fc") or torch.equal(state[name], value)
    assert names["net"].fc.weight.grad.any() and names["net"](torch.randn(2, 3, 64, 64)).shape == (2, 10)
