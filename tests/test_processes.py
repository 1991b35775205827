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
from conftest import changed, start, use_data
from test_model import relative_error

import train

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and signals")


@pytest.fixture
def edited(project: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the project with dropout, a frozen stem, 500 test images and 5 batches an epoch, 2 to a step."""
    shutil.rmtree(project / "data")
    tiny.make(project / "data", test=500)
    use_data(project / "data", monkeypatch)
    optimizer, pooled = "        self.optimizer = Muon", "self.avgpool(x).flatten(1)"
    values = {"h or Hyperparameters()": "h or Hyperparameters((32, 40), batch_size=20, accumulation=2)"}
    edits = {
        "model.py": {pooled: f"F.dropout({pooled}, 0.3, self.training)"},
        "train.py": values | {optimizer: f"        self.model.conv1.requires_grad_(False)\n{optimizer}"},
    }
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
        out, err = (run := start(edited, "--arch resnet10 --epochs 3", processes)).communicate(timeout=120)
        assert run.returncode == 0 and [line[:7] for line in out.splitlines()[1:4]] == ["Epoch 1", "Epoch 2", "Epoch 3"]
        assert len(out.splitlines()) == 5, err
    one, two = tiny.saved_state(by_one), tiny.saved_state(whole)
    losses = [[row["train_loss"] for row in state["history"]] for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1])
    train.seed_draws(0)
    net, (_, test) = train.ResNet(*train.LAYER_TABLE["resnet10"]), train.load_data(validate=False)
    assert torch.equal(net.conv1.weight, two["model"]["conv1.weight"])  # the frozen stem
    for name, _ in net.named_parameters():
        assert torch.equal(two["model"][name], one["model"][name])
    # What is left of the start in averages of 15 batches, and in those of 3 epochs with 3 batches here and 2 there.
    left = 0.9**15, ((0.9**3 + 0.9**2) / 2) ** 3
    for name, new in net.named_buffers():
        if new.is_floating_point():
            a, b = ((s["model"][name] - share * new) / (1 - share) for s, share in zip((one, two), left, strict=True))
            assert relative_error(b, a) < 0.2  # their batches do not count alike
    net.load_state_dict(two["model"])
    accuracy = (train.evaluate(net, test.pixels, 40).argmax(1) == test.labels).sum().item() / 500
    assert accuracy == two["history"][-1]["test_acc"]  # shared out, and each image counted once

    torchrun = start(edited, "--arch resnet10 --epochs 3", 2)
    kill_second(torchrun, "Epoch 1")
    assert torchrun.wait(60) == 1 and (done := len(tiny.saved_state(path)["history"])) in (1, 2)
    torchrun = start(edited, "--resume", 2, "--max-restarts 3")  # goes on by itself
    kill_second(torchrun, f"Epoch {done + 1}")
    out, err = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0 and "Epoch 3, test acc: " in out, err
    tiny.assert_equal(tiny.saved_state(path), two)


def test_early_stopping(edited: Path) -> None:
    end = 'left", flush=True)\n'
    text = changed(edited / "train.py", {end: f"{end}        if accuracy < 2:\n            break\n"})
    (edited / "train.py").write_text(text, encoding="utf-8")
    out, err = (torchrun := start(edited, "--arch resnet10 --epochs 3", 2)).communicate(timeout=120)
    assert torchrun.returncode == 0 and "test acc after 1 epochs: " in out and "Traceback" not in err


def test_what_fails_in_the_first_process_is_one_line(project: Path) -> None:
    _, err = (torchrun := start(project, "--resume missing.pt", 2)).communicate(timeout=60)
    (told,) = [said for said in err.splitlines() if said.startswith("train.py: ")]
    assert torchrun.returncode == 1 and "missing.pt" in told and "[rank" not in err
