"""Standard output and error that are closed, full, gone, or know no letter but the English: no program ends of them."""

import errno
import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from core.config.console import LossyOutput, hold_console, lost

TALKS = """
import logging, sys, warnings
from core.config.exit import exit_plainly
with exit_plainly():
    for _ in range(3):
        print("naïve \\u65e5\\u672c " * 2000)
        print("flushed", flush=True)
        sys.stderr.write("tqdm draws so\\r")
        warnings.warn("mind the gap")
        logging.getLogger("another library").warning("as logging tells it")
    open(sys.argv[1], "w").write("the end")
"""
SHOWS = """
from core.config.exit import exit_plainly
from core.config.help import show
with exit_plainly():
    show("what was asked for")
"""


@contextmanager
def closed_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full_disk() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@contextmanager
def terminal_that_went() -> Iterator[int]:
    controller, terminal = pty.openpty()
    os.close(controller)
    yield terminal
    os.close(terminal)


CONSOLES = {"closed pipe": closed_pipe, "full disk": full_disk, "terminal that went": terminal_that_went}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("console", CONSOLES)
def test_a_program_comes_to_its_end_whatever_its_console_does(tmp_path, console, encoding):
    end = tmp_path / "end"
    with CONSOLES[console]() as descriptor:
        command = [sys.executable, "-X", "dev", "-c", TALKS, str(end)]
        environ = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, stdout=descriptor, stderr=descriptor, env=environ, timeout=60)
    assert done.returncode == 0 and end.read_text() == "the end"


def test_closed_descriptors_receive_no_file_of_the_program(tmp_path):
    end = tmp_path / "end"
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", TALKS, str(end)], timeout=60)
    assert done.returncode == 0 and end.read_text() == "the end"


def test_a_letter_that_the_console_lacks_is_escaped():
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", TALKS, os.devnull], capture_output=True, env=environ, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(rb"na\xefve \u65e5\u672c na")
    assert done.stderr.count(b"mind the gap") == 1


def test_what_a_program_was_called_for_is_not_lost_in_silence():
    codes = {}
    for name, console in CONSOLES.items():
        with console() as descriptor:
            done = subprocess.run([sys.executable, "-c", SHOWS], stdout=descriptor, stderr=subprocess.PIPE, timeout=60)
        codes[name] = done.returncode, done.stderr.decode()
    error = "error: standard output does not take the text: "
    assert codes == {
        "closed pipe": (0, ""),
        "full disk": (2, f"{error}[Errno 28] No space left on device\n"),
        "terminal that went": (2, f"{error}[Errno 5] Input/output error\n"),
    }


def test_a_disk_that_has_room_again_is_told_what_it_missed(tmp_path, monkeypatch):
    room = [10**6]

    def write(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n_bytes = min(room[0], len(data))
        room[0] -= n_bytes
        return write_on(descriptor, data[:n_bytes])

    write_on = os.write
    monkeypatch.setattr(os, "write", write)
    with (tmp_path / "log").open("wb") as file:
        stream = io.TextIOWrapper(io.BufferedWriter(LossyOutput(file.fileno())), line_buffering=True)
        print("first", file=stream)
        room[0] = 4
        print("second", file=stream)  # 7 bytes, of which 3 are lost
        print("third", file=stream)
        assert lost(stream) is not None
        room[0] = 10**6
        print("fourth", file=stream)
        print("fifth", file=stream)
    missing = "[9 bytes are missing here: [Errno 28] No space left on device]"
    assert (tmp_path / "log").read_text() == f"first\nseco\n{missing}\nfourth\nfifth\n"


def test_a_pipe_that_does_not_block_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = "import os, time; time.sleep(0.2); data = b''\nwhile (p := os.read(0, 65536)): data += p\nprint(len(data))"
    with subprocess.Popen([sys.executable, "-c", code], stdin=reader, stdout=subprocess.PIPE) as process:
        os.close(reader)
        output = LossyOutput(writer)
        assert output.write(b"x" * 500_000) == 500_000 and output.error is None
        os.close(writer)
        assert process.communicate(timeout=60)[0] == b"500000\n"


def test_a_stream_in_the_place_of_the_console_is_left_alone(capsys):
    before = sys.stdout, sys.stderr
    hold_console()
    assert (sys.stdout, sys.stderr) == before and lost(sys.stdout) is None
