"""Programs run for minutes here, so XLA compiles them well: as for users."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled_in_a_hurry():
    """Take the place of the fixture of that name in tests/conftest.py."""
