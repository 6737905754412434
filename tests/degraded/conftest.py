from __future__ import annotations

import os

# The tests of fresh kernels start the lab, which does not run inside itself.
collect_ignore = ["test_fresh_kernels.py"] if os.environ.get("KTLS_LAB") else []
