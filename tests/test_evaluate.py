"""The evaluator: results that do not depend on batches, interruptions or processes, and refusals of what would lie."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import Grey

from lexel.config import check
from lexel.data import TRANSFORMS, ArrayImages, to_images
from lexel.data.tokens import write_tokens
from lexel.errors import UsageError
from lexel.evaluate import (
    Metric,
    compare_results,
    evaluate_samples,
    evaluate_tokenizer,
    read_result,
    reference_statistics,
    write_result,
)
from lexel.losses import LPIPS
from lexel.metrics import (
    PROTOCOLS,
    MomentState,
    Protocol,
    frechet_distance_of_features,
    precision_recall,
    psnr,
    ssim,
)
from lexel.metrics.protocols import PixelRule, ScoreRule, UsageRule, protocol
from lexel.networks import FEATURE_NETWORKS, build
from lexel.tokenizer import Tokenizer, TokenizerConfig

QUICK = dataclasses.replace(  # a network of 16 features that needs no file, at 32 px
    PROTOCOLS["lexel"], name="quick", network="random", size=32, samples=20, reference_features=15, lpips=()
)


def pictures(count: int = 23, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth coloured pictures, uint8 (count, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in coarse])


def image_set(count: int = 23, size: int = 32, seed: int = 0) -> ArrayImages:
    return ArrayImages(pictures(count, size, seed), [f"{number:04}" for number in range(count)])


def save(folder: Path, array: np.ndarray) -> Path:
    folder.mkdir()
    for number, picture in enumerate(array):
        Image.fromarray(picture).save(folder / f"{number:04}.png")
    return folder


def numbers_of(result: dict) -> dict:
    """What a result says of the images, without when, where and how fast."""
    return {name: result[name] for name in ("metrics", "intervals", "data", "protocol", "network")}


def assert_same(a: dict, b: dict) -> None:
    a, b = numbers_of(a), numbers_of(b)
    assert a["data"] == b["data"]
    assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-9, abs=1e-9)
    for name, interval in a["intervals"].items():
        assert interval == pytest.approx(b["intervals"][name], rel=1e-7, abs=1e-7), name


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def extractor():
    return build("random", None, "clean", True)


# ------------------------------------------------------------------------------------------------- tokenizers


def test_the_numbers_are_those_of_the_metrics_on_the_whole_set(extractor):
    result = evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=5)
    originals = to_images(pictures())
    indices = Grey().encode(originals)
    made = Grey().decode(indices)
    rounded = ((made + 1) / 2 * 255).round() / 255 * 2 - 1
    real, fake = extractor(originals), extractor(rounded)
    counts = indices.flatten().bincount(minlength=64).double() / indices.numel()
    expected = {
        "psnr": psnr(originals, made, "round").mean(),
        "ssim": ssim(originals, made, "round", window="gaussian").mean(),
        "fd_random": frechet_distance_of_features(real.pooled, fake.pooled),
        "usage": (counts > 0).double().mean(),
        "perplexity": torch.exp(-torch.xlogy(counts, counts).sum()),
    }
    for name, value in expected.items():
        assert result["metrics"][name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert result["data"]["images"] == 23


@pytest.mark.parametrize("batch_size", [1, 7, 23, 64])
def test_the_batch_size_does_not_show(batch_size):
    expected = evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=4)
    assert_same(evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=batch_size), expected)


def test_the_order_of_files_does_not_show_but_in_scores_that_follow_it():
    forward, backward = image_set(), ArrayImages(pictures()[::-1].copy(), image_set().names)
    metrics = ("frechet", "psnr", "ssim", "usage")
    a, b = (evaluate_tokenizer(Grey(), one, QUICK, metrics=metrics) for one in (forward, backward))
    assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-9)
    assert a["data"]["fingerprint"] == b["data"]["fingerprint"]
    in_order = dataclasses.replace(QUICK, score=ScoreRule(splits=3, shuffle=False))
    scores = [
        evaluate_tokenizer(Grey(), one, in_order, metrics=["inception_score"])["metrics"]["inception_score_random"] - 1
        for one in (forward, backward)  # this network is sure of nothing: its scores are little above 1
    ]
    assert scores[0] != pytest.approx(scores[1], rel=0.01)


def test_another_picture_is_another_fingerprint():
    changed = pictures()
    changed[7, 3, 3, 0] ^= 1
    a = evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["psnr"])
    b = evaluate_tokenizer(Grey(), ArrayImages(changed, image_set().names), QUICK, metrics=["psnr"])
    assert a["data"]["fingerprint"] != b["data"]["fingerprint"]


def test_what_the_network_saw_of_real_images_is_found_again_and_changes_nothing(cache, monkeypatch):
    looks = []
    random = build("random")
    monkeypatch.setattr(type(random), "forward", count_calls(type(random).forward, looks))
    first = evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=4)
    of_both = len(looks)
    assert_same(evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=4), first)
    assert len(looks) == of_both + of_both // 2
    assert_same(evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=4, cache=False), first)
    assert len(looks) == of_both * 2 + of_both // 2
    assert len(list((cache / "statistics").iterdir())) == 1
    evaluate_tokenizer(Grey(), image_set(seed=1), QUICK)
    evaluate_tokenizer(Grey(), image_set(), dataclasses.replace(QUICK, rounding="float"))
    assert len(list((cache / "statistics").iterdir())) == 3


def count_calls(call, calls: list):
    def counted(*given):
        calls.append(1)
        return call(*given)

    return counted


class Stopped(Exception):
    pass


class Rows(Metric):
    """Moments of rows."""

    def __init__(self) -> None:
        super().__init__(None)
        self.states = {"moments": MomentState(3)}


def stop_after(count: int):
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise Stopped

    return progress


def test_an_evaluation_that_was_stopped_goes_on_and_ends_the_same(tmp_path):
    folder, windowed = tmp_path / "state", dataclasses.replace(QUICK, usage=UsageRule(window=300))
    straight = evaluate_tokenizer(Grey(), image_set(), windowed, batch_size=4)
    options = {"batch_size": 4, "resume": folder, "save_every": 0.0}
    for count in (8, 12):
        with pytest.raises(Stopped):
            evaluate_tokenizer(Grey(), image_set(), windowed, progress=stop_after(count), **options)
    seen: list[tuple[int, int]] = []
    resumed = evaluate_tokenizer(Grey(), image_set(), windowed, progress=lambda *at: seen.append(at), **options)
    assert seen == [(3, 3)]  # 8 and 12 of the 23 were there
    assert_same(resumed, straight)
    assert not folder.exists()


def test_an_evaluation_stopped_while_its_result_is_made_looks_at_nothing_again(tmp_path, monkeypatch):
    options = {"batch_size": 4, "resume": tmp_path / "state"}
    straight = evaluate_tokenizer(Grey(), image_set(), QUICK, batch_size=4)

    def stop(*given):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("lexel.evaluate.metrics.frechet.frechet_terms", stop)
        with pytest.raises(Stopped):
            evaluate_tokenizer(Grey(), image_set(), QUICK, **options)
    seen: list[tuple[int, int]] = []
    resumed = evaluate_tokenizer(Grey(), image_set(), QUICK, progress=lambda *at: seen.append(at), **options)
    assert seen == []
    assert_same(resumed, straight)
    assert not (tmp_path / "state").exists()


def test_a_partial_state_of_another_evaluation_is_refused(tmp_path):
    options = {"batch_size": 4, "resume": tmp_path / "state", "save_every": 0.0}
    with pytest.raises(Stopped):
        evaluate_tokenizer(Grey(), image_set(), QUICK, progress=stop_after(4), **options)
    with pytest.raises(UsageError, match="partial state of another evaluation"):
        evaluate_tokenizer(Grey(), image_set(seed=1), QUICK, **options)
    with pytest.raises(UsageError, match="partial state of another evaluation"):
        evaluate_tokenizer(Grey(), image_set(), dataclasses.replace(QUICK, rounding="float"), **options)


def test_parts_of_several_processes_are_taken_over_by_one_and_none_counts_twice(tmp_path):
    """Two processes of an earlier run, stopped at different places, and a leftover that the first already holds."""
    from lexel.evaluate.stream import Partial, Visited

    def part(numbers: list[int]) -> tuple[dict, Visited]:
        metrics, visited = {"moments": Rows()}, Visited(10)
        metrics["moments"].states["moments"].add(torch.arange(30.0).view(10, 3)[numbers])
        visited.add(torch.zeros(len(numbers), 3, 1, 1), torch.tensor(numbers, dtype=torch.int64))
        return metrics, visited

    for name, numbers in (("part-0.pt", [0, 2, 4, 1]), ("part-1.pt", [3, 5]), ("part-2.pt", [1, 2])):
        partial = Partial(tmp_path, {})
        partial.path = tmp_path / name
        partial.save(*part(numbers))
    for _ in range(2):  # again: what the first process took over is not taken twice
        metrics, visited = part([])
        Partial(tmp_path, {}).load(metrics, visited)
        assert visited.done.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
        assert int(metrics["moments"].states["moments"].n) == 6


def test_unreadable_images_are_named_counted_and_left_out(tmp_path):
    folder = save(tmp_path / "images", pictures())
    (folder / "0003.png").write_bytes(b"no image")
    (folder / "0011.png").write_bytes((folder / "0011.png").read_bytes()[:50])
    result = evaluate_tokenizer(Grey(), folder, QUICK, metrics=["psnr"], batch_size=4)
    assert result["data"]["images"] == 21
    assert result["data"]["unreadable"]["count"] == 2
    assert set(result["data"]["unreadable"]["reasons"]) == {"0003.png", "0011.png"}
    assert any("2 images could not be read" in warning for warning in result["warnings"])
    readable = np.delete(pictures(), [3, 11], axis=0)
    expected = evaluate_tokenizer(Grey(), ArrayImages(readable, list("abcdefghijklmnopqrstu")), QUICK, metrics=["psnr"])
    assert result["metrics"]["psnr"] == pytest.approx(expected["metrics"]["psnr"], rel=1e-12)
    assert result["data"]["fingerprint"] == expected["data"]["fingerprint"]


def test_a_folder_without_a_readable_image_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"at least two readable images.*a\.png"):
        evaluate_tokenizer(Grey(), tmp_path / "images", QUICK, metrics=["psnr"])


def test_a_limit_takes_images_from_the_whole_set():
    result = evaluate_tokenizer(Grey(), image_set(), QUICK, limit=5, metrics=["psnr"])
    spaced = pictures()[[0, 4, 9, 13, 18]]
    expected = evaluate_tokenizer(Grey(), ArrayImages(spaced, list("abcde")), QUICK, metrics=["psnr"])
    assert result["data"]["images"] == 5
    assert result["data"]["fingerprint"] == expected["data"]["fingerprint"]


def test_numbers_of_another_network_carry_its_name_and_a_word_on_it():
    of_inception = dataclasses.replace(QUICK, network="inception", resize="tf1")
    named = evaluate_tokenizer(Grey(), image_set(), of_inception, network="random")
    assert named["network"]["resize"] == "clean"  # its own: the protocol's rule is about the protocol's network
    assert "fd_random" in named["metrics"]
    assert "inception_score_random" in named["metrics"]
    assert not any(name in named["metrics"] for name in ("fid", "rfid", "inception_score"))


def test_only_inceptions_numbers_have_the_published_names(monkeypatch, samples):
    class Disguised(type(build("random"))):
        name = "inception"

    monkeypatch.setitem(FEATURE_NETWORKS, "inception", Disguised)
    of_inception = dataclasses.replace(QUICK, network="inception")
    made = evaluate_tokenizer(Grey(), image_set(), of_inception, network="inception")
    assert {"rfid", "inception_score"} <= made["metrics"].keys()
    generated = evaluate_samples(samples, image_set(), of_inception, network="inception")
    assert generated["metrics"].keys() == {"fid", "sfid", "inception_score", "precision", "recall", "kid"}


def test_without_inceptions_weights_the_offline_network_is_used_and_said(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lexel.evaluate.features.networks.build", lambda name, *rest: asked.append(name) or build("random")
    )
    result = evaluate_tokenizer(Grey(), image_set(), dataclasses.replace(QUICK, network="inception"))
    assert asked == ["efficientnet_lite0"]
    assert any("whose weights are not here" in warning for warning in result["warnings"])


def test_a_pooled_psnr_is_of_the_mean_error():
    pooled = dataclasses.replace(QUICK, psnr=PixelRule(pooled=True))
    result = evaluate_tokenizer(Grey(), image_set(), pooled, metrics=["psnr"])
    originals = to_images(pictures())
    errors = ((Grey().decode(Grey().encode(originals)) - originals) / 2).square().mean()
    assert result["metrics"]["psnr"] == pytest.approx(float(-10 * errors.log10()), abs=0.01)
    mean_of_images = evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["psnr"])["metrics"]["psnr"]
    assert result["metrics"]["psnr"] < mean_of_images


def test_a_window_of_tokens_is_reported_beside_the_whole_set():
    rule = dataclasses.replace(QUICK, usage=UsageRule(window=64))
    metrics = evaluate_tokenizer(Grey(), image_set(), rule, metrics=["usage"])["metrics"]
    assert metrics["usage"] < metrics["usage_whole_set"]


def test_few_images_are_warned_of():
    few = evaluate_tokenizer(Grey(), image_set(12), QUICK)["warnings"]
    assert any("too few for the 16 features" in warning for warning in few)
    assert any("published numbers of protocol 'quick' are of 20" in warning for warning in few)
    many = evaluate_tokenizer(Grey(), image_set(23), QUICK)["warnings"]
    assert not any("too few" in warning or "published numbers" in warning for warning in many)


def test_a_perfect_tokenizer_scores_perfectly_and_its_result_can_be_written(tmp_path):
    class Perfect(Grey):
        def decode(self, indices: Tensor) -> Tensor:
            return to_images(pictures())

    result = evaluate_tokenizer(Perfect(), image_set(), QUICK, batch_size=64)
    assert math.isinf(result["metrics"]["psnr"])
    assert result["metrics"]["ssim"] == pytest.approx(1)
    assert result["metrics"]["fd_random"] == pytest.approx(0, abs=1e-8)
    assert result["intervals"]["fd_random"]["standard_error"] < 1e-8  # groups are left out on both sides
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json")["metrics"]["psnr"] is None
    assert any("reproduced exactly" in warning for warning in result["warnings"])


def test_every_frechet_distance_and_score_has_an_interval():
    intervals = evaluate_tokenizer(Grey(), image_set(), QUICK)["intervals"]
    for name in ("fd_random", "inception_score_random", "psnr", "ssim"):
        assert intervals[name]["low"] < intervals[name]["high"], name
        assert intervals[name]["standard_error"] > 0


def test_a_result_says_what_it_is_of(tmp_path):
    result = evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["frechet"])
    write_result(tmp_path / "result.json", result)
    read = json.loads((tmp_path / "result.json").read_text())
    assert read["protocol"]["name"] == "quick"
    assert read["protocol"]["transform"] == "titok"
    assert read["network"]["fingerprint"] == build("random").fingerprint
    assert read["tokenizer"] == "grey"
    assert {"lexel", "torch", "numpy", "python"} <= read["versions"].keys()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"protocol": "fid"}, "unknown protocol 'fid'; choose from adm"),
        ({"metrics": ["fid"]}, "unknown metric 'fid'; choose from"),
        ({"network": "resnet"}, "unknown feature network 'resnet'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"limit": 1}, "limit must be at least 2"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_ones(options, message):
    with pytest.raises(UsageError, match=message):
        evaluate_tokenizer(Grey(), image_set(), **{"protocol": QUICK, **options})


def test_a_protocol_of_ones_own_is_checked():
    with pytest.raises(UsageError, match="unknown rounding 'floor'"):
        protocol(dataclasses.replace(QUICK, rounding="floor"))
    with pytest.raises(UsageError, match="unknown transform 'squash'"):
        evaluate_tokenizer(Grey(), image_set(), dataclasses.replace(QUICK, transform="squash"))


# ----------------------------------------------------------------------------------------------- generated images


@pytest.fixture
def samples(tmp_path) -> Path:
    np.savez(tmp_path / "samples.npz", arr_0=pictures(21, seed=5))
    return tmp_path / "samples.npz"


def test_samples_get_the_numbers_of_the_metrics(samples, extractor):
    result = evaluate_samples(samples, image_set(), QUICK, batch_size=4)
    real, fake = (extractor(to_images(array)) for array in (pictures(), pictures(21, seed=5)))
    assert result["metrics"]["fd_random"] == pytest.approx(
        frechet_distance_of_features(real.pooled, fake.pooled), rel=1e-6
    )
    assert result["metrics"]["sfd_random"] == pytest.approx(
        frechet_distance_of_features(real.spatial, fake.spatial), rel=1e-6
    )
    assert set(result["metrics"]) == {
        f"{name}_random" for name in ("fd", "sfd", "inception_score", "precision", "recall", "kid")
    }
    assert result["reference"]["images"] == 23


def test_precision_and_recall_are_against_the_protocols_number_of_references(samples, extractor):
    whole = dataclasses.replace(QUICK, reference_features=23)
    metrics = evaluate_samples(samples, image_set(), whole, batch_size=4)["metrics"]
    real, fake = (extractor(to_images(array)).pooled for array in (pictures(), pictures(21, seed=5)))
    assert (metrics["precision_random"], metrics["recall_random"]) == precision_recall(real, fake)
    statistics = reference_statistics(image_set(), QUICK, extractor)
    assert len(statistics.features) == QUICK.reference_features


def test_the_same_samples_score_the_same_from_npz_folder_and_array(tmp_path, samples):
    folder = save(tmp_path / "folder", pictures(21, seed=5))
    np.savez_compressed(tmp_path / "small.npz", arr_0=pictures(21, seed=5))
    expected = evaluate_samples(samples, image_set(), QUICK)
    for other in (folder, tmp_path / "small.npz", image_set(21, seed=5)):
        assert_same(evaluate_samples(other, image_set(), QUICK), expected)


def test_references_are_the_same_from_images_a_folder_a_file_and_the_cache(tmp_path, samples, extractor, cache):
    expected = evaluate_samples(samples, image_set(), QUICK, cache=False)
    folder = save(tmp_path / "folder", pictures())
    np.savez(tmp_path / "images.npz", arr_0=pictures())
    for reference in (folder, tmp_path / "images.npz"):
        assert_same(evaluate_samples(samples, reference, QUICK), expected)
    cached = list((cache / "statistics").iterdir())
    assert len(cached) == 2
    seen: list[tuple[int, int]] = []
    assert_same(evaluate_samples(samples, folder, QUICK, progress=lambda *at: seen.append(at)), expected)
    assert {total for _, total in seen} == {21}  # the reference was not looked at again
    for file in cached:
        assert_same(evaluate_samples(samples, file, QUICK), expected)


def test_a_changed_file_is_not_mistaken_for_the_cached_one(tmp_path, samples):
    folder = save(tmp_path / "folder", pictures())
    before = evaluate_samples(samples, folder, QUICK)["metrics"]
    Image.fromarray(pictures(1, seed=9)[0]).save(folder / "0000.png")
    assert evaluate_samples(samples, folder, QUICK)["metrics"] != before


def test_adms_reference_gives_moments_of_all_and_features_of_its_images(tmp_path, samples, extractor):
    real = extractor(to_images(pictures(60, seed=3)))
    moments = {}
    for suffix, rows in (("", real.pooled.double()), ("_s", real.spatial.double())):
        moments[f"mu{suffix}"], moments[f"sigma{suffix}"] = rows.mean(0).numpy(), rows.T.cov().numpy()
    np.savez(tmp_path / "adm.npz", arr_0=pictures(23), **moments)
    metrics = evaluate_samples(samples, tmp_path / "adm.npz", dataclasses.replace(QUICK, reference_features=23))[
        "metrics"
    ]
    fake = extractor(to_images(pictures(21, seed=5))).pooled
    assert metrics["fd_random"] == pytest.approx(frechet_distance_of_features(real.pooled, fake), rel=1e-6)
    assert "sfd_random" in metrics
    of_23 = precision_recall(extractor(to_images(pictures(23))).pooled, fake)
    assert (metrics["precision_random"], metrics["recall_random"]) == of_23


def test_a_bare_statistics_file_gives_what_it_can_and_says_what_it_cannot(tmp_path, samples, extractor):
    rows = extractor(to_images(pictures())).pooled.double()
    np.savez(tmp_path / "fid.npz", mu=rows.mean(0).numpy(), sigma=rows.T.cov().numpy())
    result = evaluate_samples(samples, tmp_path / "fid.npz", QUICK)
    assert set(result["metrics"]) == {"fd_random", "inception_score_random"}
    left_out = [warning for warning in result["warnings"] if "is left out" in warning]
    assert len(left_out) == 3


def test_a_small_reference_is_warned_of(samples):
    few = evaluate_samples(samples, image_set(10), QUICK, metrics=["frechet"])["warnings"]
    assert any("the reference has 10 images, too few for the 16 features" in warning for warning in few)
    enough = evaluate_samples(samples, image_set(), QUICK, metrics=["frechet"])["warnings"]
    assert not any("the reference has" in warning for warning in enough)


def test_statistics_of_another_network_or_protocol_are_refused(tmp_path, samples, cache):
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UsageError, match="2048 features, random has 16"):
        evaluate_samples(samples, tmp_path / "other.npz", QUICK)
    evaluate_samples(samples, image_set(), QUICK)
    (file,) = (cache / "statistics").iterdir()
    with pytest.raises(UsageError, match="made with rounding round, protocol 'quick' has rounding float"):
        evaluate_samples(samples, file, dataclasses.replace(QUICK, rounding="float"))
    with pytest.raises(UsageError, match="was made with random"):
        evaluate_samples(samples, file, dataclasses.replace(QUICK, resize="tf1"))


def test_samples_of_other_sizes_or_shapes_are_refused(tmp_path):
    mixed = save(tmp_path / "mixed", pictures(4))
    Image.fromarray(pictures(1, size=40)[0]).save(mixed / "9999.png")
    with pytest.raises(UsageError, match="must all be 32 x 32 pixels like the first one, got 40 x 40"):
        evaluate_samples(mixed, image_set(), QUICK)
    wide = save(tmp_path / "wide", pictures(4)[:, :20])
    with pytest.raises(UsageError, match="must be square, got 20 x 32"):
        evaluate_samples(wide, image_set(), QUICK)


def test_an_evaluation_of_samples_goes_on_where_it_was_stopped(tmp_path, samples):
    options = {"batch_size": 4, "resume": tmp_path / "state", "save_every": 0.0, "cache": False}
    straight = evaluate_samples(samples, image_set(), QUICK, batch_size=4, cache=False)
    calls = [0]

    def stop_at(batch: int):
        def progress(done: int, total: int) -> None:
            calls[0] += 1
            if calls[0] == batch:
                raise Stopped

        return progress

    for batch in (3, 10):  # once in the reference, once in the samples
        with pytest.raises(Stopped):
            evaluate_samples(samples, image_set(), QUICK, progress=stop_at(batch), **options)
    assert_same(evaluate_samples(samples, image_set(), QUICK, **options), straight)


def test_trap_class_sorted_samples_score_lower_in_the_order_of_the_file(tmp_path):
    kinds = np.repeat(pictures(4, seed=2), 25, axis=0)  # four kinds of picture, sorted
    np.savez(tmp_path / "sorted.npz", arr_0=kinds)
    np.savez(tmp_path / "shuffled.npz", arr_0=kinds[np.random.default_rng(0).permutation(100)])
    ordered = dataclasses.replace(QUICK, score=ScoreRule(splits=None, split_size=25, shuffle=False))
    dealt = dataclasses.replace(QUICK, score=ScoreRule(splits=4, shuffle=True))

    def score(name: str, rule: Protocol) -> float:
        result = evaluate_samples(tmp_path / name, image_set(), rule, metrics=["inception_score"])
        return result["metrics"]["inception_score_random"]

    assert score("sorted.npz", ordered) == pytest.approx(1, abs=1e-6)
    assert score("shuffled.npz", ordered) > 1 + 1e-5
    assert score("sorted.npz", dealt) > 1 + 1e-5


# ------------------------------------------------------------------------------------------------- comparing results


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    return evaluate_tokenizer(Grey(), image_set(), QUICK, metrics=["psnr", "frechet"])


def test_comparable_results_are_put_side_by_side(result):
    class Coarse(Grey):
        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images) // 16 * 16

    other = evaluate_tokenizer(Coarse(), image_set(), QUICK, metrics=["psnr"])
    difference = compare_results(result, other)["psnr"]
    assert difference.difference == other["metrics"]["psnr"] - result["metrics"]["psnr"] < 0
    assert difference.distinct
    assert not compare_results(result, result)["psnr"].distinct


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r["protocol"].update(name="ibq"), "different protocols cannot be compared: quick and ibq"),
        (lambda r: r["protocol"].update(rounding="float"), "rounding is round in one and float in the other"),
        (lambda r: r["network"].update(name="inception"), "the network differs"),
        (lambda r: r["network"].update(fingerprint="0"), "the network weights differs"),
        (lambda r: r["data"].update(fingerprint="0"), "the data differs"),
        (lambda r: r.update(kind="generation"), "different kinds cannot be compared"),
    ],
)
def test_results_that_are_not_on_one_scale_are_refused_with_the_reason(result, change, reason):
    other = json.loads(json.dumps(result))
    change(other)
    with pytest.raises(UsageError, match=reason):
        compare_results(json.loads(json.dumps(result)), other)


def test_a_result_is_compared_with_one_from_a_file(tmp_path, result):
    write_result(tmp_path / "result.json", result)
    assert compare_results(read_result(tmp_path / "result.json"), result)["psnr"].difference == 0


def test_other_numbers_of_samples_are_not_compared(samples):
    a = evaluate_samples(samples, image_set(), QUICK, metrics=["frechet"])
    b = evaluate_samples(samples, image_set(), QUICK, metrics=["frechet"], limit=18)
    with pytest.raises(UsageError, match="21 and 18 images"):
        compare_results(a, b)


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UsageError, match="is no result"):
        read_result(tmp_path / "a.json")
    with pytest.raises(UsageError, match="is not a file"):
        read_result(tmp_path / "b.json")


# ------------------------------------------------------------------------------------- with a tokenizer of ours


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    config = check(
        {
            "autoencoder": {"width": 8, "multipliers": [1, 2], "attention_levels": [], "z_channels": 8, "groups": 4},
            "quantizer": {"kind": "residual", "codebook_size": 16, "codebook_dim": 8, "depth": 2},
        },
        TokenizerConfig,
        "test",
    )
    return Tokenizer(config).eval()


def test_a_tokenizer_with_several_books_is_measured(tokenizer):
    result = evaluate_tokenizer(tokenizer, image_set(), QUICK, batch_size=6)
    indices = tokenizer.encode(to_images(pictures()))
    used = sum(len(indices[:, book].unique()) for book in range(2))
    assert result["metrics"]["usage"] == used / 32
    assert result["tokenizer"] == tokenizer.fingerprint()


def test_token_sets_score_as_the_images_they_decode_to(tmp_path, tokenizer):
    images = image_set(21, seed=5)
    write_tokens(
        tmp_path / "tokens",
        images,
        TRANSFORMS["titok"](32),
        tokenizer.encode,
        grid=tokenizer.encode(to_images(pictures(1))).shape[1:],
        codebook_size=tokenizer.codebook_size,
        fingerprint=tokenizer.fingerprint(),
    )
    unrounded = dataclasses.replace(QUICK, rounding="float")
    from_tokens = evaluate_samples(tmp_path / "tokens", image_set(), unrounded, tokenizer=tokenizer, batch_size=4)
    decoded = tokenizer.decode(tokenizer.encode(to_images(pictures(21, seed=5))))
    features = build("random", None, "clean", True)(decoded).pooled
    reference = build("random", None, "clean", True)(to_images(pictures())).pooled
    expected = frechet_distance_of_features(features, reference)
    assert from_tokens["metrics"]["fd_random"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UsageError, match="holds tokens; give the tokenizer"):
        evaluate_samples(tmp_path / "tokens", image_set(), unrounded)
    with pytest.raises(UsageError, match="made by another tokenizer"):
        evaluate_samples(tmp_path / "tokens", image_set(), unrounded, tokenizer=Grey())


def test_lpips_is_the_mean_over_images_and_carries_its_networks_name():
    with_lpips = dataclasses.replace(QUICK, lpips=("alex",))
    result = evaluate_tokenizer(Grey(), image_set(4), with_lpips, metrics=["lpips"], batch_size=3)
    originals = to_images(pictures(4))
    made = Grey().decode(Grey().encode(originals))
    expected = float(LPIPS("alex")(originals, made).mean())
    assert result["metrics"] == {"lpips_alex": pytest.approx(expected, rel=1e-5)}
    assert len(result["lpips"]["alex"]) == 64


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_cpu(tokenizer):
    here, there = (evaluate_tokenizer(tokenizer, image_set(), QUICK, device=device) for device in ("cpu", "cuda"))
    assert there["metrics"] == pytest.approx(here["metrics"], rel=1e-3)
    assert there["data"]["fingerprint"] == here["data"]["fingerprint"]
