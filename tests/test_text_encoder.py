"""Text encoders of the transformers library; without it, that it is named."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_captions import images_table
from test_data_tokens import pictures
from typer.testing import CliRunner

from lexel.autoencoders import VQGANConfig
from lexel.cli import app
from lexel.data.tokens import SequenceSet, TokenSet
from lexel.errors import UsageError
from lexel.generators import Generator, GeneratorConfig
from lexel.generators.config import network_config
from lexel.runtime import runtime
from lexel.text_encoder import EncodedCaptions, TextEncoder
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.tokens import TokenSource

WORDS = ["[PAD]", "[UNK]", "a", "cat", "dog", "red", "on", "mat"]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module", params=["clip", "t5"])
def encoder(tmp_path_factory, request) -> Path:
    """A small random encoder of 16 channels, and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder") / request.param
    words = Words(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if request.param == "clip":
        sizes |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, max_position_embeddings=6))
    else:
        sizes |= {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    model.save_pretrained(folder)
    return folder


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'lexel\[text\]'"):
        TextEncoder(tmp_path)


@needs_transformers
def test_features_do_not_depend_on_the_captions_beside_and_end_with_them(encoder):
    text = TextEncoder(encoder, length=5, batch_size=2)
    assert (text.length, text.channels) == (5, 16)
    texts = ["a cat", "red dog on a mat", "dog"]
    rows = text.encode(texts)
    assert rows.shape == (3, 5, 16)
    assert [int(row.any(1).sum()) for row in rows] == [2, 5, 1]
    alone = np.concatenate([text.encode([each]) for each in texts])
    np.testing.assert_allclose(rows, alone, atol=1e-6)
    captions = EncodedCaptions(text, texts)
    assert len(captions) == 3
    np.testing.assert_allclose(captions.rows([2, 0]), rows[[2, 0]], atol=1e-6)
    assert captions.fingerprint() != EncodedCaptions(text, texts[::-1]).fingerprint()


@needs_transformers
def test_long_captions_are_cut_with_a_warning(encoder):
    text = TextEncoder(encoder, length=3)
    with pytest.warns(UserWarning, match="captions are cut at 3 tokens, the first 'a red cat"):
        rows = text.encode(["a red cat on a mat"])
    assert rows.shape == (1, 3, 16)
    text.encode(["a red cat on a mat"])  # said once: warnings are errors here


@needs_transformers
def test_what_is_no_text_encoder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is no text encoder of transformers"):
        TextEncoder(tmp_path)


@needs_transformers
def test_the_commands_encode_captions_for_training_and_sampling(tmp_path, encoder):
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": [1, 1], "residual_blocks": 1, "attention_levels": [], "z_channels": 4}
    quantizer = {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    tokenizer = Tokenizer(TokenizerConfig(autoencoder=VQGANConfig(**sizes, groups=4), quantizer=quantizer)).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    images = np.stack([pictures().read(number)[:, :4] for number in range(10)])
    texts = ["a cat", "red dog"] * 5
    np.savez(tmp_path / "images.npz", images=images, captions=np.array(texts))

    def run(*words, code: int = 0) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == code or code, done.output
        if code:
            assert isinstance(done.exception, UsageError), done.exception
            return str(done.exception)
        return done.output

    common = ("encode", tmp_path / "tokenizer", f"npz:{tmp_path / 'images.npz'}", "--size", 4)
    asked = ("--text-encoder", encoder, "--caption-length", 3)
    run(*common, "--out", tmp_path / "tokens", *asked)
    tokens = TokenSet.open(tmp_path / "tokens")
    expected = torch.from_numpy(TextEncoder(encoder, 3).encode(texts)).half()
    torch.testing.assert_close(tokens.features(range(10)), expected, atol=1e-3, rtol=0)
    assert tokens.facts["provenance"]["text_encoder"] == encoder.name

    run(*common, "--out", tmp_path / "words", "--sequences", tmp_path / "s", "--text-vocabulary", encoder)
    sequences = SequenceSet(tmp_path / "s")
    assert sequences.format.offset == len(WORDS)
    assert [sequences[number][:3].tolist() for number in (0, 1)] == [[2, 3, 25], [5, 4, 25]]  # a cat <begin>
    words = ("--sequences", tmp_path / "x", "--text-vocabulary", encoder)
    assert "less than the 8 ids" in run(*common, "--out", tmp_path / "x", *words, "--offset", 3, code=2)
    assert "is for --sequences" in run(*common, "--out", tmp_path / "x", "--text-vocabulary", encoder, code=2)

    table = {"kind": "next_token", "codebook_size": 16, "rows": 2, "columns": 2, "width": 16, "layers": 1, "heads": 2}
    condition = {"kind": "text", "features": 16, "length": 3}
    generator = Generator(GeneratorConfig(transformer=network_config({**table, "condition": condition})))
    generator.save_pretrained(tmp_path / "generator", tokenizer)
    made = ("sample", tmp_path / "generator", "--out", tmp_path / "s.npy", "--caption", "a cat", "--caption", "dog")
    run(*made, "--text-encoder", encoder, "--per-class", 3)
    assert np.load(tmp_path / "s.npy").shape == (6, 2, 2)
    assert "--text-encoder" in run(*made, code=2)


@needs_transformers
def test_images_that_are_encoded_on_the_way_have_the_features_that_a_token_set_of_them_keeps(tmp_path, encoder):
    texts = [" ".join(WORDS[2 + number % 5 : 4 + number % 5]) for number in range(10)]
    np.savez(tmp_path / "images.npz", images=pictures().array[:, :, :4], captions=np.array(texts))
    table = images_table(tmp_path, f"npz:{tmp_path / 'images.npz'}", features=16, length=3)
    table["data"] |= {"text_encoder": str(encoder), "caption_length": 3}
    source = TokenSource(GeneratorRecipe.model_validate(table), runtime("cpu"))
    expected = torch.from_numpy(TextEncoder(encoder, 3).encode(texts)).half()
    held_out = [int(name.split(".")[0]) for name in source.names["validation"]]
    trained = [number for number in range(10) if number not in held_out]
    batch = next(source.batches(GeneratorRecipe.model_validate(table).train, 0, 0, 1))
    torch.testing.assert_close(batch.captions, expected[trained][batch.numbers], atol=1e-3, rtol=0)
    (batch,) = source.measured(8, None, 0, 1)
    torch.testing.assert_close(batch.captions, expected[held_out][batch.numbers], atol=1e-3, rtol=0)
