"""The identity of a full KV block: a 128-bit hash over everything that its content depends on.

Called by ``Request`` (``block_hash``); nothing else knows the hash function.  A block's
hash covers its own tokens and, through its predecessor, all tokens before it and the
salt, so equal hashes mean equal K/V.  The salt separates what must never share blocks:
the caller's ``cache_salt``, another adapter, and, with the prefix cache off, other keys.
"""

from __future__ import annotations

import hashlib

HASH_BYTES = 16


def root_hash(*, cache_salt: bytes | None, lora_id: int | None, private_key: bytes | None) -> bytes:
    """What the first block of a request chains to.

    ``private_key``: the request's key when the prefix cache is off, so that only the
    children of one n > 1 find each other's blocks.
    """
    hasher = hashlib.blake2b(digest_size=HASH_BYTES, person=b"folovllm-kv-root")
    for part in (cache_salt, None if lora_id is None else str(lora_id).encode(), private_key):
        # Length before content: (b"a", b"b") and (b"ab", b"") differ; absent is not empty.
        hasher.update(b"-" if part is None else len(part).to_bytes(8, "little") + part)
    return hasher.digest()


def chain_hash(previous: bytes, token_bytes: bytes) -> bytes:
    """The hash of a block whose tokens are ``token_bytes`` (i32[block_size]) after ``previous``."""
    return hashlib.blake2b(previous + token_bytes, digest_size=HASH_BYTES).digest()
