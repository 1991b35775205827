"""The project's folder on the import path, a small CIFAR-10 in place of the real one, and a short recipe."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny  # noqa: E402

import train  # noqa: E402

FAST = train.Hyperparameters(image_sizes=(32, 40), batch_size=16, accumulation=2, skip=0.5, full_skip=1)


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


def use_data(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    """Make the imported train.py use the small CIFAR-10 in `data`."""
    for name, value in tiny.checksums(data).items():
        monkeypatch.setattr(train.CIFAR10, name, value)
    monkeypatch.setattr(train, "DATA", data)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: Path) -> Path:
    """Make the imported train.py use the small data set and a checkpoint folder of its own, which is returned."""
    use_data(monkeypatch, tiny_data)
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"
