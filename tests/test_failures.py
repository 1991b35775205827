"""What happens to people, and the line that each of it is answered with."""

import os
import random
import re
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import FAST

import train

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
FINISHED: dict = {}  # a checkpoint, by the first test that needs it
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, signals and file-size limits")


def main(capsys: Capture, *arguments: object) -> tuple[object, str, list[str]]:
    """Run main(); return its status, what it printed, and the lines of standard error."""
    try:
        status = train.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


def fork(action: Callable[[], object]) -> int:
    """Run `action` in a process of its own, whose number is returned; it exits with 0 if the action ends well."""
    if not (child := os.fork()):
        try:
            torch.set_num_threads(1)
            action()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return child


@pytest.fixture
def finished(small: Path) -> Path:
    """Return the checkpoint of a run of one epoch."""
    if not FINISHED:
        train.train("resnet18", 1, h=FAST)
        FINISHED.update(train.load(small / "resnet18-001.pt"))
    small.mkdir(exist_ok=True)
    torch.save(FINISHED, small / "resnet18-001.pt")
    return small / "resnet18-001.pt"


ARGUMENTS = {
    "--arch resnet19": "argument --arch: invalid choice: 'resnet19'",
    "--epochs 0": "argument --epochs: must be at least 1",
    "--seed one": "argument --seed: invalid int value: 'one'",
    "--resume": "there is no unfinished run to resume",
    "--arch resnet34 --resume RUN": "resnet18-001.pt is a run with arch resnet18",
    "--epochs 7 --resume RUN": "resnet18-001.pt is a run with epochs 1",
    "--seed 4 --resume RUN": "resnet18-001.pt is a run with seed 0",
}
Evil = type("Evil", (), {"__reduce__": lambda self: (sys.exit, ("code in the checkpoint has run",))})
CHECKPOINTS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "damaged archive": lambda path: path.write_bytes(path.read_bytes().replace(b"data.pkl", b"data.pkm")),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "code": lambda path: torch.save(FINISHED | {"seed": Evil()}, path),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "other format": lambda path: torch.save(FINISHED | {"format": 99}, path),
}
# A run's table, a copy, a save that was killed.
NAMES = ["resnet18-001.csv", "resnet18-001.bak", "resnet18-001.pt.1.tmp"]


@pytest.mark.parametrize("case", [*ARGUMENTS, *CHECKPOINTS])
def test_wrong_arguments_and_bad_checkpoints(case: str, finished: Path, capsys: Capture) -> None:
    CHECKPOINTS.get(case, Path.exists)(finished)
    arguments = case if case in ARGUMENTS else "--resume RUN"
    status, out, err = main(capsys, *(finished if word == "RUN" else word for word in arguments.split()))
    assert out == "" and set(finished.parent.glob("*.pt")) <= {finished}
    assert status == 2 if case in ARGUMENTS else (status == 1 and len(err) == 1)
    assert ARGUMENTS.get(case, str(finished)) in err[-1]


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_another_name_is_resumed(name: str, finished: Path, capsys: Capture) -> None:
    torch.save(FINISHED | {"epochs": 2}, finished.with_name(name))
    before = {path: path.read_bytes() for path in finished.parent.iterdir()}
    status, out, err = main(capsys, "--resume", finished.with_name(name))
    assert status == 1 and out == "" and len(err) == 1 and f"{name} is damaged, or no checkpoint (.pt) of" in err[0]
    assert {path: path.read_bytes() for path in finished.parent.iterdir()} == before


WRONG = {
    "batch_size": (0, 1, 2.5, inf, (128, 64)),
    "image_sizes": ((), (32, 0)),
    "warmup": (1, -0.1),
    "peak_lr": (nan,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_hyperparameters_that_cannot_work(name: str, value: object, small: Path, capsys: Capture) -> None:
    with pytest.MonkeyPatch.context() as patch:  # as a user would edit the script
        patch.setattr(train.Hyperparameters.__init__, "__defaults__", tuple((asdict(FAST) | {name: value}).values()))
        status, out, err = main(capsys, "--epochs", 1)
    assert status == 1 and out == "" and not small.exists()
    assert len(err) == 1 and f"Hyperparameters: {name} must be " in err[0] and err[0].endswith(f", not {value}.")


def test_numpys_numbers_in_a_sweep(small: Path) -> None:
    h = replace(FAST, peak_lr=np.linspace(0.01, 0.02, 3)[1], batch_size=np.int64(50), image_sizes=np.array([32, 40]))
    assert (h.peak_lr, h.image_sizes) == (0.015, (32, 40)) and type(h.peak_lr) is float and type(h.batch_size) is int
    train.train("resnet18", *np.array([1, 5]), h=h)
    state = train.load(small / "resnet18-001.pt")
    assert (state["epochs"], state["seed"], state["hyperparameters"]) == (1, 5, asdict(h))
    for epochs in np.array([0, -1]):
        with pytest.raises(train.RunError, match=f"^epochs must be at least 1, not {epochs}"):
            train.train(epochs=epochs)
    assert len(list(small.glob("*.pt"))) == 1


def test_finished_run_resumed(finished: Path, capsys: Capture, monkeypatch: Patch) -> None:
    torch.save(FINISHED | {"epochs": 2, "history": FINISHED["history"] * 2}, finished)
    before, accuracy, evaluate, sizes = finished.read_bytes(), FINISHED["history"][-1]["test_acc"], train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *a: sizes.append(a[2]) or evaluate(*a))
    status, out, _ = main(capsys, "--arch", "resnet18", "--epochs", 2, "--seed", 0, "--resume", finished)
    assert status == 0 and f"{finished} is finished" in out and finished.read_bytes() == before and sizes == [40]
    of_each = [line.replace(",", "").split() for line in out.splitlines() if line.startswith("  ")]
    assert [words[0] for words in of_each] == train.CLASSES and f"test acc after 2 epochs: {accuracy:.4f}" in out
    assert sum(float(words[1]) for words in of_each) / 10 == pytest.approx(accuracy)


def test_resumed_run_keeps_its_hyperparameters_though_the_script_was_edited(finished: Path, capsys: Capture) -> None:
    edited = {name: value for name, value in asdict(FAST).items() if name != "crop"} | {"ema_decay": 0.9}
    torch.save(FINISHED | {"epochs": 2, "hyperparameters": edited}, finished)
    status, _, err = main(capsys, "--resume", finished)
    assert status == 0 and len(err) == 1
    for name, value in asdict(FAST).items():
        assert (name in err[0]) == (value != getattr(train.Hyperparameters, name))
    hyperparameters, history = map(train.load(finished).get, ("hyperparameters", "history"))
    assert hyperparameters == asdict(FAST) and [row["image_size"] for row in history] == [40, 40]


def test_resumed_through_a_link_and_on_another_system(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    torch.save(FINISHED | {"epochs": 2, "system": "torch 1.0"}, finished)
    (link := tmp_path / "latest.pt").symlink_to(finished)
    train.train(resume=str(link))
    out, err = capsys.readouterr()
    assert link.is_symlink() and list(tmp_path.glob("latest*")) == [link] and str(finished) in out
    assert len(train.load(finished)["history"]) == 2 and finished.with_suffix(".csv").exists()
    here = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    assert f"Not bit for bit as without the stop: torch 1.0, now {here}\n" in err
    assert train.load(finished)["system"] == here
    link.rename(tmp_path / "latest")  # the name of the target counts
    assert main(capsys, "--seed", 0, "--resume", tmp_path / "latest")[0] == 0


def test_bare_resume_takes_the_unfinished_run_saved_last(finished: Path, capsys: Capture, monkeypatch: Patch) -> None:
    asked = []
    monkeypatch.setattr(train, "train", lambda **given: asked.append(given["resume"].stem))
    for name, epochs in {"resnet18-003": 2, "resnet18-002": 3, "resnet34-001": 2}.items():
        torch.save(FINISHED | {"arch": name[:8], "epochs": epochs}, finished.with_stem(name))
    finished.touch()
    finished.with_stem("resnet18-004").write_text("no checkpoint")
    finished.with_stem("resnet18-005").touch(), finished.with_stem("resnet18-006").mkdir()  # 5: killed before it began
    finished.with_stem("resnet18-007").symlink_to("nowhere.pt")
    for arguments in ((), ("--arch", "resnet18")):
        status, _, err = main(capsys, *arguments, "--resume")
        assert status == 0 and len(err) == 2 and "resnet18-004.pt" in "".join(err)
    assert asked == ["resnet34-001", "resnet18-002"] and not (torch.tensor([1e-39]) / 2).any()  # denormals are 0


def test_runs_that_start_at_the_same_moment(small: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(train.new_path, ["resnet18"] * 40))
    assert sorted(path.name for path in paths) == [f"resnet18-{i:03d}.pt" for i in range(1, 41)]
    paths[7].rename(paths[7].with_suffix(".csv"))  # only the checkpoint was deleted: its table stays
    assert train.new_path("resnet18").name == "resnet18-041.pt"


def test_two_processes_on_one_run(finished: Path, monkeypatch: Patch) -> None:
    torch.save(FINISHED | {"epochs": 3}, finished)
    evaluate, others = train.evaluate, [finished]

    def after_another_process(*arguments: Any) -> torch.Tensor:
        if others:
            train.train(resume=others.pop())
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", after_another_process)
    line = f"^Another process goes on with {re.escape(str(finished))}: this one stops"
    with pytest.raises(train.RunError, match=line):
        train.train(resume=finished)
    assert len(train.load(finished)["history"]) == 3 and not list(finished.parent.glob("*.tmp"))
    run = train.Run("resnet18", 4, 0, FAST, 100)
    run.history = [*train.load(finished)["history"], {"seconds": 1.0}]
    os.truncate(finished, 1000)  # damaged while the run goes on: what the run has in memory is written
    train.save(run, finished)
    assert train.load(finished)["history"] == run.history


def test_file_held_for_a_moment(finished: Path, monkeypatch: Patch) -> None:
    run, held, replaced = train.Run("resnet18", 3, 0, FAST, 100), [True] * 3, Path.replace
    run.history = [*FINISHED["history"], {"seconds": 1.0}]

    def replace_file(path: Path, target: Path) -> Path:
        if held and held.pop():
            raise PermissionError(13, "Permission denied")
        return replaced(path, target)

    monkeypatch.setattr(Path, "replace", replace_file)
    train.save(run, finished)
    assert train.load(finished)["history"] == run.history and not held
    held += [True] * 99
    run.history.append({"seconds": 2.0})
    monkeypatch.setattr(time, "sleep", lambda seconds: held.remove(True))
    with pytest.raises(train.RunError, match="Cannot save .*Permission denied"):
        train.save(run, finished)
    assert len(train.load(finished)["history"]) == 2 and not list(finished.parent.glob("*.tmp"))


def test_loss_that_is_not_finite(small: Path) -> None:
    with pytest.raises(train.RunError, match=r"^Epoch 1, batch 2 of 3, learning rate 7.5e\+36: the loss is .*peak_lr"):
        train.train("resnet18", 2, h=replace(FAST, peak_lr=1e37, warmup=0.0, accumulation=1))
    history, weights = map(train.load(small / "resnet18-001.pt").get, ("history", "model"))
    assert history == [] and all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("batch_size", [7, 49, 1000])  # of 50 images; one left alone could not be normalised
def test_run_leaves_the_process_as_it_was(batch_size: int, small: Path, capsys: Capture, monkeypatch: Patch) -> None:
    def process() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), socket.getdefaulttimeout(), torch.get_num_threads()]

    for path in (paths := [small / "a.csv", small / "a-mistakes.png"]):
        path.mkdir(parents=True)
    monkeypatch.setattr(train, "new_path", lambda arch: small / "a.pt")
    socket.setdefaulttimeout(None), torch.manual_seed(7)  # other tests left what train() would set
    before = process()
    (row,) = train.train("resnet18", 1, h=replace(FAST, image_sizes=(32,), batch_size=batch_size))
    assert row["images"] == 50 and process() == before
    assert capsys.readouterr().err == "".join(f"Cannot write {path}: Is a directory\n" for path in paths)


def test_bad_hosts_and_data(small: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    hosts = {
        "busy": (b"503 Busy\r\n\r\n", "HTTP Error 503"),
        "broken": (b"Oops\r\n\r\n", "Oops"),
        "half": (b"200 OK\r\n\r\n\x1f\x8bhalf an archive", "corrupted"),
        "portal": (b"200 OK\r\nContent-Type: text/html\r\n\r\n<html>Log in</html>", "corrupted"),
        "circle": (b"302 Found\r\nLocation: /circle\r\n\r\n", "redirect"),
        "stalled": (b"200 OK\r\nContent-Length: 9999\r\n\r\n", "timed out"),
        "reset": (b"200 OK\r\nContent-Length: 9999\r\n\r\n", "reset"),  # while the body arrives
        "moved": (b"301 Moved\r\nLocation: /good\r\n\r\n", ""),
        "good": (b"200 OK\r\n\r\n" + (train.DATA / train.CIFAR10.filename).read_bytes(), ""),
    }

    def handle(request: socket.socket, *_: object) -> None:
        name = request.recv(9999).split()[1][1:].decode()
        request.sendall(b"HTTP/1.0 " + hosts[name][0])
        time.sleep(2 * (name == "stalled"))
        if name == "reset":
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)), request.close()

    monkeypatch.setattr(train, "HOST_TIMEOUT", 0.5)
    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handle) as server:
        server.handle_error = lambda *_: None  # the client may leave before it has all
        threading.Thread(target=server.serve_forever, daemon=True).start()
        *bad, moved, _ = [f"http://127.0.0.1:{server.server_address[1]}/{name}" for name in hosts]
        monkeypatch.setattr(train, "HOSTS", bad)
        status, out, err = main(capsys)
        monkeypatch.setattr(train, "HOSTS", [bad[0], moved])
        retried = main(capsys, "--epochs", 1)
        server.shutdown()
    assert status == 1 and out == "" and len(err) == 2 * len(bad) + 1 and socket.getdefaulttimeout() is None
    for asked, line, url, (_, answer) in zip(err[::2], err[1::2], bad, hosts.values(), strict=False):
        assert asked == f"CIFAR-10 (170 MB) comes from {url}"
        assert line.startswith(f"No CIFAR-10 from {url}: ") and answer in line
    assert all(part in err[-1] for part in (train.CIFAR10.filename, train.CIFAR10.tgz_md5, str(train.DATA), "by hand"))
    assert retried[0] == 0 and "\nEpoch 1, test acc: " in retried[1]
    assert retried[2] == [*err[:2], f"CIFAR-10 (170 MB) comes from {moved}"]
    for name in ("data_batch_3", "batches.meta"):  # mended by the archive at hand, as no host answers by now
        (train.DATA / train.CIFAR10.base_folder / name).write_bytes(b"damaged")
        assert [len(part.labels) for part in train.load_data(validate=False)] == [100, 40]
    assert {path.name for path in train.DATA.iterdir()} == {train.CIFAR10.filename, train.CIFAR10.base_folder}


@linux
def test_two_first_runs_download_at_once(small: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    archive = (train.DATA / train.CIFAR10.filename).read_bytes()

    def handle(request: socket.socket, *_: object) -> None:
        request.recv(9999), request.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        for start in range(0, len(archive), len(archive) // 20):  # in 0.2 s
            request.sendall(archive[start : start + len(archive) // 20]), time.sleep(0.01)

    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handle) as server:
        monkeypatch.setattr(train, "HOSTS", [f"http://127.0.0.1:{server.server_address[1]}/"])
        # Each starts when the one before it has three quarters.
        load_late = [lambda late=late: (time.sleep(0.15 * late), train.load_data(False)) for late in range(4)]
        host, *children = map(fork, [server.serve_forever, *load_late])
        statuses = [os.waitpid(child, 0)[1] for child in children]
        os.kill(host, signal.SIGKILL), os.waitpid(host, 0)
    assert statuses == [0] * 4
    assert {path.name for path in train.DATA.iterdir()} == {train.CIFAR10.filename, train.CIFAR10.base_folder}
    assert [len(part.labels) for part in train.load_data(validate=False)] == [100, 40]


def test_streams_that_are_no_files_of_the_system(small: Path, monkeypatch: Patch) -> None:
    out, err = [], []
    for name, written in {"stdout": out, "stderr": err}.items():  # as in IDLE, in Spyder and in many a notebook
        monkeypatch.setattr(sys, name, SimpleNamespace(write=written.append, flush=lambda: None))
    monkeypatch.setattr(train, "Hyperparameters", lambda: FAST)
    assert train.main(["--epochs", "1"]) == 0 and "Epoch 1, test acc: " in "".join(out) and not err
    for console in ("PYCHARM_HOSTED", "ipykernel", "idlelib"):
        with monkeypatch.context() as patch:
            patch.setitem(os.environ if console.isupper() else sys.modules, console, "1")
            train.train(epochs=1)
            assert "\rEpoch 1:   0%" in err[0] and "\n" not in "".join(err)
        err.clear()
    options = train.bar_options()
    assert options["mininterval"] == options["delay"] == 60
    monkeypatch.setattr(train, "bar_options", lambda: options | {"mininterval": 0, "delay": 1e-9})  # a minute is over
    train.train(epochs=1)
    lines = "".join(err).split("\n")
    assert len(lines) > 3 and all(re.match(r"\rEpoch 1: +\d+%.*loss|$", line) for line in lines)


@pytest.mark.parametrize("name", ["DATA", "CHECKPOINTS"])
def test_folder_that_is_a_file(name: str, small: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(train, name, tmp_path / "a file")
    (tmp_path / "a file").touch()
    status, out, err = main(capsys, "--epochs", 1)
    assert status == 1 and out == "" and err and all("a file" in line for line in err)


def start(project: Path, arguments: str, before: str = "") -> subprocess.Popen[str]:
    """Start train.py on its small data set, in another folder and with an ASCII terminal, after shell commands."""
    command = f'{before} exec "{sys.executable}" "{tiny.__file__}" "{project}" {arguments}'
    options = {"cwd": project.parent, "env": os.environ | {"PYTHONIOENCODING": "ascii"}, "shell": True, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@linux
def test_disk_full_closed_output_and_interrupt(project: Path) -> None:
    path = project / "checkpoints" / "resnet18-001.pt"
    # The first checkpoint, of 45 MB, has no momentum yet; the one after the first epoch has, in as much again.
    for megabytes, left in ((10, []), (60, [path])):
        process = start(project, "--epochs 3", f"ulimit -f {megabytes * 2000};")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and "resnet18-001.pt: File too large" in err and err.count("\n") == 1
        assert "Epoch" not in out and list(path.parent.iterdir()) == left
    out, err = (process := start(project, "--resume > /dev/full")).communicate(timeout=120)
    assert (
        process.returncode == 1
        and "Cannot print: No space left on device. Go on with --resume" in err
        and err.count("\n") == 1
    )
    process = start(project, "--resume")
    assert process.stdout.readline().startswith("resnet18, ") and not process.stdout.close()
    assert "Cannot print: Broken pipe. Go on" in (err := process.stderr.read()) and err.endswith('resnet18-001.pt"\n')
    assert err.count("\n") == process.wait(120) == 1
    process = start(project, "--resume")
    assert [process.stdout.readline()[:9] for _ in range(2)] == ["resnet18,", "Epoch 2, "]
    time.sleep(0.1)  # because tqdm, interrupted while it makes its bar, adds a line of its own
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    # Ended by the signal: a shell's loop over seeds ends too.
    assert process.returncode == -signal.SIGINT and err.startswith('KeyboardInterrupt: Go on with --resume "')
    assert err.count("\n") == 1 and err.endswith('lauf/checkpoints/resnet18-001.pt"\n')
    assert start(project, "--resume >&- 2>&-").wait(120) == 0
    out, err = start(project, f'--resume "{path}"').communicate(timeout=120)
    assert err == "" and "is finished" in out and "test acc after 3 epochs" in out and "Fr\\xfch lauf" in out
    assert sorted(file.name[12:] for file in path.parent.iterdir()) == ["-mistakes.png", ".csv", ".pt"]


@linux
def test_killed_at_any_moment(small: Path) -> None:
    whole, path = small / "resnet18-001.pt", small / "resnet18-002.pt"
    path.parent.mkdir()
    for turn in range(6):  # in turn 0 a run is left alone, in turns 1 to 4 a second one is killed
        child = fork(lambda: train.train("resnet18", 4, h=FAST, resume=path if path.exists() else None))
        if kill := 1 <= turn <= 4:
            time.sleep(random.uniform(0, 1.5 * train.load(whole)["history"][-1]["seconds"]))
            os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] in ((0, signal.SIGKILL) if kill else (0,))
        if path.exists() and not path.stat().st_size:
            for file in small.glob("resnet18-002*"):  # it never began
                file.unlink()
        if path.exists() and turn < 5:
            path.with_name(f"{path.name}.{turn}.tmp").write_text("half a checkpoint, of a save that was killed")
    tiny.assert_equal(tiny.saved_state(path), tiny.saved_state(whole))
    assert not list(small.glob("*.tmp"))
