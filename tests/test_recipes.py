"""The recipes that come with Lexel: all load, and build the networks whose sizes were published."""

import re
from pathlib import Path

import pytest
import torch

from lexel.config import load
from lexel.errors import UsageError
from lexel.memory import FusedAttention
from lexel.runtime import runtime
from lexel.tokenizer import Tokenizer
from lexel.train import load_recipe
from lexel.train.generator_recipe import GeneratorRecipe
from lexel.train.plan import check_memory, plan
from lexel.train.processes import Processes
from lexel.train.recipes import TokenizerRecipe, outline
from lexel.train.session import Session

FOLDER = Path(__file__).parents[1] / "recipes"
ALL = sorted(path.stem for path in FOLDER.glob("*.toml"))
TOKENIZERS = [name for name in ALL if not name.startswith("generator")]
PUBLISHED = {  # exact; the papers round to 107.05M, 108.88M, 110.98M, 173.90M
    "ibq_1024": 107_049_859,
    "ibq_8192": 108_884_867,
    "ibq_16384": 110_982_019,
    "ibq_262144": 173_896_579,
    "ibq_pretrain_16384": 110_982_019,
    "ibq_pretrain_262144": 173_896_579,
    "vqgan_1024": 72_141_699,
    "vqgan_16384": 76_073_859,
    "vit_vqgan_small": 50_908_195,
    "vit_vqgan_base": 170_664_483,
    "vit_vqgan_large": 613_487_907,
    "titok_l32": 641_054_735,
    "titok_b64": 204_814_095,
    "titok_s128": 83_674_639,
    "maskgit_vqgan": 54_515_587,
    "vqvae2_256": 1_388_867,
    "var_tokenizer": 108_948_355,
    "rqvae_16384": 104_402_051 - 16_385 * 256,  # the codes, counted there, are running means and no parameters
    "dqvae": 48_098_437 - 1025 * 256,  # likewise
}
PAPER = {"ibq_1024": 89.60, "ibq_8192": 91.43, "ibq_16384": 93.53, "ibq_262144": 156.44}  # M, with three blocks


def recipe(name, *overrides):
    return load(FOLDER / f"{name}.toml", TokenizerRecipe, overrides)


def parameters(recipe):
    return sum(parameter.numel() for parameter in outline(recipe.model).parameters())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_recipe_builds_and_weighs_every_term(name):
    resolved = recipe(name).resolved()
    assert outline(resolved.model).quantizer.LOSS_WEIGHTS.keys() <= resolved.train.weights.keys()


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_says_how_to_run_it_and_what_to_expect(name):
    comment = [line for line in (FOLDER / f"{name}.toml").read_text().splitlines() if line.startswith("#")]
    text = " ".join(comment)
    assert f"lexel train recipes/{name}.toml" in text
    assert "Hardware:" in text
    assert re.search(r"Published result|Reaches|[Mm]eant to reach", text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers_have_the_published_number_of_parameters(name):
    assert parameters(recipe(name)) == PUBLISHED[name]


WIDTHS = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}
ONE_STAGE = {  # encoder and decoder, tokens, numbers of a code or of a latent, TA-TiTok's text
    ("bl", 128, 64, False): 390_179_988,
    ("bl", 64, 64, False): 390_016_148,
    ("sl", 256, 64, False): 330_260_884,
    ("bl", 128, 16, False): 389_581_940,
    ("bl", 64, 16, False): 389_418_100,
    ("ll", 32, 16, False): 606_879_604,
    ("bl", 128, 64, True): 391_046_292,
    ("bl", 64, 64, True): 390_882_452,
    ("bl", 32, 64, True): 390_800_532,
    ("bl", 64, 16, True): 390_284_404,
    ("bl", 32, 16, True): 390_202_484,
    ("sl", 128, 16, True): 330_275_188,
}


@pytest.mark.parametrize("size", ONE_STAGE)
def test_titok_in_one_stage_has_its_published_sizes(size):
    sides, tokens, dim, text = size
    codes = ["model.quantizer.codebook_size=8192"] if dim == 64 else []
    changes = [
        f'model.quantizer={{kind="{"vq" if codes else "gaussian"}",codebook_dim={dim}}}',
        *codes,
        f"model.autoencoder.tokens={tokens}",
        "model.autoencoder.size=256",
        "data.size=256",
        "model.autoencoder.patch=16",
        *(["model.autoencoder.text={}"] if text else []),
    ]
    for side, (width, depth) in zip(("encoder", "decoder"), (WIDTHS[side] for side in sides), strict=True):
        changes.append(f"model.autoencoder.{side}={{width={width},depth={depth},heads={width // 64}}}")
    assert parameters(recipe("titok_openmoji", *changes)) == ONE_STAGE[size]


def test_the_aligned_recipe_has_the_size_of_emu35s_tokenizer():
    assert parameters(recipe("ibq_131072_aligned")) == 455_336_963  # "455M"


def test_the_decoder_stage_has_the_network_of_the_stage_before():
    assert recipe("ibq_16384_vit_decoder").model == recipe("ibq_16384_vit").model


def test_a_decoder_of_another_width_than_the_encoders_has_a_plan():
    assert plan(recipe("vit_openmoji", "model.autoencoder.decoder.width=32")).memory["kept for backward"] > 0


def test_latents_on_several_grids_have_a_plan():
    assert plan(recipe("vqvae2_openmoji")).memory["kept for backward"] > 0


@pytest.mark.parametrize("name", PAPER)
def test_with_three_blocks_they_have_the_papers_own_count(name):
    three = parameters(recipe(name, "model.autoencoder.residual_blocks=3"))
    assert three / 1e6 == pytest.approx(PAPER[name], abs=0.005)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("ibq")])
def test_ibq_recipes_have_the_released_codes_weights(name):
    train = recipe(name).resolved().train
    assert train.weights == {
        "l1": 1.0,
        "lpips": 1.0,
        "adversarial": 0.1,
        "quantization": 1.0,
        "commitment": 1.0,
        "codebook": 0.25,
        "entropy_sample": 0.05,
        "entropy_batch": -0.05,
    }
    assert (train.lr, train.betas, train.batch_size, train.average_decay) == (1e-4, [0.5, 0.9], 256, 0.999)
    assert train.discriminator is not None
    assert (train.discriminator.start, train.discriminator.lecam, train.discriminator.adaptive) == (0, 0.05, False)


@pytest.mark.parametrize(
    ("name", "images", "first"),
    [("ibq_16384", 4, True), ("ibq_pretrain_16384", 8, True), ("vqgan_1024", 12, False), ("vqgan_16384", 12, False)],
)
def test_statistics_and_the_order_of_updates_are_the_released_codes(name, images, first):
    adversary = recipe(name).train.discriminator
    assert adversary is not None
    assert (adversary.statistics, adversary.first) == (images, first)


@pytest.mark.parametrize("name", ["b", "l", "xl", "xxl", "factorised_b"])
def test_published_generators_learn_on_fresh_crops_of_all_training_images(name):
    path = FOLDER / f"generator_{name}.toml"
    data = load(path, GeneratorRecipe).data
    assert data.tokens is None
    assert data.images is not None
    assert data.images.validation is None  # the validation split: nothing is held out
    cheap = load(path, GeneratorRecipe, ["data.tokens=tokens/train", "data.validation=tokens/validation"]).data
    assert (cheap.images, cheap.tokens, cheap.validation) == (None, "tokens/train", "tokens/validation")


def test_a_vqgan_is_one_change_away_from_the_papers_own_weights():
    swapped = recipe("vqgan_16384").resolved().train.weights
    assert (swapped["codebook"], swapped["commitment"]) == (0.25, 1.0)
    papers = recipe("vqgan_16384", "train.weights.codebook=1.0", "train.weights.commitment=0.25").train.weights
    assert (papers["codebook"], papers["commitment"]) == (1.0, 0.25)


def test_the_demo_changes_nothing_but_the_quantizer():
    ibq, vq = recipe("openmoji").resolved(), recipe("openmoji", "model.quantizer.kind=vq").resolved()
    assert ibq.model.autoencoder == vq.model.autoencoder
    assert ibq.data == vq.data
    weights = {"weights": {}}
    assert ibq.train.model_copy(update=weights) == vq.train.model_copy(update=weights)
    assert {name: ibq.train.weights.get(name) for name in ("l1", "l2")} == {
        name: vq.train.weights.get(name) for name in ("l1", "l2")
    }
    assert vq.train.weights["codebook"] == 1.0
    assert vq.train.weights["commitment"] == 0.25


def test_a_plan_counts_every_network_and_halves_memory_with_the_batch():
    whole = plan(recipe("ibq_16384"), processes=64)
    assert whole.parameters["encoder and decoder"] + whole.parameters["quantizer"] == PUBLISHED["ibq_16384"]
    assert whole.parameters["discriminator"] == 2_765_633
    assert whole.images == 4
    half = plan(recipe("ibq_16384", "train.accumulation=2"), processes=64)
    assert half.images == 2
    assert half.memory["kept for backward"] == pytest.approx(whole.memory["kept for backward"] / 2, rel=0.01)
    assert half.memory["weights and optimizers"] == whole.memory["weights and optimizers"]
    assert "train.weights" in str(whole)


def test_a_plan_foresees_what_autograd_keeps():
    tiny = recipe("tiny", "train.weights.adversarial=0.0")
    tokenizer = Tokenizer(tiny.model)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.rand(tiny.train.batch_size, 3, tiny.data.size, tiny.data.size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tokenizer(images)
    weights = {parameter.untyped_storage().data_ptr() for parameter in tokenizer.parameters()}
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    assert plan(tiny).memory["kept for backward"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "name", ["continuous_small", "flow_small", "masked_small", "next_scale_small", "residual_small"]
)
def test_a_training_of_every_family_is_planned(name):
    assert "parameters" in str(plan(load_recipe(f"generator_{name}")))


# sizes that no machine has room for


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("tiny", "model.autoencoder.residual_blocks=1000000", "more than 1,000 layers"),
        ("tiny", "model.autoencoder.residual_blocks=10000000000", "residual_blocks must be at most 16,777,216"),
        ("tiny", "model.autoencoder.z_channels=16000000", "GiB|more than 1,099,511,627,776 weights"),
        ("tiny", "data.size=100000000", "less than or equal to 65536"),
        ("tiny", "data.workers=1000000", "less than or equal to 1024"),
        (
            "tiny",
            "train.steps=1" + 400 * "0",
            "steps must be at most 9,0.*992, got a number of about 400 digits",
        ),
        ("generator_tiny", "generator.layers=1000000", "more than 1,000 layers"),
        ("generator_tiny", "generator.width=16000000", "more than 1,099,511,627,776 weights"),
        ("generator_tiny", "generator.rows=16000000", "an image of 128,000,000 tokens is too large"),
        ("generator_tiny", "generator.grid=[1000, 1000, 1000]", "an image of 1,000,000,000 tokens is too large"),
    ],
)
def test_absurd_sizes_are_refused_before_they_are_built(name, override, message, monkeypatch):
    monkeypatch.setattr("lexel.runtime.MOST_MODULES", 1000)  # for 10,000 layers are counted by making them
    with pytest.raises(UsageError, match=message) as refused:
        check_memory(load_recipe(name, [override]), runtime("cpu"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("tiny", "train.batch_size=100000000"),
        ("tiny", "data.size=65536"),
        ("tiny", "train.discriminator.width=100000"),
        ("generator_tiny", "train.batch_size=100000000"),
        ("generator_tiny", "generator.width=40000"),
    ],
)
def test_a_training_that_does_not_fit_in_memory_ends_before_its_folder_is_made(tmp_path, name, override, monkeypatch):
    monkeypatch.setattr("lexel.train.plan.available_bytes", lambda device: 2**36)
    folder = tmp_path / "run"
    names = {"training": ["a", "b"], "validation": ["c"]}
    with pytest.raises(UsageError, match=r"out of memory: this training needs at least [\d,.]+ GiB, cpu has 64\.0 GiB"):
        Session(load_recipe(name, [override]), folder, Processes("cpu"), names)
    assert not folder.exists()


def test_the_estimate_of_a_training_counts_attention_as_it_grows():
    def attention(size):
        wide = recipe("tiny", f"data.size={size}", "model.autoencoder.middle_attention=true")
        with FusedAttention():
            return plan(wide).memory["kept for backward"]

    assert attention(512) < 4.5 * attention(256)  # with the pixels, not with their square
