"""Print how many minutes a run takes on this machine, and 30 epochs of a plain loop.

    python tests/benchmark.py

A run trains on 50,000 images an epoch and is tested on 10,000. The plain loop trains torchvision's network on ready
images of 32 px in batches of 128 with SGD, without tests, in a process without train.py's settings of memory.
"""

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train


def seconds(action: Callable[[], object]) -> float:
    """Return what a call takes, the second of two."""
    action()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def plain_step(arch: str) -> None:
    """Print the seconds of a step of the plain loop."""
    model, x, labels = (
        torchvision.models.get_model(arch, num_classes=10),
        torch.randn(128, 3, 32, 32),
        torch.arange(128) % 10,
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9, weight_decay=5e-4)

    def steps() -> None:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

    print(seconds(steps) / 4)


def main() -> None:
    """Print the table."""
    train.tune_process()
    recipe = train.Hyperparameters()
    images = recipe.batch_size * recipe.accumulation  # of one step
    data = train.Images(torch.randint(256, (images, 32, 32, 3), dtype=torch.uint8), torch.arange(images) % 10)
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {processor}\n")
    print("| minutes | 5 epochs | 10 epochs | 30 epochs | plain loop, 30 epochs |\n| --- | --- | --- | --- | --- |")
    for arch in ("resnet18", "resnet34", "resnet50"):
        minutes = {}  # of an epoch, by size
        for size in recipe.image_sizes:
            run = train.Run(arch, 1, 0, train.Hyperparameters(image_sizes=(size,), peak_lr=1e-6))
            training = seconds(partial(train.train_epoch, run, data, 0))
            testing = seconds(partial(train.evaluate, run.model, data.pixels, size))
            minutes[size] = (50_000 * training + 10_000 * testing) / images / 60
        runs = [train.Run(arch, epochs, 0, recipe) for epochs in (5, 10, 30)]
        cells = [sum(minutes[run.image_size(epoch)] for epoch in range(run.epochs)) for run in runs]
        command = [sys.executable, __file__, arch]
        step = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        cells.append(30 * 50_000 / 128 * step / 60)
        print(f"| {arch} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    plain_step(sys.argv[1]) if sys.argv[1:] else main()
