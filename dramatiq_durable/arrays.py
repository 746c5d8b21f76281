"""Arrays for Postgres in its binary format, built in one go.

A batch of a hundred messages is eight arrays of a hundred; dumping their elements one by one would cost more than all
the rest of the batch.  Wrap a list in the class of its element type to pass it as a parameter.

Connections that are not ours, of whatever driver, get the same arguments as text: see `literal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, pack
from typing import Any, ClassVar

from psycopg import pq
from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper, Loader

_HEADER = Struct(">iiIii")
_EMPTY = Struct(">iiI")
_LENGTH = Struct(">i").pack
_NULL = b"\xff\xff\xff\xff"


class Array(list[Any]):
    """A list that is sent as an array of the subclass's element type; ``None`` is NULL."""

    element: ClassVar[int]
    array: ClassVar[int]
    sql: ClassVar[str]

    @classmethod
    def pieces(cls, items: Sequence[Any]) -> list[bytes]:
        raise NotImplementedError

    @classmethod
    def text(cls, item: Any) -> str:
        """An element that is not NULL, as it stands in an array's literal."""
        return str(item)

    def to_binary(self) -> bytes:
        if not self:
            return _EMPTY.pack(0, 0, self.element)
        header = _HEADER.pack(1, 1 if None in self else 0, self.element, len(self), 1)
        return header + b"".join(self.pieces(self))


class Uuids(Array):
    """uuid[]; the elements are 16 bytes each."""

    element, array, sql = 2950, 2951, "uuid[]"

    @classmethod
    def pieces(cls, items: Sequence[Any]) -> list[bytes]:
        return [_NULL if v is None else b"\x00\x00\x00\x10" + v for v in items]

    @classmethod
    def text(cls, item: bytes) -> str:
        return item.hex()


class Blobs(Array):
    """bytea[]"""

    element, array, sql = 17, 1001, "bytea[]"

    @classmethod
    def pieces(cls, items: Sequence[Any]) -> list[bytes]:
        return [_NULL if v is None else _LENGTH(len(v)) + v for v in items]

    @classmethod
    def text(cls, item: bytes) -> str:
        return '"\\\\x' + item.hex() + '"'


class Texts(Array):
    """text[]"""

    element, array, sql = 25, 1009, "text[]"

    @classmethod
    def pieces(cls, items: Sequence[Any]) -> list[bytes]:
        return Blobs.pieces([None if v is None else v.encode() for v in items])

    @classmethod
    def text(cls, item: str) -> str:
        return '"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Ints(Array):
    """int[]"""

    element, array, sql = 23, 1007, "int[]"

    @classmethod
    def pieces(cls, items: Sequence[Any]) -> list[bytes]:
        return [_NULL if v is None else pack(">ii", 4, v) for v in items]


class Longs(Array):
    """bigint[]"""

    element, array, sql = 20, 1016, "bigint[]"

    @classmethod
    def pieces(cls, items: Sequence[Any]) -> list[bytes]:
        return [_NULL if v is None else pack(">iq", 8, v) for v in items]


class Bools(Array):
    """boolean[]"""

    element, array, sql = 16, 1000, "boolean[]"

    @classmethod
    def pieces(cls, items: Sequence[Any]) -> list[bytes]:
        return [_NULL if v is None else (b"\x00\x00\x00\x01\x01" if v else b"\x00\x00\x00\x01\x00") for v in items]


class Uuid(bytes):
    """A uuid parameter, as its 16 bytes."""


class _UuidDumper(Dumper):
    format = pq.Format.BINARY
    oid = 2950

    def dump(self, obj: bytes) -> bytes:
        return bytes(obj)


class _UuidLoader(Loader):
    format = pq.Format.BINARY

    def load(self, data: Any) -> bytes:
        return bytes(data)


def _array_dumper(kind: type[Array]) -> type[Dumper]:
    class ArrayDumper(Dumper):
        format = pq.Format.BINARY
        oid = kind.array

        def dump(self, obj: Array) -> bytes:
            return obj.to_binary()

    return ArrayDumper


_DUMPERS = {kind: _array_dumper(kind) for kind in (Uuids, Blobs, Texts, Ints, Longs, Bools)}


def literal(argument: Any) -> tuple[str, str]:
    """An argument of a call as a text and the type that it is to be cast to: what any driver can send."""
    if isinstance(argument, Array):
        items = ("NULL" if v is None else argument.text(v) for v in argument)
        return "{" + ",".join(items) + "}", argument.sql
    if isinstance(argument, Uuid):
        return argument.hex(), "uuid"
    if isinstance(argument, bytes):
        return "\\x" + argument.hex(), "bytea"
    return str(argument), "bigint" if isinstance(argument, int) else "text"


def register(context: AdaptContext) -> None:
    """Teach a connection these types.  It reads uuids as 16 bytes, in the binary format."""
    adapters = context.adapters
    assert adapters is not None
    for kind, dumper in _DUMPERS.items():
        adapters.register_dumper(kind, dumper)
    adapters.register_dumper(Uuid, _UuidDumper)
    adapters.register_loader("uuid", _UuidLoader)
