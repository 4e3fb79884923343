from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.process
def test_settings_can_be_read_without_importing_torch() -> None:
    program = (
        "import sys, mild, mild.settings; print(sorted({'torch', 'diffusers', 'cv2', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
