"""Small records and stores for the data tests."""

from itertools import islice

import numpy as np

from msf_fast.data.conversion import converter
from msf_fast.data.loader import Loader, Request, build_loader
from msf_fast.data.records import jpeg_image, png_image
from msf_fast.data.store import Store, StoreWriter


def sample(index: int, height: int = 60, width: int = 80, codec: str = "jpeg") -> dict:
    """A record with two segments and some void pixels."""
    generator = np.random.default_rng(index)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = coarse.repeat(-(-height // 6), 0)[:height].repeat(-(-width // 8), 1)[:, :width]
    mask = np.zeros((height, width), np.uint8)
    mask[5:20, 5:30], mask[25:50, 20:60], mask[:, -3:] = 1, 2, 255
    encode = {"jpeg": jpeg_image, "png": png_image, "raw": np.ascontiguousarray}[codec]
    return {
        "image": encode(image),
        "mask": png_image(mask),
        "category": np.array([3, 140], np.int32),
        "is_thing": np.array([1, 0], np.uint8),
        "name": f"sample {index}",
    }


def load(store: Store, *, device="cpu", backend="auto", **fields) -> Loader:
    """A loader of a store. fields: those of the request."""
    return build_loader(store, Request(**fields), device=device, backend=backend)


def write(path, records, name="test", split="train") -> Store:
    """A store of the given records."""
    with StoreWriter(path, name, split, "made by a test") as writer:
        for record in records:
            writer.add(record)
    return Store(path)


def listed(name, source, **options):
    """The splits that a converter finds, and its lines about missing parts."""
    one = converter(name)
    return one.list_splits(one.options(source=source, out=source / "out", **options))


def names(folder) -> dict[str, list[str]]:
    """The samples' names in every file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.lmdb")):
        with Store(path) as store:
            found[path.stem] = [fields["name"] for fields in store]
    return found


def take(loader, count, start=0):
    """The first batches of a training loader."""
    batches = loader.batches(start)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()
