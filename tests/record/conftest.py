from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import pytest

from ktls.protocol.suites import MAX_FRAGMENT
from ktls.testing import pattern

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(pattern(400 * MAX_FRAGMENT))
        file.flush()
        yield file
