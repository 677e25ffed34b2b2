"""What the tests share: the real inputs beside the project, for those who have them."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def need_shared(name: str) -> Path:
    """The path of `name` in ../shared; skips the test, saying why, where it is missing."""
    if not (SHARED / name).exists():
        pytest.skip(f"needs ../shared/{name}, which is not here")
    return SHARED / name
