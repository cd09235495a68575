"""Methods of vLLM's classes and names of its modules, wrapped once per process."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "is_wrapped_by_sepllm"


def wrap_once(owner: type | ModuleType, name: str, around: Callable[..., Any]) -> None:
    """Replace a function, method or class method by a call of ``around``. May run again.

    Args:
        owner: the class, or the module that has imported the function.
        name: of the function or method.
        around: takes the original function, then what vLLM passes, self or cls first.
    """
    if is_wrapped(owner, name):
        return
    member = inspect.getattr_static(owner, name)
    is_classmethod = isinstance(member, classmethod)
    original: Callable[..., Any] = member.__func__ if is_classmethod else member

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def is_wrapped(owner: type | ModuleType, name: str) -> bool:
    """Whether :func:`wrap_once` wrapped it; functools.wraps carries the mark to outer wrappers."""
    return hasattr(getattr(owner, name), _MARK)
