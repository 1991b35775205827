"""The project's folder on the import path, and a small CIFAR-10 in place of the real one."""

import shutil
import sys
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

import train  # noqa: E402


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 100 training and 40 test images."""
    data = tmp_path_factory.mktemp("tiny") / "data"
    tiny.make(data)
    return data


@pytest.fixture
def project(tmp_path: Path, tiny_data: Path) -> Path:
    """Return a copy of the project, with the small data set, in a folder with a space and non-ASCII letters."""
    folder = tmp_path / "Früh lauf"
    folder.mkdir()
    for name in ("model.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(tiny_data, folder / "data")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: Path) -> Path:
    """Make the imported train.py use the small data set and a checkpoint folder of its own, which is returned."""
    for name, value in tiny.checksums(tiny_data).items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(train, "DATA", tiny_data)
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"
