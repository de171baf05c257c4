"""Triton has no wheels for some platforms; its tests are not collected there."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_triton_*.py"]
