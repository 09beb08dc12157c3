"""Statistics and samples in .npz files, in the layouts of other evaluators."""

import zipfile

import numpy as np
import pytest
import torch
from fuzz import counts, survives

from lexel.arrays import NpzWriter
from lexel.errors import UsageError
from lexel.metrics import Moments, NpzImages, ReferenceStatistics, read_statistics, write_statistics

NETWORK = {"name": "random", "fingerprint": "0" * 64, "dims": 5, "resize": "clean", "logit_bias": True}


def moments(dim: int, n: int | None = 50) -> Moments:
    rows = torch.randn(50, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    return Moments(rows.mean(0), rows.T.cov(), n)


def pictures(n: int = 11) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), np.uint8)


def test_statistics_come_back_as_they_were(tmp_path):
    features = torch.randn(7, 5)
    written = ReferenceStatistics(moments(5), moments(3), features, {"network": NETWORK})
    write_statistics(tmp_path / "a.npz", written)
    read = read_statistics(tmp_path / "a.npz")
    for one, other in ((read.pooled, written.pooled), (read.spatial, written.spatial)):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.covariance, other.covariance)
        assert one.n == 50
    assert torch.equal(read.features, features)
    assert read.about == {"network": NETWORK}


def test_others_read_our_file_by_its_keys(tmp_path):
    write_statistics(tmp_path / "a.npz", ReferenceStatistics(moments(5), moments(3)))
    with np.load(tmp_path / "a.npz") as archive:  # as ADM's evaluator, pytorch-fid and clean-fid do
        assert archive["mu"].shape == (5,)
        assert archive["sigma"].shape == (5, 5)
        assert archive["mu_s"].shape == (3,)
        assert archive["sigma_s"].dtype == np.float64


def test_adms_file_is_read_with_its_images(tmp_path):
    images, pooled, spatial = pictures(), moments(5), moments(3)
    np.savez(
        tmp_path / "adm.npz",
        mu=pooled.mean.float().numpy(),
        sigma=pooled.covariance.numpy(),
        mu_s=spatial.mean.numpy(),
        sigma_s=spatial.covariance.numpy(),
        arr_0=images,
    )
    read = read_statistics(tmp_path / "adm.npz")
    assert read.pooled.n is None
    assert read.pooled.mean.dtype == torch.float64
    torch.testing.assert_close(read.spatial.covariance, spatial.covariance)
    _, batch = next(NpzImages(tmp_path / "adm.npz").batches(range(11), 20))
    np.testing.assert_array_equal(batch, images)


def test_pytorch_fids_and_clean_fids_files_are_read(tmp_path):
    np.savez_compressed(tmp_path / "fid.npz", mu=moments(5).mean.numpy(), sigma=moments(5).covariance.numpy())
    read = read_statistics(tmp_path / "fid.npz")
    torch.testing.assert_close(read.pooled.covariance, moments(5).covariance)
    assert read.spatial is None
    assert read.features is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_a_few_at_a_time_and_by_number(tmp_path, save):
    images = pictures()
    save(tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(11))
    samples = NpzImages(tmp_path / "samples.npz")
    assert len(samples) == 11
    seen = list(samples.batches(range(1, 11, 3), batch_size=2))
    assert [numbers.tolist() for numbers, _ in seen] == [[1, 4], [7, 10]]
    for numbers, batch in seen:
        np.testing.assert_array_equal(batch, images[numbers.numpy()])


def test_a_written_set_is_numpys_and_ours(tmp_path):
    images = pictures()
    with NpzWriter(tmp_path / "samples.npz", images.shape) as writer:
        for start in range(0, 11, 4):
            writer.add(images[start : start + 4])
    with np.load(tmp_path / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], images)
    _, batch = next(NpzImages(tmp_path / "samples.npz").batches([3], 1))
    np.testing.assert_array_equal(batch[0], images[3])


def write(path, images: np.ndarray, promised: int) -> None:
    with NpzWriter(path, (promised, 4, 5, 3)) as writer:
        writer.add(images)


def test_a_set_that_ends_early_or_is_of_another_shape_leaves_no_file(tmp_path):
    with pytest.raises(UsageError, match="was to hold 11 images, got 4"):
        write(tmp_path / "a.npz", pictures(4), promised=11)
    with pytest.raises(UsageError, match="images must be uint8"):
        write(tmp_path / "a.npz", pictures(4)[:, :3], promised=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_file_is_refused(tmp_path, save):
    path = tmp_path / "samples.npz"
    save(path, arr_0=pictures())
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UsageError, match=r"samples\.npz"):
        NpzImages(path)


def test_a_member_shorter_than_its_header_says_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1000, 4, 5, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(b"x" * 100)
    with pytest.raises(UsageError, match="truncated"):
        list(NpzImages(tmp_path / "a.npz").batches(range(1000), 10))


def test_what_is_no_such_file_is_refused_with_what_it_holds(tmp_path):
    np.savez(tmp_path / "other.npz", labels=np.arange(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    (tmp_path / "text.npz").write_text("hello")
    for call, message in (
        (lambda: read_statistics(tmp_path / "other.npz"), "holds labels, not mu, sigma"),
        (lambda: read_statistics(tmp_path / "wrong.npz"), r"sigma is float64 \(2, 2\); floating \(3, 3\) is needed"),
        (lambda: read_statistics(tmp_path / "text.npz"), "cannot be read"),
        (lambda: read_statistics(tmp_path / "none.npz"), "is not a file"),
        (lambda: NpzImages(tmp_path / "other.npz"), "has labels, not arr_0"),
        (lambda: NpzImages(tmp_path / "float.npz"), r"uint8 \(N, H, W, 3\) is needed"),
        (lambda: write_statistics(tmp_path / "a.pt", ReferenceStatistics(moments(2))), r"written as \.npz"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_a_file_that_would_run_code_is_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([object()]), sigma=np.zeros((1, 1)))
    with pytest.raises(UsageError, match="damaged"):
        read_statistics(tmp_path / "evil.npz")


@pytest.mark.parametrize(
    "about",
    [
        "[]",
        "{",
        '{"network": "random"}',
        '{"network": {"name": 3, "fingerprint": "0", "resize": "clean"}}',
        '{"network": {}}',
        '{"choices": []}',
    ],
)
def test_what_a_file_says_of_itself_is_checked(tmp_path, about):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3), about=np.array(about))
    with pytest.raises(UsageError, match=r"a\.npz is damaged: about"):
        read_statistics(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.full(3, np.nan)},
        {"n": np.int64(1)},
        {"n": np.float64(50)},
        {"features": np.zeros((4, 2))},
        {"mu_s": np.zeros(2), "sigma_s": np.zeros((3, 3))},
        {"mu": np.zeros(3, np.int64)},
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **{"mu": np.zeros(3), "sigma": np.eye(3)} | arrays)
    with pytest.raises(UsageError, match=r"a\.npz"):
        read_statistics(tmp_path / "a.npz")


@counts
def test_damaged_statistics_are_read_right_or_refused_in_one_line(tmp_path, count):
    written = ReferenceStatistics(moments(5), moments(3), torch.randn(7, 5), {"network": NETWORK, "choices": {}})
    write_statistics(tmp_path / "a.npz", written)

    def check(read: ReferenceStatistics) -> None:
        assert torch.equal(read.pooled.covariance, written.pooled.covariance)

    survives(read_statistics, tmp_path / "a.npz", 2, count, check)


@counts
def test_damaged_image_sets_are_read_right_or_refused_in_one_line(tmp_path, count):
    np.savez_compressed(tmp_path / "a.npz", arr_0=pictures())

    def read(path) -> np.ndarray:
        samples = NpzImages(path)
        return np.concatenate([images for _, images in samples.batches(range(len(samples)), 4)])

    survives(read, tmp_path / "a.npz", 3, count, lambda images: np.testing.assert_array_equal(images, pictures()))
