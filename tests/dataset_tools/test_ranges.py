"""Parts of files over HTTP: never more than is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dataset_tools.ranges import NoRanges, read_range

SIZE = 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False])
def test_of_a_large_file_only_the_part_crosses_the_wire(
    serve_files: Callable[..., Any], tmp_path: Path, ranges: bool
) -> None:
    """Where the server knows no ranges, nothing is read but what the socket held."""
    (tmp_path / "large").write_bytes(os.urandom(SIZE))
    server = serve_files(tmp_path, ranges=ranges)
    filesystem, path = fsspec.url_to_fs(f"{server.url}/large")
    if ranges:
        with (tmp_path / "large").open("rb") as file:
            file.seek(SIZE // 2)
            assert read_range(filesystem, path, SIZE // 2, SIZE // 2 + 1000) == file.read(1000)
        assert read_range(filesystem, path, SIZE - 5, SIZE + 5) == (tmp_path / "large").read_bytes()[-5:]
        assert read_range(filesystem, path, SIZE + 5, SIZE + 9) == b""
        assert server.sent < 2000
    else:
        with pytest.raises(NoRanges, match="ignores range requests"):
            read_range(filesystem, path, SIZE // 2, SIZE // 2 + 1000)
        assert server.sent < SIZE // 2
