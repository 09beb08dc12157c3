"""Usage, prune and grow on whole models: tokenizers, token sets, generators, and the commands."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_generators import NETWORKS, make
from torch import Tensor

from lexel import codec, load
from lexel.autoencoders import VQGANConfig
from lexel.bank import make_bank
from lexel.cli import main
from lexel.cli.options import PIXELS, MaxPixels
from lexel.codebooks import grow, prune, split_codes, usage, used_codes, write_pruned
from lexel.codec import Codec
from lexel.data import PIXEL_LIMIT, open_images, to_images
from lexel.data.tokens import TokenSet
from lexel.errors import UsageError
from lexel.evaluate import METRICS, Options, evaluate_tokenizer
from lexel.generators import FREE, Generator
from lexel.loading import own_transform
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer, TokenizerConfig

K, D, PICTURES = 64, 4, 12
SIZES = {"width": 8, "multipliers": [1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4, "groups": 4}


def tokenizer(kind: str = "vq", **options) -> Tokenizer:
    """Random weights whose latents are spread like the codes, so that many codes are in use."""
    torch.manual_seed(0)
    table = {"kind": kind, "codebook_size": K, "codebook_dim": D, **options}
    model = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**SIZES), quantizer=table))
    with torch.no_grad():
        for parameter in model.quantizer.parameters():
            parameter.normal_(0, 0.5)
    model.provenance = {"size": 16, "transform": "crop"}
    return model.eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        (folder / f"class{number % 2}").mkdir(exist_ok=True)
        coarse = generator.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((20, 20)).save(folder / f"class{number % 2}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    whole = tokenizer()
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, model, pictures) -> TokenSet:
    folder = tmp_path_factory.mktemp("tokens") / "train"
    whole = load(model)
    return Codec(whole, runtime("cpu"), own_transform(whole)).encode(pictures, folder, crops=2, shard_size=5)


def lexel(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["lexel", *map(str, arguments)])
    main()


def refused(monkeypatch, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        lexel(monkeypatch, *arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ usage


def test_usage_of_tokens_is_what_the_token_set_counts(tokens):
    found = usage(tokens)
    assert torch.equal(found.counts.tokens, tokens.histogram())
    assert found.unseen.pictures == PICTURES  # both crops of a picture are one picture
    assert found.fingerprint == tokens.fingerprint


def test_usage_of_pictures_is_that_of_their_tokens(model, pictures, tmp_path):
    whole = load(model)
    single = Codec(whole, runtime("cpu"), own_transform(whole)).encode(pictures, tmp_path / "tokens")
    options = Options(batch_size=5, device="cpu")
    assert usage(pictures, whole, options=options).unseen == usage(single).unseen


def test_an_interrupted_count_goes_on_where_it_was(model, pictures, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise Stopped

    whole, looked_at = load(model), []
    options = Options(batch_size=2, device="cpu", resume=tmp_path / "partial", save_every=0)
    with pytest.raises(Stopped):
        usage(pictures, whole, options=options.changed({"progress": stop}))
    resumed = usage(pictures, whole, options=options.changed({"progress": lambda done, total: looked_at.append(total)}))
    assert set(looked_at) == {PICTURES - 6}
    assert resumed.unseen == usage(pictures, whole, options=Options(device="cpu")).unseen
    assert not (tmp_path / "partial").exists()


def test_evaluations_can_take_the_share_of_unseen_codes(model, pictures):
    assert "unseen_codes" in METRICS
    whole = load(model)
    result = evaluate_tokenizer(whole, pictures, metrics=["unseen_codes"], device="cpu", cache=False, size=16)
    assert set(result["metrics"]) == {"unseen_share", "reachable_codes"}
    interval = result["intervals"]["unseen_share"]
    assert interval["low"] <= result["metrics"]["unseen_share"] <= interval["high"]


# ------------------------------------------------------------------------------------------------------ prune


def decoded(whole: Tokenizer, found: TokenSet) -> Tensor:
    return whole.decode(found.tokens(range(len(found)), 1))


def test_a_pruned_model_decodes_its_tokens_to_the_same_bits(model, tokens, tmp_path):
    whole = load(model)
    kept = used_codes(whole, [tokens])
    assert 2 < len(kept) < K
    write_pruned(whole, kept, tmp_path / "small", [tokens])
    small = load(tmp_path / "small")
    again = TokenSet.open(tmp_path / "small" / "tokens" / "train", verify="now")
    assert small.codebook_size == again.codebook_size == len(kept)
    assert torch.equal(decoded(small, again), decoded(whole, tokens))
    assert usage(again).unseen.seen == len(kept)
    again.require(small.fingerprint())
    assert small.fingerprint() != whole.fingerprint()
    assert np.array_equal(np.load(tmp_path / "small" / "code_map.npy"), kept.numpy())
    assert small.provenance["pruned_from"] == {"fingerprint": whole.fingerprint(), "codebook_size": K}
    assert small.provenance["size"] == 16
    assert again.facts["provenance"]["pruned_from"] == whole.fingerprint()
    assert (again.names[:], again.labels.tolist(), again.classes) == (
        tokens.names[:],
        tokens.labels.tolist(),
        tokens.classes,
    )


def test_a_pruned_model_encodes_the_same_pictures_to_the_same_codes(model, pictures, tokens, tmp_path):
    whole = load(model)
    kept = used_codes(whole, [tokens])
    small = prune(whole, kept)
    fresh = Codec(small, runtime("cpu"), own_transform(small)).encode(pictures, tmp_path / "again", crops=2)
    everything = range(PICTURES)
    assert torch.equal(kept[fresh.tokens(everything, 1)], tokens.tokens(everything, 1))


def test_tokens_with_a_code_that_was_dropped_are_refused(model, tokens, tmp_path):
    whole = load(model)
    with pytest.raises(UsageError, match="has codes that are not among the 2 that stay"):
        write_pruned(whole, torch.tensor([0, 1]), tmp_path / "small", [tokens])
    with pytest.raises(UsageError, match="at least 2 codes; 1 would stay"):
        prune(whole, torch.tensor([5]))
    with pytest.raises(UsageError, match="ascending"):
        prune(whole, torch.tensor([5, 4]))


PLAIN = [name for name in NETWORKS if name != "next_token-factorised"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_pruned_generator_gives_the_codes_that_stay_their_old_logits(name):
    generator = make(name).eval()
    kept = torch.tensor([0, 3, 4, 11, 29])
    small = generator.prune(kept)
    assert small.config.transformer.codebook_size == 5
    numbers = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    hidden = numbers == 2 if name.startswith("masked") else torch.zeros_like(numbers, dtype=torch.bool)
    condition = torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    old = generator(kept[numbers].masked_fill(hidden, FREE), condition).logits[0]
    torch.manual_seed(0)
    new = small(numbers.masked_fill(hidden, FREE), condition).logits[0]
    torch.testing.assert_close(new, old[..., kept], atol=1e-12, rtol=1e-12)


def test_a_factorised_head_has_no_rows_of_codes_and_says_so():
    with pytest.raises(UsageError, match=r"cannot be pruned to 4 codes: .*factors must be two numbers"):
        make("next_token-factorised").prune(torch.tensor([0, 1, 2, 3]))


def test_a_generator_is_pruned_with_its_tokenizer(tokens, model, monkeypatch, tmp_path, capsys):
    generator = make("masked", codebook_size=K, rows=8, columns=8, dtype=torch.float32)
    generator.attach(load(model))
    generator.save_pretrained(tmp_path / "generator")
    lexel(monkeypatch, "prune", tmp_path / "generator", "--tokens", tokens.folder, "--out", tmp_path / "small")
    small = load(tmp_path / "small")
    assert isinstance(small, Generator)
    again = TokenSet.open(tmp_path / "small" / "tokens" / "train")
    again.require(small.tokenizer.fingerprint())
    assert small.provenance["pruned_from"]["codebook_size"] == K
    assert "codes stay" in capsys.readouterr().out
    images = small.tokenizer.decode(small.sample([0], steps=2))
    assert images.isfinite().all()


def test_lfq_refuses_in_one_line(monkeypatch, capsys, pictures, tmp_path):
    tokenizer("lfq").save_pretrained(tmp_path / "lfq")
    said = refused(monkeypatch, capsys, "prune", tmp_path / "lfq", pictures, "--out", tmp_path / "out")
    assert "no code of LFQ can be dropped: its codes are no rows of a table" in said
    said = refused(
        monkeypatch, capsys, "grow", tmp_path / "lfq", "--to", 128, "--data", pictures, "--out", tmp_path / "out"
    )
    assert "no code of LFQ can be added" in said
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ grow


def blobs(count: int) -> Tensor:
    """Latents around four means, stretched along a diagonal."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[4.0, 0, 0], [-4, 0, 0], [0, 4, 0], [0, -4, 0]])
    along = torch.tensor([0.0, 0.6, 0.8])
    spread = torch.randn(count, 1, generator=generator) * along + 0.05 * torch.randn(count, 3, generator=generator)
    return means[torch.arange(count) % 4] + spread


def test_a_code_is_split_along_the_longest_axis_of_its_latents():
    latents = blobs(4000)[::4]  # one blob
    codes, parents = split_codes(latents, torch.zeros(1000, dtype=torch.int64), torch.zeros(1, 3), 2)
    assert parents.tolist() == [0, 0]
    axis = torch.nn.functional.normalize(codes[1] - codes[0], dim=0)
    covariance = torch.cov(latents.T)
    longest = torch.linalg.eigh(covariance).eigenvectors[:, -1]
    assert abs(float(axis @ longest)) > 0.9999
    # The halves of a normal distribution have their means at sqrt(2 / pi) standard deviations.
    assert float((codes[1] - codes[0]).norm()) == pytest.approx(2 * (2 / torch.pi) ** 0.5, rel=0.1)


def test_the_codes_used_most_are_split_first_and_the_distortion_falls():
    latents = torch.cat([blobs(400), blobs(1600)[::4]])  # the first blob has five times as many
    codes = torch.tensor([[4.0, 0, 0], [-4, 0, 0], [0, 4, 0], [0, -4, 0]])
    indices = torch.cdist(latents, codes).argmin(1)
    grown, parents = split_codes(latents, indices, codes, 7)
    assert parents.tolist()[:4] == [0, 1, 2, 3]
    assert parents[4:].tolist() == [0, 0, 0]
    assert torch.equal(grown[1:4], codes[1:4])
    before, after = (torch.cdist(latents, table).amin(1).square().mean() for table in (codes, grown))
    assert after < 0.8 * before


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_codes_compared_by_direction_are_split_by_direction(similarity):
    generator = torch.Generator().manual_seed(0)
    # Lengths vary far more than directions do: an axis along the mean would give two codes of one direction.
    latents = (1 + 3 * torch.rand(500, 1, generator=generator)) * torch.tensor([1.0, 0.0])
    latents = latents + 0.1 * torch.randn(500, 2, generator=generator)
    codes, _ = split_codes(latents, torch.zeros(500, dtype=torch.int64), torch.tensor([[2.0, 0.0]]), 2, similarity)
    chosen = (latents @ codes.T).argmax(1).bincount(minlength=2)
    assert 150 < int(chosen[0]) < 350
    assert float(codes[0] @ codes[1]) / 4 < math.cos(0.03)
    torch.testing.assert_close(codes.norm(dim=1), torch.tensor([2.0, 2.0]), rtol=0.01, atol=0)


def test_what_latents_do_not_see_of_a_code_stays_and_its_neighbour_keeps_its_latents():
    generator = torch.Generator().manual_seed(0)
    angles = torch.cat([0.1 * torch.randn(300, generator=generator), 1.0 + 0.1 * torch.randn(200, generator=generator)])
    latents = torch.stack([angles.cos(), angles.sin(), torch.zeros(500)], dim=1)
    codes = torch.tensor([[2.0, 0.0, 7.0], [2 * math.cos(1.0), 2 * math.sin(1.0), 0.0]])
    chosen = (latents @ codes.T).argmax(1)
    grown, _ = split_codes(latents, chosen, codes, 3, "dot")
    torch.testing.assert_close(grown[:, 2], torch.tensor([7.0, 0.0, 7.0]))
    counts = (latents @ grown.T).argmax(1).bincount(minlength=3)
    assert counts[1] == 200
    assert 100 < counts[0] < 200


def test_latents_that_are_alike_are_not_split():
    with pytest.raises(UsageError, match="only 2 of 5 codes can be told apart"):
        split_codes(torch.ones(50, 2).cumsum(0).clamp_max(2), torch.zeros(50, dtype=torch.int64), torch.zeros(1, 2), 5)


@pytest.mark.parametrize("kind", ["vq", "ibq", "simvq", "cosine", "affine", "ema"])
def test_a_grown_tokenizer_reconstructs_latents_better_and_trains_on(kind, pictures, tmp_path):
    whole = tokenizer(kind)
    grown = grow(whole, 4 * K, pictures, options=Options(device="cpu"))
    grown.save_pretrained(tmp_path / "grown", provenance=grown.provenance)
    grown = load(tmp_path / "grown")
    assert grown.codebook_size == 4 * K
    assert grown.provenance["grown_from"] == {"fingerprint": whole.fingerprint(), "codebook_size": K}
    for name, tensor in whole.state_dict().items():
        if not name.startswith("quantizer."):
            assert torch.equal(tensor, grown.state_dict()[name]), name
    used = {model: usage(pictures, model, options=Options(device="cpu")).unseen.seen for model in (whole, grown)}
    assert used[grown] > 1.5 * used[whole]
    if kind not in ("ibq", "cosine"):  # those measure no distances
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
        z = whole.latents(images)
        errors = [(model.quantizer.eval()(z).z_q - z).square().mean() for model in (whole, grown)]
        assert errors[1] < errors[0]
    grown.train()(images if kind not in ("ibq", "cosine") else torch.zeros(1, 3, 16, 16)).images.mean().backward()


def test_the_commands_print_and_say_what_was_wrong(monkeypatch, capsys, model, tokens, pictures, tmp_path):
    lexel(monkeypatch, "usage", tokens.folder, "--json", tmp_path / "usage.json")
    said = capsys.readouterr().out
    assert "codes used" in said
    assert "as many pictures again would add" in said
    table = json.loads((tmp_path / "usage.json").read_text())
    assert table["pictures"] == PICTURES
    assert table["usage"] == table["seen"] / K
    lexel(monkeypatch, "grow", model, "--to", 100, "--data", pictures, "--out", tmp_path / "grown", "--device", "cpu")
    assert "100 codes out of 64" in capsys.readouterr().out
    assert "pictures need a tokenizer" in refused(monkeypatch, capsys, "usage", pictures)
    assert "give images (DIR), or --tokens DIR" in refused(monkeypatch, capsys, "prune", model, "--out", tmp_path / "x")
    assert "give images by --data" in refused(monkeypatch, capsys, "grow", model, "--to", 99, "--out", tmp_path / "x")
    said = refused(monkeypatch, capsys, "grow", model, "--to", 64, "--data", pictures, "--out", tmp_path / "x")
    assert "--to must be more, got 64" in said
    said = refused(monkeypatch, capsys, "grow", model, "--to", 5000, "--data", pictures, "--out", tmp_path / "x")
    assert "at least two a code are needed" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_are_opened_with_the_channels_of_the_tokenizer(pictures, tmp_path, channels):
    torch.manual_seed(0)
    table = {"kind": "vq", "codebook_size": 8, "codebook_dim": D}
    whole = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**SIZES, channels=channels), quantizer=table))
    whole.provenance = {"size": 16, "transform": "crop"}
    images, cut = open_images(pictures, size=16, channels=channels), own_transform(whole)
    squares = to_images(np.stack([cut(images.read(number)) for number in range(PICTURES)]))
    assert squares.shape == (PICTURES, channels, 16, 16)
    alike = Options(device="cpu")
    assert torch.equal(usage(pictures, whole, options=alike).kept, whole.eval().encode(squares).unique())
    assert grow(whole, 12, pictures, options=alike).codebook_size == 12
    bank = make_bank(whole, pictures, tmp_path / "bank.safetensors", 4, runtime("cpu"))
    assert bank.shape == (4, D)


def test_a_tokenizer_of_grey_pictures_is_evaluated_on_grey_pictures(pictures):
    torch.manual_seed(0)
    table = {"kind": "vq", "codebook_size": 8, "codebook_dim": D}
    whole = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**SIZES, channels=1), quantizer=table)).eval()
    whole.provenance = {"size": 16}
    alike = {"metrics": ["psnr"], "device": "cpu", "cache": False}
    grey = evaluate_tokenizer(whole, open_images(pictures, size=16, channels=1), **alike)
    assert evaluate_tokenizer(whole, pictures, **alike)["metrics"] == grey["metrics"]


def test_the_command_lines_limits_on_pixels_are_the_librarys():
    assert PIXELS == PIXEL_LIMIT
    assert f"Default: {codec.NATIVE_PIXELS}" in MaxPixels.__metadata__[0].help


@pytest.mark.parametrize("command", ["evaluate", "usage", "prune", "grow", "bank", "encode", "reconstruct", "probe"])
def test_the_limit_on_pixels_reaches_every_command_that_opens_pictures(
    monkeypatch, capsys, model, pictures, command, tmp_path
):
    arguments = {
        "evaluate": (model, "--data", pictures),
        "usage": (pictures, "--model", model),
        "prune": (model, pictures, "--out", tmp_path / "x"),
        "encode": (model, pictures, "--out", tmp_path / "x"),
        "reconstruct": (model, pictures, "--out", tmp_path / "x"),
        "grow": (model, "--to", 100, "--data", pictures, "--out", tmp_path / "x"),
        "bank": (model, pictures, "--codes", 4, "--out", tmp_path / "x.safetensors"),
        "probe": (pictures, "--tokenizer", model),
    }[command]
    said = refused(monkeypatch, capsys, command, *arguments, "--pixel-limit", 4)
    assert "more than the limit of 4" in said or "gives 0 latents" in said


def test_sizes_that_cannot_fit_are_refused_before_a_codebook_grows(monkeypatch, capsys, model, pictures, tmp_path):
    said = refused(
        *(monkeypatch, capsys, "grow", model, "--to", 100, "--data", pictures),
        *("--size", 1_000_000, "--out", tmp_path / "x"),
    )
    assert "out of memory" in said
