"""The targets and their seeds: one function per reader of bytes. It returns, or raises the error that the reader
promises (README.md). fuzz_data.py runs them.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import random
import struct
import sys
import tempfile
import tracemalloc
import types
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import NamedTuple

import atheris
import msgpack
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


# The __init__ of these packages are not run: they import torch, which takes seconds and most of the memory, and would
# import the readers before they are instrumented.
for name in ("msf_fast", "msf_fast.data"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(ROOT.joinpath(*name.split(".")))]
# Imported before the instrumentation too: atheris' comparisons of whole arrays take extra memory.
importlib.import_module("msf_fast.data.boxes")
with redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["msf_fast", "PIL", "pickletools"]):
    import pickletools

    from PIL import Image

    from msf_fast.data import form, lmdb_pages, pickles, records, sources, store, tfrecord
    from msf_fast.data.converters import movi, published
    from msf_fast.data.records import DataError, RefusedError

    # Pillow imports its readers when they are first needed; they would not be instrumented then.
    Image.init()


class Target(NamedTuple):
    """read(data): the code under test. mutate(data, generator): a change that knows the format, or None when ``data``
    has another format. dictionary: byte strings that libFuzzer inserts. memory: the most bytes that reading may take
    per byte of input, in addition to 8 MiB."""

    read: Callable
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes | None] = lambda data, generator: None
    dictionary: tuple[bytes, ...] = ()
    longest: int = 1 << 16
    memory: int = 256


# Records and headers: msgpack behind an envelope


def read_record(data: bytes) -> None:
    for entry in (data, records.seal(data)):
        try:
            fields = records.decode_record(entry, file="fuzzed", key=0)
        except DataError:
            continue
        for value in fields.values():
            if not isinstance(value, (str, int)):
                _decoded(value)


def _decoded(image) -> None:
    try:
        pixels = records.decode_image(image, file="fuzzed", key=0)
    except DataError:
        return
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 3, pixels.shape


def read_header(data: bytes) -> None:
    for entry in (data, records.seal(data)):
        try:
            header = store._read_header(entry, 4)
        except RefusedError:
            continue
        assert header.count + header.frames == 3, header


def record_seeds() -> list[bytes]:
    samples = [sample(kind) for kind in ("jpeg", "png", "raw")]
    entries = [records.encode_record(one) for one in samples] + records.encode_sample(video())
    return entries + [entry[records.ENVELOPE.size :] for entry in entries]


def header_seeds() -> list[bytes]:
    header = {"format": "msf_fast", "name": "coco", "split": "train", "count": 3, "source": "", "complete": True}
    whole = [
        header | {"metadata": {"categories": {"1": "person"}, "skipped": {"no annotation": 28}}},
        header | {"metadata": {}, "count": 1, "frames": 2},
    ]
    return [msgpack.packb(one) for one in whole]


def sample(kind: str = "jpeg") -> dict:
    image = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
    mask = np.zeros((24, 32), np.uint8)
    mask[4:12, 4:20], mask[20:] = 1, 255
    encode = {"jpeg": records.jpeg_image, "png": records.png_image, "raw": np.asarray}[kind]
    return {
        "image": encode(image),
        "mask": mask if kind == "raw" else records.png_image(mask),
        "category": np.array([3], np.int32),
        "is_thing": np.array([1], np.uint8),
        "name": "sample",
    }


def video() -> dict:
    one = sample()
    frame = {name: one.pop(name) for name in ("image", "mask")}
    return one | {"frames": [frame, frame], "boxes": np.zeros((2, 1, 4), np.float32)}


ODD_VALUES = (
    0,
    1,
    -1,
    255,
    2**31,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    None,
    True,
    False,
    0.5,
    float("nan"),
    "",
    b"",
    [],
    {},
)
WORDS = ("jpeg", "png", "array", "text", "number", "uint8", "float64", "frames", "image", "mask", "object", ">f4")


def mutate_msgpack(data: bytes, generator: random.Random) -> bytes | None:
    """Change one node of the tree: replace it, drop it, repeat it, or (bytes and text) mutate it in place."""
    try:
        tree = msgpack.unpackb(data, strict_map_key=False)
        return msgpack.packb(_changed(tree, generator))
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.exceptions.UnpackException):
        return None


def _changed(node, generator: random.Random):
    if isinstance(node, dict) and node and generator.random() < 0.9:
        name = generator.choice(list(node))
        if generator.random() < 0.1:
            return {other: value for other, value in node.items() if other != name}
        new_name = generator.choice(WORDS) if generator.random() < 0.1 else name
        return {**node, new_name: _changed(node[name], generator)}
    if isinstance(node, list) and node and generator.random() < 0.9:
        place = generator.randrange(len(node))
        copies = [[], [node[place]] * 2, [_changed(node[place], generator)]][generator.choice((0, 1, 2, 2, 2, 2))]
        return [*node[:place], *copies, *node[place + 1 :]]
    if isinstance(node, bytes) and generator.random() < 0.9:
        return atheris.Mutate(node, len(node) + 64)
    return generator.choice((*ODD_VALUES, *WORDS, generator.randrange(1 << generator.randrange(1, 64))))


# Store: a whole file, read as LMDB


def read_store(data: bytes) -> None:
    """Check the pages and, if the check passes, read every record with LMDB: the process must not crash."""
    path = _scratch_file(data)
    try:
        entries = lmdb_pages.check_pages(path)
        assert 0 <= entries <= len(data)
    except lmdb_pages.PagesError:
        entries = None
    try:
        with store.Store(path) as opened:
            assert entries is not None, "a file whose pages are damaged was opened"
            for index in range(len(opened)):
                with suppress(DataError):
                    fields = opened[index]
                    for number in range(min(fields.get("frames", 0), opened.header.frames)):
                        opened.frame(index, number)
    except DataError:
        pass


def _scratch_file(data: bytes) -> str:
    path = Path(_scratch_folder().name, "file")
    path.unlink(missing_ok=True)  # a new file: an open store would keep the old one
    path.write_bytes(data)
    return str(path)


@functools.cache
def _scratch_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def store_seeds() -> list[bytes]:
    few = [sample(), video(), sample("raw")]
    many = [{"name": f"{index}"} for index in range(300)]  # a tree of two levels
    seeds = []
    for samples in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            with store.StoreWriter(f"{folder}/file", "fuzz", "train") as output:
                for one in samples:
                    output.add(one)
            seeds.append(Path(f"{folder}/file").read_bytes())
    return seeds


def mutate_pages(data: bytes, generator: random.Random) -> bytes | None:
    """Change a few bytes of a page's header and pointers, or of an entry."""
    changed = bytearray(data)
    if len(changed) < 4096:
        return None
    for _ in range(generator.randrange(1, 4)):
        page = 4096 * generator.randrange(len(changed) // 4096)
        place = min(page + generator.randrange(generator.choice((32, 160, 4096))), len(changed) - 1)
        changed[place] = generator.choice((0, 1, 255, changed[place] ^ 1 << generator.randrange(8)))
    return bytes(changed)


# Images and masks


def read_image(data: bytes) -> None:
    for one in (data, with_chunk_checksums(data)):
        try:
            image = records.encode_image(one)
        except ValueError:  # neither a JPEG nor a PNG
            continue
        _decoded(image)


def read_mask(data: bytes) -> None:
    for one in (data, with_chunk_checksums(data)):
        try:
            indices = sources.read_indices(one)
            assert indices.dtype == np.uint8, indices.dtype
            assert indices.ndim == 2, indices.shape
            mask, ids = sources.number_segments(indices)
            assert mask.shape == indices.shape
            sources.mask_boxes(mask, len(ids))
        except form.Skip:
            pass
        with suppress(form.Skip):
            _decoded(sources.decodable_image(one))


def with_chunk_checksums(data: bytes) -> bytes:
    """A PNG with corrected CRCs, so that a change inside a chunk is not found only by its CRC."""
    if data[:8] != PNG_SIGNATURE:
        return data
    fixed, place = bytearray(data), 8
    while place + 12 <= len(fixed):
        length = struct.unpack_from(">I", fixed, place)[0]
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


def image_seeds() -> list[bytes]:
    picture = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    seeds = []
    for mode, kind, options in (
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("1", "PNG", {}),
        ("LA", "PNG", {"dpi": (72, 72)}),
        ("RGBA", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("RGB", "JPEG", {"progressive": True, "quality": 30}),
        ("L", "JPEG", {"restart_marker_rows": 1}),
        ("CMYK", "JPEG", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("L", "GIF", {}),
        ("RGB", "BMP", {}),
        ("L", "TIFF", {}),
    ):
        output = io.BytesIO()
        converted = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
        converted.save(output, kind, **options)
        seeds.append(output.getvalue())
    return seeds


IMAGE_WORDS = (
    *(PNG_SIGNATURE, b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fdAT"),
    *(b"\xff\xd8", b"\xff\xc0", b"\xff\xc2", b"\xff\xda", b"\xff\xdd", b"\xff\xe1Exif\0\0", b"\xff\xee", b"\xff\xd9"),
    *(b"RIFF", b"WEBPVP8L", b"II*\0", b"MM\0*", b"GIF89a", b"BM", b"\xff\xff\xff\xff", b"\0\0\0\0"),
)

# TFRecord files and the messages in them


def read_tfrecord(data: bytes) -> None:
    for one in (data, with_record_checksums(data)):
        path = _scratch_file(one)
        with suppress(DataError):
            for key, (offset, length) in enumerate(tfrecord.list_records(path)):
                _parsed(tfrecord.read_record(path, offset, length, key=key))
    _parsed(data)


def _parsed(data: bytes) -> None:
    for names in (None, ("video", "metadata/num_frames")):
        with suppress(DataError):
            tfrecord.parse_example(data, names, file="fuzzed", key=0)


def with_record_checksums(data: bytes) -> bytes:
    """The framing of as many records as fit into ``data``, with correct checksums."""
    fixed, start = bytearray(data), 0
    while start + 16 <= len(fixed):
        end = start + 12 + struct.unpack_from("<Q", fixed, start)[0]
        struct.pack_into("<I", fixed, start + 8, tfrecord.masked_crc(bytes(fixed[start : start + 8])))
        if end + 4 > len(fixed):
            break
        struct.pack_into("<I", fixed, end, tfrecord.masked_crc(bytes(fixed[start + 12 : end])))
        start = end + 4
    return bytes(fixed)


def tfrecord_seeds() -> list[bytes]:
    """Examples with a feature of each kind, alone and framed."""
    kinds = {
        "video": message((1, message((1, b"\x89PNG"), (1, b"")))),
        "instances/bboxes": message((2, message((1, struct.pack("<4f", 0, 0.25, 0.5, 1))))),
        "metadata/num_frames": message((3, message((1, b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")))),
        "empty": b"",
    }
    entries = [(1, message((1, name.encode()), (2, value))) for name, value in kinds.items()]
    examples = [message((1, message(*entries))), message((1, message(entries[0], entries[0])))]
    return [*examples, framed(examples[:1]), framed(examples)]


def message(*fields: tuple[int, bytes]) -> bytes:
    """Length-delimited protobuf fields, each of a number below 16."""
    return b"".join(bytes([number << 3 | 2]) + varint(len(data)) + data for number, data in fields)


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def framed(records: list[bytes]) -> bytes:
    return with_record_checksums(b"".join(struct.pack("<QI", len(one), 0) + one + bytes(4) for one in records))


def read_movi(data: bytes) -> None:
    """A video's record, behind its framing."""
    path = _scratch_file(framed([data]))
    with suppress(DataError, form.Skip):
        check_sample(movi.make_sample(movi.MoviItem("fuzzed", path, 0, tfrecord.HEADER.size, len(data))))


def check_sample(sample: dict) -> None:
    """Every sample of a converter has one size, lists the segments of its masks, and has its boxes inside."""
    frames = sample.get("frames", [sample])
    sizes = {records.decode_image(frame["image"]).shape[:2] for frame in frames}
    sizes |= {frame["mask"].shape for frame in frames if "mask" in frame}
    assert len(sizes) == 1, sizes
    for frame in frames:
        if "mask" in frame:
            segments = frame["mask"][frame["mask"] != records.VOID]
            assert segments.max(initial=0) <= len(sample["category"]) == len(sample["is_thing"])
    if "boxes" in sample:
        assert sample["boxes"].shape == (len(frames), len(sample["category"]), 4)
        assert ((sample["boxes"] >= 0) & (sample["boxes"] <= 1)).all()
    form.SampleForm(max_objects=10, min_object_area=16).apply(sample)


def movi_seeds() -> list[bytes]:
    """Two frames and two instances, one of which is visible in only one frame."""
    images, masks = [encoded("PNG", "RGB", mark) for mark in (0, 1)], [encoded("PNG", "L", mark) for mark in (1, 2)]
    boxes = struct.pack("<12f", *[0.1, 0.2, 0.5, 0.75] * 3)
    features = {
        "video": (1, message(*((1, one) for one in images))),
        "segmentations": (1, message(*((1, one) for one in masks))),
        "instances/category": (3, message((1, b"\x03\x05"))),
        "instances/bboxes/ragged_flat_values": (2, message((1, boxes))),
        "instances/bboxes/ragged_row_lengths_0": (3, message((1, b"\x02\x01"))),
        "instances/bbox_frames/ragged_flat_values": (3, message((1, b"\x00\x01\x01"))),
        "instances/bbox_frames/ragged_row_lengths_0": (3, message((1, b"\x02\x01"))),
        "metadata/video_name": (1, message((1, b"12"))),
    }
    entries = [(1, message((1, name.encode()), (2, message(feature)))) for name, feature in features.items()]
    return [message((1, message(*entries)))]


def encoded(kind: str, mode: str, value: int, **options) -> bytes:
    """A picture of 8×8 pixels whose upper half has a value."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = value
    output = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(output, kind, **options)
    return output.getvalue()


# Pickles of plain data

PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None), np.ndarray)


def read_pickle(data: bytes) -> None:
    with suppress(DataError):
        waiting = [pickles.load_pickle(data, file="fuzzed", key=0)]
        while waiting:
            value = waiting.pop()
            assert type(value) in PLAIN, type(value)
            if isinstance(value, np.ndarray):
                assert value.dtype.kind in "biuf", value.dtype
            elif isinstance(value, (dict, list, tuple)):
                waiting.extend(value.values() if isinstance(value, dict) else value)


def pickle_seeds() -> list[bytes]:
    sample = {
        "image": b"\xff\xd8 image",
        "segment": b"RIFF mask",
        "clazz": np.array([1, 7], np.uint8),
        "isthing": np.array([True, False]),
    }
    video = {"video": [b"one", b"two"], "bbox": np.asfortranarray(np.zeros((2, 3, 4), np.float32))}
    values = [
        sample,
        video,
        [b"key 0", b"key 1"],
        {"a": (1, -5, 2**40, 0.5, None, True), b"b": "text", "c": [np.float32(3), np.int64(7)]},
        np.arange(12, dtype=">i4").reshape(3, 4),
        eval,  # must be refused
    ]
    return [pickle.dumps(value, protocol) for value in values for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


def mutate_pickle(data: bytes, generator: random.Random) -> bytes | None:
    """Drop, repeat or move instructions, or insert some that make arrays and calls."""
    try:
        starts = [place for _, _, place in pickletools.genops(data)]
    except Exception:
        return None
    parts = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(generator.randrange(1, 4)):
        place, other = generator.randrange(len(parts)), generator.randrange(len(parts))
        match generator.randrange(5):
            case 0 if len(parts) > 1:
                del parts[place]
            case 1:
                parts.insert(place, parts[other])
            case 2:
                parts[place], parts[other] = parts[other], parts[place]
            case 3:
                parts.insert(place, generator.choice(PICKLE_WORDS))
            case _:
                parts[place] = parts[place][:1] + atheris.Mutate(parts[place][1:] or b"\0", len(parts[place]) + 8)
    return b"".join(parts)


PICKLE_WORDS = (
    *(
        b"(",
        b")",
        b"]",
        b"}",
        b"N",
        b"0",
        b"1",
        b"2",
        b"t",
        b"l",
        b"d",
        b"R",
        b"b",
        b"s",
        b"u",
        b"a",
        b"e",
        b".",
        b"\x94",
    ),
    *(
        b"\x81",
        b"\x93",
        b"\x85",
        b"\x86",
        b"\x87",
        b"q\x01",
        b"h\x01",
        b"r\xff\xff\xff\xff",
        b"K\x00",
        b"J\xff\xff\xff\xff",
    ),
    *(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n"),
    *(b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.numeric\n_frombuffer\n", b"cbuiltins\neval\n"),
    *(
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"B\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 8,
    ),
)


def read_published(data: bytes) -> None:
    """A record of the published project, as LMDB returns it."""
    published._read = lambda file, key: data
    with suppress(DataError, form.Skip):
        check_sample(published.make_sample(published.PublishedItem("fuzzed", "file", b"key")))


def published_seeds() -> list[bytes]:
    image, segment = encoded("JPEG", "RGB", 90), encoded("WEBP", "RGB", 1, lossless=True)
    about = {"clazz": np.array([7, 9], np.uint8), "isthing": np.array([True, False])}
    samples = [
        {"image": image, "segment": segment, **about},
        {"image": np.frombuffer(encoded("PNG", "RGB", 3), np.uint8), "segment": segment, "clazz": about["clazz"]},
        {"video": [image] * 2, "segment": [segment] * 2, "bbox": np.full((2, 2, 4), 0.5, np.float32)},
        {"video": [image] * 2, "segment": [segment] * 2, "clazz": np.array([[1, 2]] * 2, np.uint8)},
        {"image": image},
    ]
    return [pickle.dumps(one, protocol) for one in samples for protocol in (4, 5)]


MSGPACK_WORDS = tuple(map(str.encode, WORDS))
EXAMPLE_WORDS = (b"video", b"\x0a", b"\x12", b"\x1a", b"\xff" * 9 + b"\x01")
DECODED = 2 * 3 * 2048  # bytes per byte of input: the most pixels that a byte may stand for, their channels, and a copy
TARGETS = {
    "record": Target(read_record, record_seeds, mutate_msgpack, MSGPACK_WORDS, 1 << 14, DECODED),
    "header": Target(read_header, header_seeds, mutate_msgpack, MSGPACK_WORDS, 1 << 14),
    "store": Target(read_store, store_seeds, mutate_pages, (b"\xde\xc0\xef\xbe",)),
    "tfrecord": Target(read_tfrecord, tfrecord_seeds, dictionary=EXAMPLE_WORDS),
    "movi": Target(read_movi, movi_seeds, dictionary=EXAMPLE_WORDS, longest=1 << 12, memory=5 * DECODED),
    "pickle": Target(read_pickle, pickle_seeds, mutate_pickle, PICKLE_WORDS),
    "published": Target(read_published, published_seeds, mutate_pickle, PICKLE_WORDS, 1 << 12, 5 * DECODED),
    "image": Target(read_image, image_seeds, dictionary=IMAGE_WORDS, longest=1 << 12, memory=DECODED),
    "mask": Target(read_mask, image_seeds, dictionary=IMAGE_WORDS, longest=1 << 12, memory=5 * DECODED),
}


def fuzz(name: str, arguments: list[str]) -> None:
    """Run libFuzzer on one target in this process, which ends with it."""
    target = TARGETS[name]

    def run_bounded(data: bytes) -> None:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        target.read(data)
        taken = tracemalloc.get_traced_memory()[1] - before
        assert taken <= (8 << 20) + target.memory * len(data), f"{taken:,} bytes taken for {len(data):,} bytes of input"

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        generator = random.Random(seed)
        changed = target.mutate(data, generator) if generator.random() < 0.6 else None
        return atheris.Mutate(data, limit) if changed is None else changed[:limit]

    tracemalloc.start()
    atheris.Setup([sys.argv[0], *arguments], run_bounded, custom_mutator=mutate)
    atheris.Fuzz()
