"""Batches, optimizer and schedule against independent computations, and whole runs on a small data set."""

import csv
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

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
from train import Hyperparameters, seed_draws


def noise(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)


def test_augment_equals_pad_crop_flip() -> None:
    pixels, mirror = noise(20), torch.arange(20) % 2 == 0
    places = []
    for ours, original, mirrored in zip(train.augment(pixels, mirror, 4), pixels, mirror, strict=True):
        padded = F.pad(original.permute(2, 0, 1)[None].float(), (4, 4, 4, 4), mode="reflect")[0]
        padded = v2.functional.horizontal_flip(padded) if mirrored else padded
        windows = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        places += [place for place, window in windows.items() if torch.equal(ours.permute(2, 0, 1).float(), window)]
    assert len(places) == 20 and len(set(places)) > 10
    assert torch.equal(train.augment(pixels, torch.zeros(20, dtype=torch.bool), 0), pixels)


def test_to_input_equals_torchvisions_transforms() -> None:
    pixels = noise(4)
    for size in (32, 48, 24):
        normalise = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        resize = v2.Resize((size, size), antialias=False)
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


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (8, 6, 1, 1)])
def test_muon_steps(shape: tuple[int, ...]) -> None:
    kernel, vector, matrix, frozen = (nn.Parameter(torch.randn(size)) for size in (shape, (7,), (4, 6), shape))
    kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    others = [nn.Parameter(p.detach().clone()) for p in (vector, matrix)]
    expected, momentum, before = kernel.detach().double(), 0.0, frozen.requires_grad_(False).clone()
    muon = train.Muon([kernel, vector, matrix, frozen], lr=0.1, bn_lr_factor=3.0, momentum=0.9)
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
    assert torch.equal(frozen, before)


def test_training_equals_a_loop_written_out(small: Path) -> None:
    """Three epochs of 100 images in five batches of 20, two to a step."""
    h = Hyperparameters(image_sizes=(32, 32, 40), batch_size=18, accumulation=2, crop=3)
    h = replace(h, peak_lr=0.02, bn_lr_factor=3.0, momentum=0.8, warmup=0.3, label_smoothing=0.3)
    history = train.train("resnet18", 3, seed=5, h=h)
    images, test = train.load_data(validate=False)
    seed_draws(5)
    net = ResNet18().to(memory_format=torch.channels_last)
    muon = train.Muon(net.parameters(), lr=0.0, bn_lr_factor=3.0, momentum=0.8)
    seed_draws(5, "mirror")
    mirror = torch.rand(100) < 0.5
    for epoch, size in enumerate((32, 32, 40)):
        seed_draws(5, epoch)
        order, correct, losses = torch.randperm(100), 0, []
        for first, last in ((0, 2), (2, 4), (4, 5)):
            net.zero_grad()
            for number in range(first, last):
                index = order[20 * number : 20 * number + 20]
                seed_draws(5, epoch, number)
                pixels = train.augment(images.pixels[index], mirror[index], 3)
                logits = net(train.to_input(pixels, size))
                loss = F.cross_entropy(logits, images.labels[index], label_smoothing=0.3)
                (loss / 2).backward()
                losses.append(loss.item())
                correct += (logits.argmax(1) == images.labels[index]).sum().item()
            done = (5 * epoch + last - 0.5) / 15  # the middle of the step's last batch
            muon.param_groups[0]["lr"] = rate = 0.02 * (done / 0.3 if done < 0.3 else (1 - done) / 0.7)
            muon.step()
        mirror = ~mirror
        row = history[epoch]
        assert (row["epoch"], row["image_size"], row["train_acc"]) == (epoch + 1, size, correct / 100)
        assert row["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    checkpoint = train.load(small / "resnet18-001.pt")
    torch.testing.assert_close(checkpoint["model"], net.state_dict())
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)
    assert checkpoint["mean"] == pytest.approx([0.4914, 0.4822, 0.4465])
    assert checkpoint["std"] == pytest.approx([0.2470, 0.2435, 0.2616])
    reference = torchvision.models.resnet18(num_classes=10).eval()
    reference.load_state_dict(checkpoint["model"])
    logits = reference(train.to_input(test.pixels, checkpoint["image_size"])).detach()
    ours = train.evaluate(net, test.pixels.repeat(7, 1, 1, 1), 40)  # more than it takes at once
    torch.testing.assert_close(ours, logits.repeat(7, 1), rtol=1e-3, atol=1e-3)
    assert history[-1]["test_acc"] == (logits.argmax(1) == test.labels).sum().item() / 40 and not ours.requires_grad


def test_image_sizes_share_the_epochs_and_seeds_draw_other_weights() -> None:
    def sizes(epochs: int) -> list[int]:
        run = train.Run("resnet18", epochs, 0, Hyperparameters(image_sizes=(32, 48, 64)))
        return [run.image_size(epoch) for epoch in range(epochs)]

    assert (sizes(6), sizes(4), sizes(1)) == ([32, 32, 48, 48, 64, 64], [32, 48, 48, 64], [48])
    weights = [train.Run("resnet18", 1, seed, FAST).model.fc.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_validation_holds_training_images_out(small: Path) -> None:
    everything, test = train.load_data(validate=False)
    rest, held_out = train.load_data(validate=True)
    assert (len(everything.labels), len(test.labels), len(rest.labels), len(held_out.labels)) == (100, 40, 90, 10)
    pixels = torch.cat([rest.pixels, held_out.pixels]).flatten(1)
    assert sorted(pixels.tolist()) == sorted(everything.pixels.flatten(1).tolist())
    for part in (everything, rest, held_out):  # tiny.make() gives each class a brightness of its own
        assert torch.equal((part.pixels.float().mean((1, 2, 3)) - 49.5).div(15).round(), part.labels.float())


def test_learns(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h = Hyperparameters(image_sizes=(32,), batch_size=20, accumulation=1, peak_lr=0.02, crop=0)
    history = train.train("resnet18", 6, h=h)
    assert history[-1]["test_acc"] > 0.25  # guessing gives 0.1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet18, 100 training and 40 test images"
    for number, (line, row) in enumerate(zip(lines[1:7], history, strict=True), 1):
        numbers = f"test acc: {row['test_acc']:.4f}, train loss: {row['train_loss']:.4f}, 32 px, {row['seconds']:.0f} s"
        assert line == f"Epoch {number}, {numbers}, {timedelta(seconds=round((6 - number) * row['seconds']))} left"
    total = timedelta(seconds=round(sum(row["seconds"] for row in history)))
    path = small / "resnet18-001.pt"
    assert lines[7] == f"test acc after 6 epochs: {history[-1]['test_acc']:.4f}, total time {total}, checkpoint {path}"
    with path.with_suffix(".csv").open() as file:
        table = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert table == history


def test_the_worst_mistakes_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, logits, texts = train.Images(noise(40), torch.arange(40) % 10), torch.zeros(40, 10), []
    logits[range(40), [9] * 10 + [3] * 20 + list(range(10))] = torch.arange(1.0, 41) / 4
    monkeypatch.setattr(train, "draw_bounding_boxes", lambda tile, box, text, colors: texts.append(*text) or tile)
    train.draw_mistakes(logits, images, tmp_path / "x.png")
    picture = v2.functional.pil_to_tensor(Image.open(tmp_path / "x.png"))
    assert texts[:4] == ["airplane as cat", "airplane as cat", "airplane as truck", "automobile as cat"]
    for column, i in enumerate((21, 11, 1)):  # of automobiles, row 1: the network is surest of 21
        tile = picture[:, 176 + 18 :, 162 * column + 4 :][:, :160:5, :160:5]
        assert torch.equal(tile, images.pixels[i].permute(2, 0, 1))


@pytest.mark.parametrize("validate", [False, True])
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(
    validate: bool, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, seen, evaluate = replace(FAST, validate=validate), [], train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda model, pixels, size: seen.append(pixels) or evaluate(model, pixels, size)
    )
    whole = train.train("resnet18", 3, seed=5, h=h)
    path, save = small / "resnet18-002.pt", train.save

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name, stop in {"to_input": interrupt, "save": lambda run: interrupt(save(run))}.items():
        for _ in range(2 - validate):  # in the first epoch, and after each of two
            with monkeypatch.context() as patch:
                patch.setattr(train, name, stop)
                with pytest.raises(KeyboardInterrupt, match=rf'^Go on with --resume "{re.escape(str(path))}"$'):
                    train.train(resume=path) if path.exists() else train.train("resnet18", 3, seed=5, h=h)
    state = torch.get_rng_state()
    resumed = train.train(resume=path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row | {"seconds": 0} for row in resumed] == [row | {"seconds": 0} for row in whole]
    assert_equal(saved_state(small / "resnet18-001.pt"), saved_state(path))
    assert all(torch.equal(pixels, train.load_data(validate)[1].pixels) for pixels in seen)
    assert ("val_acc" in whole[0], "test_acc" in whole[0]) == (validate, not validate)
