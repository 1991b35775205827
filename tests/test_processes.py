"""Several processes, started by torchrun, train what one trains."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_model import relative_error

import train
from model import ResNet18

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and signals")


@pytest.fixture
def edited(project: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the project with 600 test images, 5 batches an epoch, of which a step has 3, dropout and a frozen stem."""
    shutil.rmtree(project / "data")
    tiny.make(project / "data", test=600)
    stem, fc = "        self.model.conv1.requires_grad_(False)\n", "self.avgpool(x).flatten(1)"
    changes = {"(64, 96)": "(32, 40)", "int = 128": "int = 20", "int = 4  # b": "int = 3  # b"}
    changes |= {
        "        self.optimizer = ": stem + "        self.optimizer = ",
        fc: f"F.dropout({fc}, 0.3, self.training)",
    }
    for file in (project / "model.py", project / "train.py"):
        text = file.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        file.write_text(text)
    for name, value in tiny.checksums(project / "data").items():
        monkeypatch.setattr(train.CIFAR10, name, value)
    monkeypatch.setattr(train, "DATA", project / "data")
    return project


def start(project: Path, processes: int, arguments: str, *options: str) -> subprocess.Popen[str]:
    """Start train.py in so many processes, a thread in each; no torchrun for one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", *options, "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun * (processes > 1), tiny.__file__, str(project), *arguments.split()]
    # Without the second a restarted process may meet what a killed one left: pytorch/pytorch#135712.
    variables = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | variables, **pipes)


def kill_second(torchrun: subprocess.Popen[str], epoch: str) -> None:
    """Kill the process of rank 1, as the system does when memory is short, once that epoch is printed."""
    assert any(line.startswith(epoch) for line in torchrun.stdout)
    for child in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def test_processes_train_what_one_trains(edited: Path) -> None:
    states = []
    for processes in (1, 3):  # of three one has no batch of an epoch's last step
        out, err = (run := start(edited, processes, "--epochs 2")).communicate(timeout=120)
        assert run.returncode == 0 and [line[:7] for line in out.splitlines()[1:3]] == ["Epoch 1", "Epoch 2"], err
        assert len(out.splitlines()) == 4
        states.append(tiny.saved_state(edited / "checkpoints" / f"resnet18-00{len(states) + 1}.pt"))
    one, three = states
    losses = [[row["train_loss"] for row in state["history"]] for state in states]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    net, (_, test) = ResNet18(), train.load_data(validate=False)
    net.load_state_dict(three["model"])
    accuracy = (train.evaluate(net, test.pixels, 40).argmax(1) == test.labels).sum().item() / 600
    assert accuracy == three["history"][1]["test_acc"]  # shared out, and each image counted once
    train.seed_draws(0)
    assert torch.equal(one["model"]["conv1.weight"], ResNet18().conv1.weight)
    assert torch.equal(three["model"]["conv1.weight"], one["model"]["conv1.weight"])
    for name, value in three["model"].items():
        # Of few batches a process counts fewer in its averages of batch normalisation; the mean is kept.
        bound = 1.0 if "running" in name else 0.02
        assert "batches" in name or relative_error(value, one["model"][name]) < bound


def test_a_killed_process(edited: Path) -> None:
    whole, path, by_one = (edited / "checkpoints" / f"resnet18-00{number}.pt" for number in (1, 2, 3))
    assert start(edited, 2, "--epochs 3").wait(120) == 0
    torchrun = start(edited, 2, "--epochs 3")
    kill_second(torchrun, "Epoch 1")
    assert torchrun.wait(60) == 1 and (done := len(tiny.saved_state(path)["history"])) in (1, 2)
    by_one.write_bytes(path.read_bytes())  # saved last, so it is the one that goes on
    out, err = start(edited, 1, "--resume").communicate(timeout=120)
    assert "Epoch 3, test acc: " in out and err == ""
    path.touch()
    torchrun = start(edited, 2, "--resume", "--max-restarts", "3")  # goes on by itself
    kill_second(torchrun, f"Epoch {done + 1}")
    out, err = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0 and "Epoch 3, test acc: " in out, err
    tiny.assert_equal(tiny.saved_state(path), tiny.saved_state(whole))
    losses = [[row["train_loss"] for row in tiny.saved_state(file)["history"]] for file in (whole, by_one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_early_stopping(edited: Path) -> None:
    text = (edited / "train.py").read_text()
    end = 'left", flush=True)\n'
    assert text.count(end) == 1
    (edited / "train.py").write_text(text.replace(end, f"{end}        if accuracy < 2:\n            break\n"))
    out, err = (torchrun := start(edited, 2, "--epochs 3")).communicate(timeout=120)
    assert torchrun.returncode == 0 and "test acc after 1 epochs: " in out and "Traceback" not in err


def test_what_fails_in_the_first_process_is_one_line(edited: Path) -> None:
    _, err = (torchrun := start(edited, 2, "--resume missing.pt")).communicate(timeout=60)
    (told,) = [said for said in err.splitlines() if said.startswith("train.py: ")]
    assert torchrun.returncode == 1 and "missing.pt" in told and "[rank" not in err
