from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# These tests start the lab, which does not run inside itself.
collect_ignore_glob = ["test_*.py"] if os.environ.get("KTLS_LAB") else []


@pytest.fixture
def machine_without_mirror(tmp_path: Path) -> dict[str, str]:
    """An apt that knows one mirror and reaches none."""
    programs = tmp_path / "programs"
    programs.mkdir()
    apt = programs / "apt-get"
    apt.write_text(
        '#!/bin/sh\n[ "$1" = indextargets ] && echo http://mirror.invalid && exit\nexit 100\n'
    )
    apt.chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "KTLS_LAB_CACHE": str(tmp_path / "cache")}
