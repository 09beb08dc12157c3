"""Nested dropout: over tokens in a line and over residual levels, so that every prefix decodes and can be measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_autoencoder_laws import images, tokenizer
from test_train_autoencoders import four_pictures
from typer.testing import CliRunner

from lexel.autoencoders import parse
from lexel.cli import app
from lexel.config import check
from lexel.errors import UsageError
from lexel.evaluate import evaluate_prefixes, evaluate_tokenizer
from lexel.evaluate.prefixes import Prefix
from lexel.nested_dropout import NestedDropout
from lexel.run_folder import RunFolder
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train import train as train_with_report
from lexel.train.recipes import TokenizerRecipe

TITOK = {"nested": {"keep": "uniform"}, "tokens": 5, "size": [16, 16]}


@pytest.fixture
def photos(tmp_path):
    return four_pictures(tmp_path / "photos", 16, 16)


def levels() -> Tokenizer:
    """A tokenizer of four levels of residual codes."""
    network = tokenizer("vqgan").config.autoencoder.model_dump(mode="json")
    codes = {"kind": "nested", "codebook_size": 16, "codebook_dim": 4, "depth": 4}
    return Tokenizer(TokenizerConfig.model_validate({"autoencoder": network, "quantizer": codes})).eval()


@pytest.mark.parametrize(
    ("keep", "lengths"),
    [("uniform", [2, 3, 4, 5, 6]), ("powers", [2, 4, 6]), ("rounded", [2, 4, 4, 6, 6])],
)
def test_as_many_parts_are_kept_as_the_way_of_keeping_says(keep, lengths):
    dropout = NestedDropout(6, keep, least=2)
    assert dropout.lengths == lengths
    drawn = dropout.draw(4000, torch.device("cpu"))
    for length in set(lengths):
        share = (drawn == length).double().mean().item()
        assert share == pytest.approx(lengths.count(length) / len(lengths), abs=0.04)
    assert (NestedDropout(6, keep, full=1.0).draw(50, torch.device("cpu")) == 6).all()
    with pytest.raises(UsageError, match=r"least must be in \[1, 6\]"):
        NestedDropout(6, least=7)


def test_a_token_left_out_says_nothing_and_one_kept_says_all():
    model = tokenizer("titok", **TITOK)
    indices = model.encode(images(model))
    for count in range(1, 6):
        decoded = model.decode(indices[:, :count])
        other = (indices + 1) % 16
        longer = torch.cat([indices[:, :count], other[:, count:]], 1)
        part = model.decoder.nested
        z = model.from_codes(model.quantizer.indices_to_codes(longer))
        cut = part.cut(z, torch.full((3,), count))
        model.decoder.nested = None
        by_hand = model.decoder(cut)
        model.decoder.nested = part
        torch.testing.assert_close(decoded, by_hand.clamp(-1, 1), rtol=0, atol=1e-6)
    assert not torch.allclose(model.decode(indices[:, :4]), model.decode(indices))
    with pytest.raises(UsageError, match=r"has 1 to 5 tokens, got \(6,\)"):
        model.decode(torch.zeros(1, 6, dtype=torch.long))


def test_training_leaves_out_tokens_of_each_image_and_every_weight_learns():
    model = tokenizer("titok", **TITOK).train()
    x = images(model)
    torch.manual_seed(0)
    first, second = model(x).images, model(x).images
    assert not torch.equal(first, second)
    total = sum(model(x).images.square().mean() for _ in range(4))
    (total + sum(model(x).quantized.losses.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.decoder.nested.left_out.grad.any()


def test_without_nested_dropout_a_titok_is_named_and_held_as_before():
    plain = tokenizer("titok")
    assert "nested" not in plain.config.autoencoder.identity()
    assert not any("nested" in name for name in plain.state_dict())
    for options, line in (
        ({"nested": {"least": 9}, "tokens": 5}, "nested.least = 9 is more than tokens = 5"),
        ({"nested": {}, "scrambled": True}, "scrambled latents mix tokens"),
        ({"nested": {"keep": "some"}}, "nested.keep"),
    ):
        with pytest.raises(ValueError, match=line):
            parse({"kind": "titok", "size": 16, "patch": 4, **options})


@pytest.mark.parametrize("made", [lambda: tokenizer("titok", **TITOK), levels], ids=["tokens", "levels"])
def test_prefixes_are_measured_as_what_they_decode_to(made, photos):
    model = made()
    result = evaluate_prefixes(model, photos, size=16, metrics=["psnr", "usage"], cache=False)
    rows, most = result["prefixes"], model.prefixes
    assert [row["kept"] for row in rows] == ([1, 2, 4, 5] if most == 5 else [1, 2, 4])
    whole = evaluate_tokenizer(model, photos, size=16, metrics=["psnr", "usage"], cache=False)
    assert rows[-1]["metrics"] == whole["metrics"] == result["metrics"]
    each = whole["tokens"]["length"] // most
    assert [row["tokens"]["length"] for row in rows] == [each * row["kept"] for row in rows]
    assert [row["tokens"]["bits"] for row in rows] == [4 * each * row["kept"] for row in rows]
    pictures = [np.asarray(Image.open(photos / f"{number}.png"), np.float32) for number in range(4)]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    decoded = model.decode(model.encode(x)[:, :1])
    seen = ((decoded + 1) * 127.5).round() - (x + 1) * 127.5
    by_hand = -10 * (seen / 255).square().mean((1, 2, 3)).log10()
    assert rows[0]["metrics"]["psnr"] == pytest.approx(by_hand.mean().item(), abs=1e-3)


def test_prefixes_of_other_tokenizers_are_refused_in_one_line(photos):
    model = tokenizer("titok", size=[16, 16])
    for wrong in (lambda: evaluate_prefixes(model, photos), lambda: Prefix(model, 1)):
        with pytest.raises(UsageError, match="prefixes decode only after nested dropout") as error:
            wrong()
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="1 to 5 of an image's tokens or levels, got 6"):
        Prefix(tokenizer("titok", **TITOK), 6)
    with pytest.raises(UsageError, match="leave resume out"):
        evaluate_prefixes(model, photos, resume="folder")


def test_the_command_prints_a_row_for_every_prefix_and_writes_them(photos, tmp_path):
    tokenizer("titok", **TITOK).save_pretrained(tmp_path / "model")
    words = ["evaluate", tmp_path / "model", "--data", photos, "--metric", "psnr", "--size", 16]
    more = ["--prefixes", "1,5", "--json", tmp_path / "r.json"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, *more]], catch_exceptions=False)
    rows = json.loads((tmp_path / "r.json").read_text())["prefixes"]
    assert [row["kept"] for row in rows] == [1, 5]
    assert all(f"{row['metrics']['psnr']:,.5g}" in done.output for row in rows)
    with pytest.raises(UsageError, match="takes numbers such as 1,4,16, or powers; got 'all'"):
        CliRunner().invoke(app, [str(word) for word in [*words, "--prefixes", "all"]], catch_exceptions=False)
    with pytest.raises(UsageError, match=r"takes numbers such as 1,4,16, or powers; got '9{80}'$"):
        CliRunner().invoke(app, [str(word) for word in [*words, "--prefixes", "9" * 5000]], catch_exceptions=False)


@pytest.mark.usefixtures("undrawn_charts")
def test_a_run_keeps_and_shows_what_prefixes_are_worth(photos, tmp_path):
    table = tokenizer("titok", **TITOK).config.model_dump(mode="json")
    train = {"steps": 1, "batch_size": 2, "lr": 1e-3, "weights": {"l2": 1.0}}
    data = {"source": str(photos), "validation": str(photos), "size": 16}
    recipe = check({"model": table, "data": data, "train": train}, TokenizerRecipe, "nested")
    trained = train_with_report(recipe, tmp_path / "run")
    bits, psnr = RunFolder.read(tmp_path / "run").contents().last["prefixes"]
    assert bits.tolist() == [4, 8, 16, 20]
    result = evaluate_prefixes(trained.average, photos, size=16, metrics=["psnr"], cache=False)
    expected = [row["metrics"]["psnr"] for row in result["prefixes"]]  # of rounded pictures
    assert psnr.tolist() == pytest.approx(expected, abs=0.02)
    assert "Rate against quality" in (tmp_path / "run" / "report.html").read_text()
