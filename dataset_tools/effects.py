"""Effects of people: what a picture shows of them outside of themselves, their shadows and reflections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataset_tools.estimators import CleanPlate
from dataset_tools.schema import Person


def effects_of_people(plate: CleanPlate, people: Sequence[Person]) -> list[np.ndarray] | None:
    """Where the picture shows the effects of each person, (H, W) bool; None where the plate's provider knows nothing.

    Also sets `Person.effects` to the kinds that the provider knows.
    """
    if plate.effects is None:
        return None
    nothing = np.zeros(plate.background.shape[:2], bool)
    for person in people:
        person.effects = plate.kinds.get(person.id, ())
    return [plate.effects.get(person.id, nothing) for person in people]
