"""What happens to people, and the line that each of it is answered with."""

import os
import random
import re
import shutil
import signal
import socket
import socketserver
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from conftest import FAST, start

import train

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
FINISHED: dict = {}  # a checkpoint, by the first test that needs it
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, signals and file-size limits")


def main(capsys: Capture, *arguments: object) -> tuple[object, str, list[str]]:
    """Run main(); return its status, what it printed, and the lines of standard error."""
    status = 0
    try:
        train.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


@pytest.fixture
def finished(small: Path) -> Path:
    """Return the checkpoint of a run of one epoch."""
    if not FINISHED:
        train.train("resnet10", 1, h=FAST)
        FINISHED.update(torch.load(small / "resnet10-001.pt", weights_only=True))
        shutil.rmtree(small)  # so that the first test to ask finds what the others find
    small.mkdir()
    torch.save(FINISHED, small / "resnet10-001.pt")
    return small / "resnet10-001.pt"


ARGUMENTS = {
    "--arch resnet19": "argument --arch: invalid choice: 'resnet19'",
    "--epochs 0": "argument --epochs: must be at least 1",
    "--resume": "there is no run to resume in ",
    "--seed 0 --resume x.pt": "a resumed run keeps its own arch, epochs and seed",
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_wrong_arguments(arguments: str, small: Path, capsys: Capture) -> None:
    status, out, err = main(capsys, *arguments.split())
    assert status == 2 and out == "" and ARGUMENTS[arguments] in err[-1] and not small.exists()


Evil = type("Evil", (), {"__reduce__": lambda self: (sys.exit, ("code in the checkpoint has run",))})
CHECKPOINTS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "code": lambda path: torch.save(FINISHED | {"settings": Evil()}, path),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "other format": lambda path: torch.save(FINISHED | {"format": 99}, path),
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


def test_links_and_a_table_that_is_open_elsewhere(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    torch.save(FINISHED | {"settings": FINISHED["settings"] | {"epochs": 2}}, finished)
    (old := tmp_path / "old").hardlink_to(finished)
    before = old.read_bytes()
    (link := tmp_path / "latest").symlink_to(finished)
    (table := finished.with_suffix(".csv")).mkdir()
    with pytest.raises(OSError) as refused:  # in the words of the system
        table.open("w")
    status, out, err = main(capsys, "--resume", link)
    assert status == 0 and "\ntest acc after 2 epochs: " in out and "checkpoint checkpoints/resnet10-001.pt\n" in out
    assert err[-1] == f"Table or picture not written: {refused.value}" and repr(str(table)) in err[-1]
    assert link.is_symlink() and len(train.resumed(finished).history) == 2
    assert old.read_bytes() == before  # a save moves a whole file into the place of the old one, which nothing changes


def test_bare_resume_takes_the_run_saved_last(finished: Path, capsys: Capture) -> None:
    for second, name in enumerate(["resnet34-001.pt", "resnet18-003.pt", "resnet18-001-epoch05.pt", "resnet18-004.pt"]):
        finished.with_name(name).write_bytes(b"" if "4" in name[8:] else b"x")  # empty: killed before it began
        os.utime(finished.with_name(name), (2e9 + second,) * 2)
    status, _, err = main(capsys, "--resume")
    assert status == 1 and len(err) == 1 and "resnet18-003.pt cannot be read" in err[0]
    assert not (torch.tensor([1e-39]) / 2).any()  # denormals are 0


def test_runs_that_start_at_the_same_moment(small: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(train, "save", lambda run: None)
    runs = [train.Run("resnet10", 1, 0, FAST) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(train.save_new, runs))
    assert sorted(path.name for path in paths) == [f"resnet10-{i:03d}.pt" for i in range(1, 17)]
    paths[7].rename(paths[7].with_suffix(".csv"))  # only the checkpoint was deleted: its table stays
    assert train.save_new(runs[0]).name == "resnet10-017.pt"


def test_loss_that_is_not_finite(small: Path) -> None:
    with pytest.raises(train.RunError, match=r"^Epoch 1, step 2: loss (nan|inf). Lower peak_lr"):
        train.train("resnet10", 2, h=replace(FAST, peak_lr=1e37, warmup=0.0, accumulation=1))
    run = train.resumed(small / "resnet10-001.pt")
    assert run.history == [] and all(value.isfinite().all() for value in run.model.parameters())


def test_bad_hosts_and_data(small: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    whole = (train.DATA / train.CIFAR10.filename).read_bytes()
    hosts = {
        "busy": (b"503 Busy\r\n\r\n", "HTTPError 503"),
        "broken": (b"Oops\r\n\r\n", "Oops"),
        "half": (b"200 OK\r\n\r\n" + whole[: len(whole) // 2], "corrupted"),
        "stalled": (b"200 OK\r\nContent-Length: 9999\r\n\r\n", "timed out"),
        "good": (b"200 OK\r\n\r\n" + whole, ""),
    }

    def answer(request: socket.socket, *_: object) -> None:
        name = request.recv(9999).split()[1][1:].decode()
        request.sendall(b"HTTP/1.0 " + hosts[name][0])
        time.sleep(2 * (name == "stalled"))

    def load_in_four_runs_at_once() -> None:
        with ThreadPoolExecutor(4) as pool:
            loaded = list(pool.map(train.load_data, [FAST] * 4))
        assert [[len(part.labels) for part in parts] for parts in loaded] == [[100, 40]] * 4
        assert {file.name for file in train.DATA.iterdir()} == {archive.name, train.CIFAR10.base_folder}
        shutil.rmtree(train.DATA / train.CIFAR10.base_folder)

    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 60))
    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # another file system would do as little
    archive = train.DATA / train.CIFAR10.filename
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        *bad, good = [f"http://127.0.0.1:{server.server_address[1]}/{name}" for name in hosts]
        monkeypatch.setattr(train, "HOSTS", bad)
        status, out, err = main(capsys)
        assert status == 1 and out == "" and not list(train.DATA.iterdir())
        archive.write_bytes(part := whole[: len(whole) // 2])  # a copy by hand that was cut short
        monkeypatch.setattr(train, "HOSTS", [bad[0], good])
        load_in_four_runs_at_once()
        assert archive.read_bytes() == part
        server.shutdown()
    set_timeout(None)
    for url, (_, reason) in zip(bad, hosts.values(), strict=False):
        (line,) = [line for line in err if f"No CIFAR-10 from {url}: " in line]
        assert reason in line
    assert all(part in err[-1] for part in (archive.name, train.CIFAR10.tgz_md5, str(train.DATA), "by hand"))
    archive.write_bytes(whole)  # a whole one: no host is asked
    load_in_four_runs_at_once()
    monkeypatch.setattr(train, "DATA", archive / "data")  # a folder in a file
    status, out, err = main(capsys)
    assert (status, out) == (1, "") and str(train.DATA) in err[-1]


def test_full_disk(small: Path, capsys: Capture) -> None:
    resource, path = pytest.importorskip("resource"), small / "resnet10-001.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The first checkpoint, of 20 MB, has no momentum yet; the one after the first epoch has, in as much again.
    for megabytes in (10, 30):
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 10**6, limits[1]))
        status, out, err = main(capsys, "--arch", "resnet10", "--epochs", "3")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 1 and "Epoch" not in out and list(small.iterdir()) == [path]
        assert len(err) == 1 and err[0].endswith(f": Cannot save {path}: File too large.")
        path.unlink()


def test_a_checkpoint_that_another_program_holds(finished: Path, monkeypatch: Patch) -> None:
    own, other = (finished.with_name(f"resnet10-00{number}.pt.1.tmp") for number in (1, 2))
    own.touch(), other.touch()  # of a save that was killed, and of a run that is saved right now
    run, before = train.resumed(finished), finished.read_bytes()
    assert own.exists() and finished.read_bytes() == before  # resumed() only reads
    move, waits = Path.replace, []

    def held(source: Path, target: Path) -> Path:
        if len(waits) < limit:
            raise PermissionError(13, "It is held")
        return move(source, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(time, "sleep", waits.append)
    limit = 10**9
    with pytest.raises(train.RunError, match=f"^Cannot save {re.escape(str(finished))}: It is held.$"):
        train.save(run)
    assert sum(waits) == 10 and finished.read_bytes() == before
    limit = len(waits) + 3
    run.seed = 7
    train.save(run)
    assert train.resumed(finished).seed == 7 and {*finished.parent.iterdir()} == {finished, other}


@linux
def test_closed_output_and_interrupt(project: Path) -> None:
    path = project / "checkpoints" / "resnet10-001.pt"
    _, err = (process := start(project, "--arch resnet10 --epochs 2 > /dev/full")).communicate(timeout=120)
    assert process.returncode == 1 and "No space left" in err and err.count("\n") == 1
    _, err = start(project, "--resume | true").communicate(timeout=120)
    assert err.count("\n") <= 1
    process = start(project, "--resume")
    assert [process.stdout.readline()[:9] for _ in range(2)] == ["resnet10,", "Epoch 1, "]
    time.sleep(0.1)  # because tqdm, interrupted while it makes its bar, adds a line of its own
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    # Ended by the signal: a shell's loop over seeds ends too.
    assert process.returncode == -signal.SIGINT and err == f'KeyboardInterrupt: Go on with --resume "{path}"\n'
    assert start(project, "--resume >&-").wait(120) == 0 and len(train.resumed(path).history) == 2
    assert sorted(file.name[12:] for file in path.parent.iterdir()) == ["-mistakes.png", ".csv", ".pt"]


@linux
def test_killed_at_any_moment(small: Path) -> None:
    whole, path = small / "resnet10-001.pt", small / "resnet10-002.pt"
    for turn in range(5):  # in turn 0 a run is left alone, in turns 1 to 3 a second one is killed
        if not (child := os.fork()):
            torch.set_num_threads(1)
            train.train(resume=path) if path.exists() else train.train("resnet10", 4, h=FAST), os._exit(0)
        if 1 <= turn <= 3:
            time.sleep(random.uniform(0, 1.5 * train.resumed(whole).history[-1]["seconds"]))
            os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL * (1 <= turn <= 3))
        if path.exists() and not path.stat().st_size:
            path.unlink()  # it never began
        if path.exists() and turn < 4:
            path.with_name(f"{path.name}.{turn}.tmp").write_text("half a checkpoint, of a save that was killed")
    tiny.assert_equal(tiny.saved_state(path), tiny.saved_state(whole))
    assert not list(small.glob("*.tmp"))
