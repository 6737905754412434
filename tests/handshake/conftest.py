from __future__ import annotations

import pytest

from .helpers import Pki


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki()
