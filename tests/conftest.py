"""Settings and fixtures that every test shares."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from pool import Pool

# Cases are drawn the same way in every run, so that a red test is red again; no time limit per case,
# since the machine may be busy.
settings.register_profile("seqloom", deadline=None, derandomize=True)
settings.load_profile("seqloom")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight worker processes for the whole session; see `Pool.run`."""
    workers = Pool()
    yield workers
    workers.close()
