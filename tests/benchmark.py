"""Print how many minutes a run takes on this machine: 50,000 training images an epoch, and 10,000 test images."""

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train


def minutes(call: Callable[..., object], *arguments: object) -> float:
    """Return what a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - start) / 60


def epoch(arch: str, size: int) -> float:
    """Return the minutes of an epoch of train.py at that size, from one step of 512 images."""
    run = train.Run(arch, 1, 0, train.Hyperparameters(image_sizes=(size,), peak_lr=1e-6))
    data = train.Images(torch.randint(256, (512, 32, 32, 3), dtype=torch.uint8), torch.arange(512) % 10)
    train.speed_up(run.model)
    train.train_epoch(run, train.Images(*(part[:128] for part in data)), 0)
    training = minutes(train.train_epoch, run, data, 0)
    return (50_000 * training + 10_000 * minutes(train.evaluate, run.model, data.pixels, size)) / 512


if __name__ == "__main__":
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, {platform.machine()}, {threads}\n")
    print("| minutes | 5 epochs | 10 epochs | 30 epochs |\n| --- | --- | --- | --- |")
    train.tune_process()
    for arch in ("resnet18", "resnet34", "resnet50"):
        run, cells = train.Run(arch, 1, 0, train.Hyperparameters()), []
        by_size = {size: epoch(arch, size) for size in run.h.image_sizes}
        for epochs in (5, 10, 30):
            run.epochs = epochs
            cells.append(sum(by_size[run.image_size(number)] for number in range(epochs)))
        print(f"| {arch} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |", flush=True)
