"""Data: the LMDB store, the converters, the embedded data sets, and the loaders."""

from msf_fast.data.records import DataError
from msf_fast.data.store import Store, StoreWriter, open_split

__all__ = ["DataError", "Store", "StoreWriter", "open_split"]
