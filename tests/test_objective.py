"""Losses of a recipe beside the quantizer's: closed forms, gradients, batches, going on, and what is refused."""

import copy
import json

import numpy as np
import pytest
import torch
from random_network import RandomBackbone
from test_train import assert_same, final_state, interrupted_at, logged, tables
from torch import nn

from lexel.config import check
from lexel.errors import UsageError
from lexel.losses import LOSSES, Alignment, FeatureDiscriminator, GramLoss, LossInputs, NearCodes
from lexel.losses.gram import gram
from lexel.losses.perturbation import Codes, nearest_codes
from lexel.losses.table import build
from lexel.networks.backbones import BACKBONES, Backbone, backbone
from lexel.runtime import without_weights
from lexel.tokenizer import Tokenizer
from lexel.train.objective import feature_shapes, gathered
from lexel.train.recipes import TokenizerRecipe
from lexel.train.tokenizer import train_tokenizer

ALIGNMENTS = ["alignment", "repa", "va_vae", "vfmtok", "distillation"]


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def inputs(count=3, channels=4):
    """Images of 16 pixels, reconstructions and features on a grid of 4 x 4, all with gradients, in float64."""
    features = noise(count, channels, 4, 4, seed=2).requires_grad_(True)
    names = ("latents", "codes", "decoder.middle")
    made = noise(count, 3, 16, 16, seed=1).requires_grad_(True)
    return LossInputs(noise(count, 3, 16, 16), made, dict.fromkeys(names, features))


def made(kind, **options):
    """A loss with the random network behind it, in float64, connected to features of 4 channels."""
    torch.manual_seed(0)
    named = {"gram": {"network": "random"}, **{name: {"teacher": "random"} for name in ALIGNMENTS}}.get(kind, {})
    loss = build(kind, {**named, **options})
    loss.connect(dict.fromkeys(loss.features, (4, 4, 4)))
    return loss.double()


WITHOUT_FILES = [kind for kind in LOSSES if kind not in ("lpips", "dists")]


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("margin, distances, distance_margin", [(0.0, 0.0, 0.0), (0.5, 1.0, 0.25), (0.1, 0.3, 0.0)])
def test_an_alignment_is_its_formula_written_as_loops(margin, distances, distance_margin):
    options = {"margin": margin, "distances": distances, "distance_margin": distance_margin}
    loss, given = made("alignment", **options), inputs()
    weight = loss.projector.weight.detach().flatten(1).numpy()  # (16, 4)
    features = given.features["latents"].detach().numpy()
    teacher = RandomBackbone().double()(given.images)[-1].numpy()

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    near, pairs = [], []
    for image in range(len(features)):
        student = [weight @ features[image, :, row, column] for row in range(4) for column in range(4)]
        wanted = [teacher[image, :, row, column] for row in range(4) for column in range(4)]
        near += [max(0, 1 - margin - cosine(a, b)) for a, b in zip(student, wanted, strict=True)]
        pairs += [
            max(0, abs(cosine(student[i], student[j]) - cosine(wanted[i], wanted[j])) - distance_margin)
            for i in range(16)
            for j in range(16)
        ]
    assert loss(given).item() == pytest.approx(np.mean(near) + distances * np.mean(pairs), rel=1e-9)


def test_features_on_another_grid_are_compared_with_the_teachers_map_resized():
    loss, given = build("alignment", {"teacher": "random", "level": 0, "projector": "identity"}).double(), inputs()
    loss.connect({"latents": (8, 4, 4)})  # the teacher's map is 8 x 8
    wanted = nn.functional.avg_pool2d(RandomBackbone().double()(given.images)[0], 2)
    seen = given._replace(features={"latents": wanted})
    assert float(loss(seen)) < 0.02  # bilinear and antialiased is nearly the mean of squares of 2 x 2
    assert float(loss(seen._replace(images=noise(3, 3, 16, 16, seed=7)))) > 0.05


def test_the_gram_matrix_of_two_channels_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # (1, 2, 1, 2)
    assert gram(features).tolist() == [[[5 / 4, 1 / 4], [1 / 4, 10 / 4]]]


def test_a_gram_loss_is_the_mean_over_entries_and_levels():
    given, loss = inputs(), made("gram")
    maps = [RandomBackbone().double()(images) for images in (given.images, given.reconstructions)]
    levels = [(gram(a) - gram(b)).abs().mean() for a, b in zip(*maps, strict=True)]
    torch.testing.assert_close(loss(given), sum(levels) / 2)
    assert made("gram", levels=[1])(given).item() == pytest.approx(levels[1].item())


def test_moved_features_are_not_the_same_texture_but_shifted_ones_are():
    features = noise(1, 3, 6, 6)
    torch.testing.assert_close(gram(features.roll((2, 1), (2, 3))), gram(features))
    assert not torch.allclose(gram(features[:, [1, 0, 2]]), gram(features))


# ------------------------------------------------------------------------------------------------ laws of the table


@pytest.mark.parametrize("kind", WITHOUT_FILES)
def test_the_gradient_of_a_loss_is_that_of_its_values(kind):
    given = inputs(count=1)
    loss = made(kind, **({"hidden": 4} if kind in ("repa", "vfmtok", "distillation") else {}))
    names = list(given.features)

    def value(made, features):
        return loss(LossInputs(given.images, made, dict.fromkeys(names, features)))

    arguments = (given.reconstructions, given.features["latents"])
    assert torch.autograd.gradcheck(value, arguments, eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", WITHOUT_FILES)
def test_a_loss_is_the_mean_of_those_of_the_images_by_themselves(kind):
    loss, given = made(kind), inputs()
    alone = [
        loss(
            LossInputs(
                given.images[n : n + 1],
                given.reconstructions[n : n + 1],
                {name: tensor[n : n + 1] for name, tensor in given.features.items()},
            )
        )
        for n in range(3)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(), loss(given))


@pytest.mark.parametrize("kind", WITHOUT_FILES)
def test_half_precision_is_summed_in_float32_and_no_frozen_network_is_saved(kind):
    loss, given = made(kind).float(), inputs()
    half = LossInputs(
        given.images.float(), given.reconstructions.bfloat16(), {n: t.float() for n, t in given.features.items()}
    )
    assert loss(half).dtype == torch.float32
    saved = {name.split(".")[0] for name in loss.state_dict()}
    assert saved <= {"projector"}


def test_the_loss_dists_is_the_metric_dists():
    try:
        loss = build("dists", {})
    except UsageError as missing:
        pytest.skip(str(missing))
    given = inputs(count=2)
    images, made = given.images.float(), given.reconstructions.float()
    torch.testing.assert_close(loss(LossInputs(images, made, {})), loss.distance(made, images).mean())
    assert float(loss(LossInputs(images, images, {}))) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------ backbones


@pytest.mark.parametrize("name", ["vgg16", "efficientnet_lite0", "efficientnet_lite2"])
def test_a_backbone_without_weights_says_the_shapes_of_its_maps(name):
    with without_weights():
        network = backbone(name)
        maps = network(torch.empty(2, 3, 64, 64))
    assert tuple(each.shape[1] for each in maps) == network.widths
    assert [64 // each.shape[2] for each in maps] == ([1, 2, 4, 8, 16] if name == "vgg16" else [2, 4, 8, 16, 32])
    assert not list(network.parameters())
    assert not network.state_dict()


def test_maps_of_efficientnet_end_in_what_its_features_are_pooled_of():
    from lexel.networks.efficientnet_lite import EfficientNetLayers

    torch.manual_seed(0)
    layers = EfficientNetLayers(10).double().eval()
    images = noise(1, 3, 32, 32)
    head = nn.functional.relu6(layers._bn1(layers._conv_head(layers.maps(images)[-1])))
    torch.testing.assert_close(layers(images)[0], head.mean((2, 3)))


def test_a_network_that_is_nowhere_is_refused_with_the_choices():
    with pytest.raises(UsageError, match=r"unknown network 'dino'; choose from .*vgg16, or give a folder"):
        backbone("dino")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Dinov2", "DINOv3ViT", "SiglipVision", "CLIPVision"])
def test_a_vision_transformer_is_a_teacher_by_its_path(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(patch_size=7, image_size=28, **sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    network = backbone(str(tmp_path))
    assert (network.patch, network.widths) == (7, (16,) * 4)
    images = noise(2, 3, 16, 16).float().requires_grad_(True)
    maps = network.at(images, None, (5, 5))
    assert [each.shape for each in maps] == [(2, 16, 5, 5)] * 4
    maps[0].sum().backward()
    assert images.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ the discriminator


def test_a_feature_discriminator_judges_each_image_by_itself_and_saves_its_heads_alone():
    torch.manual_seed(0)
    judge = FeatureDiscriminator("random", width=8)
    images = noise(3, 3, 16, 16).float().requires_grad_(True)
    same = copy.deepcopy(judge)  # spectral normalization moves with every pass
    logits = judge(images)
    assert logits.shape == (3, 8 * 8 + 4 * 4)
    torch.testing.assert_close(same(images[:1]), logits[:1])
    logits.sum().backward()
    assert images.grad.abs().sum() > 0
    assert {name.split(".")[0] for name in judge.state_dict()} == {"heads"}


# ------------------------------------------------------------------------------------------------ perturbed codes


def codes(similarity="l2"):
    z = noise(6, 2, 3, 3).requires_grad_(True)
    codebook = noise(12, 2, seed=5)
    nearest = (z.detach().movedim(1, -1)[..., None, :] - codebook).square().sum(-1).argmin(-1)
    chosen = codebook[nearest].movedim(-1, 1)
    return Codes(z, chosen + z - z.detach(), codebook, similarity)


@pytest.mark.parametrize("similarity", ["l2", "dot", "cosine"])
def test_near_codes_are_those_of_a_full_sort(similarity):
    rows, codebook = noise(20, 3), noise(15, 3, seed=1)
    distance = {
        "l2": torch.cdist(rows, codebook),
        "dot": -rows @ codebook.T,
        "cosine": -nn.functional.normalize(rows, dim=1) @ nn.functional.normalize(codebook, dim=1).T,
    }[similarity]
    assert torch.equal(nearest_codes(rows, codebook, 4, similarity), distance.argsort(1)[:, :4])


def test_perturbed_tokens_are_near_codes_and_gradients_pass():
    given = codes()
    perturbed = NearCodes(images=1.0, tokens=1.0, neighbours=3)(given, 0.0)
    near = nearest_codes(given.z.detach().movedim(1, -1).flatten(0, 2), given.codebook, 3)
    rows = perturbed.detach().movedim(1, -1).flatten(0, 2)
    among = (given.codebook[near] == rows[:, None]).all(-1)
    assert among.any(1).all()
    assert among.sum(0).min() > 5  # each rank is drawn
    weight = noise(*perturbed.shape, seed=3)
    (gradient,) = torch.autograd.grad((perturbed * weight).sum(), given.z)
    torch.testing.assert_close(gradient, weight)


def test_untouched_images_keep_their_codes():
    given = codes()
    assert torch.equal(NearCodes(images=0.0)(given, 0.0), given.z_q)
    assert torch.equal(NearCodes(images=1.0, tokens=0.0)(given, 0.0), given.z_q)
    assert torch.equal(NearCodes(images=1.0, neighbours=1)(given, 0.0), given.z_q)


def test_a_perturbation_shrinks_between_its_start_and_its_stop():
    strength = NearCodes(start=0.2, stop=0.6, end=0.5).strength
    assert [strength(at) for at in (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.5])


# ------------------------------------------------------------------------------------------------ in training

EVERYTHING = {
    "weights": {"l1": 1.0, "gram": 1.0, "adversarial": 0.1, "va_vae": 0.1, "deep": 0.2},
    "losses": {
        "gram": {"network": "random"},
        "va_vae": {"teacher": "random"},
        "deep": {"kind": "repa", "teacher": "random", "at": "decoder.middle", "hidden": 8},
    },
    "discriminator": {"kind": "features", "width": 8, "start": 3, "options": {"network": "random"}},
    "perturbation": {"kind": "near_codes", "images": 0.5, "neighbours": 4},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(generator.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def recipe(pictures, **train):
    return check(tables(pictures, **{**EVERYTHING, **train}), TokenizerRecipe, "test")


@pytest.fixture(scope="module")
def straight(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train_tokenizer(recipe(pictures), folder, device="cpu")
    return folder


def test_a_run_with_every_kind_of_loss_goes_on_bit_for_bit(pictures, straight, tmp_path):
    train_tokenizer(recipe(pictures), tmp_path, device="cpu", progress=interrupted_at(4))
    train_tokenizer(recipe(pictures), tmp_path, device="cpu")
    assert_same(final_state(straight), final_state(tmp_path))
    assert logged(straight) == logged(tmp_path)


def test_a_run_logs_its_losses_and_balanced_weights_and_saves_projectors_beside_the_model(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()][1:]  # after the start
    assert {"gram", "va_vae", "va_vae_weight", "deep"} <= lines[0].keys()
    state = final_state(straight)
    assert {name.split(".")[1] for name in state["objective"]} == {"va_vae", "deep"}
    assert Tokenizer.from_pretrained(straight).state_dict().keys() == state["model"].keys()


def test_projectors_learn(pictures, straight):
    learned = final_state(straight)["objective"]
    assert all(not torch.equal(tensor, torch.zeros_like(tensor)) for tensor in learned.values())
    with torch.random.fork_rng():
        from lexel.train.objective import Objective
        from lexel.train.optimization import seed_step

        seed_step(0, -2, 0)
        chosen = recipe(pictures).resolved()
        fresh = Objective(chosen.train, chosen.model, chosen.data.size).state_dict()
    assert all(not torch.equal(fresh[name], learned[name]) for name in learned)


def test_losses_that_learn_change_no_other_random_number(pictures, tmp_path):
    """Reconstructions and the discriminator begin as in the same run without them."""
    plain = {"losses": {}, "discriminator": {"layers": 1, "width": 4}, "perturbation": None, "log_every": 1}
    plain["weights"] = {"l1": 1.0, "adversarial": 0.1}
    aligned = plain | {"weights": plain["weights"] | {"repa": 1.0}}
    aligned["losses"] = {"repa": {"teacher": "random", "hidden": 8}}
    for name, options in {"plain": plain, "aligned": aligned}.items():
        train_tokenizer(recipe(pictures, steps=1, **options), tmp_path / name, device="cpu")
    first, second = (logged(tmp_path / name)[0] for name in ("plain", "aligned"))
    for name in ("l1", "logits_real", "discriminator"):
        assert first[name] == second[name]
    assert first["loss"] != second["loss"]


def test_the_decoder_alone_learns_stronger_losses_on_frozen_tokens(pictures, straight, tmp_path):
    options = {"weights": {"l1": 1.0, "gram": 5.0, "deep": 0.2}, "discriminator": None}
    options["losses"] = {name: EVERYTHING["losses"][name] for name in ("gram", "deep")}
    table = tables(pictures, **{**EVERYTHING, **options})
    table["init"] = {"source": str(straight), "what": "decoder"}
    train_tokenizer(check(table, TokenizerRecipe, "test"), tmp_path, device="cpu")
    before, after = Tokenizer.from_pretrained(straight), Tokenizer.from_pretrained(tmp_path)
    images = noise(2, 3, 16, 16).float()
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.decode(before.encode(images)), after.decode(before.encode(images)))


def test_an_alignment_of_what_is_frozen_is_refused(pictures, straight, tmp_path):
    table = tables(pictures, **EVERYTHING) | {"init": {"source": str(straight), "what": "decoder"}}
    with pytest.raises(UsageError, match="the loss va_vae looks at 'latents', where nothing learns"):
        train_tokenizer(check(table, TokenizerRecipe, "test"), tmp_path, device="cpu")


def test_features_have_the_shapes_that_were_announced(pictures):
    chosen = recipe(pictures)
    names = ("latents", "codes", "encoder.conv_in", "decoder.middle")
    shapes = feature_shapes(chosen.model, 16, names)
    tokenizer = Tokenizer(chosen.model)
    with gathered(tokenizer, names, (8, 8)) as found:
        tokenizer(noise(2, 3, 16, 16).float())
    assert {name: tuple(found[name].shape[1:]) for name in names} == shapes
    assert shapes["latents"] == shapes["codes"] == (4, 8, 8)
    assert not any(module._forward_hooks for module in tokenizer.modules())


def test_tokens_of_a_transformer_are_aligned_as_a_map():
    from lexel.autoencoders import ViTConfig
    from lexel.tokenizer import TokenizerConfig

    sizes = {"width": 8, "depth": 2, "heads": 2}
    config = ViTConfig(patch=4, encoder=sizes, decoder=sizes, head_width=4)
    quantizer = {"kind": "ibq", "codebook_size": 16, "codebook_dim": 4}
    model = TokenizerConfig(autoencoder=config, quantizer=quantizer)
    assert feature_shapes(model, 16, ("decoder.blocks.0", "encoder")) == {
        "decoder.blocks.0": (8, 4, 4),
        "encoder": (8, 4, 4),
    }


@pytest.mark.parametrize(
    "train, message",
    [
        ({"losses": {"repa": {"teacher": "random"}}}, "losses.repa has no weight; give weights.repa"),
        ({"losses": {"Deep": {}}, "weights": {"l1": 1.0, "Deep": 1.0}}, "a loss is named in small letters"),
        ({"losses": {"x": {"kind": "rapa"}}, "weights": {"l1": 1.0, "x": 1.0}}, "unknown loss 'rapa'; choose from"),
        ({"losses": {}, "weights": {"l1": 1.0, "repa": 1.0}}, "loss 'repa' needs the option 'teacher'"),
        (
            {"losses": {"repa": {"teacher": "random", "margin": 1}}, "weights": {"l1": 1.0, "repa": 1.0}},
            "loss 'repa' has no option 'margin'; its options are teacher, at, level, size, hidden",
        ),
        (
            {"losses": {"repa": {"teacher": "random", "at": "decoder.x"}}, "weights": {"l1": 1.0, "repa": 1.0}},
            "no features 'decoder.x'; choose latents, codes or a part: encoder, encoder.conv_in",
        ),
        (
            {"losses": {"repa": {"teacher": "random", "at": "encoder.levels"}}, "weights": {"l1": 1.0, "repa": 1.0}},
            "no features 'encoder.levels'; choose",
        ),
        (
            {"losses": {"gram": {"network": "random", "size": -1}}, "weights": {"l1": 1.0, "gram": 1.0}},
            "size must be a number of pixels, got -1",
        ),
        (
            {"losses": {"repa": {"teacher": "random", "level": 2}}, "weights": {"l1": 1.0, "repa": 1.0}},
            "level = 2: the network random has maps 0 to 1, or -2 to -1",
        ),
        (
            {"losses": {"commitment": {"kind": "gram"}}, "weights": {"l1": 1.0, "commitment": 1.0}},
            "train.losses.commitment has the name of a term of the model",
        ),
        ({"perturbation": {"images": 0.5}}, "a perturbation needs a kind; choose from near_codes"),
        ({"perturbation": {"kind": "near_codes", "images": 2.0}}, r"needs images in \[0, 1\], got 2.0"),
        (
            {
                "perturbation": {"kind": "near_codes"},
                "quantizer": {"kind": "residual", "codebook_size": 4, "codebook_dim": 4},
            },
            "swaps codes of one table",
        ),
        ({"discriminator": {"kind": "features", "layers": 2}}, "layers has no effect without a kind that has layers"),
        ({"discriminator": {"kind": "features", "options": {"x": 1}}}, "discriminator 'features' has no option 'x'"),
        ({"discriminator": {"kind": "features", "options": {"width": 8}}}, "options.width is an option of the discrim"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_the_recipe(pictures, train, message):
    with pytest.raises(UsageError, match=message):
        recipe(pictures, **train)


def test_a_loss_of_features_needs_images_of_three_channels(pictures):
    table = tables(pictures, weights={"l1": 1.0, "gram": 1.0}, losses={"gram": {"network": "random"}})
    table["model"]["autoencoder"]["channels"] = table["data"]["channels"] = 1
    with pytest.raises(UsageError, match="the loss gram needs images of 3 channels, got 1"):
        check(table, TokenizerRecipe, "test")


def test_every_loss_can_be_built_without_weights():
    with without_weights():
        for kind in LOSSES:
            made(kind)
        assert isinstance(BACKBONES["vgg16"](), Backbone)
        assert isinstance(build("alignment", {"teacher": "vgg16"}), Alignment)
        assert isinstance(build("gram", {}), GramLoss)
