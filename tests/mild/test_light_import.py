from __future__ import annotations

import subprocess
import sys

import pytest

import mild
from mild.erasing import pipeline


@pytest.mark.process
def test_the_package_and_its_settings_are_imported_without_torch() -> None:
    program = (
        "import sys, mild, mild.settings, mild.bases; assert 'recompose' in mild.__all__;"
        "print(sorted({'torch', 'diffusers', 'cv2', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_users_import_is_what_the_rooms_define() -> None:
    from mild import MILDPipeline, recompose

    assert (MILDPipeline, recompose) == (pipeline.MILDPipeline, pipeline.recompose)
    with pytest.raises(AttributeError, match="module 'mild' has no attribute 'MILDPipelin'"):
        _ = mild.MILDPipelin
