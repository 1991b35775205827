"""Edits that students make, made as they make them: they work, or one line names them."""

import csv
import json
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
from conftest import FAST, use_data

import train

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
Edit = Callable[[dict[str, str]], ModuleType]


def test_changed_data_is_left_alone(project: Path, small: Path, monkeypatch: Patch, capsys: Capture) -> None:
    use_data(project / "data", monkeypatch)
    file = project / "data" / train.CIFAR10.base_folder / "data_batch_1"
    file.write_bytes(changed := file.read_bytes().replace(b"labels", b"LABELS"))
    assert train.main(["--epochs", "1"]) == 1 and file.read_bytes() == changed and not small.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file.parent) in line and "load_data()" in line


WITHOUT_USE = {
    "CIFAR10(DATA, train=True)": ("CIFAR10(DATA, train=True, transform=str)", "transform would not be called"),
    "    return training, test": ("    training, test", r"load_data\(\) returned nothing"),
}


@pytest.mark.parametrize("old", WITHOUT_USE)
def test_changes_of_load_data_that_would_do_nothing(old: str, edit: Edit) -> None:
    new, message = WITHOUT_USE[old]
    module = edit({old: new})
    with pytest.raises((module.RunError, SystemExit), match=message):
        module.train("resnet10", 1, h=module.Hyperparameters(**asdict(FAST)))


def test_an_evaluation_in_mid_epoch_changes_nothing(small: Path, edit: Edit) -> None:
    step = "            if not loss.isfinite():\n"
    for changes in ({}, {step: f"            evaluate(model, images.pixels[:2], 32)\n{step}"}):
        module = edit(changes)
        module.train("resnet10", 1, h=module.Hyperparameters(**asdict(FAST)))
    tiny.assert_equal(*(tiny.saved_state(small / f"resnet10-00{number}.pt") for number in (1, 2)))


def test_another_number_of_classes(small: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(train, "CLASSES", [f"class {number}" for number in range(100)])
    train.train("resnet10", 1, h=FAST)
    assert train.load(small / "resnet10-001.pt")["model"]["fc.weight"].shape == (100, 512)
    monkeypatch.setattr(train, "CLASSES", ["cat", "dog"])
    with pytest.raises(train.RunError, match=r"^CLASSES has 2 names, but a label is 9.$"):
        train.train("resnet10", 1, h=FAST)


def test_every_parameter_group_follows_the_schedule_from_its_own_peak(small: Path, edit: Edit) -> None:
    groups = '[{"params": self.model.fc.parameters(), "lr": 0.5}, {"params": self.model.layer4.parameters()}]'
    module = edit({"Muon(self.model.parameters()": f"Muon({groups}"})
    h = module.Hyperparameters(**asdict(FAST) | {"peak_lr": 0.02})
    module.train("resnet10", 1, h=h)
    rates = [group["lr"] for group in module.load(small / "resnet10-001.pt")["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.5 * 0.5 / 4 / 0.8, 0.02 * 0.5 / 4 / 0.8])  # half a batch of 4 before the end
    with pytest.raises(module.RunError, match="A resumed run keeps its own h"):
        module.train(resume=small / "resnet10-001.pt", h=h)


WRONG = [
    *[("image_sizes", value) for value in (64, (64), "64", None, (), (32, 0), (64.5,), [])],
    *[("peak_lr", value) for value in ("0.05", None, (0.05,))],
    *[("batch_size", value) for value in (0, 1, 2.5, "128", (128, 64))],
    *[("warmup", value) for value in (1, -0.1)],
    *[("accumulation", 0), ("crop", 32), ("validate", "False"), ("momentum", Path("0.9"))],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_that_cannot_work(name: str, value: object, small: Path, monkeypatch: Patch, capsys: Capture) -> None:
    defaults = tuple((asdict(FAST) | {name: value}).values())
    monkeypatch.setattr(train.Hyperparameters.__init__, "__defaults__", defaults)
    assert train.main(["--epochs", "1"]) == 1 and not small.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"Hyperparameters: {name} cannot be {value!r}, see " in line


def test_fields_of_other_types_and_numpys_numbers(small: Path, edit: Edit) -> None:
    limits = "    def __post_init__"
    fields = f'    note: str = "x"\n    folder: Path | None = None\n\n{limits}'
    end = "run.history.append(row)"
    metrics = f'row |= {{"x": __import__("numpy").float64(0.5), "y": torch.tensor([2.0, 3.0])}}\n        {end}'
    module = edit({limits: fields, end: metrics})
    with pytest.raises(module.RunError, match=r"Hyperparameters: folder cannot be PosixPath\('x'\)"):
        module.Hyperparameters(folder=Path("x"))
    with pytest.raises(AttributeError, match="lr"):
        module.Hyperparameters().lr = 0.1  # no such field
    numbers = {"peak_lr": np.float32(0.25), "batch_size": np.int64(25), "image_sizes": np.array([32, 40])}
    h = module.Hyperparameters(**asdict(FAST) | numbers | {"validate": np.bool_(True)})
    module.train("resnet10", *np.array([1, 5]), h=h)
    state = module.load(small / "resnet10-001.pt")
    assert (state["epochs"], state["seed"], state["hyperparameters"]["peak_lr"]) == (1, 5, 0.25)
    assert (state["history"][0]["x"], state["history"][0]["y"]) == (0.5, [2, 3])
    assert module.train(resume=small / "resnet10-001.pt") == state["history"]


def test_fields_and_columns_that_came_or_went_since_a_run_began(small: Path, edit: Edit, capsys: Capture) -> None:
    train.train("resnet10", 2, h=replace(FAST, image_sizes=(40,)))
    path = small / "resnet10-001.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"history": json.dumps(json.loads(state["history"])[:1])}, path)
    capsys.readouterr()
    changes = {"momentum: float = ": "ema: float = 0.5  # ", "momentum=h.momentum)": "momentum=0.9)"}
    column = 'row["new"] = 7\n        run.history.append(row)'
    history = edit(changes | {"run.history.append(row)": column}).train(resume=path)
    lines = capsys.readouterr().err.splitlines()
    told = {line.split(":")[0]: line for line in lines}
    assert told["ema"] == "ema: 0.5 in the script, None in the checkpoint, 0.5 is used"
    assert told["momentum"] == f"momentum: None in the script, {FAST.momentum} in the checkpoint, None is used"
    sizes = train.Hyperparameters().image_sizes
    assert told["image_sizes"] == f"image_sizes: {sizes} in the script, [40] in the checkpoint, [40] is used"
    assert told.keys() == {"ema", "momentum", "image_sizes", "batch_size", "accumulation"} and len(lines) == 5
    with path.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["new"] for row in table] == ["", "7"] and history[1]["image_size"] == 40
    assert [float(row["test_acc"]) for row in table] == [row["test_acc"] for row in history]


@pytest.mark.parametrize("variables", [{"RANK": "1", "WORLD_SIZE": "4"}, {"WORLD_SIZE": ""}, {"RANK": "x"}])
def test_variables_that_a_job_scheduler_leaves(variables: dict[str, str], edit: Edit, monkeypatch: Patch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = edit({})
    assert (module.RANK, module.WORLD_SIZE) == (0, 1)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    state = {"format": train.CHECKPOINT_FORMAT, "hyperparameters": "{}", "history": "[]", "model": {"a": torch.ones(9)}}
    torch.save(state, path := tmp_path / "resnet10-001.pt")
    whole, loaded, refused = path.read_bytes(), train.load(path), 0
    bits = random.Random(0).sample(range(8 * len(whole)), 1500)  # of a small file, so that headers are met, too
    bits += [8 * (entry.start() + 38) + 4 for entry in re.finditer(b"PK\x01\x02", whole)]  # "this is a folder"
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
