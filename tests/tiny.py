"""A CIFAR-10 of random images in torchvision's own layout, for tests; and a way to run train.py on it.

    python tests/tiny.py FOLDER ARGUMENT ...

runs FOLDER/train.py with the arguments, once the images in FOLDER/data were made with make().
"""

import hashlib
import json
import pickle
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def make(data: Path, training: int = 100, test: int = 40) -> None:
    """Write the batch files, the archive of them and their checksums into `data`."""
    folder = data / CIFAR10.base_folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name, count in zip(names, [training // 5] * 5 + [test], strict=True):
        labels = [i % 10 for i in range(count)]
        # Each class has a brightness of its own, so that there is something to learn.
        pixels = draw.integers(0, 100, (count, 3072)) + np.array(labels)[:, None] * 15
        (folder / name).write_bytes(pickle.dumps({"data": pixels.astype(np.uint8), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    with tarfile.open(data / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    files = [*folder.iterdir(), data / CIFAR10.filename]
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in files}
    (data / "md5.json").write_text(json.dumps(sums))


def checksums(data: Path) -> dict[str, object]:
    """Return the attributes of torchvision's CIFAR10 that make it accept the files of `data`."""
    sums = json.loads((data / "md5.json").read_text())
    return {
        "tgz_md5": sums[CIFAR10.filename],
        "train_list": [[name, sums[name]] for name, _ in CIFAR10.train_list],
        "test_list": [[name, sums[name]] for name, _ in CIFAR10.test_list],
        "meta": CIFAR10.meta | {"md5": sums["batches.meta"]},
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, value in checksums(folder / "data").items():
        setattr(CIFAR10, name, value)
    sys.argv = [str(folder / "train.py"), *sys.argv[2:]]
    sys.path.insert(0, str(folder))
    runpy.run_path(sys.argv[0], run_name="__main__")
