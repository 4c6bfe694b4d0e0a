"""What `jaxcompress.explain` listens to: every use of a compressed array, as traced."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Listener", "Use", "listen", "listener"]


class Use(NamedTuple):
    """One compressed leaf met by one primitive, and what became of it."""

    path: str
    container: str
    primitive: str
    op: str
    implementation: str
    why: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Listener:
    """Collects uses, and says for which platform implementations are to be named."""

    platform: str
    uses: list[Use] = dataclasses.field(default_factory=list)


_current: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("uses", default=None)


def listener() -> Listener | None:
    """Whoever listens while a function is traced; nearly always nobody."""
    return _current.get()


@contextlib.contextmanager
def listen(platform: str) -> Iterator[list[Use]]:
    """The uses that are traced within the block."""
    here = Listener(platform)
    token = _current.set(here)
    try:
        yield here.uses
    finally:
        _current.reset(token)
