"""A verifier of one's own, named by its path."""

from __future__ import annotations

import importlib
import os
import sys

from hsd.data.verify import Verifier


def load(path: str) -> Verifier:
    """The function at "package.module:function"; the working directory is searched as well.

    Raises:
        ValueError: there is no such function.
    """
    module_name, _, function_name = path.partition(":")
    expected = "a path such as package.module:function"
    if not module_name or not function_name.isidentifier():
        raise ValueError(f"task.verifier: found {path!r}, expected {expected}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        verify = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task.verifier: found {path!r} ({error}), expected {expected}") from None
    if not callable(verify):
        found = f"{path!r}, which is {type(verify).__name__}"
        raise ValueError(f"task.verifier: found {found}, expected a function")
    function: Verifier = verify
    return function
