"""The tokenizer: equal to the published implementation, indices as images, and what it refuses."""

import pytest
import torch

import lexel
from lexel.autoencoders import VQGANConfig
from lexel.checkpoint import fingerprint, load_folder, save_folder
from lexel.convert import convert
from lexel.errors import UsageError
from lexel.quantizers import QUANTIZERS
from lexel.tokenizer import Tokenizer, TokenizerConfig

SMALL = VQGANConfig(width=8, multipliers=[1, 2], residual_blocks=1, attention_levels=[1], z_channels=8, groups=4)


def tokenizer(kind: str = "ibq", **options: object) -> Tokenizer:
    torch.manual_seed(0)
    quantizer = {"kind": kind, "codebook_size": 16, "codebook_dim": 4, **options}
    return Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer=quantizer)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("codes", [1024, 8192, 16384, 262144])
@pytest.mark.parametrize(("blocks", "base"), [(3, 89_333_635), (4, 106_787_715)])
def test_the_published_tokenizers_have_the_published_parameters(codes, blocks, base):
    """107.05M, 108.88M, 110.98M and 173.90M with four blocks a level; 89.60M to 156.44M with three."""
    config = TokenizerConfig(
        autoencoder=VQGANConfig(residual_blocks=blocks),
        quantizer={"kind": "ibq", "codebook_size": codes, "codebook_dim": 256},
    )
    with torch.device("meta"):
        built = Tokenizer(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == base + 256 * codes


@pytest.mark.parametrize(
    ("case", "image", "tolerance"),
    [("f32", "input", 1e-4), ("f64", "input", 1e-9), ("rect_f64", "input_rect", 1e-9)],
)
def test_the_published_tokenizer_gives_the_published_numbers(parity, case, image, tolerance):
    published = torch.load(parity / "tok_nrb1_io.pt", weights_only=True)
    expected, dtype = published[case]["out"], torch.float32 if case == "f32" else torch.float64
    model = lexel.load(parity / "tok_nrb1_weights.pt", family="ibq").to(dtype)
    x = published[image].to(dtype)
    result = model(x)
    close = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(model.latents(x), expected["z"], **close)
    torch.testing.assert_close(result.images, expected["rec"], **close)
    assert torch.equal(model.encode(x).flatten(), expected["indices"].flatten())
    torch.testing.assert_close(model.decode(model.encode(x)), published[case]["rec_from_codes"].clamp(-1, 1), **close)


def test_the_gradients_of_every_parameter_have_the_published_norms(parity):
    published = torch.load(parity / "tok_nrb1_io.pt", weights_only=True)["f64"]
    images = torch.load(parity / "tok_nrb1_io.pt", weights_only=True)["input"].double()
    conversion = convert(parity / "tok_nrb1_weights.pt", family="ibq")
    model = conversion.model.double().train()
    result = model(images)
    terms = result.quantized.losses
    quantization = terms["quantization"] + terms["commitment"] + 0.25 * terms["codebook"]
    entropy = terms["entropy_sample"] - terms["entropy_batch"]
    total = (result.images - images).abs().mean() + quantization + 0.05 * entropy
    assert total.item() == pytest.approx(published["total"].item(), abs=1e-9)
    total.backward()
    for ours, theirs in conversion.origins.items():
        norm = model.get_parameter(ours).grad.norm().item()
        assert norm == pytest.approx(published["param_grad_norms"][theirs], rel=1e-7, abs=1e-12), ours


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
@pytest.mark.parametrize("training", [False, True])
def test_decoding_what_was_encoded_is_the_forward_pass(kind, training, images):
    model = tokenizer(kind)
    expected = model(images).images
    model.train(training)
    torch.testing.assert_close(model.decode(model.encode(images)), expected.clamp(-1, 1), rtol=0, atol=1e-6)


def test_encoding_leaves_every_part_in_its_mode(images):
    model = tokenizer().train()
    model.encoder.eval()
    model.decode(model.encode(images))
    assert model.decoder.training
    assert not model.encoder.training


def test_half_precision_rounds_neither_the_projection_nor_the_choice_of_a_code(images):
    model = tokenizer()
    with torch.autocast("cpu", torch.bfloat16):
        z = model.latents(images)
        assert z.dtype == torch.float32
        features = model.encoder(images)
        indices = model.encode(images)
        assert model.decode(indices).dtype == torch.float32
    assert features.dtype == torch.bfloat16
    projected = model.to_codes(features.float())
    assert torch.equal(z, projected)
    assert torch.equal(indices, torch.einsum("bdhw,kd->bkhw", projected, model.quantizer.codebook).argmax(1))


def test_a_model_of_bfloat16_weights_still_gives_indices_and_float32_images(images):
    model = tokenizer().bfloat16()
    decoded = model.decode(model.encode(images))
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()


def test_gradients_reach_the_encoder_and_the_codebook(images):
    model = tokenizer()
    model(images).images.sum().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantizer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_a_saved_tokenizer_loads_with_the_same_indices_and_fingerprint(kind, images, tmp_path):
    model = tokenizer(kind)
    model.save_pretrained(tmp_path, provenance={"recipe": "tiny", "step": 40})
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images), model.encode(images))
    indices = model.encode(images)
    # Matrix products round by the alignment of their memory, so projected codebooks differ in the last bit.
    torch.testing.assert_close(loaded.decode(indices), model.decode(indices), rtol=0, atol=1e-5)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.provenance == {"recipe": "tiny", "step": 40}
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert not loaded.training


def test_the_fingerprint_names_the_weights_and_not_their_history(tmp_path):
    model = tokenizer()
    before = model.fingerprint()
    model.provenance = {"step": 1}
    assert model.fingerprint() == before
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-6
    assert model.fingerprint() != before


def test_a_tokenizer_that_is_saved_again_keeps_where_its_weights_come_from(tmp_path):
    tokenizer().save_pretrained(tmp_path / "first", provenance={"size": 32, "step": 40})
    Tokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert Tokenizer.from_pretrained(tmp_path / "second").provenance == {"size": 32, "step": 40}


@pytest.mark.parametrize("kind", ["vqgan", "magvit2", "simvq"])
def test_folders_and_fingerprints_of_version_0_1_hold(kind, tmp_path):
    """Until 0.1 one table served three designs, all options of `vqgan` written out; fingerprints were taken of it."""
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": [1, 2], "residual_blocks": 1, "z_channels": 8, "groups": 4}
    options = {"attention_levels": [], "middle_attention": False, "patch": 1, "downsamplings": None}
    old = {
        "autoencoder": {"design": kind, **sizes, **options},
        "quantizer": {"kind": "vq", "codebook_size": 16, "codebook_dim": 4},
        "projections": True,
    }
    extra = {name: options[name] for name in ("attention_levels", "middle_attention")} if kind == "vqgan" else {}
    model = Tokenizer(TokenizerConfig.model_validate(old | {"autoencoder": {"kind": kind, **sizes, **extra}}))
    save_folder(tmp_path, {"model": "tokenizer", "lexel": "0.1.0", **old, "provenance": {}}, model.state_dict())
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint() == fingerprint(old, model.state_dict())


def test_images_of_other_channels_go_through_a_tokenizer_for_them():
    config = TokenizerConfig(
        autoencoder=SMALL.model_copy(update={"channels": 1}),
        quantizer={"kind": "vq", "codebook_size": 16, "codebook_dim": 4},
    )
    model = Tokenizer(config).eval()
    grey = torch.rand(2, 1, 8, 12) * 2 - 1
    assert model.decode(model.encode(grey)).shape == grey.shape
    with pytest.raises(UsageError, match=r"must be \(B, 1, H, W\), got \(1, 3, 8, 8\)"):
        model.encode(torch.zeros(1, 3, 8, 8))
    assert (
        model.fingerprint() != Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer=config.quantizer)).fingerprint()
    )


def test_the_tokenizer_says_how_tokens_lie_and_which_sizes_fit(images):
    model = tokenizer("residual")
    spec = model.token_spec(8, 12)
    assert (spec.grids, spec.codebook_size, spec.books) == (((4, 6),), 16, model.quantizer.books)
    assert model.encode(images).shape[1:] == spec.shape
    assert model.image_size(model.grid(8, 12)) == (8, 12)
    assert model.pad(torch.zeros(1, 3, 7, 9)).shape == (1, 3, 8, 10)
    with pytest.raises(UsageError, match="H and W multiples of 2, got 7 x 8"):
        model.grid(7, 8)


def test_loading_takes_the_tensors_over_instead_of_copying_them(tmp_path):
    model = tokenizer()
    model.save_pretrained(tmp_path)
    config, tensors = load_folder(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path, config, tensors)
    for name, parameter in loaded.named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr(), name


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 9), "multiples of 2, got (1, 3, 8, 9)"),
        (torch.zeros(3, 8, 8), "must be (B, 3, H, W), got (3, 8, 8)"),
        (torch.zeros(1, 1, 8, 8), "must be (B, 3, H, W)"),
        (torch.zeros(1, 3, 0, 8), "must be (B, 3, H, W)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be floating-point"),
        (torch.full((1, 3, 8, 8), 255.0), "must be in [-1, 1], got values up to 255"),
        (torch.full((1, 3, 8, 8), torch.nan), "must be in [-1, 1]"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused_with_what_was_given(images, message):
    with pytest.raises(UsageError) as error:
        tokenizer().encode(images)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.full((1, 2, 2), 16), "in [0, 16), got 16"),
        (torch.full((1, 2, 2), -1), "in [0, 16), got -1"),
        (torch.zeros(1, 2, 2), "must be integers, got torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "must be integers"),
        (torch.zeros(4, dtype=torch.int64), "must be (B, h, w), got (4,)"),
    ],
)
def test_indices_that_name_no_code_are_refused_with_what_was_given(indices, message):
    with pytest.raises(UsageError) as error:
        tokenizer().decode(indices)
    assert message in str(error.value)


def test_short_integers_are_indices_too(images):
    model = tokenizer()
    indices = model.encode(images)
    assert torch.equal(model.decode(indices.to(torch.uint8)), model.decode(indices))


def test_without_projections_the_widths_must_agree():
    with pytest.raises(UsageError, match="z_channels must be the codes' dimension 4, got 8"):
        Tokenizer(
            TokenizerConfig(
                autoencoder=SMALL, quantizer={"kind": "vq", "codebook_size": 16, "codebook_dim": 4}, projections=False
            )
        )


def test_a_quantizer_without_a_kind_is_refused_with_the_choices():
    with pytest.raises(UsageError, match="needs a kind; choose from"):
        Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer={"codebook_size": 16}))


def test_a_folder_of_something_else_is_no_tokenizer(tmp_path):
    save_folder(tmp_path, {"model": "generator"}, {"a": torch.zeros(1)})
    with pytest.raises(UsageError, match="holds a generator, not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_wrong_key_in_the_configuration_names_the_options(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    config, tensors = load_folder(tmp_path)
    config["autoencoder"]["widht"] = 8
    save_folder(tmp_path, config, {name: tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(UsageError, match="has no option 'widht'"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["none", "gaussian"])
def test_a_continuous_tokenizer_encodes_what_it_decodes(kind):
    network = {"width": 4, "multipliers": [1, 2], "residual_blocks": 1, "attention_levels": [], "groups": 2}
    network |= {"middle_attention": False, "z_channels": 4}
    config = TokenizerConfig.model_validate({"autoencoder": network, "quantizer": {"kind": kind, "codebook_dim": 3}})
    tokenizer = Tokenizer(config).eval()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tokenizer.encode(images)
    assert latents.shape == (2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(latents), tokenizer(images).images.clamp(-1, 1))
