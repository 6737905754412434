"""lab/run keeps its promises: status, streams, environment, an unharmed machine, clear failures."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

LAB = Path(__file__).resolve().parents[2] / "lab"
RUN = str(LAB / "run")
LAB_FAILED = 125

pytestmark = pytest.mark.slow


def lab(
    *words: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [RUN, *words],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=50,
        check=False,
    )
    # Decoded by hand: text mode would hide a changed line end.
    return subprocess.CompletedProcess(
        result.args, result.returncode, os.fsdecode(result.stdout), os.fsdecode(result.stderr)
    )


def wait_until(path: Path, text: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} never appeared in {path}"
        time.sleep(0.05)


def test_status_and_streams_are_those_of_the_command() -> None:
    result = lab("--", "sh", "-c", r"printf 'a\r\nb'; echo c >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (7, "a\r\nb", "c\n")


def test_common_target_of_both_streams_keeps_their_order(tmp_path: Path) -> None:
    with (tmp_path / "both").open("wb") as both:
        script = "for i in 1 2 3; do echo out$i; echo err$i >&2; done"
        subprocess.run([RUN, "--", "sh", "-c", script], stdout=both, stderr=both, check=True)
    assert (tmp_path / "both").read_text().split() == [
        "out1",
        "err1",
        "out2",
        "err2",
        "out3",
        "err3",
    ]


@pytest.mark.parametrize(
    ("command", "status"),
    [(["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL), (["no-such-command"], 127)],
    ids=["killed", "not-found"],
)
def test_status_of_a_command_that_did_not_exit(command: list[str], status: int) -> None:
    assert lab("--", *command).returncode == status


def test_environment_and_arguments_arrive_unchanged(tmp_path: Path) -> None:
    value = "a b\n\"c\" $HOME `x` \\ 'q' é \udcff=*;"
    script = (
        "import os, sys; print([ascii(x) for x in "
        "(os.environ['ODD'], os.environ['odd-name.1'], sys.argv[1:], os.getcwd())])"
    )
    directory = tmp_path / "with 'odd' name"
    directory.mkdir()
    result = lab(
        *("--", sys.executable, "-c", script, value, ""),
        cwd=directory,
        env={"ODD": value, "odd-name.1": ""},
    )
    assert result.stdout == f"{[ascii(x) for x in (value, '', [value, ''], str(directory))]}\n"


def test_output_is_seen_while_the_command_runs(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen([RUN, "--", "sh", "-c", "echo early; sleep 100"], stdout=out)
        try:
            wait_until(tmp_path / "out", "early")
        finally:
            process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For TMPDIR: the lab goes to /tmp when the name is too long for a Unix socket, as pytest's are."""
    with tempfile.TemporaryDirectory(prefix="lab", dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_when_it_is_stopped(short_directory: Path, sent: int) -> None:
    env = os.environ | {"TMPDIR": str(short_directory)}
    with (short_directory / "out").open("wb") as out:
        # Whoever started us in the background may have left SIGINT ignored, and that is inherited.
        words = ["env", "--default-signal=INT", RUN, "--", "sh", "-c", "echo up; sleep 100"]
        process = subprocess.Popen(words, stdout=out, env=env, start_new_session=True)
        wait_until(short_directory / "out", "up")
        assert kernels_of(short_directory)
        process.send_signal(sent)
        process.wait(10)
    deadline = time.monotonic() + 5
    while running := kernels_of(short_directory):
        assert time.monotonic() < deadline, running
        time.sleep(0.05)
    if sent != signal.SIGKILL:
        assert [path.name for path in short_directory.iterdir()] == ["out"]


def kernels_of(directory: Path) -> list[str]:
    """Command lines of the processes that work in a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if f"LAB_WORK={directory}/" in line:
            found.append(line)
    return found


def test_timeout() -> None:
    result = lab("--timeout", "4", "--", "sleep", "100")
    assert (result.returncode, result.stderr) == (124, "lab: no end after 4 seconds\n")


@pytest.mark.parametrize(("kind", "status"), [("rekey", 125), ("norekey", 139)])
def test_process_with_too_many_pages_is_told_apart(kind: str, status: int) -> None:
    """Each page is a mapping of the host's, and these have a limit; one of the kernels would leave the process spinning."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 100_000:
        pytest.skip(f"vm.max_map_count is {limit} here: more than a guest has memory for")
    program = f"import mmap; pages = mmap.mmap(-1, {4096 * 2 * limit}); [pages.write_byte(1) or pages.seek(8191, 1) for _ in range({limit})]"
    result = lab("--kernel", kind, "--timeout", "50", "--", "python3", "-c", program)
    assert f"more than vm.max_map_count ({limit}) mappings" in result.stderr
    assert result.returncode == status


def test_kernels_differ_and_run_side_by_side() -> None:
    script = "grep -c TlsTxRekeyOk /proc/net/tls_stat; echo $KTLS_LAB"
    processes = {
        kind: subprocess.Popen(
            [RUN, "--kernel", kind, "--", "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
        for kind in ("rekey", "norekey")
    }
    said = {kind: process.communicate(timeout=50)[0] for kind, process in processes.items()}
    assert said == {"rekey": "1\nrekey\n", "norekey": "0\nnorekey\n"}


def test_module_is_absent_on_request() -> None:
    assert lab("--no-tls-module", "--", "test", "-e", "/proc/net/tls_stat").returncode == 1


@pytest.mark.parametrize("kind", ["rekey", "norekey"])
def test_machine_is_out_of_harms_way_but_output_is_real(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("intact")
    output = tmp_path / "output"
    output.mkdir()
    script = (
        "echo broken >precious && cat precious && rm precious && touch new"
        " && echo real >output/file"
        " && dd if=/dev/zero of=/dev/shm/large bs=1M count=192 2>/dev/null"
        " && dd if=/dev/zero of=large bs=1M count=192 2>/dev/null"
    )
    result = lab(
        *("--kernel", kind, "--output", "output", "--", "sh", "-c", script),
        cwd=tmp_path,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "broken\n", "")
    assert precious.read_text() == "intact"
    assert (output / "file").read_text() == "real\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "precious"]


def test_guest_is_a_proper_machine() -> None:
    script = (
        "import os, resource, socket, time;"
        "os.urandom(16); socket.create_server(('::1', 0), family=socket.AF_INET6); open('/dev/null'); os.openpty();"
        "print(socket.gethostname(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], time.time())"
    )
    result = lab("--", sys.executable, "-W", "ignore", "-c", script)
    name, files, seconds = result.stdout.split()
    assert (name, files) == ("ktls-lab", "65536")
    assert abs(float(seconds) - time.time()) < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--colour", "--", "true"], "unknown option --colour"),
        (["--kernel", "6.1", "--", "true"], "unknown kernel 6.1"),
        (["--kernel"], "--kernel needs a value"),
        (["--timeout", "soon", "--", "true"], "--timeout takes whole seconds, not soon"),
        (["--memory", "lots", "--", "true"], "--memory takes a size such as 512M or 2G"),
        (["--output", "/no/such", "--", "true"], "--output /no/such is not a directory"),
        (["--"], "no command"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_misuse_is_one_line(words: list[str], message: str) -> None:
    result = lab(*words)
    assert result.returncode == LAB_FAILED
    assert result.stderr.startswith(f"lab: {message}")
    assert result.stderr.count("\n") == 1


def test_unreachable_mirror_is_named(machine_without_mirror: dict[str, str]) -> None:
    result = lab("--", "true", env=machine_without_mirror)
    assert result.returncode == LAB_FAILED
    *_, last = result.stderr.splitlines()
    assert last.startswith(
        "lab: no mirror in reach: Debian forky could not be read from http://mirror.invalid"
    )


def test_too_much_memory_is_no_space() -> None:
    result = lab("--memory", "9000000G", "--", "true")
    assert result.returncode == LAB_FAILED
    assert result.stderr.startswith("lab: no space: a kernel with 9000000G needs ")


def test_kernel_that_does_not_boot_is_reported() -> None:
    # Too small for its own tables: it panics before it starts anything.
    result = lab("--memory", "4M", "--", "true")
    assert result.returncode == LAB_FAILED
    assert result.stderr.startswith("lab: the rekey kernel does not boot: ")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def damaged_cache(tmp_path: Path) -> Path:
    """What a killed download and a cut file leave: a kernel that looks complete, and is not."""
    intact = Path(subprocess.check_output([LAB / "build-kernel", "norekey"], text=True).strip())
    cache = tmp_path / "cache"
    shutil.copytree(intact, cache / "norekey", copy_function=os.link)
    kernel = cache / "norekey" / "linux"
    kernel.unlink()  # or the intact one would be cut as well
    kernel.write_bytes((intact / "linux").read_bytes()[:100_000])
    return cache


def test_damaged_cache_is_not_used(
    damaged_cache: Path, machine_without_mirror: dict[str, str]
) -> None:
    result = lab("--kernel", "norekey", "--", "true", env=machine_without_mirror)
    assert result.returncode == LAB_FAILED
    assert "no mirror in reach" in result.stderr


def test_cache_repairs_itself(damaged_cache: Path) -> None:
    env = {"KTLS_LAB_CACHE": str(damaged_cache)}
    build = subprocess.Popen(
        [LAB / "build-kernel", "norekey"],
        env=os.environ | env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while not list(damaged_cache.glob(".building-norekey.*/sources.list")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    result = lab("--kernel", "norekey", "--", "uname", "-s", env=env)
    assert (result.returncode, result.stdout) == (0, "Linux\n"), result.stderr
    assert not list(damaged_cache.glob(".building-*"))


def test_command_ends_when_nobody_reads_any_more() -> None:
    with subprocess.Popen([RUN, "--timeout", "40", "--", "yes"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait() == 128 + signal.SIGPIPE


def test_peers_run_here_and_in_the_lab() -> None:
    lines = subprocess.check_output([LAB / "peers"], text=True).splitlines()
    peers = dict(line.split("=", 1) for line in lines)
    assert list(peers) == ["openssl", "curl", "gnutls-cli", "gnutls-serv", "strace"]
    [directory] = {str(Path(path).parent) for path in peers.values()}
    script = "openssl version && curl --version && gnutls-cli --version && gnutls-serv --version"
    path = f"{directory}:{os.environ['PATH']}"
    here = subprocess.check_output(["sh", "-c", script], text=True, env=os.environ | {"PATH": path})
    assert lab("--", "sh", "-c", script, env={"PATH": path}).stdout == here
