"""Codecs for the values of workflows: encryption with keys that can be rotated, and compression.

``pip install cryptography``; a key is 32 random bytes, from wherever you keep your secrets.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class Encrypt:
    """AES-256 in Galois/counter mode: what was changed in the database does not decrypt.

    Parameters:
      keys: every key that stored values may have been encrypted with, by an id of its own.
      current: the id of the key for new values.  To rotate, give all workers the new key, then make it the current one;
        drop the old key once nothing of its time is kept any more.
    """

    name = "aes-gcm"

    def __init__(self, keys: Mapping[str, bytes], current: str) -> None:
        self._ciphers = {id: AESGCM(key) for id, key in keys.items()}
        self._cipher = self._ciphers[current]
        self._head = bytes([len(current)]) + current.encode("ascii")

    def encode(self, data: bytes) -> bytes:
        nonce = os.urandom(12)
        return self._head + nonce + self._cipher.encrypt(nonce, data, self._head)

    def decode(self, data: bytes) -> bytes:
        head, rest = data[: data[0] + 1], data[data[0] + 1 :]
        id = head[1:].decode("ascii")
        if id not in self._ciphers:
            raise LookupError(f"there is no key {id!r}")
        return self._ciphers[id].decrypt(rest[:12], rest[12:], head)


class Compress:
    """Deflates what is long enough to be worth it."""

    name = "zlib"

    def encode(self, data: bytes) -> bytes:
        packed = zlib.compress(data, level=6) if len(data) > 200 else data
        return b"\1" + packed if len(packed) < len(data) else b"\0" + data

    def decode(self, data: bytes) -> bytes:
        return zlib.decompress(data[1:]) if data[:1] == b"\1" else data[1:]
