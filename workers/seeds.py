"""Seeds of torch's generators, each a pure function of what it is for."""

import hashlib


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return 32 bits from (seed, step, global micro-batch): never from the rank, so world size changes no mask.

    32, because torch's CPU generator keeps only the low 32 bits of a seed.
    """
    digest = hashlib.blake2b(f"dropout/{seed}/{step}/{micro_batch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
