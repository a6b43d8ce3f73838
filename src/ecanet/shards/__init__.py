"""Sets of shards: pack photographs into tar files, index tar files of others, and check both.

Training reads them as ``shards:ADDRESS``; `ecanet.data` has the reader. Read downward: `packing` (`pack`), `checking`
(`check`), `indexing` (`index`), `writing` (one shard, and the index of a set), `plan` (which image goes where).
"""

from ecanet.shards.checking import check
from ecanet.shards.indexing import index
from ecanet.shards.packing import pack

__all__ = ["check", "index", "pack"]
