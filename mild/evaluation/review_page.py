"""A page on which reviewers pick clean plates without knowing whose they are, each in an order of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from mild.evaluation.page import PICTURE_HEADERS, Name, PageSettings, local_page
from mild.evaluation.pairs import blind_png
from mild.evaluation.review import NONE, Decisions, Review
from mild.seeds import derived_seed

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGE = Path(__file__).with_suffix(".html")


class ReviewPageSettings(PageSettings):
    """Who reviews, and where the page is served."""

    reviewers: tuple[Name, ...] = ()
    """Names to choose from; empty: everybody enters their own."""


class _Sent(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reviewer: Name


class _Decision(_Sent):
    item: str
    """Its id."""
    choice: str
    """sha256 of a proposal; empty for none."""


def review_page(
    review: Review, decisions: Decisions, work: Path, settings: ReviewPageSettings, finish: Callable[[], str]
) -> FastAPI:
    """The application that serves the page, its pictures, and keeps the decisions.

    ``GET /reviewers`` gives the names to choose from; ``GET /standing?reviewer=`` a reviewer's pictures in their order,
    each with its proposals in theirs and the reviewer's own choice; ``PUT /decision`` keeps one, ``POST /undo`` takes
    the last one back; ``GET /outcome`` says what follows of everybody's; ``POST /finish`` calls ``finish``, unless
    anything is undecided; ``GET /pictures/ITEM/SHA256.png`` are the pictures. None of it names a method, a picture's
    key or a file, nor tells one reviewer what another decided.

    Args:
        work: folder that the pictures' files lie below.
        finish: lets what waits for the decisions go on; gives what to tell the reviewer.
    """
    from fastapi import HTTPException, Response

    items = {item.id: item for item in review.items}
    files = {(item.id, shown.sha256): work / shown.file for item in review.items for shown in (item, *item.proposals)}
    app = local_page(PAGE, settings)

    def check(reviewer: str) -> None:
        if settings.reviewers and reviewer not in settings.reviewers:
            raise HTTPException(403, "this name is none of the reviewers")

    def count(reviewer: str) -> dict[str, int]:
        return {"done": len(decisions.of(reviewer).keys() & items.keys()), "total": len(items)}

    @app.get("/reviewers")
    def names() -> list[str]:
        return list(settings.reviewers)

    @app.get("/standing")
    def standing(reviewer: Name) -> dict[str, Any]:
        check(reviewer)
        own = decisions.of(reviewer)

        def shuffled(ids: list[str], *of: str) -> list[str]:
            return sorted(ids, key=lambda one: derived_seed(review.seed, "order", reviewer, *of, one))

        return {
            **count(reviewer),
            "items": [
                {
                    "id": id,
                    "picture": items[id].sha256,
                    "proposals": shuffled([proposal.sha256 for proposal in items[id].proposals], id),
                    "choice": own.get(id),
                }
                for id in shuffled(list(items))
            ],
        }

    @app.put("/decision")
    def decide(sent: _Decision) -> dict[str, Any]:
        check(sent.reviewer)
        item = items.get(sent.item)
        if item is None or sent.choice not in (NONE, *(proposal.sha256 for proposal in item.proposals)):
            raise HTTPException(404, "this picture is none of these; load the page again")
        decisions.decide(sent.reviewer, sent.item, sent.choice)
        return count(sent.reviewer)

    @app.post("/undo")
    def undo(sent: _Sent) -> dict[str, Any]:
        check(sent.reviewer)
        last = next((id for id in reversed(decisions.of(sent.reviewer)) if id in items), None)
        if last is not None:
            decisions.take_back(sent.reviewer, last)
        return {**count(sent.reviewer), "item": last}

    @app.get("/outcome")
    def outcome() -> dict[str, Any]:
        found = decisions.outcome(review)
        return {"complete": found.undecided == 0, "told": found.sentences()}

    @app.post("/finish")
    def go_on(sent: _Sent) -> dict[str, str]:
        check(sent.reviewer)
        if decisions.outcome(review).undecided:
            raise HTTPException(409, "not everything that is needed is decided yet")
        return {"said": finish()}

    @app.get("/pictures/{item}/{sha256}.png")
    def picture(item: str, sha256: str) -> Response:
        if (item, sha256) not in files:
            raise HTTPException(404, "there is no such picture")
        try:
            data = files[item, sha256].read_bytes()
        except OSError:
            data = b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HTTPException(410, "the proposals have changed; start mild review again")
        return Response(blind_png(data), media_type="image/png", headers=PICTURE_HEADERS)

    return app
