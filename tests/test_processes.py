"""Two processes, started by torchrun, train what one trains."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import LAYOUT, PARTS, changed, start, use_data
from test_model import relative_error

import train

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and signals")


@pytest.fixture
def edited(project: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the project with dropout, a frozen stem, PARTS, an unused head and one that only some batches use."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # a log that lacks a letter of the folder's name
    monkeypatch.setenv("RANK", "1")  # which schedulers of jobs set, without torchrun
    shutil.rmtree(project / "data")
    tiny.make(project / "data", test=500)
    use_data(project / "data", monkeypatch)
    pooled, stages = "self.avgpool(x).flatten(1)", "x = self.layer4(self.layer3(self.layer2(self.layer1(x))))"
    initialised = 'nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")\n'
    model = {
        pooled: f"F.dropout({pooled}, 0.3, self.training)",
        initialised: f"{initialised}        self.unused, self.at_times = nn.Conv2d(3, 3, 3), nn.Conv2d(64, 64, 1)\n",
        stages: f"x = x + self.at_times(x) if self.training and torch.rand(1) < 0.4 else x\n        {stages}",
    }
    script = PARTS | {
        "h or Hyperparameters()": "h or Hyperparameters((32, 40), batch_size=20, accumulation=2)",
        LAYOUT: f"        self.model.conv1.requires_grad_(False)\n{LAYOUT}",
    }
    edits = {"model.py": model, "train.py": script}
    for name, changes in edits.items():
        (project / name).write_text(changed(project / name, changes), encoding="utf-8")
    return project


def kill_second(torchrun: subprocess.Popen[str], epoch: str) -> None:
    """Kill the process of rank 1, as the system does when memory is short, once that epoch is printed."""
    assert any(line.startswith(epoch) for line in torchrun.stdout)
    for child in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def test_two_processes_train_what_one_trains_and_go_on_when_one_is_killed(edited: Path) -> None:
    by_one, whole, path = (edited / "checkpoints" / f"resnet10-00{number}.pt" for number in (1, 2, 3))
    for processes in (1, 2):
        run, lines = start(edited, "--arch resnet10 --epochs 3", processes), []
        for line in run.stdout:
            lines.append(line[:7])
            if line.startswith("Epoch 1,") and processes == 2:
                shutil.copy(whole, path)  # as if the run had ended here
        assert run.wait(60) == 0 and lines[1:4] == ["Epoch 1", "Epoch 2", "Epoch 3"] and len(lines) == 5
    one, two = tiny.saved_state(by_one), tiny.saved_state(whole)
    assert [row["train_loss"] for row in one["history"]] == pytest.approx([row["train_loss"] for row in two["history"]])
    assert len(one["parts"]["optimizer"]["state"]) == len(one["parts"]["optimizer"]["param_groups"][0]["params"]) - 3
    train.seed_torch(0)
    net, (_, test) = train.NETWORKS["resnet10"](), train.load_data(train.Hyperparameters())
    assert torch.equal(net.conv1.weight, two["parts"]["model"]["conv1.weight"])  # the frozen stem
    for name in [*(name for name, _ in net.named_parameters()), "unused.weight", "at_times.weight", "at_times.bias"]:
        assert torch.equal(two["parts"]["model"][name], one["parts"]["model"][name])
    for name, new in net.named_buffers():
        if new.is_floating_point():  # averages of 18 batches by one process, and of 9 by each of two, after the start
            a, b = (state["parts"]["model"][name] - 0.9**n * new for state, n in ((one, 18), (two, 9)))
            assert relative_error(b / (1 - 0.9**9), a / (1 - 0.9**18)) < 0.2  # their batches do not count alike
            assert torch.equal(two["parts"]["average"][f"module.{name}"], two["parts"]["model"][name])
    net.load_state_dict(two["parts"]["model"], strict=False)
    accuracy = (train.evaluate(net, test.pixels, 40).argmax(1) == test.labels).sum().item() / 500
    assert accuracy == two["history"][-1]["test_acc"]  # shared out, and each image counted once

    torchrun = start(edited, f'--resume "{path}"', 2, "--max-restarts 3")  # goes on by itself
    kill_second(torchrun, "Epoch 2")
    out, err = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0 and "Epoch 3, test acc: " in out, err
    tiny.assert_equal(tiny.saved_state(path), two)


def test_what_fails_in_the_first_process_is_one_line(project: Path) -> None:
    _, err = (torchrun := start(project, "--resume missing.pt", 2)).communicate(timeout=60)
    (told,) = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert torchrun.returncode == 1 and "missing.pt" in told and "[rank" not in err
