"""Batches, optimizer and schedule against independent computations, and whole runs on a small data set."""

import csv
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import FAST
from PIL import Image
from tiny import assert_equal, saved_state
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

import train
from model import ResNet18
from train import Hyperparameters, random_stream


def noise(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)


def test_augment_equals_pad_crop_flip() -> None:
    pixels, mirror, index = noise(20), torch.arange(20) % 2 == 0, torch.randperm(20)
    batch = train.augment(pixels, index, mirror, 4, random_stream(1))
    places = []
    for ours, i, mirrored in zip(batch, index, mirror, strict=True):
        padded = F.pad(pixels[i].permute(2, 0, 1)[None].float(), (4, 4, 4, 4), mode="reflect")[0]
        padded = v2.functional.horizontal_flip(padded) if mirrored else padded
        windows = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        places += [place for place, window in windows.items() if torch.equal(ours.permute(2, 0, 1).float(), window)]
    assert len(places) == 20 and len(set(places)) > 10


def test_to_input_equals_torchvisions_transforms() -> None:
    pixels = noise(4)
    for size in (32, 48, 24):
        normalise = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        resize = v2.Resize((size, size), antialias=False)
        transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), resize, normalise])
        x = train.to_input(pixels, size)
        torch.testing.assert_close(x, transform(pixels.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_the_hardest_images_are_chosen_and_unseen_ones_first() -> None:
    losses = torch.rand(1000)
    losses[:300] = torch.inf
    order = train.choose_images(losses, 0.6, random_stream(7))
    assert torch.equal(order.sort().values, losses.topk(400).indices.sort().values)
    assert order.tolist() != order.sort().values.tolist() and not losses[order[:300]].isinf().all()
    assert torch.equal(order, train.choose_images(losses, 0.6, random_stream(7)))
    assert not torch.equal(order, train.choose_images(losses, 0.6, random_stream(8)))
    assert sorted(train.choose_images(losses, 0.0, random_stream(7)).tolist()) == list(range(1000))


def test_learning_rate() -> None:
    h = Hyperparameters(peak_lr=0.5, warmup=0.2)
    rates = [train.learning_rate(done, h) for done in (0.05, 0.1, 0.2, 0.6, 0.9)]
    assert rates == pytest.approx([0.125, 0.25, 0.5, 0.25, 0.0625])
    assert train.learning_rate(0.25, Hyperparameters(peak_lr=0.5, warmup=0)) == pytest.approx(0.375)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (5, 5)])
def test_orthogonalise_acts_on_the_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s /= s.square().sum().sqrt()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(train.orthogonalise(matrix).double(), u * s @ v, rtol=1e-4, atol=1e-5)
    assert not train.orthogonalise(torch.zeros(shape)).any()  # as a new bottleneck's gradients, and not NaN


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (8, 6, 1, 1)])
def test_muon_steps(shape: tuple[int, ...]) -> None:
    kernel, vector, matrix = (nn.Parameter(torch.randn(size)) for size in (shape, (7,), (4, 6)))
    kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    others = [nn.Parameter(p.detach().clone()) for p in (vector, matrix)]
    expected, momentum = kernel.detach().double(), 0.0
    muon = train.Muon([kernel, vector, matrix], lr=0.1, bn_lr_factor=3.0, momentum=0.9)
    sgd = torch.optim.SGD([{"params": others[:1]}, {"params": others[1:], "lr": 0.1}], 0.3, 0.9, nesterov=True)
    for _ in range(4):
        for p in (kernel, vector, matrix):
            p.grad = torch.randn_like(p)
        for p, other in zip((vector, matrix), others, strict=True):
            other.grad = p.grad.clone()
        muon.step()
        sgd.step()
        momentum = 0.9 * momentum + kernel.grad.double()
        step = train.orthogonalise((kernel.grad + 0.9 * momentum).flatten(1)).view(shape)
        expected = expected * min(8, kernel[0].numel()) ** 0.5 / expected.norm() - 0.1 * step
        torch.testing.assert_close(kernel.detach().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([vector, matrix], others)


def test_training_equals_a_loop_written_out(small: Path) -> None:
    """Three epochs of 55 of 100 images in batches of 19, 18 and 18, two to a step; the losses choose the images."""
    h = Hyperparameters(image_sizes=(32, 32, 40), batch_size=16, accumulation=2, skip=0.45, crop=3)
    h = replace(h, peak_lr=0.02, bn_lr_factor=3.0, momentum=0.8, warmup=0.3, label_smoothing=0.3, full_skip=3)
    history = train.train("resnet18", 3, seed=5, h=h)
    images, reported = train.load_data(validate=False)
    torch.manual_seed(random_stream(5).initial_seed())
    net = ResNet18().to(memory_format=torch.channels_last)
    muon = train.Muon(net.parameters(), lr=0.0, bn_lr_factor=3.0, momentum=0.8)
    losses, mirror = torch.full((100,), torch.inf), torch.rand(100, generator=random_stream(5)) < 0.5
    done = iter([1.5 / 9, 2.5 / 9, 4.5 / 9, 5.5 / 9, 7.5 / 9, 8.5 / 9])  # the middle of each step's last batch
    for epoch, size in enumerate((32, 32, 40)):
        order = train.choose_images(losses, 0.45, random_stream(5, epoch))
        hits, before = 0, losses.clone()
        for numbers in ((0, 1), (2,)):
            net.zero_grad()
            for number in numbers:
                index = order[(0, 19, 37)[number] : (19, 37, 55)[number]]
                pixels = train.augment(images.pixels, index, mirror[index], 3, random_stream(5, epoch, number))
                logits = net(train.to_input(pixels, size))
                each = F.cross_entropy(logits, images.labels[index], reduction="none", label_smoothing=0.3)
                (each.mean() / 2).backward()
                losses[index] = each.detach()
                hits += (logits.argmax(1) == images.labels[index]).sum().item()
            share = next(done)
            muon.param_groups[0]["lr"] = rate = 0.02 * (share / 0.3 if share < 0.3 else (1 - share) / 0.7)
            muon.step()
        mirror = ~mirror
        row = history[epoch]
        assert (row["image_size"], row["images"], row["train_acc"]) == (size, 55, hits / 55)
        assert row["train_loss"] == pytest.approx(losses[order].mean().item(), rel=1e-5)
        assert row["learning_rate"] == pytest.approx(rate) and (losses != before).sum() == 55
    checkpoint = train.load(small / "resnet18-001.pt")
    torch.testing.assert_close(checkpoint["model"], net.state_dict())
    torch.testing.assert_close(checkpoint["losses"], losses)
    reference = torchvision.models.resnet18(num_classes=10).eval()
    reference.load_state_dict(checkpoint["model"])
    logits = reference(train.to_input(reported.pixels, checkpoint["image_size"])).detach()
    ours = train.evaluate(net, reported.pixels.repeat(7, 1, 1, 1), 40)  # more than it takes at once
    torch.testing.assert_close(ours, logits.repeat(7, 1), rtol=1e-3, atol=1e-3)
    assert history[-1]["test_acc"] == (logits.argmax(1) == reported.labels).sum().item() / 40 and not ours.requires_grad


def test_image_sizes_share_the_epochs_and_seeds_draw_other_weights() -> None:
    def sizes(epochs: int) -> list[int]:
        run = train.Run("resnet18", epochs, 0, Hyperparameters(image_sizes=(32, 48, 64)), 10)
        return [run.image_size(epoch) for epoch in range(epochs)]

    assert (sizes(6), sizes(4), sizes(1)) == ([32, 32, 48, 48, 64, 64], [32, 48, 48, 64], [48])
    weights = [train.Run("resnet18", 1, seed, FAST, 10).model.fc.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_short_runs_train_on_as_many_images_as_long_ones() -> None:
    skips = [train.Run("resnet18", n, 0, Hyperparameters(skip=0.75, full_skip=20), 10).skip for n in (3, 5, 8, 20, 40)]
    assert skips == pytest.approx([0, 0, 0.375, 0.75, 0.75])


def test_validation_holds_training_images_out_and_leaves_the_test_images_alone(small: Path) -> None:
    everything, test = train.load_data(validate=False)
    rest, held_out = train.load_data(validate=True)
    assert (len(everything.labels), len(test.labels), len(rest.labels), len(held_out.labels)) == (100, 40, 90, 10)
    pixels = torch.cat([rest.pixels, held_out.pixels]).flatten(1)
    assert sorted(pixels.tolist()) == sorted(everything.pixels.flatten(1).tolist())
    for part in (everything, rest, held_out):  # tiny.make() gives each class a brightness of its own
        assert torch.equal((part.pixels.float().mean((1, 2, 3)) - 49.5).div(15).round(), part.labels.float())
    history = train.train("resnet18", 1, h=replace(FAST, image_sizes=(32,), validate=True, skip=0.75, full_skip=2))
    assert history[0]["images"] == 45 and "val_acc" in history[0] and "test_acc" not in history[0]


def test_learns(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h = Hyperparameters(image_sizes=(32,), batch_size=20, accumulation=1, peak_lr=0.02, skip=0, crop=0)
    history = train.train("resnet18", 6, h=h)
    assert history[-1]["test_acc"] > 0.25  # guessing gives 0.1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"resnet18, 11,181,642 parameters, \d threads, 100 training and 40 test images", lines[0])
    for number, (line, row) in enumerate(zip(lines[1:7], history, strict=True), 1):
        numbers = f"test acc: {row['test_acc']:.4f}, train loss: {row['train_loss']:.4f}, 32 px, {row['seconds']:.0f} s"
        assert line == f"Epoch {number}, {numbers}, {timedelta(seconds=round((6 - number) * row['seconds']))} left"


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    images, logits = train.Images(noise(40), torch.arange(40) % 10), torch.zeros(40, 10)
    logits[range(40), [9] * 10 + [3] * 20 + list(range(10))] = torch.arange(1.0, 41) / 4
    texts, history = [], [{"test_acc": accuracy, "seconds": 35} for accuracy in (0.1, 0.375)]
    monkeypatch.setattr(train, "draw_bounding_boxes", lambda tile, box, text, colors: texts.append(*text) or tile)
    train.report(SimpleNamespace(split="test", epochs=2, history=history), tmp_path / "x.pt", logits, images)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "test acc after 2 epochs: 0.3750, of each class:" and "Total time 0:01:10, " in lines[11]
    assert lines[4] == "  cat        0.7500, most often taken for truck" and texts[2] == "airplane as truck"
    picture = v2.functional.pil_to_tensor(Image.open(tmp_path / "x-mistakes.png"))
    for label in range(10):  # the images label, label + 10 and label + 20 are taken for 9 and, more surely, for 3
        mistakes = ((label + 20, 3), (label + 10, 3), (label, 9))
        for column, i in enumerate(i for i, taken_for in mistakes if taken_for != label):
            tile = picture[:, 176 * label + 18 :, 162 * column + 4 :][:, :160:5, :160:5]
            assert torch.equal(tile, images.pixels[i].permute(2, 0, 1))


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.train("resnet18", 3, seed=5, h=FAST)
    path, save = small / "resnet18-002.pt", train.save

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name, stop in {"evaluate": interrupt, "save": lambda *a: interrupt(save(*a))}.items():
        for _ in range(2):  # in the first epoch, twice, and after each of two
            with monkeypatch.context() as patch:
                patch.setattr(train, name, stop)
                with pytest.raises(KeyboardInterrupt, match=rf'^Go on with --resume "{re.escape(str(path))}"$'):
                    train.train(resume=path) if path.exists() else train.train("resnet18", 3, seed=5, h=FAST)
    assert train.newest_run("resnet18") == path
    assert [row["test_acc"] for row in train.train(resume=path)] == [row["test_acc"] for row in whole]
    assert_equal(saved_state(small / "resnet18-001.pt"), saved_state(path))
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert [(int(row["epoch"]), float(row["test_acc"])) for row in rows] == [(r["epoch"], r["test_acc"]) for r in whole]
