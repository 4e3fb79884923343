"""Names on Prefect's pages."""

from __future__ import annotations

import pytest
from prefect.client.schemas.actions import ArtifactCreate

from flows.names import artifact_key, short_name


@pytest.mark.parametrize(
    ("place", "short"),
    [
        ("/data/build/sample", "build/sample"),
        ("/sample", "sample"),
        ("s3://bucket/sample", "bucket/sample"),
        ("s3://bucket/sets/2026/sample", "2026/sample"),
    ],
)
def test_a_place_is_called_by_its_last_parts(place: str, short: str) -> None:
    assert short_name(place) == short


def test_outputs_of_one_name_have_artifacts_of_their_own_under_keys_that_prefect_takes() -> None:
    places = ("/one/build/sample", "/two/build/sample", "s3://build/sample", "/one/build/Sample", "/Bilder/Größe 2")
    keys = {artifact_key("dataset-shards", place) for place in places}
    assert len(keys) == len(places)
    for key in keys:
        ArtifactCreate(key=key)
