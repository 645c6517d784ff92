"""Names that have moved: what an old name is called now."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn


def moved(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose old names raise an `AttributeError` that says where they are.

    Args:
      module: its name.
      places: by old name the whole new one.
    """

    def find(name: str) -> NoReturn:
        where = f"; it is {places[name]} now" if name in places else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{where}")

    return find
