"""Error messages for names that have moved to another module."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn


def moved(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Build a module `__getattr__` whose `AttributeError` gives the new location of a moved name.

    Args:
      module: name of the module.
      places: old name -> full new name.
    """

    def find(name: str) -> NoReturn:
        where = f"; it is {places[name]} now" if name in places else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{where}")

    return find
