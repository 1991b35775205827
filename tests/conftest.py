"""The project's folder on the import path, and a small CIFAR-10, network and recipe in place of the real ones."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny  # noqa: E402

import train  # noqa: E402

tiny.add_network()
FAST = train.Hyperparameters(image_sizes=(32, 40), batch_size=25, accumulation=2)

LAYOUT = "        # oneDNN's layout."  # how the line after Run's model begins
# An average of the weights, and torch's scheduler in place of the loop's line, as a student adds them to train.py.
OPTIMIZER = "        self.optimizer = Muon(self.model.parameters(), lr=h.peak_lr, momentum=h.momentum)\n"
SCHEDULE = """        for group in optimizer.param_groups:  # delete these three lines for a torch scheduler
            peak_lr = group.setdefault("initial_lr", group["lr"])
            group["lr"] = peak_lr * h.schedule(done)
        optimizer.step()
"""
AVERAGE = "        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))\n"
PARTS = {
    "import argparse\n": """import argparse
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
""",
    OPTIMIZER: f"{OPTIMIZER}{AVERAGE}        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))\n",
    SCHEDULE: "        optimizer.step()\n        run.scheduler.step()\n        run.average.update_parameters(model)\n",
}


def use_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the imported train.py train on the images in `data`."""
    for name, value in tiny.checksums(data).items():
        monkeypatch.setattr(train.CIFAR10, name, value)
    monkeypatch.setattr(train, "DATA", data)


def changed(file: Path, changes: dict[str, str]) -> str:
    """Return what `file` says with texts replaced, as a student edits it."""
    text = file.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def start(project: Path, arguments: str, processes: int = 1, options: str = "") -> subprocess.Popen[str]:
    """Start train.py by a shell, with a thread for each process; by torchrun if there are several."""
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {options}" if processes > 1 else ""
    command = f'exec "{sys.executable}" {torchrun} "{tiny.__file__}" "{project}" {arguments}'
    # Without the second a restarted process may meet what a killed one left: pytorch/pytorch#135712.
    variables = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731, as a job in the background does not
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, shell=True, preexec_fn=listen, env=os.environ | variables, **pipes)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 100 training and 40 test images."""
    tiny.make(data := tmp_path_factory.mktemp("tiny") / "data")
    return data


@pytest.fixture
def project(tmp_path: Path, tiny_data: Path) -> Path:
    """Return a copy of the project, with the small data set, in a folder with a space and non-ASCII letters."""
    folder = shutil.copytree(ROOT, tmp_path / "Früh lauf", ignore=lambda _, names: {*names} - {"model.py", "train.py"})
    shutil.copytree(tiny_data, folder / "data")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: Path) -> Path:
    """Make the imported train.py use the small data set and a checkpoint folder of its own, which is returned."""
    use_data(tiny_data, monkeypatch)
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.fixture
def edit(small: Path, tiny_data: Path) -> Callable[..., ModuleType]:
    """Return a function that imports a changed copy of train.py."""

    def edit(changes: dict[str, str]) -> ModuleType:
        module = sys.modules["edited"] = ModuleType("edited")  # there, because dataclasses look it up
        module.__file__ = str(ROOT / "train.py")
        exec(changed(ROOT / "train.py", changes), vars(module))
        module.DATA, module.CHECKPOINTS = tiny_data, small
        return module

    return edit
