"""Measure the training step against torchvision's network in a plain loop, on this machine.

    python tests/benchmark.py

Times are medians of runs in turn, ours, theirs, ours, ..., so that a drifting machine still gives a fair ratio. Ours is
train_epoch() on one step's images; theirs, "stock", is torchvision's network with ready images, NCHW, plain SGD. "Share
of the ceiling" is the arithmetic of forward and backward pass by torch's FLOP counter, over the time and the rate of a
large matrix product; it can exceed 100 %, because 3x3 convolutions here take fewer multiplications than it counts.
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
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from model import LAYER_TABLE, Conv3x3, ResNet

RECIPE = train.Hyperparameters()
STEP = RECIPE.batch_size * RECIPE.accumulation  # images
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
    """Answer each line "ARCH" on standard input with the seconds of a stock step, at 32 px, batch 128."""
    x, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    for line in sys.stdin:
        model = torchvision.models.get_model(line.strip(), num_classes=10)
        optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9, weight_decay=5e-4)

        def step() -> None:
            optimizer.zero_grad()  # noqa: B023
            F.cross_entropy(model(x), labels).backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        step()
        print(timed(step), flush=True)


def stock(server: subprocess.Popen[str], arch: str) -> float:
    """Return the seconds of a stock step in a process of its own, which our memory settings do not reach."""
    print(arch, file=server.stdin, flush=True)
    return float(server.stdout.readline())


def our_step(arch: str, size: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a step as train.py does it and a test, both of STEP images."""
    h = train.Hyperparameters(image_sizes=(size,), skip=0.0, peak_lr=1e-6)
    images = train.Images(torch.randint(256, (STEP, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (STEP,)))
    run = train.Run(arch, 30, 0, h, STEP)
    return partial(train.train_epoch, run, images, 0), partial(train.evaluate, run.model, images.pixels, size)


def step_flops(arch: str, size: int) -> int:
    """Return the operations of a step, a multiply-add as two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ResNet(*LAYER_TABLE[arch])(torch.empty(STEP, 3, size, size)).sum().backward()
    return counter.get_total_flops()


def layer_step(layer: nn.Conv2d, size: int) -> Callable[[], object]:
    """Return a call that convolves a batch of maps of that size and works out both gradients."""
    x = torch.randn(RECIPE.batch_size, layer.in_channels, size, size).to(memory_format=torch.channels_last)
    layer, x = layer.to(memory_format=torch.channels_last), x.requires_grad_()
    grad = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), (x, layer.weight), grad)


def main() -> None:
    """Print the tables."""
    train.tune_process()
    a, b = torch.randn(2, 2048, 2048)
    ceiling = 2 * 2048**3 / medians(partial(timed, lambda: a @ b))[0]
    pipe, capability = subprocess.PIPE, torch.backends.cpu.get_cpu_capability()
    server = subprocess.Popen([sys.executable, __file__, "stock"], stdin=pipe, stdout=pipe, text=True)
    print(f"torch {torch.__version__}, {platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    print(f"matrix product: {ceiling / 1e9:.0f} GFLOP/s")
    print("\n| images/s | ours | stock, at 32 px | share of the ceiling |\n| --- | --- | --- | --- |")
    costs = {}  # of an image trained and an image tested, in images of the stock loop
    # 32 px too, because the stock loop trains at it: the same arithmetic, done our way.
    for arch, size in [*[("resnet18", size) for size in sorted({32, *RECIPE.image_sizes})], ("resnet50", 32)]:
        step, test = our_step(arch, size)
        ours, testing, theirs = medians(partial(timed, step), partial(timed, test), partial(stock, server, arch))
        share = step_flops(arch, size) / ours / ceiling
        print(f"| {arch}, {size} px | {STEP / ours:.0f} | {128 / theirs:.0f} | {share:.0%} |", flush=True)
        costs[arch, size] = ours / STEP / (theirs / 128), testing / STEP / (theirs / 128)
    print("\n| resnet18, epochs, each with its 10,000 test images | cost, in epochs of the stock loop |\n| --- | --- |")
    for epochs in (5, 10, 30):
        run = train.Run("resnet18", epochs, 0, RECIPE, 0)
        training, testing = zip(*(costs["resnet18", run.image_size(epoch)] for epoch in range(epochs)), strict=True)
        print(f"| {epochs} | {(1 - run.skip) * sum(training) + 10_000 / 50_000 * sum(testing):.1f} |")
    print("\n| 3x3 layer, forward and both gradients | ours, ms | library, ms | ratio |\n| --- | --- | --- | --- |")
    for inputs, outputs, stride, size in LAYERS:
        layers = Conv3x3(inputs, outputs, stride), nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        ours, theirs = medians(*(partial(timed, layer_step(layer, size)) for layer in layers))
        rates = f"{ours * 1e3:.1f} | {theirs * 1e3:.1f} | {theirs / ours:.2f}"
        print(f"| {inputs} to {outputs}, stride {stride}, on {size}x{size} | {rates} |", flush=True)


# In and out channels, stride and input map of ResNet-18's 3x3 layers at 32, 64 and 96 px; of stride 2 the small ones.
LAYERS = [
    *[(c, c, 1, 512 // c * m) for c in (64, 128, 256, 512) for m in (1, 2, 3)],
    *[(inputs, 2 * inputs, 2, m) for inputs, m in ((64, 8), (128, 4), (256, 2), (256, 4))],
]

if __name__ == "__main__":
    serve_stock_steps() if sys.argv[1:] == ["stock"] else main()
