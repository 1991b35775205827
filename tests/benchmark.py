"""Measure the training step against torchvision's network in a plain loop, on this machine.

    python tests/benchmark.py

Times are medians of runs in turn, ours, theirs, ours, ..., so that a machine whose speed drifts still gives a fair
ratio. "Share of the ceiling" is the arithmetic of forward and backward pass, padding counted (torch's FLOP counter),
over the time and the rate of a large matrix product; it can exceed 100 %, as the fast convolutions need fewer
multiplications and the library skips some of the padding.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from model import LAYER_TABLE, Conv3x3, ResNet

BATCH = 256
LAYER_BATCH = train.Hyperparameters.batch_size
STEP_BATCHES = train.Hyperparameters.batch_size * train.Hyperparameters.accumulation // BATCH  # a step, as in training
ROUNDS = 5


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def medians(*timers: Callable[[], float]) -> list[float]:
    """Return the median of what each timer returns, all called in turn after a warm-up."""
    rounds = [[timer() for timer in timers] for _ in range(ROUNDS + 1)][1:]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def serve_stock_steps() -> None:
    """Answer each line "ARCH SIZE BATCH" on standard input with the seconds of a stock step: the second process."""
    steps: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        if line not in steps:
            arch, size, batch = line.split()
            steps = {line: stock_step(arch, int(size), int(batch))}
        print(timed(steps[line]), flush=True)


class Stock:
    """A process of its own for the stock steps, which our memory settings do not reach."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "stock"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, arch: str, size: int, batch: int) -> float:
        """Return the seconds of one step."""
        print(arch, size, batch, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def random_images(count: int) -> train.Images:
    """Return that many images of noise."""
    return train.Images(torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (count,)))


def our_step(arch: str, size: int) -> Callable[[], object]:
    """Return a step as train.py does it: augmentation, network, optimizer and average, on STEP_BATCHES batches."""
    h = train.Hyperparameters(batch_size=BATCH, accumulation=STEP_BATCHES)
    images = random_images(STEP_BATCHES * BATCH)
    mean, std = train.pixel_statistics(images.pixels)
    model = ResNet(*LAYER_TABLE[arch]).to(memory_format=torch.channels_last)
    optimizer, average = train.optimizer_and_average(model, h)
    prepare = partial(train.to_input, mean=mean, std=std, size=size)
    order, weights = train.choose_images(torch.zeros(len(images.labels)), 0.0, 0, 0)

    def step() -> None:
        batches = train.training_batches(images, order, weights, train.augmentation(0, 30, h), h, 0, 0, prepare)
        train.run_epoch("", model, batches, STEP_BATCHES, h, optimizer, [1e-6] * STEP_BATCHES, average)

    return step


def stock_step(arch: str, size: int, batch: int) -> Callable[[], object]:
    """Return a step of torchvision's network as a plain loop has it: NCHW, plain SGD, ready images."""
    model = torchvision.models.get_model(arch, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9, weight_decay=5e-4)
    x, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def step_flops(arch: str, size: int) -> int:
    """Return the operations of a step, a multiply-add as two."""
    with torch.device("meta"):
        model, x = ResNet(*LAYER_TABLE[arch]), torch.empty(BATCH, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
    return counter.get_total_flops()


def layer_step(conv: nn.Conv2d, x: Tensor) -> Callable[[], object]:
    """Return a call that convolves x and works out both gradients."""
    x, grad = x.clone().requires_grad_(), torch.randn_like(conv(x))
    return lambda: torch.autograd.grad(conv(x), (x, conv.weight), grad)


def main() -> None:
    """Print the tables."""
    train.keep_memory()
    torch.set_flush_denormal(True)
    a, b = torch.randn(2, 2048, 2048)
    ceiling = 2 * 2048**3 / medians(partial(timed, lambda: a @ b))[0]
    stock = Stock()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    print(f"matrix product: {ceiling / 1e9:.0f} GFLOP/s")
    print(f"\n| batch {BATCH} | ours, images/s | stock, images/s | ratio | share of the ceiling | input pipeline |")
    print("| --- | --- | --- | --- | --- | --- |")
    images = random_images(50_000)
    index, flip = torch.randperm(50_000)[:BATCH], torch.rand(BATCH) < 0.5
    draw, one = train.random_stream(0), torch.ones(3)
    a = train.augmentation(0, 30, train.Hyperparameters())
    for arch, size in [("resnet18", 32), ("resnet18", 48), ("resnet18", 64), ("resnet34", 32), ("resnet50", 32)]:

        def pipeline(size: int = size) -> None:
            train.to_input(train.augment(images, index, flip, a, draw), one, one, size)

        timers = partial(timed, our_step(arch, size)), partial(stock, arch, size, BATCH), partial(timed, pipeline)
        ours, theirs, feeding = medians(*timers)
        ours /= STEP_BATCHES
        share = step_flops(arch, size) / ours / ceiling
        rates = f"{BATCH / ours:.0f} | {BATCH / theirs:.0f} | {theirs / ours:.2f}"
        print(f"| {arch}, {size} px | {rates} | {share:.0%} | {feeding / ours:.1%} |", flush=True)
    (plain,) = medians(partial(stock, "resnet18", 32, 128))
    minutes = 30 * 50_000 * plain / 128 / 60
    print(f"\nstock resnet18, 32 px, batch 128: {128 / plain:.0f} images/s, 30 epochs in {minutes:.0f} min")
    print("\n| 3x3 layer, forward and both gradients | ours, ms | library, ms | ratio |\n| --- | --- | --- | --- |")
    for inputs, outputs, stride, side in LAYERS:
        x = torch.randn(LAYER_BATCH, inputs, side * stride, side * stride).to(memory_format=torch.channels_last)
        convs = Conv3x3(inputs, outputs, stride), nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        steps = (layer_step(conv.to(memory_format=torch.channels_last), x) for conv in convs)
        ours, theirs = medians(*(partial(timed, step) for step in steps))
        rates = f"{ours * 1e3:.1f} | {theirs * 1e3:.1f} | {theirs / ours:.2f}"
        print(f"| {side}x{side}, {inputs} to {outputs}, stride {stride} | {rates} |", flush=True)


# In and out channels, stride and output map of ResNet-18's 3x3 layers at 32, 48 and 64 px.
LAYERS = [
    *[(64, 64, 1, m) for m in (8, 12, 16)],
    *[(64, 128, 2, m) for m in (4, 6, 8)],
    *[(128, 128, 1, m) for m in (4, 6, 8)],
    *[(128, 256, 2, m) for m in (2, 3, 4)],
    *[(256, 256, 1, m) for m in (2, 3, 4)],
    *[(256, 512, 2, m) for m in (1, 2)],
    *[(512, 512, 1, m) for m in (1, 2)],
]

if __name__ == "__main__":
    serve_stock_steps() if sys.argv[1:] == ["stock"] else main()
