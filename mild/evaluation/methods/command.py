"""Any program that fills holes, for methods that do not stand here, or must not (their licence).

The program is started once a picture, without a shell, with the environment of the evaluation. Its working folder is a
fresh one that vanishes afterwards, so paths among its words have to be absolute. There it finds

============== ====================================================================================
``image.png``  the picture, 8-bit RGB, person included
``mask.png``   8-bit grey of the same size: 255 where it is to fill, 0 elsewhere
``prompt.txt`` the prompt, UTF-8, without a line break at its end; may be empty
============== ====================================================================================

and there it leaves ``result.png``: a picture of the same size (PNG, JPEG, WEBP, TIFF, BMP or GIF, whatever its name
says). Exit code 0 with a readable result means done. After anything else this picture has failed, and the reason is the
exit code with the last line of stderr; stdout is not looked at, stdin is empty. What is still running of its process
group when it ends, or when its time is up, is killed.

The same on one page, for who writes such a program: ``docs/command-contract.md``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field

from dataset_tools.errors import Rejected, UserError
from dataset_tools.schema import encode_png
from dataset_tools.settings import digest_of
from mild.evaluation.methods import Case, MethodSettings, PassingFault, Setup, keep_outside
from mild.evaluation.methods.folder import read_result
from mild.evaluation.methods.placeholders import checked, filled

IMAGE, MASK, PROMPT, RESULT = "image.png", "mask.png", "prompt.txt", "result.png"
_PLACEHOLDERS = ("image", "mask", "prompt", "result", "folder", "seed")
_LINE = 300
"""Characters of stderr's last line that are told."""


class CommandMethod(MethodSettings):
    """A program. The module says what it is given and what it has to leave."""

    kind: Literal["command"] = "command"
    warms_up: ClassVar[bool] = False
    batch_size: Literal[1] = 1
    """It is started for each picture by itself."""
    command: tuple[Annotated[str, AfterValidator(lambda word: checked(word, _PLACEHOLDERS))], ...] = Field(min_length=1)
    """The program, by name or path, and its arguments. ``{image}``, ``{mask}``, ``{prompt}`` and ``{result}`` become
    the absolute paths of the files, ``{folder}`` that of the working folder, ``{seed}`` a whole number that is to
    decide all randomness."""
    version: str = ""
    """Of the program, in any words: raise it when the program or its weights changed, and its results are made anew."""
    prompt: Annotated[str, AfterValidator(lambda text: checked(text, ("categories",)))] | None = None
    """What ``prompt.txt`` says, such as ``remove the {categories}``: names of what is to vanish, each once. Null: the
    prompt of the evaluation."""
    time_limit: float = Field(600, gt=0)
    """Seconds a picture."""
    label: str = ""
    """What tables and figures call it; empty: its name."""
    keep_outside: bool = True
    """Whether the pixels outside the hole are put back, as those of all methods are; without, the metrics of what
    changed there judge the results as they came."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return (self.label or self.name) + ("" if self.keep_outside else ", outside the hole as it came")

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        if shutil.which(self.command[0]) is None:
            return f"program {self.command[0]} is not found: install it, or name it by its path"
        return None

    def weights(self, setup: Setup) -> dict[str, str]:
        """None that are known; ``version`` stands for them in `fingerprint`."""
        return {}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.decisive("label")
        return digest_of([1, settings, setup.prompt if self.prompt is None else ""])

    def open(self, setup: Setup) -> CommandEraser:
        """See `MethodSettings.open`; nothing has to be loaded."""
        if missing := self.missing(setup):
            raise UserError(f"{self.name}: {missing}")
        return CommandEraser(self, setup.prompt)


class CommandEraser:
    """Starts the program."""

    def __init__(self, settings: CommandMethod, prompt: str) -> None:
        self._settings, self._prompt = settings, prompt

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Fill the holes. With ``keep_outside`` off, pixels outside the hole may differ from the image.

        See `mild.evaluation.methods.Eraser.erase`.
        """
        return [self._erased(case, seed) for case, seed in zip(cases, seeds, strict=True)]

    def _erased(self, case: Case, seed: int) -> np.ndarray:
        prompt = self._prompt_of(case)
        # What it left running and was killed may still hold files.
        with tempfile.TemporaryDirectory(prefix="mild-command-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            (folder / IMAGE).write_bytes(encode_png(case.image))
            (folder / MASK).write_bytes(encode_png(case.hole.astype(np.uint8) * 255))
            (folder / PROMPT).write_text(prompt, encoding="utf-8", newline="")
            files = {"image": IMAGE, "mask": MASK, "prompt": PROMPT, "result": RESULT}
            values = {what: str(folder / file) for what, file in files.items()} | {"folder": name, "seed": str(seed)}
            _run([filled(word, values) for word in self._settings.command], folder, self._settings.time_limit)
            try:
                result = read_result(folder / RESULT, case.hole.shape)
            except Rejected as error:
                raise UserError(f"{self._settings.command[0]}: {RESULT}: {error.message}") from None
        return keep_outside(result, case) if self._settings.keep_outside else result

    def _prompt_of(self, case: Case) -> str:
        if self._settings.prompt is None:
            return self._prompt
        if "{categories}" in self._settings.prompt and not case.categories:
            raise UserError("prompt names {categories}, but it is not known what is to vanish from this picture")
        names = dict.fromkeys(category.lower() for category in case.categories)
        return filled(self._settings.prompt, {"categories": " and ".join(names)})


def _run(command: list[str], folder: Path, time_limit: float) -> None:
    """Run a program in a folder until it ends, and nothing of it any longer.

    Raises:
        PassingFault: it cannot be started, ended with another exit code than 0, or took too long.
    """
    # A path that is relative is so to our working folder, and not to the program's.
    program = os.path.abspath(shutil.which(command[0]) or command[0])
    # A file: a pipe would stay open as long as anything that the program started.
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                [program, *command[1:]],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                process_group=0,
            )
        except OSError as error:
            raise PassingFault(f"{command[0]} cannot be started: {error.strerror}") from None
        try:
            code = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            raise PassingFault(f"{command[0]} was killed after {time_limit:g} s, its time_limit") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise PassingFault(f"{command[0]} {how}: {_last_line(stderr)}")


def _last_line(stream: IO[bytes]) -> str:
    """Of a file that is text, as a rule."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 16 * _LINE))
    lines = [line.strip() for line in stream.read().decode("utf-8", errors="replace").splitlines()]
    return next((line[:_LINE] for line in reversed(lines) if line), "without a word on stderr")
