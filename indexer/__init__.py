"""Which worker holds which KV blocks?

`blocks` turns tokens into hashes, `radix` is the index (on `rank_cache` and `masks`), `dump` makes
plain data of it.
"""
