"""Edits that students make, made as they make them: they work, or one line names them."""

import csv
import json
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from conftest import AVERAGE, FAST, LAYOUT, PARTS
from test_readme import README
from torch import nn

import train

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
Edit = Callable[[dict[str, str]], ModuleType]


def fast(module: ModuleType, **values: object) -> object:
    return module.Hyperparameters(**asdict(FAST) | values)


CATS = 'row["cats"] = (logits.argmax(1) == 3)[test.labels == 3].float().mean().item()'
BEST = 'if accuracy == max(row[f"{run.split}_acc"] for row in run.history): shutil.copy(run.path, "best.pt")'
ROWS = {  # of the README's table, as they stand there
    "import io\n": "import io\nimport shutil\nfrom torchvision.transforms import v2\n",
    LAYOUT: f"{AVERAGE}        self.model.conv1.requires_grad_(False)\n{LAYOUT}",
    "    model.train()\n": "    model.train()\n    model.bn1.eval()\n",
    "            logits": "            x, labels = v2.MixUp(num_classes=len(CLASSES))(x, labels)\n            logits",
    "        for group in o": "        nn.utils.clip_grad_norm_(model.parameters(), 1)\n        for group in o",
    "        optimizer.zero": "        run.average.update_parameters(model)\n        optimizer.zero",
    "        bar.set_postfix": "        model.fc.weight.data[mask] = 0\n        bar.set_postfix",
    "        if RANK == 0:\n            save": f"        {CATS}\n        if RANK == 0:\n            save",
    "            write_results": f"            {BEST}\n            write_results",
    'left", flush=True)\n': 'left", flush=True)\n        if epoch == 1:\n            break\n',
}
MORE = {
    "import csv\n": "import csv\nfrom torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn\n",
    "        # oneDNN": "        nn.init.zeros_(self.model.layer4[0].conv2.weight)\n        # oneDNN",
    "        done = (": "        mask = (torch.arange(5120) % 2 == 0).view(10, 512)\n        done = (",
    "        optimizer.step()\n": "        assert optimizer.step(lambda: loss) is loss\n",
    "return (1 - done) / (1": "return (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))) / (1",
    "run.model, test.pixels, size": "run.average, test.pixels, size",
}


def test_edits_that_work_all_at_once(small: Path, edit: Edit, tmp_path: Path, monkeypatch: Patch) -> None:
    codes = {line.strip() for old, new in ROWS.items() for line in new.replace(old, "").splitlines()}
    assert codes - {*re.findall("`(.+?)`", README)} == {"if epoch == 1:", "break"}  # "if …: break"
    monkeypatch.chdir(tmp_path)
    module = edit(ROWS | MORE)
    new, history = module.Run("resnet10", 3, 0, fast(module)), module.train("resnet10", 3, h=fast(module))
    run, (_, test) = module.resumed(small / "resnet10-001.pt"), module.load_data(fast(module))
    assert run.history == history and len(history) == 2
    assert module.resumed("best.pt").history[-1]["test_acc"] == max(row["test_acc"] for row in history)
    assert not run.model.fc.weight[:, ::2].any() and run.model.fc.weight[:, 1::2].all()
    assert torch.equal(run.model.conv1.weight, new.model.conv1.weight) and not run.model.bn1.running_mean.any()
    assert all(0 < row["train_loss"] < 5 and 0 <= row["train_acc"] < 0.9 for row in history)
    right = (module.evaluate(run.average, test.pixels, 40).argmax(1) == test.labels).float()
    assert history[1]["test_acc"] == pytest.approx(right.mean().item())
    assert history[1]["cats"] == pytest.approx(right[test.labels == 3].mean().item())


class Plain(nn.Module):
    """No ResNet: layer scale in a 4-D parameter, a convolution that starts at zero, weight norm, and a fixed size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.utils.weight_norm(nn.Conv2d(3, 8, 3, padding=1, bias=False))
        self.branch = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 0.1))
        self.fc = nn.Linear(8 * 32 * 32, num_classes)
        nn.init.zeros_(self.branch.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        return self.fc((x + self.scale * self.branch(x)).flatten(1))


def test_a_network_that_is_no_resnet(small: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(train.NETWORKS, "plain", Plain)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train.train("plain", 2, h=FAST)  # of which the second epoch would have 40 px
    assert not small.exists()
    history = train.train("plain", 2, h=replace(FAST, image_sizes=(32,), peak_lr=0.001))
    model = train.resumed(small / "plain-001.pt").model
    assert all(p.isfinite().all() for p in model.parameters()) and history[1]["train_loss"] < history[0]["train_loss"]
    assert (model.scale - 0.1).abs().max() < 0.05  # a step of an orthogonal matrix would be larger


PIXELS = "training.pixels[chosen]"
SHAPE = r"^load_data\(\): torch.{}, .* labels: not uint8 \(N, S, S, 3\), S > 2 crop\.$"
METER = 'type("Meter", (), {"state_dict": lambda self: {"best": __import__("numpy").float64(1)}})()'
REFUSED = {
    "a transform": ("train=True)", "train=True, transform=str)", "transform has no effect here"),
    "of 0 to 1": (PIXELS, f"{PIXELS} / 255", SHAPE.format(r"float32 \(100, 32, 32, 3\)")),
    "wide": (PIXELS, f"{PIXELS}.repeat(1, 1, 2, 1)", SHAPE.format(r"uint8 \(100, 32, 64, 3\)")),
    "grey": (PIXELS, f"{PIXELS}[..., 0]", SHAPE.format(r"uint8 \(100, 32, 32\)")),
    "labels": ("training.labels[chosen]", "training.labels[chosen][:50]", "50 labels: not uint8"),
    "a state that no resume could read": (LAYOUT, f"        self.meter = {METER}\n{LAYOUT}", "numpy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_edits_that_are_refused_before_the_first_epoch(name: str, small: Path, edit: Edit, capsys: Capture) -> None:
    old, new, message = REFUSED[name]
    module = edit({old: new})
    with pytest.raises((module.RunError, pickle.UnpicklingError), match=message):
        module.train("resnet10", 1, h=fast(module))
    assert capsys.readouterr().out == ""


def test_parameter_groups_and_contiguous_parameters(small: Path, edit: Edit) -> None:
    """Every group follows the schedule from its own peak, of which 0 means frozen."""
    groups = '[{"params": self.model.fc.parameters(), "lr": 0.5}, {"params": self.model.layer3.parameters()}, '
    groups += '{"params": self.model.layer4.parameters(), "lr": 0}]'
    layout = "        self.model.to(memory_format=torch.channels_last)\n"
    module = edit({layout: "", "Muon(self.model.parameters()": f"Muon({groups}"})
    vector = lambda run: nn.utils.parameters_to_vector(run.model.layer4.parameters())  # noqa: E731
    before, h = vector(module.Run("resnet10", 1, 0, fast(module))), fast(module, peak_lr=0.02)
    module.train("resnet10", 1, h=h)
    run = module.resumed(path := small / "resnet10-001.pt")
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == pytest.approx([0.5 * 0.5 / 2 / 0.8, 0.02 * 0.5 / 2 / 0.8, 0])  # half a step of 2 before the end
    assert torch.equal(vector(run), before)
    with pytest.raises(RuntimeError, match="view size is not compatible"):  # with the line that the comment names
        vector(train.Run("resnet10", 1, 0, FAST))
    with pytest.raises(module.RunError, match="A resumed run keeps its own h"):
        module.train(resume=path, h=h)


WRONG = [
    *[("image_sizes", value) for value in (64, "64", None)],
    *[("peak_lr", value) for value in ("0.05", None, (0.05,), Path("0.05"))],
    *[("batch_size", value) for value in (2.5, "128", (128, 64))],
    *[("accumulation", 0), ("validate", "False"), ("images", 0.5), ("warmup", 1), ("warmup", -0.1)],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_that_cannot_work(name: str, value: object, small: Path, monkeypatch: Patch, capsys: Capture) -> None:
    defaults = tuple((asdict(FAST) | {name: value}).values())
    monkeypatch.setattr(train.Hyperparameters.__init__, "__defaults__", defaults)
    with pytest.raises(SystemExit, match="1"):
        train.main(["--epochs", "1"])
    assert not small.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"Hyperparameters: {name} cannot be {value!r}, see " in line


def test_fields_of_other_types_and_numpys_numbers(small: Path, edit: Edit) -> None:
    method, end = "    def schedule(", "run.history.append(row)"
    fields = f'    note: str = "x"\n    sides: tuple[int, ...] = (1, 2)\n\n{method}'
    metrics = f'row |= {{"x": torch.tensor(0.5).numpy()[()], "y": torch.tensor([2.0, 3.0]), "z": DATA}}\n        {end}'
    module = edit({method: fields, end: metrics, '"truck"]': '"truck", *map(str, range(90))]'})
    with pytest.raises(AttributeError, match="lr"):
        module.Hyperparameters().lr = 0.1  # no such field
    numbers = {"peak_lr": np.float32(0.25), "batch_size": np.int64(25), "image_sizes": np.array([32, 40])}
    module.train("resnet10", *np.array([1, 5]), h=fast(module, **numbers, validate=np.bool_(True)))
    run = module.resumed(small / "resnet10-001.pt")
    assert (run.epochs, run.seed, run.h.peak_lr, run.h.image_sizes) == (1, 5, 0.25, [32, 40])
    assert run.model.fc.weight.shape == (100, 512)
    assert [run.history[0][name] for name in "xyz"] == [0.5, [2, 3], str(module.DATA)]
    assert module.train(resume=small / "resnet10-001.pt") == run.history
    module.WORLD_SIZE = 4
    with pytest.raises(module.RunError, match="accumulation cannot be 2, see its line"):
        module.prepare(fast(module))


def test_fields_and_columns_that_came_or_went_since_a_run_began(small: Path, edit: Edit, capsys: Capture) -> None:
    train.train("resnet10", 2, h=replace(FAST, image_sizes=(40,)))
    path = small / "resnet10-001.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"history": json.dumps(json.loads(state["history"])[:1])}, path)
    capsys.readouterr()
    changes = {"momentum: float = ": "ema: float = 0.5  # ", "momentum=h.momentum)": "momentum=0.9)"}
    column = 'row["new"] = 7\n        run.history.append(row)'
    history = edit(PARTS | changes | {"run.history.append(row)": column}).train(resume=path)
    lines = capsys.readouterr().err.splitlines()
    told = {line.split(":")[0]: line for line in lines}
    assert told["ema"] == "ema: 0.5 in the script, None in the checkpoint, 0.5 is used"
    assert told["momentum"] == f"momentum: None in the script, {FAST.momentum} in the checkpoint, None is used"
    sizes = train.Hyperparameters().image_sizes
    assert told["image_sizes"] == f"image_sizes: {sizes} in the script, (40,) in the checkpoint, (40,) is used"
    assert told["average"] == "average: only in Run, starts anew"
    names = {"ema", "momentum", "image_sizes", "batch_size", "accumulation", "average", "scheduler"}
    assert told.keys() == names and len(lines) == len(names)
    assert train.resumed(path) and "average: only in the checkpoint\n" in capsys.readouterr().err
    with path.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["new"] for row in table] == ["", "7"] and history[1]["image_size"] == 40
    assert [float(row["test_acc"]) for row in table] == [row["test_acc"] for row in history]


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    settings = {"h": asdict(train.Hyperparameters())}
    state = {"format": train.FORMAT, "settings": settings, "history": "[]", "parts": {"model": {"a": torch.ones(9)}}}
    torch.save(state, path := tmp_path / "resnet10-001.pt")
    whole, loaded, refused = path.read_bytes(), train.load(path), 0
    bits = random.Random(0).sample(range(8 * len(whole)), 1500)  # of a small file, so that headers are met, too
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            tiny.assert_equal(train.load(path), loaded)
        except train.RunError as error:
            assert str(path) in str(error)
            refused += 1
    assert 700 < refused < 1400
