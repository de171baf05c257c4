"""The sandbox of this machine, or a skip where the kernel gives none."""

from __future__ import annotations

import pytest

from hsd.data.sandbox.local import LocalSandbox, strongest_mechanism


@pytest.fixture(scope="session")
def sandbox() -> LocalSandbox:
    if strongest_mechanism() != "namespaces":
        pytest.skip("needs a kernel that allows user namespaces")
    return LocalSandbox()
