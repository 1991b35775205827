"""Augmentation, schedule, runs and checkpoints on a small data set."""

import copy
import csv
import re
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

import train
from train import Augmentation, Hyperparameters, Images

FAST = Hyperparameters(image_sizes=(32, 40), batch_size=16)


def saved_state(path: Path) -> dict:
    """Return what a checkpoint holds, but for the seconds, which no two runs share."""
    checkpoint = train.load(path)
    for row in checkpoint["history"]:
        del row["seconds"]
    return checkpoint


def assert_equal(a: object, b: object) -> None:
    """Compare nested containers bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_augment_equals_pad_crop_flip() -> None:
    pixels = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8)
    flip = torch.arange(20) % 2 == 0
    index = torch.randperm(20)
    batch = train.augment(Images(pixels, torch.arange(20)), index, flip, Augmentation(4, 0, 0), train.random_stream(1))
    shifts = torch.randint(-4, 5, (2, 20, 1), generator=train.random_stream(1))[..., 0].T.tolist()
    assert len({tuple(s) for s in shifts}) > 10
    for ours, i, mirrored, (down, right) in zip(batch, index, flip, shifts, strict=True):
        padded = F.pad(pixels[i].permute(2, 0, 1)[None].float(), (4, 4, 4, 4), mode="reflect")[0]
        expected = padded[:, 4 + down : 36 + down, 4 + right : 36 + right]
        expected = v2.functional.horizontal_flip(expected) if mirrored else expected
        assert torch.equal(ours.permute(2, 0, 1).float(), expected)


def test_augment_cuts_larger_and_smaller_squares() -> None:
    a = Augmentation(crop=0, erase=0, zoom=3)
    pixels = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    images, flip, draw = Images(pixels, torch.arange(2)), torch.zeros(2, dtype=torch.bool), train.random_stream(1)
    batches = [train.augment(images, torch.arange(2), flip, a, draw) for _ in range(60)]
    padded = F.pad(pixels.permute(0, 3, 1, 2).float(), (3, 3, 3, 3), mode="reflect")
    for batch in batches:
        side = batch.shape[1]
        expected = v2.functional.center_crop(padded, [side])
        # Of an odd margin, center_crop and augment may leave the odd px on either side.
        shifts = [expected, *(expected.roll((y, x), (2, 3)) for y in (-1, 0, 1) for x in (-1, 0, 1))]
        ours = batch.permute(0, 3, 1, 2).float()
        assert any(torch.equal(ours[..., 1:-1, 1:-1], e[..., 1:-1, 1:-1]) for e in shifts)
    assert {batch.shape[1] for batch in batches} == set(range(29, 36))


def test_augmentation_is_weaker_in_short_runs_and_the_zoom_ends_before_the_last_epochs() -> None:
    h = Hyperparameters(crop=4, erase=8, zoom=6, plain=0.1)
    assert [train.augmentation(epoch, 30, h) for epoch in range(30)] == [(4, 8, 6)] * 27 + [(4, 8, 0)] * 3
    assert [train.augmentation(epoch, 10, h) for epoch in range(10)] == [(2, 3, 2)] * 9 + [(2, 3, 0)]
    assert [train.augmentation(epoch, 60, h) for epoch in (0, 59)] == [(4, 8, 6), (4, 8, 0)]


def test_augment_erases_a_square() -> None:
    pixels = torch.zeros(50, 32, 32, 3, dtype=torch.uint8)
    images, flip = Images(pixels, torch.zeros(50)), torch.zeros(50, dtype=torch.bool)
    batch = train.augment(images, torch.arange(50), flip, Augmentation(0, 5, 0), train.random_stream(1))
    erased = batch[..., 0] != 0
    assert (erased.sum((1, 2)) == 25).all()
    assert (erased.any(1).sum(1) == 5).all() and (erased.any(2).sum(1) == 5).all()
    assert len({tuple(e.nonzero()[0].tolist()) for e in erased}) > 20
    assert not pixels.any()


def test_every_image_once_an_epoch_and_mirrored_in_turn() -> None:
    pixels = torch.zeros(50, 32, 32, 3, dtype=torch.uint8)
    pixels[:, :, :16] = 200  # the left half is bright
    images, h = Images(pixels, torch.arange(50)), Hyperparameters(batch_size=8)
    sides = []
    for epoch in range(2):
        order, weights = train.choose_images(torch.zeros(50), 0.5, seed=3, epoch=epoch)  # no loss is known yet
        a = Augmentation(0, 0, 0)
        batches = list(train.training_batches(images, order, weights, a, h, seed=3, epoch=epoch, prepare=lambda p: p))
        assert len(batches) == train.batch_count(50, h) == 6
        labels = torch.cat([y for _, y, _ in batches])
        assert sorted(labels.tolist()) == list(range(50)) and labels.tolist() != list(range(50))
        assert torch.equal(torch.cat([w for _, _, w in batches]), torch.ones(50))
        left = torch.cat([x for x, _, _ in batches])[:, 0, 0, 0] == 200
        sides.append(left[labels.argsort()])
    assert torch.equal(sides[0], ~sides[1])
    assert 10 < sides[0].sum() < 40


def test_to_input_equals_torchvisions_transforms() -> None:
    pixels = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    mean, std = train.pixel_statistics(pixels)
    assert mean.tolist() == pytest.approx((pixels.double() / 255).mean((0, 1, 2)).tolist(), rel=1e-6)
    assert std.tolist() == pytest.approx((pixels.double() / 255).std((0, 1, 2)).tolist(), rel=1e-4)
    for size in (32, 48):
        transform = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Resize((size, size)), v2.Normalize(mean.tolist(), std.tolist())]
        )
        x = train.to_input(pixels, mean, std, size)
        torch.testing.assert_close(x, transform(pixels.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_whitened_outputs_are_uncorrelated() -> None:
    x = F.interpolate(torch.randn(200, 3, 8, 8), (28, 28), mode="bilinear")  # neighbours are alike
    convolution = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    train.whiten(convolution, x)
    outputs = F.conv2d(x, convolution.weight, stride=7).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs[:32], -outputs[32:])
    patches = x.reshape(200, 3, 4, 7, 4, 7).permute(0, 2, 4, 1, 3, 5).reshape(3200, 147)
    variances = torch.linalg.svdvals(patches - patches.mean(0))[:32].flip(0) ** 2 / 3199
    expected = torch.diag(variances / (variances + 0.01))
    torch.testing.assert_close(outputs[:32].cov(), expected, rtol=1e-3, atol=1e-3)


def test_learning_rate() -> None:
    h = Hyperparameters(peak_lr=0.5, warmup=0.2)
    rates = [train.learning_rate(step, 99, h) for step in range(99)]
    assert rates[19] == max(rates) == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.25) and rates[59] == pytest.approx(0.25)
    assert 0 < rates[0] < 0.03 and 0 < rates[-1] < 0.01
    assert train.learning_rate(0, 99, Hyperparameters(peak_lr=0.5, warmup=0)) == pytest.approx(0.495)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (5, 5)])
def test_orthogonalise_acts_on_the_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s /= s.square().sum().sqrt()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(train.orthogonalise(matrix).double(), u * s @ v, rtol=1e-4, atol=1e-5)


def test_muon_steps() -> None:
    kernel, vector, matrix = (nn.Parameter(torch.randn(shape)) for shape in ((8, 3, 5, 5), (7,), (4, 6)))
    kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    others = [nn.Parameter(p.detach().clone()) for p in (vector, matrix)]
    expected, momentum = kernel.detach().double(), 0.0
    muon = train.Muon([kernel, vector, matrix], lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD(others, lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(4):
        for p in (kernel, vector, matrix):
            p.grad = torch.randn_like(p)
        for p, other in zip((vector, matrix), others, strict=True):
            other.grad = p.grad.clone()
        muon.step()
        sgd.step()
        momentum = 0.9 * momentum + kernel.grad.double()
        step = train.orthogonalise((kernel.grad + 0.9 * momentum).reshape(8, 75)).reshape(8, 3, 5, 5)
        expected = expected * 8**0.5 / expected.norm() - 0.1 * step
        torch.testing.assert_close(kernel.detach().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([vector, matrix], others)


def test_accumulated_batches_make_one_step() -> None:
    x, labels, whole = torch.randn(20, 6), torch.randint(3, (20,)), nn.Linear(6, 3)
    averages = []
    for size, accumulation in ((10, 1), (5, 2), (4, 3)):
        model, h = copy.deepcopy(whole), Hyperparameters(batch_size=size, accumulation=accumulation)
        optimizer, average = train.optimizer_and_average(model, h)
        batches = zip(x.split(size), labels.split(size), torch.ones(20).split(size), strict=True)
        train.run_epoch("", model, batches, 20 // size, h, optimizer, [0.1] * (20 // size), average)
        assert average.n_averaged == 2  # the last step of (4, 3) is one of two batches
        averages.append(average.module.state_dict())
    torch.testing.assert_close(averages[0], averages[1])


def test_easy_images_are_left_out_and_the_gradient_stays_the_same_in_the_mean() -> None:
    losses = torch.rand(1000)
    easy, sums, shares = losses < losses.mean(), torch.zeros(1000), []
    for epoch in range(300):
        order, weights = train.choose_images(losses, 0.6, 0, epoch)
        assert len(order.unique()) == len(order) == len(weights)
        assert (weights[~easy[order]] == 1).all() and (~easy[order]).sum() == (~easy).sum()
        torch.testing.assert_close(weights[easy[order]], torch.full((int(easy[order].sum()),), 2.5))
        sums.index_add_(0, order, weights)
        shares.append(easy[order].sum() / easy.sum())
    assert abs(torch.stack(shares).mean() - 0.4) < 0.01
    mean = sums / 300
    assert (mean[easy] - 1).abs().max() < 0.4  # its standard deviation is 0.07
    assert abs(mean[easy].mean() - 1) < 0.02
    assert torch.equal(train.choose_images(losses, 0.6, 0, 7)[0], train.choose_images(losses, 0.6, 0, 7)[0])
    assert len(train.choose_images(losses, 0.0, 0, 7)[0]) == 1000


def test_an_image_of_weight_two_counts_as_two() -> None:
    # In float64: the losses are compared as Python's floats, more closely than float32 adds.
    x, labels, linear = torch.randn(4, 6).double(), torch.randint(3, (4,)), nn.Linear(6, 3).double()
    h, results = Hyperparameters(accumulation=1), []
    for index, weights, lr in (
        (torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.0, 1.0, 2.0]), 0.1),
        (torch.tensor([0, 1, 1, 2, 3, 3]), torch.ones(6), 0.15),  # the loss of a step is a mean over four or six
    ):
        model = copy.deepcopy(linear)
        optimizer, average = train.optimizer_and_average(model, h)
        batches = [(x[index], labels[index], weights)]
        loss, accuracy, _, _ = train.run_epoch("", model, batches, 1, h, optimizer, [lr], average)
        results.append((loss, accuracy, model.state_dict()))
    torch.testing.assert_close(*results)


def test_the_losses_that_choose_the_images_are_those_of_the_epoch(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, run, chosen, seen = train.choose_images, train.run_epoch, [], []

    def record_choice(losses: torch.Tensor, *rest: object) -> tuple:
        chosen.append((losses.clone(), choose(losses, *rest)))
        return chosen[-1][1]

    def record_losses(
        title: str, model: nn.Module, batches: object, count: int, h: Hyperparameters, *rest: object
    ) -> tuple:
        result = run(title, model, batches, count, h, *rest)
        if rest:
            order = chosen[-1][1][0]
            targets = F.one_hot(train.load_data(False)[0].labels[order], 10) * 0.9 + 0.01
            seen.append((order, -(targets * result[2].log_softmax(1)).sum(1)))
        return result

    monkeypatch.setattr(train, "choose_images", record_choice)
    monkeypatch.setattr(train, "run_epoch", record_losses)
    history = train.train("resnet18", 3, h=FAST)
    expected = torch.zeros(100)
    for row, (losses, (order, _)), (_, now) in zip(history, chosen, seen, strict=True):
        torch.testing.assert_close(losses, expected)
        expected[order] = now
        assert row["images"] == len(order)
    assert history[0]["images"] == 100 > history[1]["images"]


def test_image_sizes_share_the_epochs() -> None:
    h = Hyperparameters(image_sizes=(32, 48, 64))
    assert [train.image_size(e, 6, h) for e in range(6)] == [32, 32, 48, 48, 64, 64]
    assert [train.image_size(e, 4, h) for e in range(4)] == [32, 48, 48, 64]
    assert train.image_size(0, 1, h) == 48


def test_validation_split_is_balanced_and_leaves_the_test_images_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.make(tmp_path, training=300)
    monkeypatch.setattr(train, "DATA", tmp_path)
    for name, value in tiny.checksums(tmp_path).items():
        monkeypatch.setattr(CIFAR10, name, value)
    everything, _, _ = train.load_data(validate=False)
    rest, held_out, _ = train.load_data(validate=True)
    assert held_out.labels.bincount().tolist() == [3] * 10
    pixels = torch.cat([rest.pixels, held_out.pixels]).flatten(1)
    assert sorted(pixels.tolist()) == sorted(everything.pixels.flatten(1).tolist())


def test_learns(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h = Hyperparameters(
        image_sizes=(32,), batch_size=20, accumulation=1, peak_lr=0.02, average_decay=0.5, crop=0, erase=0
    )
    history = train.train("resnet18", 6, h=h)
    assert history[-1]["test_acc"] > 0.25  # guessing gives 0.1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet18, 11,181,642 parameters, 1 threads, 100 training and 40 test images".replace(
        "1 threads", f"{torch.get_num_threads()} threads"
    )
    for number, line in enumerate(lines[1:7], 1):
        assert re.fullmatch(
            rf"Epoch {number}, test acc: \d\.\d{{4}}, train loss: \d+\.\d{{4}}, 32 px, \d+ s, \d:\d\d:\d\d left", line
        )


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train.train("resnet18", 3, seed=5, h=FAST)
    printed = capsys.readouterr().out
    write_history = train.write_history

    def interrupt(history: list, path: Path) -> None:
        write_history(history, path)
        if len(history) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "write_history", interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 epochs are saved, go on with --resume \".*resnet18-002.pt\""):
        train.train("resnet18", 3, seed=5, h=FAST)
    monkeypatch.setattr(train, "write_history", write_history)
    assert train.newest_run("resnet18") == small / "resnet18-002.pt"
    resumed = train.train("resnet18", 3, seed=5, h=FAST, resume=small / "resnet18-002.pt")
    assert [row["test_acc"] for row in resumed] == [row["test_acc"] for row in whole]
    assert_equal(saved_state(small / "resnet18-001.pt"), saved_state(small / "resnet18-002.pt"))
    accuracies = re.findall("acc: ([0-9.]+), train loss: ([0-9.]+)", printed)
    assert accuracies[1:] == re.findall("acc: ([0-9.]+), train loss: ([0-9.]+)", capsys.readouterr().out)
    rows = list(csv.DictReader((small / "resnet18-002.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
