"""Members of vLLM's classes, wrapped once per process. Start-up and front end do so."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

_MARK = "is_wrapped_by_sepllm"


def wrap_once(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Have ``around(original, *args, **kwargs)`` called instead of a method or class method.

    Args:
        owner: the class.
        name: of its member.
        around: gets the original function first, then what the caller passes, self or cls included.
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


def is_wrapped(owner: type, name: str) -> bool:
    """Whether :func:`wrap_once` was here, below the wrapper of another plugin too."""
    return hasattr(getattr(owner, name), _MARK)
