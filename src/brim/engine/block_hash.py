"""Names for the content of full blocks. Owns the hash chain: equal hashes mean equal tokens from position 0 on."""

from __future__ import annotations

from hashlib import blake2b

from brim.engine.sequence import Sequence

HASH_BYTES = 16


def extend_block_hashes(sequence: Sequence, num_blocks: int, block_size: int) -> list[bytes]:
    """The sequence's hashes, at least of its first num_blocks blocks; each is computed once.

    hash[i] = blake2b-128(hash[i-1] + the int64 bytes of the block's ids); hash[-1] = blake2b-128(extra_key), which keeps
    sequences apart whose equal tokens mean different K/V (another adapter, another tenant). 128 bits of a cryptographic
    hash: two contents share a name about never, unlike with Python's 64-bit `hash`.
    """
    hashes = sequence.block_hashes
    if len(hashes) < num_blocks:
        assert num_blocks * block_size <= sequence.num_tokens, "a block is hashed before its ids are known"
        parent = hashes[-1] if hashes else blake2b(sequence.extra_key, digest_size=HASH_BYTES).digest()
        data = sequence.token_ids.data.cast("B")
        step = 8 * block_size
        for index in range(len(hashes), num_blocks):
            parent = blake2b(parent + data[index * step : (index + 1) * step], digest_size=HASH_BYTES).digest()
            hashes.append(parent)
    return hashes
