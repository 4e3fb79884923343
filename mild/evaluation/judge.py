"""Pairs judged by a model that sees pictures, at any endpoint that speaks OpenAI's chat completions (section G.6).

The paper asks GPT-4o for four scores from 1 to 10, whose mean is the overall one, and whether the removal succeeded.
Here each pair is asked for twice, once with the original first and once with the edited picture first, since such
models favour positions.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dataset_tools.errors import UserError, one_line
from dataset_tools.settings import digest_of
from mild.evaluation.page import opened
from mild.evaluation.pairs import Opinion, Pair, PairsSettings, blind_png, read_pair

if TYPE_CHECKING:
    from openai import AsyncOpenAI

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
LOCK = "judge.lock"
ANSWERS = "answers.sqlite"
"""In `mild.evaluation.pairs.folder_beside`."""
HOPELESS = 5
"""So many pairs set aside before any was answered: the endpoint cannot do it."""

Order = Literal["original first", "edited first"]

LONGEST_SIDE = 1024
"""Pixels; larger pictures are shrunk to it before they are sent."""
INSTRUCTIONS = """\
You judge how well people were erased from a photograph. You are given two pictures: the original picture, in which \
the people are still present, and the edited picture, from which people were erased and whose holes were filled in. \
Compare them side by side. Judge the edited picture alone, not the quality of the original; there is no ground truth. \
The order in which the two pictures are shown means nothing.

Give four integer scores from 1 (worst) to 10 (best):
- naturalness: whether the filled region appears visually plausible and free from obvious artifacts.
- semantic_consistency: whether the filled content aligns semantically with the surrounding scene.
- visual_harmony: whether lighting, textures and shadows in the edited region are consistent with the rest of the image.
- artifact_suppression: whether the result avoids seams, blurs, distortions and other visual artifacts.

And say whether the removal is a success: true only if the result is seamless, contextually appropriate and free of \
noticeable flaws."""
LABELS = {"original": "The original picture:", "edited": "The edited picture:"}


class Verdict(BaseModel):
    """What the model is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    naturalness: int = Field(ge=1, le=10)
    semantic_consistency: int = Field(ge=1, le=10)
    visual_harmony: int = Field(ge=1, le=10)
    artifact_suppression: int = Field(ge=1, le=10)
    success: bool

    @property
    def overall(self) -> float:
        """Mean of the four scores."""
        scores = (self.naturalness, self.semantic_consistency, self.visual_harmony, self.artifact_suppression)
        return sum(scores) / len(scores)


RESPONSE_FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "strict": True, "schema": Verdict.model_json_schema()},
}
PROMPT = digest_of([INSTRUCTIONS, LABELS, RESPONSE_FORMAT, LONGEST_SIDE])
"""Version of all that is asked: answers to another prompt are never taken for answers to this one."""


class JudgeSettings(PairsSettings):
    """Which model judges, where, and for how much. Its key, where it needs one, is the environment variable
    ``OPENAI_API_KEY``."""

    model: str = Field(min_length=1)
    """By the endpoint's name for it, such as ``gpt-4o``."""
    url: str = Field(OPENAI, pattern=r"^https?://[^\s/@]+(/\S*)?$")
    """The endpoint; a local server's often ends in ``/v1``, too."""
    temperature: float | None = Field(None, ge=0, le=2)
    """null leaves it to the endpoint; some models refuse any other."""
    concurrency: int = Field(4, ge=1, le=64)
    """Requests at once."""
    timeout: float = Field(120.0, gt=0)
    """Seconds that a request may take."""
    retries: int = Field(5, ge=0)
    """How often a request that failed (too many, server errors, time-outs) is sent again, after the time that the
    endpoint names (Retry-After, two minutes at most) or one that doubles."""
    attempts: int = Field(3, ge=1)
    """How often a pair is asked for until the answer is one; then it is set aside."""
    max_cost: float | None = Field(None, gt=0)
    """US dollars that all answers of this model for this evaluation may cost, earlier runs included; needs prices. A
    request is taken to cost as much as the dearest so far; the very first one is sent alone."""
    input_price: float = Field(0.0, ge=0)
    """US dollars per million tokens of requests, pictures included."""
    output_price: float = Field(0.0, ge=0)
    """US dollars per million tokens of answers."""

    @property
    def judge(self) -> str:
        """As tables name who judges: the model, and where it is asked if not at OpenAI's own endpoint; servers of one's
        own often answer to any name."""
        url = self.url.rstrip("/")
        place = "" if url == OPENAI else f" at {url.partition('://')[2]}"
        return f"{self.model}{place}" + ("" if self.temperature is None else f", temperature {self.temperature:g}")

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """US dollars."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


@dataclass(frozen=True)
class Standing:
    """How far it is."""

    done: int
    """Requests answered, from the cache or now, or set aside."""
    total: int
    sent: int
    """Requests answered now, useless answers included."""
    cost: float
    """US dollars, of all runs."""
    set_aside: tuple[str, ...] = ()
    """Names of pairs with order and reason."""
    at_cap: bool = False
    """Whether it stopped since the next request might have gone beyond ``max_cost``."""


@dataclass
class _Question:
    pair: Pair
    order: Order
    digest: str
    attempts: int = 0


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True)
class _Answer:
    verdict: Verdict | None
    complaint: str
    """What is wrong with an answer without verdict."""
    usage: _Usage | None


def judge(pairs: Sequence[Pair], settings: JudgeSettings, folder: Path, show: Callable[[Standing], None]) -> Standing:
    """Ask for every pair in both orders; what was answered before is not asked again. One at a time asks: two would pay
    twice, each up to the cap.

    Args:
        folder: where answers are kept; made where it is missing.
        show: called after each answer.

    Raises:
        UserError: the endpoint cannot be used (key, model, place, quota), or says nothing of tokens where there is a
            cap. What was answered until then is kept. Or another is at work there.
    """
    if settings.max_cost is not None and not (settings.input_price or settings.output_price):
        raise UserError("max_cost needs the model's prices: set input_price and output_price")
    key = os.environ.get(KEY_VARIABLE)
    if not key and settings.url.rstrip("/") == OPENAI:
        raise UserError(f"{OPENAI} needs a key: put it into the environment variable {KEY_VARIABLE}, or set url")
    with _answers(folder) as answers, _alone(folder):
        return asyncio.run(_Run(pairs, settings, answers, show).all(key or "none"))


def judged(folder: Path) -> dict[str, list[Opinion]]:
    """All that models said of pairs with today's prompt, by judge; pairs with an answer in one order alone are left
    out."""
    if not (folder / ANSWERS).is_file():
        return {}
    verdicts: dict[tuple[str, str], dict[str, Verdict]] = {}
    with _answers(folder) as answers:
        for judge, pair, seen, answer in answers.execute(
            "SELECT judge, pair, seen, answer FROM answers WHERE prompt = ? AND answer IS NOT NULL ORDER BY rowid",
            (PROMPT,),
        ):
            verdicts.setdefault((judge, pair), {})[seen] = Verdict.model_validate_json(answer)
    opinions: dict[str, list[Opinion]] = {}
    for (judge, pair), found in verdicts.items():
        if len(found) == len(get_args(Order)):
            said = opinions.setdefault(judge, [])
            said += [Opinion(pair, seen, verdict.overall, verdict.success) for seen, verdict in found.items()]
    return opinions


class _Run:
    """One round of questions."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        settings: JudgeSettings,
        answers: sqlite3.Connection,
        show: Callable[[Standing], None],
    ) -> None:
        self._settings, self._answers, self._show = settings, answers, show
        asked = {
            (digest := digest_of([settings.judge, PROMPT, pair.digest, order])): _Question(pair, order, digest)
            for pair in pairs
            for order in get_args(Order)
        }
        known = {row[0] for row in answers.execute("SELECT digest FROM answers WHERE answer IS NOT NULL")}
        self._waiting = deque(question for digest, question in asked.items() if digest not in known)
        self._total, self._done = len(asked), len(asked) - len(self._waiting)
        paid = [
            settings.cost(*tokens)
            for tokens in answers.execute(
                "SELECT input_tokens, output_tokens FROM answers WHERE judge = ?", (settings.judge,)
            )
        ]
        self._cost, self._dearest = sum(paid), max(paid, default=None)
        self._sent = 0
        self._aside: list[str] = []
        self._failure: UserError | None = None

    async def all(self, key: str) -> Standing:
        """Ask until nothing waits or nothing may be sent."""
        from openai import AsyncOpenAI

        settings = self._settings
        running: dict[asyncio.Task[_Answer], _Question] = {}
        async with AsyncOpenAI(
            api_key=key, base_url=settings.url, timeout=settings.timeout, max_retries=settings.retries
        ) as client:
            try:
                while self._waiting or running:
                    while self._waiting and len(running) < settings.concurrency and self._affordable(len(running)):
                        question = self._waiting.popleft()
                        running[asyncio.create_task(_ask(client, settings, question))] = question
                    if not running:
                        break
                    ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        self._take(running.pop(task), task)
                        self._show(self._standing())
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
        if self._failure is not None:
            raise self._failure
        return self._standing(at_cap=bool(self._waiting))

    def _affordable(self, running: int) -> bool:
        """Whether one more request stays below the cap, whatever those that are running come to."""
        if self._settings.max_cost is None:
            return True
        if self._dearest is None:
            return running == 0
        return self._cost + (running + 1) * self._dearest <= self._settings.max_cost

    def _take(self, question: _Question, task: asyncio.Task[_Answer]) -> None:
        import openai

        question.attempts += 1
        try:
            answer = task.result()
        except (openai.BadRequestError, openai.UnprocessableEntityError, openai.APITimeoutError) as error:
            self._set_aside(question, one_line(error))
        except openai.APIError as error:
            self._stop(f"{self._settings.url}: {_why(error, self._settings.model)}")
        except UserError as error:
            self._stop(str(error))
        else:
            self._keep(question, answer)

    def _keep(self, question: _Question, answer: _Answer) -> None:
        settings = self._settings
        tokens = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else (0, 0)
        text = answer.verdict.model_dump_json() if answer.verdict else None
        with self._answers:
            self._answers.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(question.digest, settings.judge, PROMPT, question.pair.digest, question.order),
                    *(text, *tokens),
                ),
            )
        cost = settings.cost(*tokens)
        self._sent += 1
        self._cost += cost
        self._dearest = max(cost, self._dearest or 0.0)
        if settings.max_cost is not None and answer.usage is None:
            self._stop(
                f"{settings.url} does not say how many tokens it used: the cap cannot be kept; leave max_cost out"
            )
        if answer.verdict is not None:
            self._done += 1
        elif question.attempts < settings.attempts:
            self._waiting.append(question)
        else:
            self._set_aside(question, answer.complaint)

    def _set_aside(self, question: _Question, reason: str) -> None:
        self._done += 1
        self._aside.append(f"{question.pair.name}, {question.order}: {reason}")
        if len(self._aside) == self._done >= HOPELESS:
            self._stop(f"{self._settings.url}: no answer could be used, the last of them: {reason}")

    def _stop(self, why: str) -> None:
        """Send nothing more; what runs is waited for, since it may have to be paid."""
        self._failure = self._failure or UserError(why)
        self._waiting.clear()

    def _standing(self, at_cap: bool = False) -> Standing:
        return Standing(self._done, self._total, self._sent, self._cost, tuple(self._aside), at_cap)


async def _ask(client: AsyncOpenAI, settings: JudgeSettings, question: _Question) -> _Answer:
    """One request. Raises what the client raises when its retries are used up."""
    from openai import omit

    before, result = await asyncio.to_thread(read_pair, question.pair)
    shown = [("original", before), ("edited", result)]
    if question.order == "edited first":
        shown.reverse()
    content: list[Any] = []
    for label, picture in shown:
        png = await asyncio.to_thread(blind_png, picture, LONGEST_SIDE)
        url = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        content.append({"type": "text", "text": LABELS[label]})
        content.append({"type": "image_url", "image_url": {"url": url, "detail": "high"}})
    # Not parsed by the client, which takes whatever comes for a completion.
    response = await client.chat.completions.with_raw_response.create(
        model=settings.model,
        messages=[{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": content}],
        response_format=RESPONSE_FORMAT,
        temperature=omit if settings.temperature is None else settings.temperature,
    )
    return _read(response.http_response.content)


def _read(data: bytes) -> _Answer:
    """The body of a response."""
    try:
        completion = _Completion.model_validate_json(data)
    except ValidationError:
        return _Answer(None, "it did not answer with a chat completion", None)
    message = completion.choices[0].message
    if message.refusal:
        return _Answer(None, f"it refused: {' '.join(message.refusal.split())[:200]}", completion.usage)
    try:
        verdict = Verdict.model_validate_json(message.content or "", strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        wrong = f"the answer is not as asked for: {where + ': ' if where else ''}{first['msg']}"
        return _Answer(None, wrong, completion.usage)
    return _Answer(verdict, "", completion.usage)


def _why(error: Any, model: str) -> str:
    """Why nothing more can be sent, and what to do."""
    import openai

    if isinstance(error, openai.AuthenticationError):
        # What the endpoint says may repeat a part of the key.
        return f"it does not accept the key in the environment variable {KEY_VARIABLE}"
    if isinstance(error, openai.NotFoundError):
        return f"it knows no model {model!r} here: {one_line(error)}"
    if isinstance(error, openai.APIConnectionError):
        return f"it cannot be reached ({one_line(error.__cause__ or error)}); what was answered is kept"
    return f"{one_line(error)}; what was answered is kept, and the same command goes on from there"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs from asking. The lock is the kernel's, and ends with the process."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise UserError(f"another mild judge is at work on {folder}: wait for it, or end it") from None


def _answers(folder: Path) -> contextlib.AbstractContextManager[sqlite3.Connection]:
    """Every answer that came, a row each; ``answer`` is NULL where it was of no use, but had to be paid."""
    columns = "digest TEXT, judge TEXT, prompt TEXT, pair TEXT, seen TEXT, answer TEXT"
    return opened(folder / ANSWERS, f"answers ({columns}, input_tokens INTEGER, output_tokens INTEGER)")
