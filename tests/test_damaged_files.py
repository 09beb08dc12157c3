"""Files that Lexel reads back and that may be damaged: a right result, or one line.

Pictures, lists, shards, arrays, tokens, recipes, logs, weights and results have such tests beside their readers'.
"""

import json
import pickle

import numpy as np
import pytest
import torch
from fuzz import counts, survives
from published_layouts import random_state, vqgan_shapes
from safetensors.torch import save_file

from lexel.compare.plan import read_variants
from lexel.compare.run import read_finished
from lexel.compare.summary import summarise
from lexel.convert import convert
from lexel.data.captions import CaptionFile
from lexel.errors import UsageError
from lexel.evaluate import write_result
from lexel.leaderboard import write_leaderboard
from lexel.networks import weights
from lexel.networks.backbones import published_range
from lexel.regular import sha256_of
from lexel.sample_parts import merge_samples
from lexel.samples import read_tokens


@counts
def test_a_damaged_description_of_samples_merges_them_rightly_or_refuses(tmp_path, count):
    rows = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    for number, begin in enumerate((0, 2), 1):
        path = tmp_path / f"a.part-{number}-of-2.npy"
        np.save(path, rows[begin : begin + 2])
        about = {"format": "lexel samples", "part": number, "parts": 2, "images": [begin, begin + 2], "of": 4}
        sha = sha256_of(path)
        path.with_name(f"{path.name}.json").write_text(json.dumps({**about, "identity": "f" * 64, "sha256": sha}))
    parts = sorted(tmp_path.glob("*.npy"))

    def merge(_):
        merge_samples(tmp_path / "out" / "a.npy", parts)
        return np.load(tmp_path / "out" / "a.npy")

    def right(merged):
        np.testing.assert_array_equal(merged, rows)

    (tmp_path / "out").mkdir()
    assert survives(merge, parts[1].with_name(f"{parts[1].name}.json"), 1, count, right) > 0
    survives(merge, parts[1], 2, count, right)


@counts
def test_damaged_tokens_of_samples_are_read_or_refused(tmp_path, count):
    np.save(tmp_path / "a.npy", np.arange(24).reshape(2, 3, 4))

    def right(tokens):
        assert tokens.dtype == torch.int64
        assert tokens.ndim == 3

    survives(read_tokens, tmp_path / "a.npy", 3, count, right)


@counts
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_features_of_captions_are_read_or_refused(tmp_path, count, packed):
    names = np.array(["a", "b"])
    shape = (5, 3) if packed else (2, 3, 3)
    features = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.savez(tmp_path / "a.npz", features=features, lengths=np.array([2, 3]), names=names)

    def read(path):
        captions = CaptionFile(path)
        return captions.rows(range(len(captions))), captions

    def right(found):
        rows, captions = found
        assert rows.shape == (len(captions), captions.length, captions.channels)

    survives(read, tmp_path / "a.npz", 4, count, right)


@counts
def test_a_damaged_result_of_a_comparison_is_summarised_or_refused(tmp_path, count):
    found = {"name": "vq-16x4-seed0", "quantizer": "vq", "codebook_size": 16, "codebook_dim": 4, "seed": 0}
    found |= {"recipe": {"train": {"steps": 1}}, "asked": [["psnr"], None], "stopped": None, "bits": 4.0}
    found |= {"metrics": {"psnr": 20.5, "usage": 1.0}, "images_per_second": 5.5, "peak_memory_bytes": None}
    write_result(tmp_path / "result.json", found)
    survives(lambda path: summarise([found, read_finished(path)]), tmp_path / "result.json", 5, count)


@counts
def test_damaged_variants_are_read_or_refused(tmp_path, count):
    path = tmp_path / "variants.toml"
    path.write_text('[ibq_st]\nkind = "ibq"\noptions = { temperature = 2.0 }\nweights = { codebook = 0.5 }\n')
    survives(read_variants, path, 6, count)


@counts
def test_a_damaged_result_gives_a_leaderboard_or_one_line(tmp_path, count):
    found = {"kind": "reconstruction", "metrics": {"psnr": 20.0, "lpips_vgg": 0.1}, "warnings": []}
    found |= {"intervals": {"psnr": {"low": 19.0, "high": 21.0, "standard_error": 0.5}}, "network": None}
    found |= {"protocol": {"name": "lexel"}, "data": {"images": 5, "fingerprint": "f" * 64}}
    found |= {"tokenizer": "a" * 64, "tokens": {"bits": 640.0}, "versions": {"lexel": "1"}, "device": "cpu"}
    for name in ("a", "b"):
        write_result(tmp_path / f"{name}.json", found)
    results = {name: tmp_path / f"{name}.json" for name in ("a", "b")}
    assert survives(lambda _: write_leaderboard(results, tmp_path / "page"), results["b"], 7, count) > 0


@counts
def test_a_damaged_cache_of_weights_is_the_published_one_or_refused(tmp_path, count, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path))
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    published = weights.PUBLISHED["dists"]
    path = tmp_path / "networks" / "dists.safetensors"
    weights._write_cached(path, tensors, published.sha256)

    def right(found):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    read = weights._read_cached
    survives(lambda path: read(path, "dists", published), path, 8, count, right)


@counts
def test_a_damaged_pickle_of_arrays_is_read_or_refused(tmp_path, count):
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"a": {"b": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}))
    survives(weights.read_arrays, path, 9, count)


class _FlaggedType:
    def __reduce__(self):
        return np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 63)


class _FlaggedArray:
    def __reduce__(self):
        reconstruct = np.zeros(1).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, (2,), _FlaggedType(), False, bytes(8))


def test_a_pickle_of_arrays_cannot_set_the_internal_flags_of_a_type(tmp_path):
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"a": _FlaggedArray()}))
    found = weights.read_arrays(path)["a"]
    assert found.dtype.flags == 0
    np.testing.assert_array_equal(found, np.zeros(2, np.float32))


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.bias"])
@pytest.mark.parametrize("change", [torch.Tensor.flatten, lambda t: t[None], lambda t: t[:0], lambda t: t.sum()])
def test_a_published_checkpoint_of_other_shapes_is_refused_in_one_line(tmp_path, name, change):
    tensors = random_state(vqgan_shapes(8, [1, 2], 1, [], 6, 4) | {"quantize.embedding.weight": (16, 4)})
    save_file({**tensors, name: change(tensors[name]).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as refused:
        convert(tmp_path / "model.safetensors", "vqgan")
    assert "\n" not in str(refused.value)


@counts
def test_the_published_range_of_a_damaged_preprocessor_is_three_numbers_or_refused(tmp_path, count):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3], "size": 224}))

    def right(found):
        mean, deviation = found
        assert len(mean) == len(deviation) == 3
        assert all(isinstance(value, int | float) for value in (*mean, *deviation))
        assert all(value > 0 for value in deviation)

    survives(lambda _: published_range(tmp_path, "dino"), path, 11, count, right)


def test_an_error_says_what_a_user_can_do(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UsageError, match="delete it to train and measure that run again"):
        read_finished(tmp_path / "result.json")
