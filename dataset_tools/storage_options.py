"""Storage options of fsspec and URLs in settings: they may name secrets, and never hold them.

Settings travel: they are parameters of flows on Prefect's server, and stand in manifests and on cards. A secret is
therefore named, and looked up where a file system is opened, in the process that opens it:

    root_options:
      key: {env: BUCKET_KEY}              # an environment variable
      secret: {block: secret/my-bucket}   # a Secret block of Prefect's server; in flows
      client_kwargs: {headers: {Authorization: {env: MIRROR_AUTHORIZATION}}}

What was looked up is taken out of every message by `scrub`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from urllib.parse import quote, quote_plus

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from dataset_tools.errors import UserError
from dataset_tools.settings import Settings
from dataset_tools.storage import normal_place

KEPT_SECONDS = 60.0
"""For how long a looked-up block is used again: pictures are many, and each opens its file system."""
HIDDEN = "***"


class FromEnvironment(Settings):
    """A value that an environment variable holds."""

    env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the variable."""


class FromBlock(Settings):
    """A value that a Secret block of Prefect's server holds."""

    block: str = Field(pattern=r"^secret/[a-z0-9-]+$")
    """Type and name of the block, such as ``secret/my-bucket``. It may hold a text, or any JSON."""


_REFERENCES: dict[str, type[Settings]] = {"env": FromEnvironment, "block": FromBlock}

_STEMS = (
    "accesskey", "accountkey", "apikey", "authorization", "connectionstring", "connstr", "cookie", "credential",
    "passphrase", "passwd", "password", "privatekey", "secret", "token",
)  # fmt: skip
"""Names that hold one of these are of secrets, however they are written."""
_WORDS = {
    "auth", "authentication", "bearer", "creds", "dsn", "jwt", "key", "keys", "pass", "pat", "pwd", "sas", "sig",
    "signature",
}  # fmt: skip
"""And names one of whose words is one of these."""
_HARMLESS_ENDINGS = {"expiry", "method", "style", "timeout", "ttl", "type", "version"}
"""Last words of names that only speak about a secret, such as ``signature_version``."""
_HARMLESS_HEADERS = {"accept", "accept-encoding", "accept-language", "cache-control", "origin", "referer", "user-agent"}
"""Any other header may be what opens a server."""
_HARMLESS_TOKENS = {"anon", "browser", "cache", "cloud", "google_default"}
"""gcsfs takes ways to find a token as ``token``."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

_PASSWORD_IN_URL = re.compile(r"(?<=://)(?:[^/?#\s]*:[^/?#\s]*|[^:/?#\s]*:(?!\d+(?:[/?#]|$))[^\s@]*)@")
"""Also where it holds what a URL would quote; a port is no password."""
_USER_OF_HTTP = re.compile(r"(https?://)[^/?#\s]*@")
"""Tokens stand there."""
_PARAMETER = re.compile(r"(?<=[?&;])([^=?&;#\s]+)=([^&;#\s'\"]+)")
_SCHEME = re.compile(r"\b(Bearer|Basic|Digest|Token|ApiKey)\s+(?=\S*[0-9+/=_~-])[A-Za-z0-9+/=._~-]{6,}", re.IGNORECASE)
_PAIR = re.compile(r"\b(AccountKey|SharedAccessKey|SharedAccessSignature|Password|Pwd)=[^;\s]+", re.IGNORECASE)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL)


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    for place, reference in _references(options):
        kind, name = next(iter(reference.items()))
        try:
            _REFERENCES[kind].model_validate({kind: name})
        except ValidationError:
            example = "{env: NAME_OF_A_VARIABLE}" if kind == "env" else "{block: secret/NAME}"
            raise _refusal(f"{_dotted(place)!r} is not the name of what holds the value; write {example}") from None
    for place in _plain_secrets(options, (), False):
        raise _refusal(
            f"{_dotted(place)!r} would hold a secret in plain text, and settings are stored and shown; write "
            "{env: NAME_OF_A_VARIABLE} or {block: secret/NAME} in place of its value"
        )
    return options


def is_secret_url(location: str) -> bool:
    """Whether it is a URL that carries a password, token or signature."""
    return "://" in location and _holds_secret(location)


def _check_location(location: str) -> str:
    if is_secret_url(location):
        raise _refusal(
            "the URL carries a password, token or signature, and settings are stored and shown; take it out and give "
            "it in the storage options, such as client_kwargs: {headers: {Authorization: {env: NAME_OF_A_VARIABLE}}}"
        )
    return normal_place(location)


def public_place(location: str, what: str) -> str:
    """`normal_place` of a flow's parameter, which Prefect stores and shows.

    Args:
        what: it is the place of, for messages.

    Raises:
        UserError: as `normal_place`; or there is a secret in it.
    """
    if is_secret_url(location):
        raise UserError(
            f"{what}: {scrub(location)} carries a password, token or signature, which would be stored and shown; take "
            "it out and give it as the library of that filesystem reads it, in its environment variables or "
            "configuration file"
        )
    return normal_place(location)


StorageOptions = Annotated[dict[str, Any], AfterValidator(_check_options)]
"""fsspec storage options as YAML has them; at any depth a value may be ``{env: NAME}`` or ``{block: secret/NAME}``.

Plain values of options whose names speak of secrets are refused, without repeating the value."""
Location = Annotated[str, AfterValidator(_check_location)]
"""A place as `dataset_tools.storage.normal_place` writes it; one with a secret in it is refused."""


def resolved(options: dict[str, Any], where: str) -> dict[str, Any]:
    """Storage options with the values that they name, for a file system that is opened now; never to be stored.

    Args:
        options: as `StorageOptions`.
        where: what the options are called in messages.

    Raises:
        UserError: a variable is not set, or a block cannot be read; the message names it.
    """

    def value_of(value: Any, place: tuple[str, ...]) -> Any:
        if _is_reference(value):
            kind, name = next(iter(value.items()))
            return _looked_up(kind, name, f"{where}: {_dotted(place)}")
        if isinstance(value, dict):
            return {key: value_of(inner, (*place, str(key))) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [value_of(inner, (*place, str(number))) for number, inner in enumerate(value)]
        return value

    return {key: value_of(value, (str(key),)) for key, value in options.items()}


def scrub(text: str) -> str:
    """A message without any value that was looked up in this process, and without what looks like a secret in it."""
    for spelling in sorted(_known, key=len, reverse=True):
        text = text.replace(spelling, HIDDEN)
    text = _USER_OF_HTTP.sub(rf"\1{HIDDEN}@", _PASSWORD_IN_URL.sub(f"{HIDDEN}@", text))
    text = _PARAMETER.sub(lambda m: f"{m[1]}={HIDDEN}" if _is_secret(m[1]) else m[0], text)
    text = _PEM.sub(HIDDEN, _PAIR.sub(rf"\1={HIDDEN}", text))
    return _SCHEME.sub(rf"\1 {HIDDEN}", text)


def register_blocks(read: Callable[[str], Any]) -> None:
    """Say how the value of a block (``secret/NAME``) is read, with `LookupError` where it cannot be: Prefect is not
    known here."""
    _readers["block"] = read


_known: set[str] = set()
"""Every spelling of what was looked up in this process."""
_kept: dict[str, tuple[float, Any]] = {}
"""Block to when it was read (`time.monotonic`), and its value."""


def _read_variable(name: str) -> str:
    if not os.environ.get(name):
        raise LookupError(f"the environment variable {name} is not set")
    return os.environ[name]


def _read_block(name: str) -> Any:
    raise LookupError(f"{name} is a block of Prefect's server, which only flows read: name a variable, {{env: NAME}}")


_readers: dict[str, Callable[[str], Any]] = {"env": _read_variable, "block": _read_block}


def _looked_up(kind: str, name: str, where: str) -> Any:
    moment, value = _kept.get(name, (0.0, None)) if kind == "block" else (0.0, None)
    if value is None or time.monotonic() - moment > KEPT_SECONDS:
        try:
            value = _readers[kind](name)
        except LookupError as error:
            raise UserError(f"{where}: {error.args[0]}") from None
        if kind == "block":
            _kept[name] = (time.monotonic(), value)
    for text in _texts(value):
        # Short words would take half of every message with them, and hide nothing.
        for part in (text, *(part for part in text.split() if len(part) >= 8)):
            if len(part) >= 4:
                _known.update((part, quote(part), quote(part, safe=""), quote_plus(part), repr(part)[1:-1]))
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _REFERENCES


def _references(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if place and _is_reference(value):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _references(inner, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _references(inner, (*place, str(number)))


def _plain_secrets(value: Any, place: tuple[str, ...], secret: bool) -> Iterator[tuple[str, ...]]:
    """Places of plain values that are secrets by their name, or by the name of what holds them, or by their look."""
    if place and _is_reference(value):
        return
    if isinstance(value, dict):
        headers = bool(place) and place[-1].lower() == "headers"
        for key, inner in value.items():
            named = str(key).lower() not in _HARMLESS_HEADERS if headers else _is_secret(str(key))
            yield from _plain_secrets(inner, (*place, str(key)), secret or named)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _plain_secrets(inner, (*place, str(number)), secret)
    elif isinstance(value, str):
        harmless = not value or (place[-1] == "token" and value in _HARMLESS_TOKENS)
        if (secret and not harmless) or _holds_secret(value):
            yield place
    elif secret and value is not None and not isinstance(value, bool):
        yield place


def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _HARMLESS_ENDINGS:
        return False
    return not _WORDS.isdisjoint(words) or any(stem in "".join(words) for stem in _STEMS)


def _holds_secret(text: str) -> bool:
    if any(_is_secret(name) for name, _ in _PARAMETER.findall(text)):
        return True
    return any(pattern.search(text) for pattern in (_PASSWORD_IN_URL, _USER_OF_HTTP, _SCHEME, _PAIR, _PEM))


def _refusal(text: str) -> PydanticCustomError:
    return PydanticCustomError("secret", "{text}", {"text": text})


def _dotted(place: tuple[str, ...]) -> str:
    return ".".join(place)
