"""What is left of requests that have ended: whoever still mentions them leaks."""

import gc
from collections.abc import Collection
from types import FunctionType, MethodType, ModuleType
from typing import Any

from vllm.config import VllmConfig

# what they refer to is everybody's
_SHARED = (type, ModuleType, FunctionType, VllmConfig)


def mentioned(root: Any, names: Collection[str]) -> set[str]:
    """Those of the names that some object has as a string which is reached from ``root``."""
    found, seen, queue = set(), {id(root)}, [root]
    for each in queue:  # grows
        if isinstance(each, str):
            if each in names:
                found.add(each)
        elif not isinstance(each, _SHARED):
            inner = [each.__self__] if isinstance(each, MethodType) else gc.get_referents(each)
            new = {id(one): one for one in inner if id(one) not in seen}
            seen |= new.keys()
            queue += new.values()
    return found
