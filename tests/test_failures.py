"""What happens to people, and the one line each of it is answered with."""

import http.server
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_train import FAST, assert_equal, saved_state
from torchvision.datasets import CIFAR10

import train

TINY = Path(tiny.__file__)


def run(project: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the project's train.py on its small data set."""
    command = [sys.executable, str(TINY), str(project), *arguments]
    options = {"capture_output": True, "env": os.environ | {"PYTHONIOENCODING": "utf-8"}} | options
    return subprocess.run(command, text=True, encoding="utf-8", timeout=120, **options)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return standard error, which must be a single line and no traceback."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


ARGUMENTS = [
    (["--arch", "resnet19"], "invalid choice: 'resnet19' (choose from"),
    (["--epochs", "0"], "'0' is not a whole number of 1 or more"),
    (["--epochs", "-3"], "'-3' is not a whole number of 1 or more"),
    (["--epochs", "1.5"], "'1.5' is not a whole number of 1 or more"),
    (["--epochs", "many"], "'many' is not a whole number of 1 or more"),
    (["--seed", "-1"], "'-1' is not a whole number of 0 or more"),
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
    (["--resume"], "there is no run of resnet18 to resume"),
    (["--arch", "resnet34", "--resume"], "there is no run of resnet34 to resume"),
]


@pytest.mark.parametrize(("arguments", "answer"), ARGUMENTS)
def test_wrong_arguments(arguments: list[str], answer: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        train.main(arguments)
    out, err = capsys.readouterr()
    assert status.value.code == 2 and out == "" and len(err.splitlines()) == 1 and answer in err
    assert not small.exists() or not list(small.iterdir())


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("evil",)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes keys of the checkpoint at a path."""

    def change(path: Path) -> None:
        checkpoint = torch.load(path)
        hyperparameters = checkpoint["hyperparameters"] | changes.pop("hyperparameters", {})
        torch.save(checkpoint | {"hyperparameters": hyperparameters} | changes, path)

    return change


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHECKPOINTS = {
    "missing": (Path.unlink, [], "No such file"),
    "empty": (lambda p: p.write_bytes(b""), [], "is damaged or not a checkpoint"),
    "cut short": (half, [], "is damaged or not a checkpoint"),
    "text": (lambda p: p.write_text("epoch 1\n"), [], "is damaged or not a checkpoint"),
    "tensor": (lambda p: torch.save(torch.ones(3), p), [], "is not a checkpoint"),
    "foreign": (lambda p: torch.save({"state_dict": {}}, p), [], "is not a checkpoint"),
    "code": (lambda p: torch.save({"format": 2, "x": Evil()}, p), [], "is damaged or not a checkpoint"),
    "folder": (folder, [], "Is a directory"),
    "other format": (changed(format=9), [], "has format 9, this train.py reads format 2"),
    "other epochs": (lambda p: None, ["--epochs", "7"], "epochs 1 there and 7 here"),
    "other arch": (lambda p: None, ["--arch", "resnet34"], "arch resnet18 there and resnet34 here"),
    "other seed": (lambda p: None, ["--seed", "4"], "seed 0 there and 4 here"),
    "other hyperparameters": (
        changed(hyperparameters={"peak_lr": 9.0, "crop": 1}),
        [],
        f"crop 1 there and {train.Hyperparameters.crop} here, "
        f"peak_lr 9.0 there and {train.Hyperparameters.peak_lr} here",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return the checkpoint of a run of one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tiny.checksums(tiny_data).items():
            patch.setattr(CIFAR10, name, value)
        patch.setattr(train, "DATA", tiny_data)
        patch.setattr(train, "CHECKPOINTS", tmp_path_factory.mktemp("finished"))
        train.train("resnet18", 1)
        return train.CHECKPOINTS / "resnet18-001.pt"


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoints(
    case: str,
    finished: Path,
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(finished, tmp_path / "some run.pt"))
    spoil, arguments, answer = CHECKPOINTS[case]
    spoil(path)
    assert train.main([*arguments, "--resume", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and answer in err and path.name in err
    assert not (tmp_path / "evil").exists()


def test_finished_run_resumed(finished: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.mkdir()
    shutil.copy(finished, small)
    capsys.readouterr()
    assert train.main(["--resume"]) == 0
    out = capsys.readouterr().out
    assert "resnet18-001.pt is finished" in out and "test acc after 1 epochs: " in out


def test_newest_unfinished_run(finished: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.mkdir()
    for number in ("001", "003"):
        shutil.copy(finished, small / f"resnet18-{number}.pt")
    unfinished = torch.load(finished)
    torch.save(unfinished | {"epochs": 2}, small / "resnet18-002.pt")
    (small / "resnet18-1004.pt").touch()  # killed before it began
    assert train.newest_run("resnet18") == small / "resnet18-002.pt"
    assert train.new_run("resnet18") == small / "resnet18-1005.pt"


def test_runs_that_start_at_the_same_moment(small: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(train.new_run, ["resnet18"] * 40))
    assert sorted(p.name for p in paths) == [f"resnet18-{i:03d}.pt" for i in range(1, 41)]


def test_loss_that_is_not_finite(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h = train.Hyperparameters(batch_size=16, accumulation=1, peak_lr=1e38, image_sizes=(32,), warmup=0.0)
    with pytest.raises(
        train.RunError, match=r"^Epoch 1, step \d of 6, learning rate .*: the loss is nan. Lower peak_lr"
    ):
        train.train("resnet18", 2, h=h)
    assert train.load(small / "resnet18-001.pt")["history"] == []


@pytest.mark.parametrize(("batch_size", "steps"), [(7, 14), (99, 1), (1000, 1)])
def test_batch_sizes(batch_size: int, steps: int, small: Path) -> None:
    h = train.Hyperparameters(batch_size=batch_size, accumulation=1, image_sizes=(16,))
    train.train("resnet18", 1, h=h)
    assert train.load(small / "resnet18-001.pt")["training"]["averaged_steps"] == steps


def test_history_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.csv").mkdir()
    train.write_history([{"epoch": 1}], tmp_path / "run.csv")
    assert len(capsys.readouterr().err.splitlines()) == 1


# The answers of a host: status, headers, body; a body that is None never comes.
HOSTS = {
    "503": (503, {}, b"", "HTTP Error 503"),
    "half": (200, {}, b"half", "sent half of the archive, or something else"),
    "portal": (
        200,
        {"Content-Type": "text/html"},
        b"<html>Log in</html>",
        "sent half of the archive, or something else",
    ),
    "circle": (302, {"Location": "/circle"}, b"", "redirect"),
    "stalled": (200, {"Content-Length": "1000"}, None, "timed out"),
}


@pytest.fixture
def server(tiny_data: Path) -> Iterator[str]:
    """Serve HOSTS, and the archive under /good and, redirected, under /moved."""
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            archive = (tiny_data / CIFAR10.filename).read_bytes()
            answers = HOSTS | {"good": (200, {}, archive, ""), "moved": (301, {"Location": "/good"}, b"", "")}
            status, headers, body, _ = answers[name]
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            if body is None:
                release.wait(20)
            elif body == b"half":
                self.wfile.write(archive[: len(archive) // 2])
            else:
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}"
    release.set()
    listener.shutdown()


@pytest.fixture
def no_data(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make train.py use an empty data folder."""
    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    monkeypatch.setattr(train, "HOST_TIMEOUT", 0.5)
    return tmp_path / "data"


@pytest.mark.parametrize("case", HOSTS)
def test_bad_host_is_told_and_the_next_one_tried(
    case: str, server: str, no_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "HOSTS", (f"{server}/{case}", "http://127.0.0.1:1/refused", f"{server}/moved"))
    training, test, classes = train.load_data(validate=False)
    assert (len(training.labels), len(test.labels), classes) == (100, 40, tiny.CLASSES)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 2, err
    assert HOSTS[case][3] in lines[0] and "refused" in lines[1]


def test_no_host(no_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "HOSTS", ("http://127.0.0.1:1/x", "http://no-such-host.invalid/x"))
    assert train.main([]) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and len(err.splitlines()) == 3
    for part in ("127.0.0.1:1: ", "no-such-host.invalid: ", CIFAR10.filename, CIFAR10.tgz_md5, str(no_data), "by hand"):
        assert part in last


def spoil_batch(data: Path) -> None:
    (data / CIFAR10.base_folder / "data_batch_3").write_bytes(b"damaged")


def halve_folder(data: Path) -> None:
    for name in ("data_batch_5", "test_batch", "batches.meta"):
        (data / CIFAR10.base_folder / name).unlink()


@pytest.mark.parametrize("spoil", [spoil_batch, halve_folder, lambda data: shutil.rmtree(data / CIFAR10.base_folder)])
def test_archive_at_hand_mends_the_data_without_network(
    spoil: Callable[[Path], None], no_data: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_data, no_data)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    spoil(no_data)
    assert len(train.load_data(validate=False)[0].labels) == 100


def test_data_folder_that_cannot_be_written(no_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_data.write_text("a file where the folder should be")
    assert train.main([]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and f"Cannot write CIFAR-10 to {no_data}: " in err


def test_checkpoint_folder_that_cannot_be_written(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_text("a file where the folder should be")
    assert train.main(["--epochs", "1"]) == 1
    out, err = capsys.readouterr()
    assert "Epoch" not in out and len(err.splitlines()) == 1 and f"Cannot write to {small}: " in err


def test_temporary_file_of_a_killed_save_goes_after_an_hour(small: Path) -> None:
    small.mkdir()
    old, young = small / "resnet18-001.tmp", small / "resnet18-002.tmp"
    for file, age in ((old, 4000), (young, 0)):
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    train.new_run("resnet18")
    assert not old.exists() and young.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file-size limits and pipes are POSIX's")
class TestSurroundings:
    """Whole processes."""

    def test_other_folder_spaces_pipes_and_encodings(self, project: Path, tmp_path: Path) -> None:
        env = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "3"}
        result = run(project, "--epochs", "1", cwd=tmp_path, env=env)
        assert result.returncode == 0 and result.stderr == ""
        assert "Epoch 1, test acc: 0." in result.stdout and "Fr\\xfch lauf" in result.stdout
        assert sorted(p.name for p in (project / "checkpoints").iterdir()) == [
            "resnet18-001-mistakes.png",
            "resnet18-001.csv",
            "resnet18-001.pt",
        ]

    def test_closed_output(self, project: Path) -> None:
        command = f'"{sys.executable}" "{TINY}" "{project}" --epochs 2'
        head = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True, timeout=120)
        assert head.stdout.startswith("resnet18, ") and len(head.stdout.splitlines()) == 1
        assert len(head.stderr.splitlines()) == 1 and "standard output was closed" in head.stderr
        closed = subprocess.run(f"{command} >&- 2>&-", shell=True, timeout=120)
        assert closed.returncode == 0
        assert len(train.load(project / "checkpoints" / "resnet18-002.pt")["history"]) == 2

    def test_disk_full_at_start_and_in_mid_run(self, project: Path) -> None:
        import resource

        def limit(size: int) -> Callable[[], None]:
            return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        result = run(project, "--epochs", "1", preexec_fn=limit(10_000_000))
        assert result.returncode == 1 and "Cannot save" in one_line(result) and "Epoch" not in result.stdout
        assert list((project / "checkpoints").iterdir()) == []
        # The first checkpoint has no momentum yet and fits, the one after the first epoch does not.
        result = run(project, "--epochs", "2", preexec_fn=limit(100_000_000))
        assert result.returncode == 1 and "Cannot save" in one_line(result) and "Epoch" not in result.stdout
        assert [p.name for p in (project / "checkpoints").iterdir()] == ["resnet18-001.pt"]
        assert run(project, "--resume").returncode == 0

    def test_interrupt_prints_how_to_go_on(self, project: Path) -> None:
        command = [sys.executable, str(TINY), str(project), "--epochs", "500"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # Tests that a shell runs in the background inherit from it that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout.readline().startswith("resnet18, ")
        assert process.stdout.readline().startswith("Epoch 1, ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and len(err.splitlines()) == 1
        path = project / "checkpoints" / "resnet18-001.pt"
        assert err.startswith("Interrupted. ") and f'go on with --resume "{path}"' in err
        assert train.load(path)["history"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, to spare each run the import of torch")
def test_killed_at_any_moment(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kill -9 a run again and again; KILLS sets how often."""
    kills, draw, epochs = int(os.environ.get("KILLS", 6)), random.Random(), 4

    def fork(work: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        return child

    start = time.perf_counter()
    assert os.waitpid(fork(lambda: train.train("resnet18", epochs, h=FAST)), 0)[1] == 0
    duration = time.perf_counter() - start
    whole, path = saved_state(small / "resnet18-001.pt"), small / "resnet18-002.pt"
    killed = 0
    while killed < kills:
        finished = False
        while not finished:
            resume = path if path.exists() and path.stat().st_size else None
            child = fork(lambda: train.train("resnet18", epochs, h=FAST, resume=resume))  # noqa: B023
            if killed < kills:
                time.sleep(draw.uniform(0, 2 * duration / epochs))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL)
            finished = status == 0
            killed += not finished
            if path.exists() and path.stat().st_size:
                train.load(path)  # whole, after every kill
            elif path.exists():
                path.unlink()
        assert_equal(saved_state(path), whole)
        assert not list(small.glob("*.tmp"))
        path.unlink()
