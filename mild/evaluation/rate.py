"""A page on which people rate pairs without knowing who made them (section G.6): one score from 1 to 10, and success.

Each rater gets all pairs in an order of their own. Pairs whose pictures are equal are rated once, for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dataset_tools.errors import UserError
from mild.evaluation.page import PICTURE_HEADERS, Name, PageSettings, local_page, opened
from mild.evaluation.pairs import Opinion, Pair, PairsSettings, blind_png, read_pair
from mild.seeds import derived_seed

if TYPE_CHECKING:
    from fastapi import FastAPI

RATINGS = "ratings.sqlite"
"""In `mild.evaluation.pairs.folder_beside`."""
TABLE = (
    "ratings (number INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT, pair TEXT, "
    "score INTEGER, success INTEGER, UNIQUE (rater, pair))"
)
PAGE = Path(__file__).with_suffix(".html")
AHEAD = 2
"""Pairs that the page knows of at once, so that the next one is there when it is wanted."""


class RateSettings(PairsSettings, PageSettings):
    """Who rates, and where the page is served."""

    raters: tuple[Name, ...] = ()
    """Names to choose from; empty: everybody enters their own."""


class Rating(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rater: Name
    item: str
    """Digest of the pair."""
    score: int = Field(ge=1, le=10)
    success: bool


class Undo(BaseModel):
    """The rater's last rating is taken back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rater: Name


def rating_page(pairs: Sequence[Pair], settings: RateSettings, folder: Path) -> FastAPI:
    """The application that serves the page, its pictures, and keeps the ratings.

    ``GET /raters`` the names to choose from; ``GET /standing?rater=`` how far a rater is and
    what comes next; ``PUT /rating`` keeps a rating and ``POST /undo`` takes the last one back, both give the
    standing after it; ``GET /pictures/ITEM/before.png`` and ``.../edited.png`` are the pictures. None of it names a
    method, a picture's key or a file.

    Args:
        folder: where ratings are kept; made where it is missing.
    """
    from fastapi import HTTPException, Response

    items = {pair.digest: pair for pair in pairs}
    with opened(folder / RATINGS, TABLE):
        pass
    app = local_page(PAGE, settings)

    def standing(rater: str) -> dict[str, Any]:
        if settings.raters and rater not in settings.raters:
            raise HTTPException(403, "this name is none of the raters")
        order = sorted(items, key=lambda item: derived_seed(settings.seed, "order", rater, item))
        with opened(folder / RATINGS, TABLE) as ratings:
            rated = {row[0] for row in ratings.execute("SELECT pair FROM ratings WHERE rater = ?", (rater,))}
        waiting = [item for item in order if item not in rated]
        return {"done": len(order) - len(waiting), "total": len(order), "waiting": waiting[:AHEAD]}

    @app.get("/raters")
    def names() -> list[str]:
        return list(settings.raters)

    @app.get("/standing")
    def how_far(rater: Name) -> dict[str, Any]:
        return standing(rater)

    @app.put("/rating")
    def rate(rating: Rating) -> dict[str, Any]:
        if rating.item not in items:
            raise HTTPException(404, "this pair is none of these; load the page again")
        standing(rating.rater)
        with opened(folder / RATINGS, TABLE) as ratings, ratings:
            ratings.execute(
                "INSERT OR REPLACE INTO ratings (rater, pair, score, success) VALUES (?, ?, ?, ?)",
                (rating.rater, rating.item, rating.score, rating.success),
            )
        return standing(rating.rater)

    @app.post("/undo")
    def undo(undone: Undo) -> dict[str, Any]:
        found = standing(undone.rater)
        with opened(folder / RATINGS, TABLE) as ratings, ratings:
            rows = ratings.execute("SELECT pair FROM ratings WHERE rater = ? ORDER BY number DESC", (undone.rater,))
            last = next((row[0] for row in rows.fetchall() if row[0] in items), None)
            if last is None:
                return found
            ratings.execute("DELETE FROM ratings WHERE rater = ? AND pair = ?", (undone.rater, last))
        found = standing(undone.rater)
        # That pair next, wherever it stands in the order.
        return {**found, "waiting": [last, *(item for item in found["waiting"] if item != last)][:AHEAD]}

    @app.get("/pictures/{item}/{which}.png")
    def picture(item: str, which: Literal["before", "edited"]) -> Response:
        if item not in items:
            raise HTTPException(404, "there is no such picture")
        try:
            before, edited = read_pair(items[item])
            shown = blind_png(before if which == "before" else edited)
        except UserError:
            raise HTTPException(410, "the evaluation has changed; start mild rate again") from None
        return Response(shown, media_type="image/png", headers=PICTURE_HEADERS)

    return app


def rated(folder: Path) -> list[Opinion]:
    """All ratings of people."""
    if not (folder / RATINGS).is_file():
        return []
    with opened(folder / RATINGS, TABLE) as ratings:
        rows = ratings.execute("SELECT pair, rater, score, success FROM ratings ORDER BY number").fetchall()
    return [Opinion(pair, rater, float(score), bool(success)) for pair, rater, score, success in rows]
