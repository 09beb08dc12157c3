"""Token sets in other formats: Parquet and WebDataset."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lexel.checkpoint import atomic_write
from lexel.data.tokens.token_set import TokenSet
from lexel.errors import UsageError


def export_parquet(tokens: TokenSet, folder: str | Path, rows: int = 65536) -> list[Path]:
    """Writes a token set as Parquet: one row for each version of each image.

    Columns: `name`, `label` (class number) and `class` where there are labels, `crop`, `indices` (a list of fixed
    length, the grid row by row). What `tokens.json` says is in the schema's metadata under `lexel`.

    Returns:
        The files, of at most `rows` rows each.
    """
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("export to Parquet needs pyarrow: pip install 'lexel[tokens]'") from None
    folder = _new_folder(folder)
    files = []
    for part, numbers in enumerate(_parts(len(tokens), max(1, rows // tokens.crops))):
        repeated = np.repeat(numbers, tokens.crops)
        crops = np.tile(np.arange(tokens.crops), len(numbers))
        indices = tokens.tokens(repeated, crops).numpy().astype(tokens.facts["dtype"]).reshape(len(repeated), -1)
        columns = {
            "name": pa.array([tokens.names[number] for number in repeated]),
            "crop": pa.array(crops.astype(np.int32)),
            "indices": pa.FixedSizeListArray.from_arrays(pa.array(indices.ravel()), indices.shape[1]),
        }
        if tokens.labels is not None:
            labels = tokens.labels[repeated]
            columns["label"] = pa.array(labels.astype(np.int32))
            columns["class"] = pa.array([tokens.classes[label] for label in labels])
        table = pa.table(columns).replace_schema_metadata({"lexel": json.dumps(tokens.facts)})
        path = folder / f"tokens-{part:05d}.parquet"
        with atomic_write(path) as file:
            pq.write_table(table, file)
        files.append(path)
    return files


def export_webdataset(tokens: TokenSet, folder: str | Path, rows: int = 10000) -> list[Path]:
    """Writes a token set as WebDataset tar files: one sample for each image.

    A sample holds `indices.npy` (crops, *grid), `cls` (the class number, where there are labels) and `json` (name,
    class and the tokenizer's fingerprint). Its key is the number of the image.

    Returns:
        The files, of at most `rows` samples each.
    """
    try:
        import webdataset  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("export to WebDataset needs webdataset: pip install 'lexel[tokens]'") from None
    folder = _new_folder(folder)
    files = []
    for part, numbers in enumerate(_parts(len(tokens), rows)):
        path = folder / f"tokens-{part:05d}.tar"
        with atomic_write(path) as file, webdataset.TarWriter(file, mtime=0) as writer:
            for number in numbers:
                indices = tokens.tokens([number] * tokens.crops, np.arange(tokens.crops)).numpy()
                sample: dict[str, Any] = {
                    "__key__": f"{number:09d}",
                    "indices.npy": indices.astype(tokens.facts["dtype"]),
                    "json": {"name": tokens.names[number], "fingerprint": tokens.fingerprint},
                }
                if tokens.labels is not None:
                    sample["cls"] = int(tokens.labels[number])
                    sample["json"]["class"] = tokens.classes[sample["cls"]]
                writer.write(sample)
        files.append(path)
    return files


def _parts(count: int, size: int) -> Iterator[np.ndarray]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; give a new folder")
    return folder
