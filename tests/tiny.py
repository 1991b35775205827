"""A CIFAR-10 of random images and a ResNet-10. `python tests/tiny.py FOLDER ARGUMENT ...` runs train.py with both."""

import hashlib
import json
import pickle
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10


def make(data: Path, training: int = 100, test: int = 40) -> None:
    """Write the batch files and the archive of them into `data`."""
    (folder := data / CIFAR10.base_folder).mkdir(parents=True)
    draw, names = np.random.default_rng(0), [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name, count in zip(names, [training // 5] * 5 + [test], strict=True):
        labels = np.arange(count) % 10
        pixels = draw.integers(0, 100, (count, 3072)) + labels[:, None] * 15  # a brightness to learn each class by
        (folder / name).write_bytes(pickle.dumps({"data": pixels.astype(np.uint8), "labels": labels.tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    shutil.make_archive(str(data / CIFAR10.filename.removesuffix(".tar.gz")), "gztar", data, CIFAR10.base_folder)


def checksums(data: Path) -> dict[str, object]:
    """Return the attributes of torchvision's CIFAR10 that make it accept the files of `data`."""
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in data.rglob("*") if file.is_file()}
    lists = {part: [[name, sums[name]] for name, _ in getattr(CIFAR10, part)] for part in ("train_list", "test_list")}
    return lists | {"tgz_md5": sums[CIFAR10.filename], "meta": CIFAR10.meta | {"md5": sums["batches.meta"]}}


def add_network() -> None:
    """Add resnet10 to the networks: a block per stage, which trains twice as fast as two."""
    import model  # not above, because FOLDER's comes later

    model.NETWORKS["resnet10"] = partial(model.ResNet, model.ResBlk, (1, 1, 1, 1))


def assert_equal(a: object, b: object) -> None:
    """Compare nested containers bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict | list | tuple):
        for x, y in zip(*(c.items() if isinstance(c, dict) else c for c in (a, b)), strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def saved_state(path: Path) -> dict:
    """Return what a checkpoint holds, but for the seconds, which no two runs share."""
    state = torch.load(path, weights_only=True)
    return state | {"history": [row | {"seconds": 0} for row in json.loads(state["history"])]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, value in checksums(folder / "data").items():
        setattr(CIFAR10, name, value)
    sys.argv[:2] = [str(folder / "train.py")]
    sys.path.insert(0, str(folder))
    add_network()
    runpy.run_path(sys.argv[0], run_name="__main__")
