"""`workers.judge.sandbox`: what generated code cannot do, layer by layer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cache_store.errors import UserError
from workers.judge.sandbox import Execution, IsolationLayer, Limits, run

if sys.platform != "linux":
    pytest.skip("the jail is made of what Linux has", allow_module_level=True)

LIMITS = Limits(seconds=3)
#: What must hold with everything, and with one of the layers missing, as in a container that forbids namespaces.
LAYERS: list[tuple[IsolationLayer, ...]] = [(), ("namespaces",), ("landlock",)]


def jail(program: str, *, limits: Limits = LIMITS, without: Sequence[IsolationLayer] = ()) -> Execution:
    # Root without seccomp is refused, since nothing limits its processes; the other layers are still worth a look.
    unisolated = "seccomp" in without and os.getuid() == 0 and "namespaces" not in without
    return run(program, limits, allow_code_execution=True, allow_unisolated=unisolated, without=without)


@pytest.fixture(scope="module", autouse=True)
def _isolating() -> None:
    try:
        jail("")
    except UserError as error:
        pytest.skip(error.message)


@pytest.fixture
def server() -> Iterator[int]:
    """The port of something that listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_a_program_that_returns_passes_and_its_output_is_kept() -> None:
    done = jail("print('hello')\nassert 1 + 1 == 2")
    assert done.passed
    assert done.output == "hello\n"
    assert done.isolated == ("files", "network", "processes")


def test_a_program_that_raises_fails_with_its_reason() -> None:
    done = jail("assert 1 + 1 == 3, 'arithmetic'")
    assert (done.outcome, done.reason) == ("failed", "AssertionError: arithmetic")


def test_a_syntax_error_fails() -> None:
    assert jail("def f(:").reason.startswith("SyntaxError")


@pytest.mark.parametrize("ending", ["raise SystemExit(0)", "import sys; sys.exit()", "import os; os._exit(0)"])
def test_a_program_that_ends_itself_before_its_tests_has_not_passed(ending: str) -> None:
    assert jail(f"{ending}\nassert False").outcome == "failed"


def test_a_forged_verdict_without_the_token_is_not_believed() -> None:
    forged = (
        'import os\nfor fd in range(3, 20):\n try: os.write(fd, b\'{"passed": "yes"}\\n\')\n except OSError: pass\n'
    )
    assert not jail(forged + "os._exit(0)").passed


@pytest.mark.parametrize("written", ["b'[' * 60_000", "b'1' * 60_000", "b'\\xff' * 100", "b'{\"failed\": 3}'"])
def test_whatever_is_written_to_the_verdict_is_a_failure(written: str) -> None:
    told = f"import os\nfor fd in range(3, 20):\n try: os.write(fd, b'\\n' + {written})\n except OSError: pass\n"
    assert jail(told + "os._exit(0)").outcome == "failed"


def test_an_endless_loop_is_stopped_in_time() -> None:
    started = time.monotonic()
    done = jail("while True: pass", limits=Limits(seconds=1))
    assert done.outcome == "timeout"
    assert time.monotonic() - started < 4


def test_sleeping_is_stopped_by_the_clock() -> None:
    assert jail("import time; time.sleep(60)", limits=Limits(seconds=1)).outcome == "timeout"


def test_endless_output_is_cut_and_stopped() -> None:
    done = jail("while True: print('x' * 1000)", limits=Limits(seconds=1, output_bytes=5000))
    assert done.outcome == "timeout"
    assert len(done.output) == 5000


def test_a_memory_hog_is_refused_its_memory() -> None:
    done = jail("hog = bytearray(3 << 30)", limits=Limits(seconds=3, memory_bytes=1 << 30))
    assert (done.outcome, done.reason) == ("failed", "MemoryError")


@pytest.mark.parametrize("without", LAYERS)
@pytest.mark.parametrize(
    "forking",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['/bin/true'], check=True)",
        "import multiprocessing; multiprocessing.get_context('fork').Process(target=print).start()",
        "import os; os.execv('/bin/true', ['true'])",
    ],
)
def test_no_new_process_is_started(forking: str, without: tuple[IsolationLayer, ...]) -> None:
    before = len(psutil.pids())
    done = jail(forking, without=without)
    assert done.outcome == "failed"
    assert "not permitted" in done.reason
    assert len(psutil.pids()) < before + 20


@pytest.mark.parametrize("without", [*LAYERS, ("seccomp",)])
def test_the_network_cannot_be_reached(server: int, without: tuple[IsolationLayer, ...]) -> None:
    program = f"import socket; socket.create_connection(('127.0.0.1', {server}), 2)"
    exec(program, {})  # the server is there
    done = jail(program, without=without)
    assert done.outcome == "failed"
    assert done.reason.split(":")[0] in ("PermissionError", "OSError", "ConnectionRefusedError")


@pytest.mark.parametrize("without", LAYERS)
def test_sockets_on_paths_cannot_be_reached(tmp_path: Path, without: tuple[IsolationLayer, ...]) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        done = jail(f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})", without=without)
    assert "PermissionError" in done.reason


@pytest.mark.parametrize("without", [*LAYERS, ("seccomp",)])
@pytest.mark.parametrize(
    "change",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a').write('x')",
        "os.truncate({path!r}, 0)",
        "os.remove({path!r})",
        "os.rename({path!r}, {path!r} + '2')",
        "os.symlink('/', {path!r} + '2')",
        "open({path!r} + '2', 'x')",
        "os.mkdir({path!r} + '2')",
    ],
)
def test_files_outside_cannot_be_changed(tmp_path: Path, change: str, without: tuple[IsolationLayer, ...]) -> None:
    kept = tmp_path / "kept"
    kept.write_text("precious")
    done = jail("import os\n" + change.format(path=str(kept)), without=without)
    assert done.outcome == "failed"
    assert done.reason.startswith(("OSError", "PermissionError"))
    assert kept.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("without", LAYERS)
@pytest.mark.parametrize("change", ["os.chmod({path!r}, 0o777)", "os.utime({path!r}, (0, 0))"])
def test_attributes_of_files_cannot_be_changed(
    tmp_path: Path, change: str, without: tuple[IsolationLayer, ...]
) -> None:
    kept = tmp_path / "kept"
    kept.write_text("precious")
    before = kept.stat()
    assert jail("import os\n" + change.format(path=str(kept)), without=without).outcome == "failed"
    assert kept.stat() == before


@pytest.mark.parametrize("without", LAYERS)
def test_its_own_folder_is_empty_writable_small_and_gone_afterwards(without: tuple[IsolationLayer, ...]) -> None:
    program = (
        "import os\nassert os.listdir() == []\nprint(os.getcwd())\nopen('a', 'w').write('x')\n"
        "assert open('a').read() == 'x'\nopen('b', 'wb').write(bytes(2 << 20))"
    )
    done = jail(program, without=without)
    assert "File too large" in done.reason
    assert not Path(done.output.strip()).exists()


@pytest.mark.parametrize("without", LAYERS)
@pytest.mark.parametrize(
    "writing",
    [
        "for i in range(20_000): open(f'f{i}', 'wb').write(bytes(1 << 20))",
        "for i in range(10**9): open(f'f{i}', 'x').close()",
        "for i in range(10**9): os.mkdir('d'); os.chdir('d')",
    ],
)
def test_all_its_files_together_are_bounded(writing: str, without: tuple[IsolationLayer, ...]) -> None:
    done = jail(f"import os\nprint(os.getcwd(), flush=True)\n{writing}", limits=Limits(seconds=20), without=without)
    assert done.outcome == "failed"
    assert done.reason.startswith(("OSError: [Errno 28]", "wrote more files"))
    assert not Path(done.output.strip()).exists()


@pytest.mark.parametrize("without", LAYERS)
@pytest.mark.parametrize("path", ["/dev/kmsg", "/dev/null", "/proc/1/environ", "/proc/self/mem"])
def test_devices_and_processes_cannot_be_opened(path: str, without: tuple[IsolationLayer, ...]) -> None:
    for mode in ("r", "w"):
        done = jail(f"open({path!r}, {mode!r})", without=without)
        assert done.outcome == "failed"
        assert done.reason.startswith(("FileNotFoundError", "PermissionError", "OSError: [Errno 30]"))


@pytest.mark.parametrize("without", [*LAYERS, ("seccomp",)])
def test_other_processes_cannot_be_signalled(without: tuple[IsolationLayer, ...]) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as bystander:
        program = f"import os\nfor pid in ({bystander.pid}, os.getppid()): os.kill(pid, {int(signal.SIGTERM)})"
        done = jail(program, without=without)
        try:
            assert done.outcome in ("failed", "died")
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_the_environment_of_the_parent_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    assert jail("import os; assert set(os.environ) <= {'LC_CTYPE'}, os.environ").passed


def test_the_parents_open_files_are_not_there(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        done = jail(f"import os; os.write({file.fileno()}, b'x')")
    assert "Bad file descriptor" in done.reason
    assert (tmp_path / "open").read_text() == ""


def test_a_fault_in_the_interpreter_is_a_death_and_not_ours() -> None:
    assert jail("import ctypes; ctypes.string_at(0)").outcome == "died"


def test_packages_are_importable_only_where_asked_for() -> None:
    import numpy

    folder = str(Path(numpy.__file__).parents[1])
    program = "import numpy; assert numpy.ones(3).sum() == 3"
    assert "ModuleNotFoundError" in jail(program).reason
    done = run(program, Limits(seconds=20, memory_bytes=4 << 30), allow_code_execution=True, modules=[folder])
    assert done.passed, done


def test_nothing_is_left_running() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    jail("import threading, time\nfor _ in range(4): threading.Thread(target=time.sleep, args=(60,)).start()")
    jail("while True: pass", limits=Limits(seconds=0.5))
    time.sleep(0.2)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_several_run_side_by_side() -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda number: jail(f"print({number})\nassert {number} % 2"), range(12)))
    assert [one.passed for one in done] == [number % 2 == 1 for number in range(12)]
    assert [one.output for one in done] == [f"{number}\n" for number in range(12)]


def test_code_is_not_run_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allow_code_execution"):
        run("", allow_code_execution=False)


def test_where_nothing_isolates_it_is_refused_and_says_what_is_missing() -> None:
    bare: tuple[IsolationLayer, ...] = ("namespaces", "landlock", "seccomp")
    with pytest.raises(UserError, match="cannot isolate files and network and processes"):
        jail("", without=bare)
    with pytest.raises(UserError, match="cannot isolate files for"):
        jail("", without=("namespaces", "landlock"))


def test_where_nothing_isolates_it_runs_only_when_that_is_allowed_too() -> None:
    bare: tuple[IsolationLayer, ...] = ("namespaces", "landlock", "seccomp")
    done = run("x = 1", LIMITS, allow_code_execution=True, allow_unisolated=True, without=bare)
    assert done.passed
    assert done.isolated == ()
