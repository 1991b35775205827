"""The project's folder on the import path, a small CIFAR-10 in place of the real one, and a short recipe."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny  # noqa: E402

import train  # noqa: E402

FAST = train.Hyperparameters(image_sizes=(32, 40), batch_size=25, accumulation=2)


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
    for name, value in tiny.checksums(tiny_data).items():
        monkeypatch.setattr(train.CIFAR10, name, value)
    monkeypatch.setattr(train, "DATA", tiny_data)
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.fixture
def edit(small: Path, tmp_path: Path, tiny_data: Path) -> Callable[..., ModuleType]:
    """Return a function that imports a copy of train.py in which texts are replaced, as a student edits it."""

    def edit(changes: dict[str, str]) -> ModuleType:
        text = (ROOT / "train.py").read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (file := tmp_path / "edited.py").write_text(text, encoding="utf-8")
        module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("edited", file))
        sys.modules["edited"] = module  # because dataclasses look their module up there
        spec.loader.exec_module(module)
        module.DATA, module.CHECKPOINTS = tiny_data, small
        return module

    return edit
