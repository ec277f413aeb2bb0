"""A block that could not be fetched ahead of time is asked for again when it is needed."""

from pathlib import Path

import numpy as np
import pytest

from api.errors import StorageUnavailable
from tests.fakes import MemoryBucket
from workers.blocks import BlockCache, Shard
from workers.tokens import describe_shard, shard_bytes


def test_a_fetch_that_failed_ahead_of_time_is_tried_again_when_the_block_is_needed(tmp_path: Path) -> None:
    tokens = np.arange(100)
    body = shard_bytes(tokens, "uint16")
    bucket = MemoryBucket()
    bucket.put("shard", body)
    shard = Shard("shard", describe_shard("shard", body, len(tokens)), np.dtype("<u2"))
    cache = BlockCache(bucket, [shard], tmp_path)
    bucket.reachable = False
    with pytest.raises(StorageUnavailable):
        cache.request(0, 0).result()
    bucket.reachable = True
    assert cache.tokens(0, 10, 5).tolist() == [10, 11, 12, 13, 14]
    cache.close()
