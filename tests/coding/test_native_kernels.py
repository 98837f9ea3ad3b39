"""The C kernels under AddressSanitizer and UBSan, without Python: see native_selftest.c.

This build replaces the GFNI instruction by its description, so that the code around it runs on any
x86 processor. Where the processor has GFNI, test_engines runs the real one.
"""

import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.coding.conftest import SanitizedKernels

SELFTEST = Path(__file__).parent / "native_selftest.c"


def test_no_level_errs_or_strays_under_sanitizers(sanitized_kernels: "SanitizedKernels", tmp_path: Path) -> None:
    program = tmp_path / "selftest"
    sanitized_kernels.link([str(SELFTEST)], program)
    ran = subprocess.run([str(program), "150", "1"], capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    levels, verdict = ran.stdout.splitlines()
    assert verdict == "ok"
    assert "portable" in levels
    assert platform.machine() != "x86_64" or "gfni512 gfni256" in levels
