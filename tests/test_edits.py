"""Edits that students make, made as they make them: they work, or one line names them."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from conftest import FAST
from torch.nn import functional as F

import train

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
Edit = Callable[[dict[str, str]], ModuleType]


def test_changed_data_is_refused_and_left_alone(
    project: Path, small: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(train, "DATA", project / "data")
    file = project / "data" / train.CIFAR10.base_folder / "data_batch_1"
    file.write_bytes(changed := file.read_bytes().replace(b"labels", b"LABELS"))
    assert train.main(["--epochs", "1"]) == 1 and file.read_bytes() == changed and not small.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file.parent) in line and "load_data()" in line


def test_dropout_draws_the_same_again_and_after_a_resume(small: Path, monkeypatch: Patch) -> None:
    forward, draw = train.ResNet.forward, train.draw_mistakes
    dropout = lambda net, x: F.dropout(forward(net, x), 0.3, net.training)  # noqa: E731
    monkeypatch.setattr(train.ResNet, "forward", dropout)

    def interrupt(*arguments: object) -> None:
        monkeypatch.setattr(train, "draw_mistakes", draw)
        raise KeyboardInterrupt

    train.train("resnet18", 2, h=FAST)
    monkeypatch.setattr(train, "draw_mistakes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.train("resnet18", 2, h=FAST)
    train.train(resume=small / "resnet18-002.pt")
    tiny.assert_equal(*(tiny.saved_state(small / f"resnet18-00{number}.pt") for number in (1, 2)))


@pytest.mark.parametrize("count", [100, 2])
def test_another_number_of_classes(count: int, small: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(train, "CLASSES", [f"class {number}" for number in range(count)])
    monkeypatch.setattr(train.Hyperparameters.__init__, "__defaults__", tuple(vars(FAST).values()))
    assert train.main(["--epochs", "1"]) == (count == 2)
    out, err = capsys.readouterr()
    if count == 100:
        assert train.load(small / "resnet18-001.pt")["model"]["fc.weight"].shape == (100, 512)
    else:
        assert out == "" and err.endswith(": CLASSES has 2 names, but a label is 9.\n") and err.count("\n") == 1


def test_every_parameter_group_follows_the_schedule_from_its_own_peak(small: Path, edit: Edit) -> None:
    groups = '[{"params": self.model.fc.parameters(), "lr": 0.5}, {"params": self.model.layer4.parameters()}]'
    module = edit({"Muon(self.model.parameters(), h.peak_lr": f"Muon({groups}, h.peak_lr"})
    h = module.Hyperparameters(**vars(FAST) | {"peak_lr": 0.02})
    for resume in (None, small / "resnet18-001.pt"):
        module.train("resnet18", 1, h=h, resume=resume)
        rates = [group["lr"] for group in module.load(small / "resnet18-001.pt")["optimizer"]["param_groups"]]
        assert rates == pytest.approx([0.5 * 0.5 / 4 / 0.8, 0.02 * 0.5 / 4 / 0.8])  # half a batch of 4 before the end


WRONG = [
    *[("image_sizes", value) for value in (64, (64), "64", None, (), (32, 0), (64.5,), [])],
    *[("peak_lr", value) for value in ("0.05", None, (0.05,))],
    *[("batch_size", value) for value in (0, 1, 2.5, "128", (128, 64))],
    *[("warmup", value) for value in (1, -0.1)],
    *[("accumulation", 0), ("crop", 32), ("validate", "False"), ("momentum", Path("0.9"))],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_that_cannot_work(name: str, value: object, small: Path, monkeypatch: Patch, capsys: Capture) -> None:
    defaults = tuple((vars(FAST) | {name: value}).values())
    monkeypatch.setattr(train.Hyperparameters.__init__, "__defaults__", defaults)
    assert train.main(["--epochs", "1"]) == 1 and not small.exists()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"Hyperparameters: {name} cannot be {value!r}, see " in err


def test_a_field_of_any_type_that_a_checkpoint_cannot_hold(edit: Edit) -> None:
    fields = 'crop: int = 2\n    note: str = "x"\n    folder: Path | None = None  #'
    module = edit({"crop: int = 2  #": fields})
    assert module.Hyperparameters(note="y").folder is None
    with pytest.raises(module.RunError, match=r"Hyperparameters: folder cannot be PosixPath\('x'\)"):
        module.Hyperparameters(folder=Path("x"))


def test_numpys_numbers(small: Path, edit: Edit) -> None:
    metric = (
        'row["x"] = __import__("numpy").float64(0.5); row["y"] = torch.tensor(2.0)\n        run.history.append(row)'
    )
    module = edit({"run.history.append(row)": metric})
    numbers = {"peak_lr": np.float32(0.25), "batch_size": np.int64(25), "image_sizes": np.array([32, 40])}
    h = module.Hyperparameters(**vars(FAST) | numbers | {"validate": np.bool_(True)})
    module.train("resnet18", *np.array([1, 5]), h=h)
    state = module.load(small / "resnet18-001.pt")
    assert (state["epochs"], state["seed"], state["hyperparameters"]["peak_lr"]) == (1, 5, 0.25)
    assert (state["history"][0]["x"], state["history"][0]["y"]) == (0.5, 2)
    assert module.train(resume=small / "resnet18-001.pt") == state["history"]


def test_early_stopping(small: Path, edit: Edit, capsys: Capture) -> None:
    module = edit({'left", flush=True)\n': 'left", flush=True)\n        if epoch == 1:\n            break\n'})
    h = module.Hyperparameters(**vars(FAST))
    assert len(module.train("resnet18", 4, h=h)) == 2
    assert "\ntest acc after 2 epochs: " in capsys.readouterr().out and (small / "resnet18-001-mistakes.png").exists()


def test_fields_and_columns_that_came_or_went_since_a_run_began(small: Path, edit: Edit, capsys: Capture) -> None:
    train.train("resnet18", 2, h=replace(FAST, image_sizes=(40,)))
    path = small / "resnet18-001.pt"
    state = torch.load(path, weights_only=True)
    first = json.loads(state["history"])[:1]
    torch.save(state | {"history": json.dumps(first)}, path)
    capsys.readouterr()
    changes = {"momentum: float = 0.9 ": "ema: float = 0.5 ", "h.bn_lr_factor, h.momentum)": "h.bn_lr_factor, 0.9)"}
    column = 'row["new"] = 7\n        run.history.append(row)'
    history = edit(changes | {"run.history.append(row)": column}).train(resume=path)
    lines = capsys.readouterr().err.splitlines()
    told = {line.split(":")[0]: line for line in lines}
    assert told["ema"] == "ema: 0.5 in the script, None in the checkpoint, 0.5 is used"
    assert told["momentum"] == "momentum: None in the script, 0.9 in the checkpoint, None is used"
    assert told["image_sizes"] == "image_sizes: (64, 96) in the script, [40] in the checkpoint, [40] is used"
    assert told.keys() == {"ema", "momentum", "image_sizes", "batch_size", "accumulation"} and len(lines) == 5
    with path.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["new"] for row in table] == ["", "7"] and history[1]["image_size"] == 40
    assert [float(row["test_acc"]) for row in table] == [row["test_acc"] for row in history]


@pytest.mark.parametrize("variables", [{"RANK": "1", "WORLD_SIZE": "4"}, {"WORLD_SIZE": ""}, {"RANK": "x"}])
def test_variables_that_a_job_scheduler_leaves(variables: dict[str, str], project: Path) -> None:
    command = [sys.executable, "-c", "import train; print(train.RANK, train.WORLD_SIZE)"]
    result = subprocess.run(command, cwd=project, env=os.environ | variables, capture_output=True, timeout=60)
    assert (result.stdout, result.stderr) == (b"0 1\n", b"")


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    state = {"format": train.CHECKPOINT_FORMAT, "hyperparameters": "{}", "history": "[]", "model": {"a": torch.ones(9)}}
    torch.save(state, path := tmp_path / "resnet18-001.pt")
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
