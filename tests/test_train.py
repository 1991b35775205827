"""Batches, optimizer and schedule against independent computations, and whole runs on a small data set."""

import copy
import csv
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import FAST, PARTS
from PIL import Image
from test_model import check_plain
from test_readme import README
from tiny import assert_equal, saved_state
from torch import nn
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

import train
from model import ResNet, ResNet18, speed_up
from train import Hyperparameters, seed_torch

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch


def noise(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)


@pytest.mark.parametrize(("value", "epoch", "crop"), [(0, 29, 0), (2, 7, 2), (2, 8, 3), (2, 29, 4), (1, 300, 2)])
def test_augment_equals_pad_crop_flip(value: int, epoch: int, crop: int) -> None:
    pixels, places, shifts = noise(200), [], range(2 * crop + 1)
    for ours, original in zip(train.augment(pixels, Hyperparameters(crop=value, erase=0), epoch), pixels, strict=True):
        padded = F.pad(original.permute(2, 0, 1)[None].float(), (crop,) * 4, mode="reflect")[0]
        for mirrored, image in enumerate((padded, v2.functional.horizontal_flip(padded))):
            windows = {(y, x, mirrored): image[:, y : y + 32, x : x + 32] for y in shifts for x in shifts}
            places += [place for place, window in windows.items() if torch.equal(ours.permute(2, 0, 1).float(), window)]
    y, x, mirrored = zip(*places, strict=True)
    assert len(places) == 200 and set(y) == set(x) == set(shifts) and 60 <= sum(mirrored) <= 140


@pytest.mark.parametrize(("value", "epoch", "side"), [(0, 9, 0), (0.25, 2, 0), (0.25, 3, 1), (0.25, 29, 7), (9, 9, 12)])
def test_augment_erases_a_square(value: float, epoch: int, side: int) -> None:
    ours = train.augment(noise(500) % 100, Hyperparameters(erase=value), epoch)
    square = (ours == torch.tensor([125, 123, 114])).all(3)  # MEAN, brighter than any other pixel
    assert (ours[~square] < 100).all() and (square.sum((1, 2)) == side**2).all()
    if side:
        boxes = masks_to_boxes(square)  # x and y of the first and the last pixel
        assert (boxes[:, 2:] - boxes[:, :2] == side - 1).all()
        assert {*boxes[:, 0].tolist()} == {*boxes[:, 1].tolist()} == {*range(33 - side)}


@pytest.mark.parametrize("size", [24, 32, 48])
def test_to_input_equals_torchvisions_transforms(size: int) -> None:
    pixels = noise(4)
    normalise = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    resize = v2.Resize((size, size), antialias=True)
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), resize, normalise])
    x = train.to_input(pixels, size)
    torch.testing.assert_close(x, transform(pixels.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (5, 5)])
def test_orthogonalise_acts_on_the_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s /= s.square().sum().sqrt()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(train.orthogonalise(matrix).double(), u * s @ v, rtol=1e-4, atol=1e-5)
    assert not train.orthogonalise(torch.zeros(shape)).any()  # as a new bottleneck's gradients, and not NaN


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (8, 6, 1, 1), (7,), (4, 6), (1, 8, 1, 1), (8, 1, 1, 1), (1, 4, 3, 3)])
def test_muon_steps(shape: tuple[int, ...]) -> None:
    """Kernels by the formula in float64, all else as torch's SGD does."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format  # as in a run
    p, kernel = nn.Parameter(torch.randn(shape).to(memory_format=layout)), len(shape) == 4 and 1 not in shape[:2]
    frozen = nn.Parameter(torch.ones(shape), requires_grad=False)
    twin, expected, momentum = nn.Parameter(p.detach().clone()), p.detach().double(), 0.0
    muon = train.Muon([p, frozen], lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD([twin], 0.1, 0.9, nesterov=True)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        twin.grad = p.grad.clone()
        muon.step(), sgd.step()
        if kernel:
            momentum = 0.9 * momentum + p.grad.double()
            step = train.orthogonalise((p.grad + 0.9 * momentum).flatten(1)).view(shape)
            expected = expected * min(8, p[0].numel()) ** 0.5 / expected.norm() - 0.1 * step
        torch.testing.assert_close(p.double(), expected if kernel else twin.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(frozen, torch.ones(shape))


def test_training_equals_a_loop_written_out(small: Path) -> None:
    """Three epochs of 100 images in three steps of two batches, of 16 or 17 images."""
    h = Hyperparameters(image_sizes=(32, 32, 40), batch_size=18, accumulation=2, crop=3)
    h = replace(h, peak_lr=0.02, momentum=0.8, warmup=0.3, label_smoothing=0.3)
    history = train.train("resnet18", 3, seed=5, h=h)
    images, test = train.load_data(Hyperparameters())
    seed_torch(5)
    net = ResNet18().to(memory_format=torch.channels_last)
    speed_up(net)
    muon = train.Muon(net.parameters(), lr=0.0, momentum=0.8)
    for epoch, (size, row) in enumerate(zip((32, 32, 40), history, strict=True)):
        seed_torch(5, epoch)
        correct, losses = 0, []
        order, start = torch.randperm(100), 0
        for number, count in enumerate([17, 17, 17, 16, 17, 16]):
            index, start = order[start : start + count], start + count
            seed_torch(5, epoch, number // 2, number % 2)
            pixels = train.augment(images.pixels[index], h, epoch)
            logits = net(train.to_input(pixels, size))
            loss = F.cross_entropy(logits, images.labels[index], label_smoothing=0.3)
            (loss / 2).backward()
            losses.append(loss.item() * count)
            correct += (logits.argmax(1) == images.labels[index]).sum().item()
            if number % 2 == 1:
                done = (3 * epoch + number // 2 + 0.5) / 9
                muon.param_groups[0]["lr"] = rate = 0.02 * (done / 0.3 if done < 0.3 else (1 - done) / 0.7)
                muon.step(), net.zero_grad()
        assert (row["epoch"], row["image_size"], row["train_acc"]) == (epoch + 1, size, correct / 100)
        assert row["train_loss"] == pytest.approx(sum(losses) / 100, rel=1e-5)
    run = train.resumed(small / "resnet18-001.pt")
    check_plain(copy.deepcopy(run.model))
    torch.testing.assert_close(run.model.state_dict(), net.state_dict())
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    logits = net.eval()(train.to_input(test.pixels, 40)).detach()
    ours = train.evaluate(net.train(), test.pixels.repeat(7, 1, 1, 1), 40)  # more than it takes at once
    torch.testing.assert_close(ours, logits.repeat(7, 1), rtol=1e-3, atol=1e-3)
    assert history[-1]["test_acc"] == (logits.argmax(1) == test.labels).sum().item() / 40 and not ours.requires_grad
    assert net.training


def test_image_sizes_share_the_epochs() -> None:
    for epochs, sizes in ((6, [32, 32, 48, 48, 64, 64]), (4, [32, 48, 48, 64]), (1, [48])):
        run = train.Run("resnet10", epochs, 0, Hyperparameters(image_sizes=(32, 48, 64)))
        assert [run.image_size(epoch) for epoch in range(epochs)] == sizes


def test_validation_holds_training_images_out(small: Path) -> None:
    everything, test = train.load_data(Hyperparameters())
    rest, held_out = train.load_data(Hyperparameters(validate=True))
    assert (len(everything.labels), len(test.labels), len(rest.labels), len(held_out.labels)) == (100, 40, 90, 10)
    pixels = torch.cat([rest.pixels, held_out.pixels]).flatten(1)
    assert sorted(pixels.tolist()) == sorted(everything.pixels.flatten(1).tolist())
    few, many = (train.load_data(Hyperparameters(validate=True, images=count))[0] for count in (30, 95))
    assert torch.equal(few.pixels, rest.pixels[::3]) and torch.equal(many.labels, rest.labels)
    for part in (everything, rest, held_out):  # tiny.make() gives each class a brightness of its own
        assert torch.equal((part.pixels.float().mean((1, 2, 3)) - 49.5).div(15).round(), part.labels.float())


def test_learns_and_prints_as_the_readme_says(small: Path, capsys: Capture, monkeypatch: Patch) -> None:
    made_fast = []
    monkeypatch.setattr(train, "speed_up", made_fast.append)
    h = Hyperparameters(image_sizes=(32,), batch_size=20, accumulation=1, peak_lr=0.02, crop=0)
    history = train.train("resnet10", 6, h=h)
    assert history[-1]["test_acc"] > 0.25 and len(made_fast) == 1  # guessing gives 0.1
    lines, path = capsys.readouterr().out.splitlines(), small / "resnet10-001.pt"
    for number, (line, row) in enumerate(zip(lines[1:7], history, strict=True), 1):
        numbers = f"test acc: {row['test_acc']:.4f}, train loss: {row['train_loss']:.4f}, 32 px, {row['seconds']:.0f} s"
        assert line == f"Epoch {number}, {numbers}, {timedelta(seconds=round((6 - number) * row['seconds']))} left"
    total = timedelta(seconds=round(sum(row["seconds"] for row in history)))
    result = f"test acc after 6 epochs: {history[-1]['test_acc']:.4f}, total time {total}"
    assert lines[7] == f"{result}, checkpoint checkpoints/resnet10-001.pt"
    example, printed = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1], [*lines[:6], lines[7]]  # of 5 epochs
    assert re.sub(r"[\d.,:]+", "0", example).splitlines() == [re.sub(r"[\d.,:]+", "0", line) for line in printed]
    run, (_, test), picture = train.resumed(path), train.load_data(h), path.with_name(f"{path.stem}-mistakes.png")
    drawn = picture.read_bytes()
    train.write_results(run, train.evaluate(run.model, test.pixels, 32), test)
    assert picture.read_bytes() == drawn
    with path.with_suffix(".csv").open() as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == history


def test_the_worst_mistakes_are_drawn(tmp_path: Path, monkeypatch: Patch) -> None:
    images, logits, texts = train.Images(noise(40), torch.arange(40) % 10), torch.zeros(40, 10), []
    logits[range(40), [9] * 10 + [3] * 20 + list(range(10))] = torch.arange(1.0, 41) / 4
    monkeypatch.setattr(train, "draw_bounding_boxes", lambda tile, box, text, colors: texts.append(*text) or tile)
    run = train.Run("resnet10", 1, 0, FAST)
    run.path = tmp_path / "x.pt"
    train.write_results(run, logits, images)
    picture = v2.functional.pil_to_tensor(Image.open(tmp_path / "x-mistakes.png"))
    assert texts[:4] == ["airplane as cat", "airplane as cat", "airplane as truck", "automobile as cat"]
    for column, i in enumerate((21, 11, 1)):  # of automobiles, row 1: the network is surest of 21
        tile = picture[:, 176 + 18 :, 162 * column + 4 :][:, :160:5, :160:5]
        assert torch.equal(tile, images.pixels[i].permute(2, 0, 1))


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(small: Path, edit: Callable, monkeypatch: Patch) -> None:
    """With dropout, a random split and parts that a student adds."""
    split = "    return Images(training.pixels[chosen]"
    train = edit(PARTS | {split: f"    chosen = chosen[torch.randperm(len(chosen))[:80]]\n{split}"})
    h, used = train.Hyperparameters(**asdict(FAST) | {"validate": True}), []
    forward, evaluate, save = ResNet.forward, train.evaluate, train.save
    dropout = lambda net, x: F.dropout(forward(net, x), 0.3, net.training)  # noqa: E731
    monkeypatch.setattr(ResNet, "forward", dropout)
    monkeypatch.setattr(train, "evaluate", lambda net, pixels, size: used.append(pixels) or evaluate(net, pixels, size))

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    whole = train.train("resnet10", 3, seed=5, h=h)
    path = small / "resnet10-002.pt"
    told = rf'^Go on with --resume "{re.escape(str(path))}"$'
    for name, stop in [("augment", interrupt)] + [("save", lambda run: interrupt(save(run)))] * 2:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=told):
            patch.setattr(train, name, stop)  # in the first epoch, and after each of two
            train.train(resume=path) if path.exists() else train.train("resnet10", 3, seed=5, h=h)
    state = torch.get_rng_state()
    resumed = train.train(resume=path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row | {"seconds": 0} for row in resumed] == [row | {"seconds": 0} for row in whole]
    assert_equal(saved_state(small / "resnet10-001.pt"), saved_state(path))
    assert all(torch.equal(pixels, train.load_data(h)[1].pixels[: len(pixels)]) for pixels in used)
    assert train.resumed(path).average.n_averaged == 6 and train.resumed(path).scheduler.last_epoch == 6
    assert "val_acc" in whole[0] and "test_acc" not in whole[0]
