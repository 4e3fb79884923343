from __future__ import annotations

import numpy as np
import pytest

from dataset_tools.errors import UserError
from mild.evaluation.methods import Case, keep_outside


def test_unusable_input_is_named(case: Case) -> None:
    image, masks = case.image, case.masks
    for bad_image, bad_masks, named in [
        (image, masks[:, :-1], "masks are bool of shape"),
        (image, masks[0], "masks are bool of shape"),
        (image, masks.astype(np.uint8), "masks are uint8"),
        (image[..., 0], masks, "image is uint8 of shape"),
        (image / 255.0, masks, "image is float64"),
    ]:
        with pytest.raises(UserError, match=named):
            Case(bad_image, bad_masks)


def test_the_hole_is_where_anybody_is_to_vanish(case: Case) -> None:
    assert np.array_equal(case.hole, case.masks[0] | case.masks[1])
    kept = keep_outside(255 - case.image, case)
    assert np.array_equal(kept[~case.hole], case.image[~case.hole])
    assert np.array_equal(kept[case.hole], 255 - case.image[case.hole])
