from __future__ import annotations

import os

# These tests start the lab, which does not run inside itself.
collect_ignore_glob = ["test_*.py"] if os.environ.get("KTLS_LAB") else []
