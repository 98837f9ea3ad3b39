"""The C kernels under AddressSanitizer and UBSan, without Python: see native_selftest.c.

This build replaces the GFNI instruction by its description, so that the code around it runs on any
x86 processor. Where the processor has GFNI, test_engines runs the real one. The NEON kernel is compiled
by a cross compiler and run by an emulator where both are found (Debian: gcc-aarch64-linux-gnu,
libc6-dev-arm64-cross, qemu-user).
"""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import holdfast.coding.native
import pytest

if TYPE_CHECKING:
    from tests.coding.conftest import SanitizedKernels

SELFTEST = Path(__file__).parent / "native_selftest.c"
SOURCES = Path(holdfast.coding.native.__file__).parent
ARM_COMPILER = "aarch64-linux-gnu-gcc"
ARM_EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


def test_no_level_errs_or_strays_under_sanitizers(sanitized_kernels: "SanitizedKernels", tmp_path: Path) -> None:
    program = tmp_path / "selftest"
    sanitized_kernels.link([str(SELFTEST)], program)
    ran = subprocess.run([str(program), "150", "1"], capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    levels, verdict = ran.stdout.splitlines()
    assert verdict == "ok"
    assert "portable" in levels
    assert platform.machine() != "x86_64" or "gfni512 gfni256" in levels


def test_the_neon_kernel_computes_the_same_under_an_emulator(tmp_path: Path) -> None:
    compiler = shutil.which(ARM_COMPILER)
    emulator = next((found for name in ARM_EMULATORS if (found := shutil.which(name))), None)
    if compiler is None or emulator is None:
        missing = [ARM_COMPILER] * (compiler is None) + [" or ".join(ARM_EMULATORS)] * (emulator is None)
        pytest.skip(f"NEON stays untested on this machine: not found: {', '.join(missing)}")
    probe, program = tmp_path / "probe.c", tmp_path / "selftest"
    probe.write_text("#include <string.h>\nint main(void) { return 0; }")
    flags = [compiler, "-O2", "-static", "-I", str(SOURCES)]
    links = subprocess.run([*flags, str(probe), "-o", str(program)], capture_output=True, text=True, check=False)
    if links.returncode != 0:
        pytest.skip(f"NEON stays untested on this machine: {ARM_COMPILER} has no C library: {links.stderr[-200:]}")
    sources = [str(SELFTEST), str(SOURCES / "_native_kernels.c")]
    built = subprocess.run([*flags, *sources, "-o", str(program)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    command = [emulator, str(program), "60", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.split() == ["neon", "portable", "ok"]
