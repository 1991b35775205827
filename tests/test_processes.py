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
from conftest import use_data
from test_model import relative_error

import train
from model import ResNet18

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and signals")


@pytest.fixture
def edited(project: Path) -> Path:
    """Return the project with 600 test images, and in an epoch 5 batches of 10 images, of which a step has 3."""
    shutil.rmtree(project / "data")
    tiny.make(project / "data", test=600)
    text = (project / "train.py").read_text()
    for old, new in {
        "int = 128": "int = 10",
        "int = 4  # b": "int = 3  # b",
        "0.68": "0.5",
        "int = 30  # r": "int = 1  # r",
        "(64, 96)": "(32, 40)",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (project / "train.py").write_text(text)
    return project


def start(project: Path, processes: int, arguments: str, *options: str) -> subprocess.Popen[str]:
    """Start train.py in so many processes, a thread in each; no torchrun for one."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", *options, "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    command = [sys.executable, *torchrun, tiny.__file__, str(project), *arguments.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Without the second a restarted process may meet what a killed one left: pytorch/pytorch#135712.
    variables = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=os.environ | variables, **pipes)


def kill_second(torchrun: subprocess.Popen[str], epoch: str) -> None:
    """Kill the process of rank 1, as the system does when memory is short, once that epoch is printed."""
    assert any(line.startswith(epoch) for line in torchrun.stdout)
    for child in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def test_processes_train_what_one_trains(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_data(monkeypatch, edited / "data")
    _, test = train.load_data(validate=False)
    one = None
    for processes in (1, 3):  # of three one has no batch of an epoch's last step
        out, err = (run := start(edited, processes, "--epochs 2")).communicate(timeout=120)
        assert run.returncode == 0 and [line[:7] for line in out.splitlines()[1:3]] == ["Epoch 1", "Epoch 2"], err
        assert len(out.splitlines()) == 15 and f"{processes} processes of 1 threads" in out or processes == 1
        state = tiny.saved_state(edited / "checkpoints" / f"resnet18-00{1 + (processes > 1)}.pt")
        one = one or state
        losses = [[row["train_loss"] for row in run["history"]] for run in (one, state)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        net = ResNet18()
        net.load_state_dict(state["model"])
        accuracy = (train.evaluate(net, test.pixels, 40).argmax(1) == test.labels).sum().item() / 600
        assert accuracy == state["history"][1]["test_acc"]  # shared out, and each image counted once
        for name, value in state["model"].items():
            if not value.is_floating_point():
                continue  # of the batches that a process has counted
            # Of few batches a process counts fewer in its averages of batch normalisation; the mean is kept.
            bound = 0.7 if "running" in name else 0.02
            assert relative_error(value.float(), one["model"][name].float()) < bound
        torch.testing.assert_close(state["losses"], one["losses"], rtol=0.02, atol=0)


def test_the_test_images_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, net = torch.randint(256, (600, 32, 32, 3), dtype=torch.uint8), ResNet18()
    expected, shares = train.evaluate(net, pixels, 32), []
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(train, "add_up", shares.extend)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        train.evaluate(net, pixels, 32)
    assert torch.equal(sum(shares), expected) and [share.any(1).sum() for share in shares] == [350, 250]


def test_a_killed_process(edited: Path) -> None:
    whole, path, by_one = (edited / "checkpoints" / f"resnet18-00{number}.pt" for number in (1, 2, 3))
    assert start(edited, 2, "--epochs 3").wait(120) == 0
    torchrun = start(edited, 2, "--epochs 3")
    kill_second(torchrun, "Epoch 1")
    assert torchrun.wait(60) == 1 and (done := len(tiny.saved_state(path)["history"])) in (1, 2)
    by_one.write_bytes(path.read_bytes())  # saved last, so it is the one that goes on
    out, err = start(edited, 1, "--resume").communicate(timeout=120)
    assert "Epoch 3, test acc: " in out and "Not bit for bit as without the stop: " in err
    torchrun = start(edited, 2, "--resume", "--max-restarts", "3")  # goes on by itself
    kill_second(torchrun, f"Epoch {done + 1}")
    out, err = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0 and "Epoch 3, test acc: " in out, err
    tiny.assert_equal(tiny.saved_state(path), tiny.saved_state(whole))
    losses = [[row["train_loss"] for row in tiny.saved_state(file)["history"]] for file in (whole, by_one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_what_fails_in_the_first_process_is_one_line(edited: Path) -> None:
    _, err = (torchrun := start(edited, 2, "--resume missing.pt")).communicate(timeout=60)
    (told,) = [said for said in err.splitlines() if said.startswith("train.py: ")]
    assert torchrun.returncode == 1 and "missing.pt" in told and "[rank" not in err


def test_more_processes_than_batches(project: Path) -> None:
    for processes, told in ((4, ""), (5, "accumulation must be int, 5 to 1e+99, for 5 processes, not 4.")):
        command, env = [sys.executable, "-c", "import train; train.Hyperparameters()"], {"WORLD_SIZE": str(processes)}
        result = subprocess.run(command, cwd=project, env=os.environ | env, capture_output=True, text=True, timeout=60)
        assert result.stderr.strip().endswith(told) and result.returncode == bool(told)
