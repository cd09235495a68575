"""A member is wrapped once, keeps its kind and its name, and the original stays reachable."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_sepllm.integration.patch import is_wrapped, wrap_once


def doubled(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    return 2 * original(*args, **kwargs)


def make_owner() -> Any:
    class Owner:
        base = 3

        def method(self, a: int, *, b: int = 1) -> int:
            """A docstring."""
            return self.base + a * b

        @classmethod
        def of_class(cls, a: int) -> int:
            return cls.base + a

    return Owner


def test_methods_and_class_methods_are_wrapped() -> None:
    owner = make_owner()
    original = owner.method
    for name in ("method", "of_class"):
        assert not is_wrapped(owner, name)
        wrap_once(owner, name, doubled)
        assert is_wrapped(owner, name)
    assert owner().method(2, b=5) == 26
    assert owner.of_class(1) == owner().of_class(1) == 8
    assert owner.method.__wrapped__ is original
    assert (owner.method.__name__, owner.method.__doc__) == ("method", "A docstring.")
    assert inspect.signature(owner.method) == inspect.signature(original)


def test_wrapping_again_changes_nothing() -> None:
    """Plugins are loaded more than once, and another one may have wrapped the member since."""
    owner = make_owner()
    for name in ("method", "of_class"):
        wrap_once(owner, name, doubled)
        wrap_once(owner, name, doubled)
    assert (owner().method(2), owner.of_class(1)) == (10, 8)
    ours = owner.method

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> int:
        return -ours(*args, **kwargs)

    owner.method = theirs
    wrap_once(owner, "method", doubled)
    assert owner.method is theirs


def test_a_subclass_is_wrapped_apart() -> None:
    """The bodies of two endpoints are wrapped one by one."""
    owner = make_owner()
    other = type("Other", (), dict(vars(owner)))
    wrap_once(owner, "method", doubled)
    assert not is_wrapped(other, "method")
    assert other().method(2) == 5
