"""Texts with placeholders such as ``{key}``, which settings hold; all other braces stand for themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping

PLACEHOLDER = re.compile(r"\{([a-z]+)\}")


def checked(text: str, known: tuple[str, ...]) -> str:
    """``text``, all of whose placeholders are among the ``known``.

    Raises:
        ValueError: one is not.
    """
    for name in PLACEHOLDER.findall(text):
        if name not in known:
            raise ValueError(f"{text!r} holds {{{name}}}; there is {', '.join(f'{{{one}}}' for one in known)}")
    return text


def filled(text: str, values: Mapping[str, str]) -> str:
    """``text`` with a value for each placeholder."""
    return PLACEHOLDER.sub(lambda found: values[found[1]], text)
