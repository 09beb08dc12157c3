"""One reader for arrays in files: what NumPy wrote comes back, and what is damaged is told in one line."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzz import counts, survives

from lexel.arrays import NpzWriter, open_arrays, read_array
from lexel.errors import UsageError

ARRAYS = {
    "floats": np.arange(12, dtype=np.float64).reshape(3, 4),
    "half": np.arange(6, dtype=np.float16).reshape(3, 2),
    "bytes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "big_endian": np.arange(5, dtype=">i4"),
    "columns": np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
    "text": np.array("{}"),
    "flags": np.array([True, False]),
    "one": np.int64(7),
    "none": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ARRAYS)
def test_what_numpy_wrote_comes_back(tmp_path, save, name):
    save(tmp_path / "a.npz", **ARRAYS)
    np.save(tmp_path / "a.npy", ARRAYS[name])
    with open_arrays(tmp_path / "a.npz") as arrays:
        assert arrays.names == tuple(ARRAYS)
        read = [arrays.read(name), arrays.map(name)]
    for array in (*read, read_array(tmp_path / "a.npy"), read_array(tmp_path / "a.npy", mapped=True)):
        assert array.shape == np.shape(ARRAYS[name])
        np.testing.assert_array_equal(array, ARRAYS[name])
    assert read[0].dtype.isnative
    assert read[0].flags.c_contiguous


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_come_one_by_one_for_ascending_numbers(tmp_path, save):
    rows = np.arange(60, dtype=np.uint8).reshape(10, 2, 3)
    save(tmp_path / "a.npz", rows=rows)
    with open_arrays(tmp_path / "a.npz") as arrays:
        for numbers in (range(10), [1, 4, 5], []):
            np.testing.assert_array_equal(list(arrays.rows(numbers, "rows")), rows[list(numbers)].tolist() or [])


@pytest.mark.parametrize(
    "shape, kind, fits",
    [
        ("A B", np.floating, True),
        ("3 4", np.float64, True),
        ("A ...", np.number, True),
        ("...", np.generic, True),
        ("A A", np.floating, False),
        ("A B C", np.floating, False),
        ("A B C ...", np.floating, False),
        ("", np.floating, False),
        ("A B", np.integer, False),
        ("A B", np.float32, False),
    ],
)
def test_a_shape_and_a_type_are_what_the_reader_needs(tmp_path, shape, kind, fits):
    np.save(tmp_path / "a.npy", ARRAYS["floats"])
    if fits:
        read_array(tmp_path / "a.npy", shape, kind)
    else:
        with pytest.raises(UsageError, match=r"a\.npy is float64 \(3, 4\); .* is needed"):
            read_array(tmp_path / "a.npy", shape, kind)


def with_header(path: Path, header: str, data: bytes = b"", version: int = 1) -> Path:
    text = header.encode("latin-1")
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000)}",  # 8e18 bytes
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4, 8)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (100000,)}",  # 800 kB, where a few bytes are
        "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 100000000000000000000000000)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': 3}",
        "{'descr': '<f8', 'fortran_order': 0, 'shape': (1,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<U99999999', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f8', 'shape': (1,)}",
        "(" * 5000,
        "{'descr'",
        "",
        "\x00\x00",
        "9" * 9000,
    ],
)
def test_a_header_that_cannot_be_is_refused_before_memory_is_taken(tmp_path, header):
    with pytest.raises(UsageError, match=r"a\.npy is damaged"):
        read_array(with_header(tmp_path / "a.npy", header, bytes(64)))


def test_a_compressed_array_cannot_promise_more_than_its_bytes_can_hold(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros(1000))
    data = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
        member.write(bytes(1000))
    with open_arrays(path) as arrays, pytest.raises(UsageError, match="truncated"):
        arrays.read("a")
    path.write_bytes(data)
    assert read_array(path).shape == (1000,)


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([object()]))
    with open_arrays(tmp_path / "a.npz") as arrays, pytest.raises(UsageError, match="plain numbers or text"):
        arrays.read("a")


def test_what_is_no_array_file_is_refused_with_what_it_is(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npy").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    np.savez(tmp_path / "two.npz", a=1, b=2)
    os.mkfifo(tmp_path / "pipe.npy")  # opening it would wait for ever
    for name, message in (
        ("text.npz", "cannot be read as .npz or .npy"),
        ("empty.npy", "cannot be read as .npz or .npy"),
        ("other.zip", "'readme.txt', which is no array"),
        ("two.npz", "holds 2 arrays; a single one"),
        ("none.npy", "is not a file"),
        ("pipe.npy", "is not a file"),
    ):
        with pytest.raises(UsageError, match=message):
            read_array(tmp_path / name)
    with open_arrays(tmp_path / "two.npz") as arrays, pytest.raises(UsageError, match="holds a, b, not mu"):
        arrays.read("mu")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_in_an_archive_is_found_by_its_checksum(tmp_path, save):
    rows = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    save(tmp_path / "a.npz", arr_0=rows)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[8000] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with open_arrays(tmp_path / "a.npz") as arrays:
        with pytest.raises(UsageError, match="is damaged"):
            arrays.read()
        with pytest.raises(UsageError, match="is damaged"):
            list(arrays.rows(range(20)))


def test_rows_of_any_type_can_be_written_as_they_come(tmp_path):
    with NpzWriter(tmp_path / "a.npz", (3, 2), dtype=np.int64) as writer:
        writer.add(np.array([[1, 2]]))
        writer.add(np.array([[3, 4], [5, 6]]))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_0"], [[1, 2], [3, 4], [5, 6]])


@counts
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed"])
def test_a_damaged_file_is_read_right_or_refused_in_one_line(tmp_path, kind, count):
    path = tmp_path / ("a.npy" if kind == "npy" else "a.npz")
    if kind == "npy":
        np.save(path, ARRAYS["bytes"])
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, **ARRAYS)

    def read(path: Path) -> dict[str, np.ndarray]:
        with open_arrays(path) as arrays:
            found = {name: arrays.read(name) for name in arrays.names}
            for name in arrays.names:
                arrays.map(name)
                shape = arrays.header(name).shape
                if shape and name != "columns":
                    list(arrays.rows(range(min(shape[0], 100)), name))
            return found

    def check(found: dict[str, np.ndarray]) -> None:
        for name, array in found.items():
            if kind != "npy" and name in ARRAYS:  # an archive has checksums
                np.testing.assert_array_equal(array, ARRAYS[name])

    survives(read, path, 1, count, check)
