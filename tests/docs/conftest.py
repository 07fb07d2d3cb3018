"""One service for what the documents and the examples ask."""

from collections.abc import Iterator

import pytest

from tests.serving import ROOT, running_service


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with running_service(ROOT, {}) as url:
        yield url
