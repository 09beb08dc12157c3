"""Laws over GENERATORS: what every family promises, whatever its network and its condition."""

import copy
import json

import pytest
import torch
from test_generators_latents import FAMILIES as LATENTS
from test_transformer import shake
from thorough import families

from lexel.config import find_recipe, load
from lexel.errors import UsageError
from lexel.generators import FREE, GENERATORS, Generator, GeneratorConfig
from lexel.generators.config import network_config
from lexel.train.generator_recipe import GeneratorRecipe

NETWORKS = {  # a family in each of its shapes; every family of the table must be here
    "next_token": {},
    "next_token-factorised": {"head": "factorised", "factors": [5, 6]},
    "next_token-start": {"modulated": False},
    "next_token-gpt": {"network": "gpt"},
    "random_order": {"hidden": 48},
    "masked": {"hidden": 48},
    "masked-uvit": {"hidden": 48, "network": "uvit"},
    "masked-mage": {"hidden": 48, "network": "mage", "decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2},
}
WITHOUT_STATES: set[str] = set()  # those that define no `hidden`
CONDITIONS = {
    "class": {"classes": 4},
    "none": {"condition": {"kind": "none"}},
    "text": {"condition": {"kind": "text", "features": 6, "length": 3}},
}
OPTIONS = {"masked": {"steps": 4, "choice_temperature": 2.0}}
HOT = {"temperature": 1.3, "top_k": 25, "top_p": 0.95, "min_p": 0.001}


def options(kind: str) -> dict:
    return OPTIONS.get(kind.split("-")[0], {})


def known(name: str, **options) -> dict:
    """Those of some options that a family has."""
    return {key: value for key, value in options.items() if key in GENERATORS[name.split("-")[0]].Config.model_fields}


def make(name: str, condition: str = "class", dtype: torch.dtype = torch.float64, **more) -> Generator:
    kind = name.split("-")[0]
    table = {"kind": kind, "codebook_size": 30, "rows": 2, "columns": 3, **known(name, width=32, layers=2, heads=2)}
    table |= {**NETWORKS[name], **CONDITIONS[condition], **more}
    generator = Generator(GeneratorConfig(transformer=network_config(table)))
    shake(generator)
    return generator.to(dtype)


def given_condition(generator: Generator, count: int = 5):
    """What a caller gives for so many images, all different."""
    if generator.condition.kind == "class":
        return [number % 4 for number in range(count)]
    if generator.condition.kind == "none":
        return count
    random = torch.Generator().manual_seed(1)
    return [torch.randn(1 + number % 3, 6, generator=random, dtype=torch.float64) for number in range(count)]


def rows(condition, chosen: list[int]):
    return len(chosen) if isinstance(condition, int) else [condition[number] for number in chosen]


@pytest.fixture(params=NETWORKS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=CONDITIONS)
def condition(request) -> str:
    return request.param


def test_every_family_of_the_table_is_held_to_the_laws():
    latents = {table["kind"] for table in LATENTS.values()}  # held to them in test_generators_latents
    assert {name.split("-")[0] for name in NETWORKS} | latents == GENERATORS.keys()


def test_an_image_depends_on_neither_its_batch_nor_its_place(name, condition):
    generator = make(name, condition)
    settings = {**HOT, **options(name), "seed": 3}
    if generator.condition.guided:
        settings |= {"cfg_scale": 2.0, "cfg_schedule": "linear"}
    asked = given_condition(generator)
    together = generator.sample(asked, **settings)
    assert together.shape == (5, 2, 3)
    assert 0 <= together.min() <= together.max() < 30
    assert len(together.unique(dim=0)) > 1
    assert torch.equal(generator.sample(asked, batch_size=2, **settings), together)
    backwards = generator.sample(rows(asked, [4, 3, 2, 1, 0]), image_numbers=[4, 3, 2, 1, 0], **settings)
    assert torch.equal(backwards.flip(0), together)
    alone = generator.sample(rows(asked, [2]), image_numbers=[2], **settings)
    assert torch.equal(alone[0], together[2])
    assert not torch.equal(generator.sample(asked, **{**settings, "seed": 4}), together)


def test_given_tokens_stay_and_the_rest_is_sampled(name):
    generator = make(name)
    given = torch.tensor([[[7, FREE, FREE], [FREE, 9, FREE]], [[7, 3, 1], [2, 4, FREE]]])
    found = generator.sample([0, 1], 2.0, given=given, seed=1, **options(name))
    assert torch.equal(found[given >= 0], given[given >= 0])
    assert (found >= 0).all()
    assert torch.equal(generator.sample([0, 1], given=found, **options(name)), found)  # nothing left to do


@pytest.mark.parametrize("grid", [[7], [3, 5], [2, 2, 2]])
def test_tokens_lie_in_a_grid_of_any_shape(name, grid):
    generator = make(name, grid=grid, width=48)  # three axes of rotated pairs divide a head of 24
    found = generator.sample([0, 1], **options(name))
    assert found.shape == (2, *grid)
    assert generator.token_spec.grids == (tuple(grid),)
    sum(generator.losses(found, torch.tensor([0, 1])).values()).backward()


def test_a_folder_gives_the_same_generator_back(name, condition, tmp_path):
    generator = make(name, condition, torch.float32)
    generator.save_pretrained(tmp_path, provenance={"step": 3})
    again = Generator.from_pretrained(tmp_path)
    assert type(again) is type(generator)
    assert again.config == generator.config
    assert again.provenance == {"step": 3}
    assert again.fingerprint() == generator.fingerprint()
    asked = given_condition(generator)
    assert torch.equal(again.sample(asked, **options(name)), generator.sample(asked, **options(name)))


def test_loading_and_sampling_work_in_inference_mode(name, tmp_path):
    generator = make(name, dtype=torch.float32)
    generator.save_pretrained(tmp_path)
    expected = generator.sample([0, 1], 2.0, **options(name))
    with torch.inference_mode():
        inside = Generator.from_pretrained(tmp_path)
        assert torch.equal(inside.sample([0, 1], 2.0, **options(name)), expected)
    assert torch.equal(inside.sample([0, 1], 2.0, **options(name)), expected)  # what was kept serves outside too
    with torch.inference_mode():
        assert torch.equal(generator.sample([0, 1], 2.0, **options(name)), expected)
    sum(generator.train().losses(expected, torch.tensor([0, 1])).values()).backward()


def test_every_parameter_learns(name, condition):
    generator = make(name, condition).train()
    tokens = torch.arange(5 * 6).view(5, 2, 3) % 30
    prepared = generator.condition.check(given_condition(generator))
    torch.manual_seed(0)
    for _ in range(4):  # masks and dropped conditions differ
        sum(generator.losses(tokens, prepared).values()).backward()
    idle = [key for key, value in generator.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []


@pytest.mark.parametrize("name", families(NETWORKS))
def test_training_steps_lower_the_likelihoods_bound(name):
    generator = make(name, dtype=torch.float32, **known(name, dropout=0.0)).train()
    optimizer = torch.optim.AdamW(generator.parameters(), 1e-2, fused=True)
    tokens, labels = torch.arange(4 * 6).view(4, 2, 3) % 30, torch.arange(4)
    before = generator.eval().nll(tokens, labels)
    torch.manual_seed(0)
    for _ in range(40):
        optimizer.zero_grad()
        sum(generator.train().losses(tokens, labels).values()).backward()
        optimizer.step()
    assert generator.eval().nll(tokens, labels).mean() < 0.7 * before.mean()


def test_the_likelihood_does_not_depend_on_the_batch(name):
    generator = make(name)
    tokens, labels = torch.arange(5 * 6).view(5, 2, 3) % 30, torch.tensor([0, 1, 2, 3, 0])
    together = generator.nll(tokens, labels)
    if together is None:
        pytest.skip("this family has no likelihood")
    assert together.shape == (5, 6)
    assert torch.equal(generator.nll(tokens, labels), together)
    torch.testing.assert_close(generator.nll(tokens[1:2], labels[1:2]), together[1:2], rtol=1e-12, atol=1e-12)


def test_a_network_is_built_on_the_meta_device_without_memory(name, condition):
    config = make(name, condition).config
    with torch.device("meta"):
        generator = Generator(config)
    assert all(parameter.is_meta for parameter in generator.parameters())


def test_a_generator_that_has_sampled_can_be_copied(name):
    generator = make(name, dtype=torch.float32)
    before = generator.sample([0, 1], **options(name))
    assert torch.equal(copy.deepcopy(generator).sample([0, 1], **options(name)), before)


def test_no_images_are_an_empty_batch(name):
    assert make(name).sample([], **options(name)).shape == (0, 2, 3)


def test_progress_counts_up_to_every_token(name):
    seen = []
    generator = make(name)
    generator.sample([0, 1, 2], batch_size=2, progress=lambda *done: seen.append(done), **options(name))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (18, 18)


@pytest.mark.parametrize(
    ("condition", "given", "message"),
    [
        ("class", [4.5], "integers"),
        ("class", [5], r"in \[0, 4\]"),
        ("class", 3, "integers"),
        ("none", [1, 2], r"takes how many images to make, got \[1, 2\]"),
        ("none", -1, "how many images"),
        ("text", [1, 2], "features"),
        ("text", [torch.zeros(2, 5)], r"float \(length, 6\)"),
        ("text", [torch.ones(4, 6)], "4 rows; the generator takes 3"),
        ("text", [torch.full((2, 6), torch.nan)], "finite"),
        ("text", "a cat", "features"),
    ],
)
def test_wrong_conditions_are_refused_in_one_line(name, condition, given, message):
    with pytest.raises(UsageError, match=message) as error:
        make(name, condition).sample(given)
    assert "\n" not in str(error.value)


def test_an_unconditional_generator_has_nothing_to_guide_by(name):
    with pytest.raises(UsageError, match="nothing to guide by"):
        make(name, "none").sample(2, cfg_scale=2.0)
    with pytest.raises(UsageError, match="no classes"):
        make(name, "none").class_numbers(["0"])


def test_options_of_another_family_are_refused_with_its_own():
    with pytest.raises(UsageError, match=r"masked generator.*no option 'window'; its options are steps, schedule"):
        make("masked").sample([0], window=2)
    with pytest.raises(UsageError, match="no option 'steps'; its options are window, implementation"):
        make("next_token").sample([0], steps=2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "maskd"}, "unknown generator 'maskd'; choose from continuous"),
        ({"kind": "masked", "schedule": "sine"}, "schedule"),
        ({"kind": "masked", "decoder_width": 64}, "decoder_width reaches nothing with network = 'bert'"),
        ({"kind": "masked", "network": "mage", "unmasked_weight": 0.2}, "unmasked_weight reaches nothing"),
        ({"kind": "masked", "network": "uvit", "layers": 3}, "layers must be even"),
        ({"pair_layers": 3}, "pair_layers reaches nothing in a plain head"),
        ({"factors": [5, 6]}, "factors reaches nothing"),
        ({"modulated": False, "gamma_init": 0.1}, "gamma_init reaches nothing"),
        ({"network": "gpt", "modulated": False}, 'modulated reaches nothing in network = "gpt"'),
        ({"network": "gpt", "head": "factorised"}, "leave head out"),
        ({"codebook_size": 30, "head": "factorised", "modulated": False}, "modulated reaches nothing"),
        ({"codebook_size": 30, "head": "factorised", "gamma_init": 0.5}, "gamma_init reaches nothing"),
        ({"kind": 3}, "kind must be a text"),
    ],
)
def test_options_that_reach_nothing_or_mean_nothing_are_refused(table, message):
    with pytest.raises(UsageError, match=message):
        network_config(table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "txt"}, "unknown condition 'txt'; choose from class, none, text"),
        ({}, "condition needs a kind"),
        ({"kind": "text"}, "needs the option 'features'"),
        ({"kind": "class", "classes": "four"}, "classes = 'four' is not an integer"),
        ({"kind": "text", "features": 6, "width": 3}, "no option 'width'"),
    ],
)
def test_wrong_condition_tables_are_refused(table, message):
    with pytest.raises(UsageError, match=message):
        Generator(GeneratorConfig(transformer=network_config({"condition": table})))


def test_old_folders_with_options_that_reached_nothing_load(tmp_path):
    generator = make("next_token-start", dtype=torch.float32)
    generator.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformer"] |= {"gamma_init": 1e-5, "pair_layers": 4, "factors": [3, 10]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Generator.from_pretrained(tmp_path).config == generator.config


def test_random_orders_are_annealed_to_raster_order():
    generator = make("random_order", anneal_from=0.5, anneal_to=0.75)
    shares = []
    for progress in (0.0, 0.5, 0.625, 0.75, 1.0):
        generator.anneal(progress)
        shares.append(generator.permuted)
    assert shares == [1.0, 1.0, 0.5, 0.0, 0.0]
    tokens, labels = torch.arange(12).view(2, 2, 3), torch.tensor([0, 1])
    loss = generator.losses(tokens, labels)["nll"]
    torch.testing.assert_close(loss, generator.nll(tokens, labels).mean())  # now in raster order


def test_known_tokens_may_come_first_in_a_random_order():
    generator = make("random_order")
    given = torch.tensor([[[FREE, FREE, 3], [FREE, 9, FREE]]])
    changed = given.clone()
    changed[0, 1, 1] = 10  # a token that stands after the first ones
    for order, differs in (("raster", False), ("given_first", True)):
        a, b = (generator.sample([0], given=each, order=order, top_k=1) for each in (given, changed))
        assert torch.equal(a[given >= 0], given[given >= 0])
        assert (a[0, 0] != b[0, 0]).any() == differs


PUBLISHED = {  # a recipe: the published count, and what of it reaches nothing: rows of tables, idle modules
    "titok_b64": (177_227_008, 0),
    "titok_l32": (177_202_432, 0),
    "titok_s128": (294_990_848, 0),
    # The mask's row, and rows to spare: 1,022 of the positions, 1,024 of the targets, 98 of the steps.
    "rar_b": (260_923_648, 2145 * 768),
    "rar_l": (461_668_352, 2145 * 1024),
    "rar_xl": (955_425_024, 2145 * 1280),
    "rar_xxl": (1_498_520_704, 2145 * 1408),
    # 999 of 1,000 labels, all their biases and the mask's; two tables of 257 positions, two tokens, and the pixels'
    # projections in and out (patches of 16 x 16 x 3).
    "mage_b": (146_474_217, (999 + 2 * 257 + 2 + 2 * 768 + 1) * 768 + 768 + 1001),
    "mage_l": (409_891_561, (999 + 2 * 257 + 2 + 2 * 768 + 1) * 1024 + 768 + 1001),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(name):
    recipe = load(find_recipe(f"generator_{name}"), GeneratorRecipe)
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(transformer=recipe.generator))
    published, idle = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in generator.parameters()) + idle == published


def test_hidden_states_of_tokens_do_not_depend_on_the_batch(name, condition):
    generator = make(name, condition).eval()
    tokens = torch.randint(30, (5, 2, 3), generator=torch.Generator().manual_seed(0))
    prepared = generator.condition.check(given_condition(generator))
    if name in WITHOUT_STATES:
        with pytest.raises(UsageError, match="has no hidden states"):
            generator.hidden(tokens, prepared)
        return
    states = generator.hidden(tokens, prepared)
    assert states.shape == (5, 6, 32)
    alone = torch.cat([generator.hidden(tokens[row : row + 1], prepared[row : row + 1]) for row in range(5)])
    torch.testing.assert_close(states, alone, atol=1e-12, rtol=0)
    assert not torch.allclose(states, generator.hidden(tokens.flip(0), prepared))
    with pytest.raises(UsageError, match=r"layers must be in \[1, 2\]"):
        generator.hidden(tokens, prepared, layers=3)


def test_the_last_hidden_states_of_a_next_token_generator_predict_its_tokens():
    generator = make("next_token-start", dtype=torch.float64).eval()
    tokens = torch.randint(30, (3, 2, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    states = generator.hidden(tokens, labels, layers=2)
    network = generator.transformer
    torch.testing.assert_close(network.head(network.norm(states)), generator(tokens, labels).logits[0])


@pytest.mark.parametrize("name", ["next_token", "next_token-gpt", "random_order"])
def test_a_hidden_state_of_an_autoregressive_generator_has_seen_the_tokens_before_its_own_and_no_other(name):
    generator = make(name).eval()
    tokens = torch.randint(30, (1, 2, 3), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 1, 0] = (other[0, 1, 0] + 1) % 30  # the fourth token
    moved = (generator.hidden(tokens, torch.tensor([1])) - generator.hidden(other, torch.tensor([1]))).abs().amax(2)
    assert (moved[0] > 1e-9).tolist() == [False] * 4 + [True] * 2


def test_the_share_that_mage_drops_the_width_inside_its_decoder_and_the_epsilon_of_norms_are_options():
    generator = make("masked-mage", dropped=0.3, decoder_hidden=20, norm_eps=1e-3)
    assert generator.transformer.decoder_norm.eps == generator.transformer.blocks[1].norm2.eps == 1e-3
    assert generator.transformer.decoder_blocks[0].feed_forward.fc1.out_features == 20
    rates = generator.mage_rates(1000, torch.device("cpu"))
    assert 0.3 <= rates.min() < 0.35
    assert rates.max() <= 1
    lengths = []
    generator.transformer.blocks[0].register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    generator.losses(torch.zeros(2, 2, 3, dtype=torch.int64), torch.tensor([0, 1]))
    assert lengths == [1 + 6 - 2]  # of six tokens, ceil(6 * 0.3) are dropped; the class stands before them
