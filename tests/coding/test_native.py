"""What is the native engine's own: that it is built, its levels, the GIL, call cost, bad arguments.

Its results are tested in test_engines with all others; the kernels without Python in
test_native_kernels.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import timeit
from pathlib import Path
from typing import TYPE_CHECKING

import holdfast.coding.native
import numpy as np
import pytest
from holdfast.coding import CodeParams, EngineUnavailableError, engine_names, parity_matrix
from holdfast.coding.native import NativeEngine, native_levels

if TYPE_CHECKING:
    from tests.coding.conftest import SanitizedKernels

HERE = Path(__file__).parent
SOURCES = Path(holdfast.coding.native.__file__).parent
pytestmark = pytest.mark.skipif(
    not native_levels() and shutil.which("cc") is None, reason="no C compiler: no native engine"
)


def test_where_there_is_a_compiler_the_engine_is_built_and_preferred() -> None:
    """The build is optional, so it could fail in silence: here it must not."""
    assert engine_names()[0] == "native"


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools builds the package")
def test_without_a_compiler_the_build_goes_on_and_one_line_says_what_is_left_out(tmp_path: Path) -> None:
    build = ["-c", "from setuptools import setup; setup()", "-q", "build_ext"]
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    built = subprocess.run(
        [sys.executable, *build, *folders],
        env=os.environ | {"CC": str(tmp_path / "no-compiler")},
        cwd=SOURCES.parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert not list(tmp_path.rglob("*.so"))
    lines = [line for line in said.splitlines() if 'building extension "holdfast.coding._native" failed' in line]
    assert len(lines) == 1, said


def test_the_best_level_is_the_default_and_any_usable_one_can_be_named() -> None:
    levels = native_levels()
    assert levels[-1] == "portable"
    assert NativeEngine().level == levels[0] == NativeEngine().detail
    for level in levels:
        assert NativeEngine(level).level == level


def test_levels_are_what_the_kernel_says_of_the_processor() -> None:
    """Linux lists a feature only if it is usable; the check must not be better or worse."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if "ssse3" not in flags:
        pytest.skip("not an x86 processor under Linux")
    wanted = {
        "gfni512": {"gfni", "avx512f", "avx512bw"},
        "gfni256": {"gfni", "avx2"},
        "avx2": {"avx2"},
        "ssse3": {"ssse3"},
        "portable": set(),
    }
    assert native_levels() == tuple(name for name, needs in wanted.items() if needs <= flags)


def test_a_level_that_cannot_run_here_is_refused_with_those_that_can() -> None:
    with pytest.raises(EngineUnavailableError, match=r"no usable level 'neon512'.*portable"):
        NativeEngine("neon512")


def test_without_the_extension_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdfast.coding.native, "_BUILT", False)
    monkeypatch.setattr(holdfast.coding.native, "_WHY_MISSING", "no module")
    with pytest.raises(EngineUnavailableError, match=r"not built here \(no module\); install a C"):
        NativeEngine()
    assert engine_names()[0] != "native"


def test_the_gil_is_released() -> None:
    """Threads are never forced to switch here, so another one runs only if the call lets it."""
    engine, size = NativeEngine("portable"), 8 << 20
    sources = [np.ones(size, dtype=np.uint8) for _ in range(4)]
    results = [np.ones(size, dtype=np.uint8) for _ in range(4)]
    matrix = parity_matrix(CodeParams(4, 4))
    running, done = threading.Event(), threading.Event()

    def work() -> None:
        running.set()
        engine.matmul(matrix, sources, results)
        done.set()

    before = sys.getswitchinterval()
    thread = threading.Thread(target=work)
    try:
        sys.setswitchinterval(1000)
        thread.start()
        assert running.wait(timeout=60)
        assert not done.is_set()
    finally:
        sys.setswitchinterval(before)
        thread.join(timeout=60)


def test_a_call_costs_little_besides_its_bytes() -> None:
    """The goal is 5 microseconds for 10 + 4 prepared buffers; the best of many is 1.4 here."""
    engine, matrix = NativeEngine(), parity_matrix(CodeParams(10, 4))
    sources = [memoryview(bytearray(64)) for _ in range(10)]
    results = [memoryview(bytearray(64)) for _ in range(4)]
    timer = timeit.Timer(lambda: engine.matmul(matrix, sources, results))
    assert min(timer.repeat(repeat=20, number=500)) / 500 < 5e-6


def test_arguments_of_every_kind_do_no_harm() -> None:
    assert fuzz([], {}).startswith("ok")


def test_arguments_of_every_kind_do_no_harm_under_sanitizers(
    sanitized_kernels: "SanitizedKernels", tmp_path: Path
) -> None:
    extension = tmp_path / "_native.abi3.so"
    include = ["-I", sysconfig.get_path("include"), "-shared", "-fPIC"]
    sanitized_kernels.link([*include, str(SOURCES / "_native.c")], extension)
    # The interpreter itself is not instrumented and keeps memory to its end: no leak check.
    environment = {"LD_PRELOAD": sanitized_kernels.runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    assert fuzz(["--extension", str(extension)], environment).startswith("ok")


def fuzz(options: list[str], environment: dict[str, str]) -> str:
    finished = subprocess.run(
        [sys.executable, str(HERE / "fuzz_native.py"), "--cases", "2000", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout
