"""A name-to-thing table whose error lists the choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import ConfigError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name; a second registration of a name is an error."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that files the decorated thing under every one of `names`."""

        def add(item: T) -> T:
            for name in names:
                if name in self._items:
                    raise ConfigError(f"{self.kind} '{name}' is registered twice")
                self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise ConfigError(unknown(self.kind, name, self._items))
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
