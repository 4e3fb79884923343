"""What a server asks of robots: ``robots.txt`` (RFC 9309) and the header ``X-Robots-Tag``.

``urllib.robotparser`` knows neither ``*`` nor ``$`` in paths, nor that the longest rule wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote, urlsplit

MOST_BYTES = 500 * 1024
"""Of a robots.txt that are read (RFC 9309, 2.5)."""
_TOKEN = re.compile(r"[A-Za-z_-]+")
"""What a robot is called (RFC 9309, 2.2.1)."""
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
"""Directives of X-Robots-Tag that hold a colon, as names of robots do."""


class Robots:
    """The rules of a robots.txt for one robot. Anything is a robots.txt: lines that say nothing are passed over.

    Args:
        data: the file's bytes.
        agent: the robot's product token, such as ``mild``.
    """

    def __init__(self, data: bytes, agent: str) -> None:
        groups: dict[str, list[tuple[bool, str]]] = {}
        named: list[str] = []
        ended = True
        for line in data[:MOST_BYTES].decode("utf-8-sig", "replace").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            key, value = key.strip().lower(), value.strip()
            if key == "user-agent":
                # As in logs, such as ``mild/1.0``: what follows the token is no part of it.
                token = match[0].lower() if (match := _TOKEN.match(value)) else value
                named = [token] if ended else [*named, token]
                groups.setdefault(token, [])
                ended = False
            elif key in ("allow", "disallow"):
                ended = True
                for name in named if value else ():
                    groups[name].append((key == "allow", _normal(value)))
        self._rules = groups.get(agent.lower(), groups.get("*", []))

    def allow(self, url: str) -> bool:
        """Whether a URL may be fetched: the longest rule that fits decides, of equal ones the one that allows."""
        parts = urlsplit(url)
        path = _normal((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        fitting = [(len(pattern), allowed) for allowed, pattern in self._rules if _fits(pattern, path)]
        return not fitting or max(fitting)[1] or path == "/robots.txt"


def directives(values: Iterable[str], agent: str) -> set[str]:
    """The directives of ``X-Robots-Tag`` headers that are meant for a robot, in small letters, such as ``noai``.

    A name of a robot, as in ``otherbot: noai, nofollow``, holds for what follows in its header.
    """
    found = set()
    for value in values:
        meant = True
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            # The clock of a date whose comma has parted it is no name.
            if colon and _TOKEN.fullmatch(name.strip()) and name.strip() not in _WITH_VALUE:
                meant, part = name.strip() == agent.lower(), rest
            if meant:
                found.add(part.strip())
    return found


def _normal(path: str) -> str:
    """A path or pattern in which equal things are written alike: what need not be in percent is not, all else is."""

    def mended(match: re.Match[str]) -> str:
        letter = chr(int(match[1], 16))
        return letter if _UNRESERVED.fullmatch(letter) else match[0].upper()

    return re.sub("%([0-9a-fA-F]{2})", mended, quote(path, safe="".join(map(chr, range(33, 127))), errors="replace"))


def _fits(pattern: str, path: str) -> bool:
    """``*`` is anything, ``$`` at the end is the end; in time linear in the path, whatever the pattern."""
    anchored = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if not others:
        return not anchored or path == first
    *between, last = others
    at = len(first)
    for piece in between:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return path.endswith(last) and len(path) - len(last) >= at if anchored else path.find(last, at) >= 0
