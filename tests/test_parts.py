"""Bulk work in parts: nothing twice, nothing left out, and the bytes of one process, whatever was killed."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from test_data_tokens import contents, levels, write

from lexel.data.tokens import TokenSet, merge_tokens
from lexel.errors import UsageError
from lexel.parts import Part


@pytest.mark.parametrize(
    "total, block, count", [(0, 4, 3), (1, 4, 3), (100, 7, 1), (100, 7, 4), (100, 1, 13), (5, 64, 2)]
)
def test_parts_cover_every_number_once_and_are_cut_at_blocks(total, block, count):
    ranges = [Part(number, count).blocks(total, block) for number in range(1, count + 1)]
    assert [number for part in ranges for number in part] == list(range(total))
    assert all(part.start % block == 0 for part in ranges if part)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "a/b", "1/2/3", "-1/2", " 1/2", "1.0/2"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(UsageError, match="is no part; write I/N"):
        Part.parse(text)


def test_a_part_is_written_as_it_is_read():
    assert Part.parse("3/16") == Part(3, 16)
    assert str(Part(3, 16)) == "3/16"


# ------------------------------------------------------------------------------------------------ token sets


def killed_after(calls: int, folder: Path, **options) -> int:
    """Writes tokens in a process that is killed at a batch; the signal that ended it, as a negative number."""

    def work() -> None:
        left = iter(range(calls))

        def encode(images):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return levels(images)

        write(folder, encode=encode, **options)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode or 0


@pytest.mark.parametrize("apart", [True, False], ids=["a folder each", "one folder"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_parts_of_which_one_is_killed_and_run_again_give_the_bytes_of_one_process(tmp_path, calls, apart):
    options = {"shard_size": 2, "batch_size": 1, "crops": 2}  # five shards, of four calls each
    write(tmp_path / "one", **options)
    folders = [tmp_path / (f"part-{number}" if apart else "all") for number in range(3)]
    assert killed_after(4 + calls, folders[1], rank=1, processes=3, **options) == -signal.SIGKILL
    write(folders[0], rank=0, processes=3, **options)
    write(folders[2], rank=2, processes=3, **options)
    with pytest.raises(UsageError, match=r"1 of 5 shards are in none of the parts \(counted from 0: 4\)"):
        merge_tokens(tmp_path / "merged", folders)
    seen = []
    write(folders[1], rank=1, processes=3, encode=lambda images: seen.append(len(images)) or levels(images), **options)
    assert sum(seen) == 4  # the shard that was whole is not encoded again
    merge_tokens(tmp_path / "merged", folders)
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")
    if not apart:
        assert contents(folders[0]) == contents(tmp_path / "one")


def test_parts_merge_into_one_of_them(tmp_path):
    write(tmp_path / "one")
    for rank in range(2):
        write(tmp_path / f"part-{rank}", rank=rank, processes=2)
    merge_tokens(tmp_path / "part-0", [tmp_path / "part-0", tmp_path / "part-1"])
    assert contents(tmp_path / "part-0") == contents(tmp_path / "one")


def test_a_damaged_part_and_parts_of_other_encodings_are_named_and_not_merged(tmp_path):
    for rank in range(2):
        write(tmp_path / f"part-{rank}", rank=rank, processes=2)
    write(tmp_path / "other", rank=1, processes=2, fingerprint="def")
    with pytest.raises(UsageError, match=r"parts of different encodings \(fingerprint: def \S*other, abc \S*part-0\)"):
        merge_tokens(tmp_path / "merged", [tmp_path / "part-0", tmp_path / "other"])
    with pytest.raises(UsageError, match="holds no tokens; give folders"):
        merge_tokens(tmp_path / "merged", [tmp_path / "part-0", tmp_path])
    path = tmp_path / "part-1" / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match=r"shard-00001.npy is damaged"):
        merge_tokens(tmp_path / "merged", [tmp_path / "part-0", tmp_path / "part-1"])
    with pytest.raises(UsageError, match="not finished"):
        TokenSet.open(tmp_path / "merged")
