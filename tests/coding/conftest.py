"""The engines under test: each one that runs here, and the native one at each of its levels."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import holdfast.coding.native
import pytest
from holdfast.coding import Engine, engine_names, select_engine
from holdfast.coding.native import NativeEngine, native_levels


def engines_under_test() -> list[Engine]:
    """All but the oracle, which they are compared with."""
    others = [select_engine(name) for name in engine_names() if name not in ("naive", "native")]
    levels: list[Engine] = [NativeEngine(level) for level in native_levels()]
    if levels:  # all orders of access, whatever the size
        levels.append(NativeEngine(stream=True, fetch=True))
        levels.append(NativeEngine(stream=True, fetch=False))
    return others + levels


def engine_id(engine: Engine) -> str:
    if isinstance(engine, NativeEngine):
        return f"native-{engine.level}-{engine._stream}{engine._fetch}"
    return engine.name


@pytest.fixture(params=engines_under_test(), ids=engine_id)
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen


@dataclass(frozen=True, slots=True)
class SanitizedKernels:
    """The C kernels, compiled once with AddressSanitizer, UBSan and GFNI emulated."""

    compiler: str
    kernels: Path  # the object file
    runtime: str  # AddressSanitizer's library, for a host that is not instrumented

    # Of UBSan what fits integers and indices: null and alignment checks double the build time, and
    # a forbidden page or a misaligned streaming store ends the process without them.
    CHECKS = "address,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
    FLAGS = ("-O1", "-fPIC", f"-fsanitize={CHECKS}", "-fno-sanitize-recover=all")
    SOURCES = Path(holdfast.coding.native.__file__).parent

    def link(self, arguments: list[str], output: Path) -> None:
        """Compile ``arguments`` and link them with the kernels, or fail with what was said."""
        command = [self.compiler, *self.FLAGS, "-I", str(self.SOURCES), *arguments]
        command += [str(self.kernels), "-o", str(output)]
        built = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
        assert built.returncode == 0, built.stderr


@pytest.fixture(scope="session")
def sanitized_kernels(tmp_path_factory: pytest.TempPathFactory) -> SanitizedKernels:
    """Skips where there is no compiler with sanitizers; an error in our code fails."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler under Linux")
    folder = tmp_path_factory.mktemp("kernels")
    empty, kernels = folder / "empty.c", folder / "kernels.o"
    empty.write_text("int main(void) { return 0; }")
    flags = [compiler, *SanitizedKernels.FLAGS]
    probe = subprocess.run([*flags, str(empty), "-o", str(folder / "empty")], capture_output=True, check=False)
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if probe.returncode != 0 or not Path(runtime).is_absolute():
        pytest.skip("this compiler has no sanitizers")
    source = SanitizedKernels.SOURCES / "_native_kernels.c"
    emulate = ["-DHOLDFAST_EMULATE_GFNI", "-Wno-psabi", "-c", str(source), "-o", str(kernels)]
    built = subprocess.run([*flags, *emulate], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return SanitizedKernels(compiler, kernels, runtime)
