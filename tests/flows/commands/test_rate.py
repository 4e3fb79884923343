from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

Command = Callable[..., tuple[int, str, str]]
MakeEvaluation = Callable[..., Path]


def test_the_table_is_printed_without_serving(mild_anew: Command, make_evaluation: MakeEvaluation) -> None:
    code, out, err = mild_anew("rate", make_evaluation(), "--table")
    assert (code, err) == (0, "")
    assert "TELEA" in out and "Nobody has judged these pairs yet." in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.md", "my own notes", "holds something else than opinions (table.md)"),
        ("ratings.sqlite", "no database " * 100, "ratings.sqlite cannot be opened (file is not a database)"),
        ("", "", "cannot be a folder of opinions: File exists"),
    ],
)
def test_where_opinions_cannot_lie_is_said_in_one_line(
    mild_anew: Command, make_evaluation: MakeEvaluation, name: str, content: str, message: str
) -> None:
    evaluation = make_evaluation()
    place = evaluation.with_name(f"{evaluation.name}-judged")
    if name:
        place.mkdir()
        (place / name).write_text(content)
    else:
        place.touch()
    code, _, err = mild_anew("rate", evaluation, "--table")
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not name or (place / name).read_text() == content


def test_a_port_that_is_taken_is_one_line(mild_anew: Command, make_evaluation: MakeEvaluation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = mild_anew("rate", make_evaluation(), "--port", taken.getsockname()[1])
    assert code == 2 and "name another with --port" in err


@pytest.mark.process
@pytest.mark.slow
def test_ctrl_c_ends_the_page_with_the_table(make_evaluation: MakeEvaluation) -> None:
    command = [sys.executable, "-m", "flows.cli", "rate", str(make_evaluation()), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as page:
        assert page.stdout is not None
        address = page.stdout.readline().split()[2]
        with urlopen(address) as answer:
            assert b"How well were people erased?" in answer.read()
        page.send_signal(signal.SIGINT)
        out, err = page.communicate()
    assert (page.returncode, err) == (0, "")
    assert "Nobody has judged these pairs yet." in out
