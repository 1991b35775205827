"""What happens to people, and the line that each of it is answered with."""

import os
import random
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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


@pytest.fixture
def finished(small: Path) -> Path:
    """Return the checkpoint of a run of one epoch."""
    if not FINISHED:
        train.train("resnet18", 1, h=FAST)
        FINISHED.update(torch.load(small / "resnet18-001.pt", weights_only=True))
    small.mkdir(exist_ok=True)
    torch.save(FINISHED, small / "resnet18-001.pt")
    return small / "resnet18-001.pt"


KEEPS = "a resumed run keeps its own --arch, --epochs and --seed"
ARGUMENTS = {
    "--arch resnet19": "argument --arch: invalid choice: 'resnet19'",
    "--epochs 0": "argument --epochs: must be at least 1",
    "--seed one": "argument --seed: invalid int value: 'one'",
    "--resume": "there is no run to resume in ",
    "--arch resnet34 --resume x.pt": KEEPS,
    "--epochs 7 --resume x.pt": KEEPS,
    "--seed 0 --resume x.pt": KEEPS,
}
Evil = type("Evil", (), {"__reduce__": lambda self: (sys.exit, ("code in the checkpoint has run",))})
CHECKPOINTS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "code": lambda path: torch.save(FINISHED | {"seed": Evil()}, path),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "other format": lambda path: torch.save(FINISHED | {"format": 99}, path),
    "a copy": lambda path: path.rename(path.with_suffix(".bak")),
    "a save that was killed": lambda path: path.rename(path.with_suffix(".pt.1.tmp")),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoints(case: str, finished: Path, capsys: Capture) -> None:
    path = CHECKPOINTS[case](finished)
    path = path if isinstance(path, Path) else finished
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    status, out, err = main(capsys, "--resume", path)
    assert status == 1 and out == "" and len(err) == 1 and str(path) in err[0]
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_wrong_arguments(arguments: str, small: Path, capsys: Capture) -> None:
    status, out, err = main(capsys, *arguments.split())
    assert status == 2 and out == "" and ARGUMENTS[arguments] in err[-1] and not small.exists()


def test_finished_run_resumed_through_a_link(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    (link := tmp_path / "latest").symlink_to(finished)
    before, accuracy = finished.read_bytes(), train.load(finished)["history"][0]["test_acc"]
    status, out, _ = main(capsys, "--resume", link)
    assert status == 0 and f"\ntest acc after 1 epochs: {accuracy:.4f}, " in out and str(finished) in out
    assert finished.read_bytes() == before and link.is_symlink() and list(tmp_path.glob("latest*")) == [link]


def test_bare_resume_takes_the_run_saved_last(finished: Path, capsys: Capture, monkeypatch: Patch) -> None:
    asked = []
    monkeypatch.setattr(train, "train", lambda resume: asked.append(resume.name))
    for second, name in enumerate(["resnet34-001.pt", "resnet18-003.pt", "notes-x.pt", "resnet18-004.pt"]):
        finished.with_name(name).write_bytes(b"" if "4" in name[8:] else b"x")  # empty: killed before it began
        os.utime(finished.with_name(name), (2e9 + second,) * 2)
    assert main(capsys, "--resume")[0] == 0 and asked == ["resnet18-003.pt"]
    assert not (torch.tensor([1e-39]) / 2).any()  # denormals are 0
    monkeypatch.undo()
    monkeypatch.setattr(train, "CHECKPOINTS", finished.parent)
    status, _, err = main(capsys, "--resume")
    assert status == 1 and len(err) == 1 and "resnet18-003.pt is damaged" in err[0]


def test_runs_that_start_at_the_same_moment(small: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(train, "save", lambda run: None)
    runs = [train.Run("resnet18", 1, 0, FAST) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(train.save_new, runs))
    assert sorted(path.name for path in paths) == [f"resnet18-{i:03d}.pt" for i in range(1, 17)]
    paths[7].rename(paths[7].with_suffix(".csv"))  # only the checkpoint was deleted: its table stays
    assert train.save_new(runs[0]).name == "resnet18-017.pt"


def test_loss_that_is_not_finite(small: Path) -> None:
    with pytest.raises(train.RunError, match=r"^Epoch 1, batch 2: loss (nan|inf). Lower peak_lr"):
        train.train("resnet18", 2, h=replace(FAST, peak_lr=1e37, warmup=0.0, accumulation=1))
    state = train.load(small / "resnet18-001.pt")
    assert state["history"] == [] and all(value.isfinite().all() for value in state["model"].values())


def test_table_that_is_open_elsewhere(finished: Path, capsys: Capture) -> None:
    def process() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), socket.getdefaulttimeout(), torch.get_num_threads()]

    torch.save(FINISHED | {"epochs": 2}, finished)
    (table := finished.with_suffix(".csv")).unlink(missing_ok=True)
    table.mkdir()
    before = process()
    assert len(train.train(resume=finished)) == 2 and process() == before
    assert capsys.readouterr().err.splitlines()[-1] == f"Cannot write {table}: Is a directory"


@contextmanager
def serve(handle: Callable[..., None]) -> Iterator[str]:
    """Answer connections by handle(socket, ...) while the block runs; its value is the address."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handle) as server:
        server.handle_error = lambda *_: None  # the client may leave before it has all
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def test_bad_hosts_and_data(small: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    whole = (train.DATA / train.CIFAR10.filename).read_bytes()
    hosts = {
        "busy": (b"503 Busy\r\n\r\n", "HTTP Error 503"),
        "broken": (b"Oops\r\n\r\n", "Oops"),
        "half": (b"200 OK\r\n\r\n" + whole[: len(whole) // 2], "corrupted"),
        "portal": (b"200 OK\r\nContent-Type: text/html\r\n\r\n<html>Log in</html>", "corrupted"),
        "circle": (b"302 Found\r\nLocation: /circle\r\n\r\n", "redirect"),
        "stalled": (b"200 OK\r\nContent-Length: 9999\r\n\r\n", "timed out"),
        "reset": (b"200 OK\r\nContent-Length: 9999\r\n\r\n", "reset"),  # while the body arrives
        "moved": (b"301 Moved\r\nLocation: /good\r\n\r\n", ""),
        "good": (b"200 OK\r\n\r\n" + whole, ""),
    }

    def handle(request: socket.socket, *_: object) -> None:
        name = request.recv(9999).split()[1][1:].decode()
        request.sendall(b"HTTP/1.0 " + hosts[name][0])
        time.sleep(2 * (name == "stalled"))
        if name == "reset":
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)), request.close()

    monkeypatch.setattr(train, "HOST_TIMEOUT", 0.5)
    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # another file system would do as little
    archive = train.DATA / train.CIFAR10.filename
    with serve(handle) as address:
        *bad, moved, _ = [address + name for name in hosts]
        monkeypatch.setattr(train, "HOSTS", bad)
        status, out, err = main(capsys)
        archive.write_bytes(whole[: len(whole) // 2])  # a copy by hand that was cut short
        monkeypatch.setattr(train, "HOSTS", [bad[0], moved])
        assert [len(part.labels) for part in train.load_data(validate=False)] == [100, 40]
        retried = capsys.readouterr().err
    assert status == 1 and out == "" and socket.getdefaulttimeout() is None
    for url, (_, answer) in zip(bad, hosts.values(), strict=False):
        (line,) = [line for line in err if f"No CIFAR-10 from {url}: " in line]
        assert f"CIFAR-10 (170 MB) comes from {url}" in err and answer in line
    assert all(part in err[-1] for part in (archive.name, train.CIFAR10.tgz_md5, str(train.DATA), "by hand"))
    assert f"CIFAR-10 (170 MB) comes from {moved}\n" in retried and archive.read_bytes() == whole
    for file in (
        train.DATA / train.CIFAR10.base_folder
    ).iterdir():  # deleted: the archive at hand has it, no host asked
        file.unlink()
    file.parent.rmdir()
    assert [len(part.labels) for part in train.load_data(validate=False)] == [100, 40]
    assert {path.name for path in train.DATA.iterdir()} == {archive.name, train.CIFAR10.base_folder}


def test_first_runs_that_download_at_once(small: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    archive = (train.DATA / train.CIFAR10.filename).read_bytes()

    def handle(request: socket.socket, *_: object) -> None:
        request.recv(9999), request.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        for start in range(0, len(archive), len(archive) // 20):  # in 0.2 s
            request.sendall(archive[start : start + len(archive) // 20]), time.sleep(0.01)

    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    with serve(handle) as address, ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(train, "HOSTS", [address])
        # Each starts when the one before it has three quarters.
        loads = pool.map(lambda late: (time.sleep(0.15 * late), train.load_data(False)), range(4))
        assert [len(parts[0].labels) for _, parts in loads] == [100] * 4
    assert {path.name for path in train.DATA.iterdir()} == {train.CIFAR10.filename, train.CIFAR10.base_folder}


def start(project: Path, arguments: str, before: str = "") -> subprocess.Popen[str]:
    """Start train.py on its small data set, in another folder, after shell commands."""
    command = f'{before} exec "{sys.executable}" "{tiny.__file__}" "{project}" {arguments}'
    options = {"cwd": project.parent, "shell": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    return subprocess.Popen(command, **options)


@linux
def test_disk_full_closed_output_and_interrupt(project: Path) -> None:
    path = project / "checkpoints" / "resnet18-001.pt"
    # The first checkpoint, of 45 MB, has no momentum yet; the one after the first epoch has, in as much again.
    for megabytes, left in ((10, []), (60, [path])):
        process = start(project, "--epochs 3", f"ulimit -f {megabytes * 2000};")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and "resnet18-001.pt: File too large" in err and err.count("\n") == 1
        assert "Epoch" not in out and list(path.parent.iterdir()) == left
    for arguments, error in (("--resume > /dev/full", "No space left"), ("--resume | true", "")):
        out, err = (process := start(project, arguments)).communicate(timeout=120)
        assert error in err and err.count("\n") <= 1 and (process.returncode == 1 or not error)
    process = start(project, "--resume")
    assert [process.stdout.readline()[:9] for _ in range(2)] == ["resnet18,", "Epoch 1, "]
    time.sleep(0.1)  # because tqdm, interrupted while it makes its bar, adds a line of its own
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    # Ended by the signal: a shell's loop over seeds ends too.
    assert process.returncode == -signal.SIGINT and err == f'KeyboardInterrupt: Go on with --resume "{path}"\n'
    assert start(project, "--resume >&- 2>&-").wait(120) == 0
    out, err = start(project, f'--resume "{path}"').communicate(timeout=120)
    assert err == "" and "\ntest acc after 3 epochs: " in out
    assert sorted(file.name[12:] for file in path.parent.iterdir()) == ["-mistakes.png", ".csv", ".pt"]


@linux
def test_killed_at_any_moment(small: Path) -> None:
    whole, path = small / "resnet18-001.pt", small / "resnet18-002.pt"
    for turn in range(6):  # in turn 0 a run is left alone, in turns 1 to 4 a second one is killed
        if not (child := os.fork()):
            torch.set_num_threads(1)
            train.train("resnet18", 4, h=FAST, resume=path if path.exists() else None), os._exit(0)
        if 1 <= turn <= 4:
            time.sleep(random.uniform(0, 1.5 * train.load(whole)["history"][-1]["seconds"]))
            os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL * (1 <= turn <= 4))
        if path.exists() and not path.stat().st_size:
            path.unlink()  # it never began
        if path.exists() and turn < 5:
            path.with_name(f"{path.name}.{turn}.tmp").write_text("half a checkpoint, of a save that was killed")
    tiny.assert_equal(tiny.saved_state(path), tiny.saved_state(whole))
    assert not list(small.glob("*.tmp"))
