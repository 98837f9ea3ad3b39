"""The engines under test: each one that runs here, and the native one at each of its levels."""

import pytest
from holdfast.coding import Engine, engine_names, select_engine
from holdfast.coding.native import NativeEngine, native_levels


def engines_under_test() -> list[Engine]:
    """All but the oracle, which they are compared with."""
    others = [select_engine(name) for name in engine_names() if name not in ("naive", "native")]
    levels: list[Engine] = [NativeEngine(level) for level in native_levels()]
    if levels:  # both orders of access, whatever the size
        levels.append(NativeEngine(stream=True, prefetch=True))
        levels.append(NativeEngine(stream=False, prefetch=False))
    return others + levels


def engine_id(engine: Engine) -> str:
    if isinstance(engine, NativeEngine):
        return f"native-{engine.level}-{engine._stream}{engine._prefetch}"
    return engine.name


@pytest.fixture(params=engines_under_test(), ids=engine_id)
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen
