"""Token sets in other formats: Parquet and WebDataset."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lexel.checkpoint import atomic_write
from lexel.data.tokens.sequences import SequenceFormat, new_folder
from lexel.data.tokens.token_set import TokenSet
from lexel.errors import UsageError

AT_ONCE = 4096  # images of one grid that are read together


def export_parquet(
    tokens: TokenSet, folder: str | Path, rows: int = 65536, sequences: SequenceFormat | None = None
) -> list[Path]:
    """Writes a token set as Parquet: one row for each version of each image.

    Columns: `name`, `label` (class number) and `class` where there are labels, `caption` where there are captions,
    `caption_features` where there are features of captions (float16, a caption's rows one after the other), `crop`,
    `indices` (a list of fixed length, the grid row by row), and `sequence` (ids for a language model) if a format is
    given; its `sides` must not be 0 where images have grids of their own. Those have lists of their own lengths, with
    their `grid`, and `height` and `width` in pixels before padding. What `tokens.json` says is in the schema's metadata
    under `lexel`.

    Returns:
        The files, of at most `rows` rows each.
    """
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("export to Parquet needs pyarrow: pip install 'lexel[tokens]'") from None
    folder = new_folder(folder)
    files = []
    for part, numbers in enumerate(_parts(len(tokens), max(1, rows // tokens.crops))):
        repeated = np.repeat(numbers, tokens.crops)
        crops = np.tile(np.arange(tokens.crops), len(numbers))
        columns = {
            "name": pa.array([_text(tokens.names[number]) for number in repeated]),
            "crop": pa.array(crops.astype(np.int32)),
        }
        kind = tokens.facts["dtype"]
        if tokens.sizes is None:
            indices = list(tokens.tokens(repeated, crops).numpy().astype(kind))
            flat = np.concatenate([one.ravel() for one in indices])
            columns["indices"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), indices[0].size)
        else:
            runs = tokens.alike(numbers, AT_ONCE)
            indices = [one for run in runs for one in tokens.tokens(run).numpy().astype(kind)]
            columns["indices"] = pa.array([one.ravel() for one in indices], pa.list_(pa.from_numpy_dtype(kind)))
            columns["grid"] = pa.array([list(one.shape) for one in indices], pa.list_(pa.int32()))
            for axis, name in enumerate(("height", "width")):
                columns[name] = pa.array(tokens.sizes[numbers, axis].astype(np.int32))
        if tokens.labels is not None:
            labels = tokens.labels[repeated]
            columns["label"] = pa.array(labels.astype(np.int32))
            columns["class"] = pa.array([_text(tokens.classes[label]) for label in labels])
        if tokens.captions is not None:
            columns["caption"] = pa.array([_text(tokens.captions[number]) for number in repeated])
        features = tokens.features(repeated)
        if features is not None:
            rows_of = features.flatten(1).numpy()
            flat = pa.array(rows_of.ravel(), pa.float16())
            columns["caption_features"] = pa.FixedSizeListArray.from_arrays(flat, rows_of.shape[1])
        if sequences is not None:
            columns["sequence"] = pa.array([_sequence(tokens, one[None], sequences)[0] for one in indices])
        table = pa.table(columns).replace_schema_metadata({"lexel": json.dumps(tokens.facts)})
        path = folder / f"tokens-{part:05d}.parquet"
        with atomic_write(path) as file:
            pq.write_table(table, file)
        files.append(path)
    return files


def export_webdataset(
    tokens: TokenSet, folder: str | Path, rows: int = 10000, sequences: SequenceFormat | None = None
) -> list[Path]:
    """Writes a token set as WebDataset tar files: one sample for each image.

    A sample holds `indices.npy` (crops, *grid), `cls` (the class number, where there are labels) and `json` (name,
    class and the tokenizer's fingerprint; height and width in pixels before padding, where images have grids of their
    own), `txt` (the caption, where there are captions), `caption.npy` (float16, the
    features (length, channels) of the caption, where there are any) and, if a format is given, `sequence.npy` (crops,
    length) with ids for a language model. Its key is the number of the image.

    Returns:
        The files, of at most `rows` samples each.
    """
    try:
        import webdataset  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError("export to WebDataset needs webdataset: pip install 'lexel[tokens]'") from None
    folder, sizes = new_folder(folder), tokens.sizes
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
                if sizes is not None:
                    sample["json"]["height"], sample["json"]["width"] = sizes[number].tolist()
                if tokens.labels is not None:
                    sample["cls"] = int(tokens.labels[number])
                    sample["json"]["class"] = tokens.classes[sample["cls"]]
                if tokens.captions is not None:
                    sample["txt"] = _text(tokens.captions[number])
                features = tokens.features([number])
                if features is not None:
                    sample["caption.npy"] = features[0].numpy()
                if sequences is not None:
                    sample["sequence.npy"] = _sequence(tokens, indices, sequences)
                writer.write(sample)
        files.append(path)
    return files


def _sequence(tokens: TokenSet, indices: np.ndarray, form: SequenceFormat) -> np.ndarray:
    """Ids (N, length) of indices (N, *grid) in a vocabulary, whatever grid an image of its own has."""
    return (form.of_grid(indices.shape[1:]) if tokens.own_grids else form).ids(indices).astype(form.dtype)


def _parts(count: int, size: int) -> Iterator[np.ndarray]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


def _text(name: str) -> str:
    """A name as text: bytes that are no UTF-8, which names of files may have, as escapes, as in JSON."""
    return name.encode("utf-8", "backslashreplace").decode()
