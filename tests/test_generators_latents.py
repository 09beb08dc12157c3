"""Generators of latents and of residual codes: oracles, sampling, in-painting, training."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_transformer import shake
from thorough import families
from torch import Tensor, nn

from lexel.codebooks import prune_tokenizer
from lexel.config import load
from lexel.convert import rq_transformer
from lexel.errors import UsageError
from lexel.generators import FREE, Generator, GeneratorConfig
from lexel.generators.config import network_config
from lexel.generators.continuous.generator import hidden_after
from lexel.generators.flow.diffusion import Diffusion, cosine_betas, ddim_steps, linear_betas, spaced_steps
from lexel.generators.flow.guidance import ProjectedGuidance
from lexel.generators.flow.times import TIMES, training_times
from lexel.generators.flow.transport import PATHS, Transport, solve_ode, solve_sde
from lexel.generators.latents import normal
from lexel.tokenizer import Tokenizer, TokenizerConfig
from lexel.train.generator_recipe import GeneratorRecipe

GRID = {"rows": 4, "columns": 6, "classes": 5}
SMALL = {"width": 32, "layers": 2, "heads": 4}
FAMILIES = {
    "flow": {"kind": "flow", "channels": 4, **GRID, **SMALL},
    "flow-heun": {"kind": "flow", "channels": 4, "path": "gvp", "times": "logit_normal", **GRID, **SMALL},
    "flow-noise": {"kind": "flow", "channels": 4, "prediction": "noise", "patch": 1, **GRID, **SMALL},
    "diffusion": {
        "kind": "flow", "channels": 4, "objective": "diffusion", "learned_variance": True, **GRID, **SMALL
    },
    "continuous": {
        "kind": "continuous", "channels": 4, "head_width": 32, "head_layers": 2, "buffer": 3, **GRID, **SMALL
    },
    "continuous-patches": {
        "kind": "continuous", "channels": 4, "patch": 2, "head_width": 32, "head_layers": 2, "buffer": 3,
        "decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2, **GRID, **SMALL,
    },
    "next_scale": {
        "kind": "next_scale", "codebook_dim": 4, "scales": [1, 2, 4], "classes": 5, "width": 32, "layers": 2, "heads": 2
    },
    "next_scale-shared": {
        "kind": "next_scale", "codebook_dim": 4, "scales": [1, 2, 4], "classes": 5, "width": 32, "layers": 2,
        "heads": 2, "shared_modulation": True, "normalised": False,
    },
    "residual": {"kind": "residual", "books": 3, "codebook_dim": 4, "depth_layers": 1, **GRID, **SMALL},
    "residual-tables": {
        "kind": "residual", "books": 3, "codebook_dim": 0, "depth_layers": 1, "cumulative": False,
        "shared_classifier": False, "sigmoid_gelu": True, **GRID, **SMALL,
    },
}  # fmt: skip
OPTIONS = {
    "flow": {"steps": 5},
    "flow-heun": {"steps": 4, "method": "heun"},
    "flow-noise": {"steps": 5, "method": "sde"},
    "diffusion": {"steps": 5},
    "continuous": {"steps": 4, "diffusion_steps": 3},
    "continuous-patches": {"steps": 3, "diffusion_steps": 3},
    "next_scale": {"top_p": 0.9},
    "next_scale-shared": {"top_k": 7},
    "residual": {"top_k": 9},
    "residual-tables": {"temperature": 1.2},
}


QUANTIZERS = {"residual": {"depth": 3}, "next_scale": {"kind": "multiscale", "scales": [1, 2, 4]}}


def tokenizer(family: str) -> Tokenizer:
    kind = family if family == "residual" else "vq"
    quantizer = {"kind": kind, "codebook_size": 11, "codebook_dim": 4, **QUANTIZERS.get(family, {})}
    autoencoder = {
        "kind": "vqgan", "width": 8, "multipliers": [1, 1], "z_channels": 4, "groups": 4, "residual_blocks": 1,
        "attention_levels": [], "middle_attention": False,
    }  # fmt: skip
    torch.manual_seed(1)
    made = Tokenizer(TokenizerConfig.model_validate({"autoencoder": autoencoder, "quantizer": quantizer}))
    return made.double().eval()


def make(name: str, codes: bool = True) -> Generator:
    """A generator of codes, with a tokenizer where it needs one; or of the latents of a continuous tokenizer."""
    table = {**FAMILIES[name], "codebook_size": 11 if codes else 1}
    generator = Generator(GeneratorConfig(transformer=network_config(table)))
    shake(generator)
    generator = generator.double().eval()
    if generator.needs_tokenizer:
        generator.attach(tokenizer(table["kind"]))
    return generator


def some_tokens(generator: Generator, count: int) -> Tensor:
    return torch.randint(0, 11, (count, *generator.grid), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


def test_an_image_depends_on_neither_its_batch_nor_its_place(name):
    generator = make(name)
    guided = {"cfg_scale": 2.0, "seed": 3, **OPTIONS[name]}
    together = generator.sample([0, 1, 2, 3], **guided)
    assert together.shape == (4, *generator.grid)
    assert 0 <= together.min() <= together.max() < 11
    alone = [generator.sample([n], image_numbers=[n], **guided) for n in (3, 2, 1, 0)]
    assert torch.equal(torch.cat(alone[::-1]), together)
    assert torch.equal(generator.sample([0, 1, 2, 3], batch_size=3, **guided), together)
    assert not torch.equal(generator.sample([0, 1, 2, 3], **{**guided, "seed": 4}), together)


@pytest.mark.parametrize("name", ["flow", "flow-heun", "flow-noise", "diffusion", "continuous", "continuous-patches"])
def test_latents_of_a_continuous_tokenizer_are_sampled_as_they_are(name):
    generator = make(name, codes=False)
    together = generator.sample([0, 1, 2], 1.5, seed=3, **OPTIONS[name])
    assert together.shape == (3, 4, 4, 6)
    assert together.is_floating_point()
    alone = torch.cat([generator.sample([n], 1.5, seed=3, image_numbers=[n], **OPTIONS[name]) for n in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)
    losses = generator.train().losses(torch.randn(2, 4, 4, 6, dtype=torch.float64), torch.tensor([0, 1]))
    assert all(loss.dim() == 0 for loss in losses.values())
    with pytest.raises(UsageError, match=r"latents \(B, 4, 4, 6\)"):
        generator.losses(torch.randn(2, 5, 4, 6), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", [each for each in FAMILIES if each != "flow-noise"])
def test_given_tokens_stay_and_the_rest_is_sampled(name):
    generator = make(name)
    given = some_tokens(generator, 2)
    free = torch.rand(given.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    free[1] = False
    found = generator.sample([0, 1], 2.0, given=given.masked_fill(free, FREE), seed=1, **OPTIONS[name])
    assert torch.equal(found[~free], given[~free])
    assert (found >= 0).all()


def test_a_folder_gives_the_same_generator_back(name, tmp_path):
    generator = make(name).float()
    generator.save_pretrained(tmp_path, provenance={"step": 3})
    again = Generator.from_pretrained(tmp_path)
    assert again.config == generator.config
    assert again.provenance == {"step": 3}
    assert again.fingerprint() == generator.fingerprint()
    expected = generator.sample([0, 1], 2.0, **OPTIONS[name])
    assert torch.equal(again.sample([0, 1], 2.0, **OPTIONS[name]), expected)
    with torch.inference_mode():
        assert torch.equal(Generator.from_pretrained(tmp_path).sample([0, 1], 2.0, **OPTIONS[name]), expected)
    assert torch.equal(copy.deepcopy(generator).sample([0, 1], 2.0, **OPTIONS[name]), expected)
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in Generator(generator.config).parameters())


def test_a_likelihood_does_not_depend_on_the_batch_where_there_is_one(name):
    generator = make(name)
    tokens, labels = some_tokens(generator, 3), torch.tensor([0, 2, 4])
    together = generator.nll(tokens, labels)
    assert (together is not None) == generator.has_likelihood == (name.split("-")[0] in ("next_scale", "residual"))
    if together is not None:
        assert together.shape == (3, math.prod(generator.grid))
        torch.testing.assert_close(generator.nll(tokens[1:2], labels[1:2]), together[1:2], rtol=1e-12, atol=1e-12)


def test_no_images_are_an_empty_batch(name):
    generator = make(name)
    assert generator.sample([], **OPTIONS[name]).shape == (0, *generator.grid)


def test_progress_counts_up_to_every_token(name):
    seen, generator = [], make(name)
    generator.sample([0, 1, 2], batch_size=2, progress=lambda *done: seen.append(done), **OPTIONS[name])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == 3 * math.prod(generator.grid)


def test_hidden_states_of_tokens_do_not_depend_on_the_batch(name):
    generator = make(name)
    tokens, labels = some_tokens(generator, 3), torch.tensor([0, 2, 4])
    rows = {"flow": 6, "flow-noise": 24, "continuous": 24, "continuous-patches": 6, "next_scale": 21, "residual": 24}
    states = generator.hidden(tokens, labels)
    assert states.shape == (3, rows.get(name) or rows[FAMILIES[name]["kind"]], 32)
    alone = torch.cat([generator.hidden(tokens[row : row + 1], labels[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(states, alone, atol=1e-12, rtol=0)
    assert not torch.allclose(states, generator.hidden(tokens.flip(0), labels))
    first, second = (generator.hidden(tokens, labels, layers=layers) for layers in (1, 2))
    assert not torch.allclose(first, second, atol=1e-6)
    with pytest.raises(UsageError, match=r"layers must be in \[1, 2\]"):
        generator.hidden(tokens, labels, layers=3)


@pytest.mark.parametrize("name", ["flow", "diffusion", "continuous"])
def test_hidden_states_are_of_latents_where_the_tokenizer_is_continuous(name):
    generator = make(name, codes=False)
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = generator.hidden(latents, torch.tensor([1, 2]))
    assert states.shape[2] == 32
    assert not torch.allclose(states[0], states[1])


@pytest.mark.parametrize("name", ["flow", "diffusion", "continuous"])
@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_filters_of_tokens_are_refused_where_no_token_is_drawn(name, filters):
    with pytest.raises(UsageError, match=f"{next(iter(filters))} reaches nothing"):
        make(name).sample([0], **OPTIONS[name], **filters)


def test_a_condition_may_be_a_caption_or_nothing(name):
    for table, asked in (({"kind": "none"}, 2), ({"kind": "text", "features": 3, "length": 2}, [torch.ones(1, 3)] * 2)):
        config = network_config({**FAMILIES[name], "codebook_size": 11, "condition": table})
        generator = Generator(GeneratorConfig(transformer=config)).eval()
        if generator.needs_tokenizer:
            generator.attach(tokenizer(generator.config.transformer.kind).float())
        assert generator.sample(asked, **OPTIONS[name]).shape == (2, *generator.grid)
        prepared = generator.condition.check(asked)
        sum(generator.train().losses(some_tokens(generator, 2), prepared).values()).backward()


def test_projected_guidance_is_of_an_image_alone_and_needs_guidance():
    generator = make("flow")
    options = {"cfg_scale": 3.0, "seed": 3, "steps": 4, "guidance": "projected"}
    together = generator.sample([0, 1, 2], **options)
    alone = torch.cat([generator.sample([n], image_numbers=[n], **options) for n in range(3)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, generator.sample([0, 1, 2], **{**options, "guidance": "plain"}))
    with pytest.raises(UsageError, match="reaches nothing without guidance; set cfg_scale above 1"):
        generator.sample([0], steps=4, guidance="projected")


def test_guidance_along_the_prediction_is_taken_out_and_the_rest_is_capped():
    conditional, unconditional = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, -9.0]])
    guided = ProjectedGuidance(longest=2.5)(conditional, unconditional, 3.0)
    torch.testing.assert_close(guided, torch.tensor([[3.0, 4.0], [1.0, 5.0]]))
    assert torch.equal(ProjectedGuidance()(conditional, unconditional, 1.0), conditional)


@pytest.mark.parametrize("times", TIMES)
def test_training_looks_at_times_within_the_path_and_a_stratified_batch_at_all_of_it(times):
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn, even = training_times(uniform, times), training_times(uniform, times, stratified=True)
    assert 0 <= min(drawn.min(), even.min()) <= max(drawn.max(), even.max()) <= 1
    steps = even.diff()  # one draw a part, in order
    assert (steps > 0).all() or (steps < 0).all()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
    with pytest.raises(UsageError, match="unknown distribution of times 'lognormal'"):
        training_times(uniform, "lognormal")


def test_options_of_times_are_written_only_where_they_say_something():
    plain = network_config(FAMILIES["flow"])
    assert not {"times", "stratified"} & plain.model_dump(mode="json").keys()
    table = network_config({**FAMILIES["flow"], "times": "mode"}).model_dump(mode="json")
    assert table["times"] == "mode"


def test_the_sde_of_a_flow_refuses_given_tokens():
    generator = make("flow")
    with pytest.raises(UsageError, match="ODE samplers only"):
        generator.sample([0], given=some_tokens(generator, 1), method="sde", steps=4)


def test_a_family_that_needs_code_vectors_says_so_without_a_tokenizer():
    generator = Generator(GeneratorConfig(transformer=network_config({**FAMILIES["flow"], "codebook_size": 11})))
    with pytest.raises(UsageError, match="no tokenizer"):
        generator.losses(some_tokens(generator, 1), torch.tensor([0]))


@pytest.mark.parametrize("name", families(FAMILIES))
def test_training_lowers_the_loss(name):
    generator = make(name).float().train()
    tokens, labels = some_tokens(generator, 4), torch.arange(4)
    optimizer = torch.optim.Adam(generator.parameters(), 5e-3, fused=True)
    torch.manual_seed(0)
    history = []
    for _ in range(15):
        loss = sum(generator.losses(tokens, labels).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.95 * sum(history[:5])


def test_recomputed_blocks_give_the_same_gradients(name):
    generator = make(name).train()
    tokens, labels = some_tokens(generator, 2), torch.tensor([1, 2])
    gradients = []
    for recomputed in (False, True):
        generator.transformer.checkpointing = recomputed
        torch.manual_seed(0)
        sum(generator.losses(tokens, labels).values()).backward()
        gradients.append([p.grad.clone() for p in generator.parameters() if p.grad is not None])
        generator.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------- scales, residual codes


@pytest.mark.parametrize("name", ["next_scale", "next_scale-shared"])
def test_the_cache_over_scales_equals_the_whole_network(name):
    generator = make(name)
    greedy = generator.sample([0, 3], top_k=1)  # (2, 21)
    logits = generator(greedy, torch.tensor([0, 3])).logits[0]
    assert torch.equal(logits.argmax(-1), greedy)


def test_a_finer_scale_does_not_change_the_likelihood_of_a_coarser_one():
    generator = make("next_scale")
    tokens = some_tokens(generator, 1)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 11  # of the second scale
    before, after = (generator.nll(each, torch.tensor([0]))[0] for each in (tokens, changed))
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[3:5], after[3:5])  # tokens of one scale do not see each other
    assert not torch.equal(before[5:], after[5:])


def test_scales_that_do_not_fit_the_tokens_are_refused_with_what_would():
    settings = make("next_scale").settings
    settings.check_fits(tokenizer("next_scale").token_spec(8, 8), ["a"] * 5, "tokens")
    with pytest.raises(UsageError, match=r"set generator\.codebook_size = 12"):
        settings.check_fits(tokenizer("next_scale").token_spec(8, 8)._replace(codebook_size=12), ["a"] * 5, "tokens")
    with pytest.raises(UsageError, match="square"):
        settings.check_fits(tokenizer("next_scale").token_spec(8, 16), ["a"] * 5, "tokens")


@pytest.mark.parametrize("name", ["residual", "residual-tables"])
def test_the_cache_of_residual_codes_equals_the_whole_network(name):
    generator = make(name)
    greedy = generator.sample([0, 3], top_k=1)  # (2, 3, 4, 6)
    logits = generator(greedy, torch.tensor([0, 3])).logits[0]
    assert torch.equal(logits.argmax(-1).view(greedy.shape), greedy)
    nll = generator.nll(greedy, torch.tensor([0, 3]))
    expected = F.cross_entropy(logits.flatten(0, 1), greedy.flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(nll, expected)


def test_a_later_code_does_not_change_the_likelihood_of_an_earlier_one():
    generator = make("residual")
    tokens = some_tokens(generator, 1)
    changed = tokens.clone()
    changed[0, 1, 2, 3] = (changed[0, 1, 2, 3] + 1) % 11  # depth 1 of position 15
    before, after = (generator.nll(each, torch.tensor([0])).view(3, 24) for each in (tokens, changed))
    assert torch.equal(before[:, :15], after[:, :15])
    assert torch.equal(before[0, 15], after[0, 15])
    assert not torch.equal(before[2, 15], after[2, 15])


def test_residual_tokens_of_another_depth_are_refused_with_what_would_fit():
    settings = make("residual").settings
    with pytest.raises(UsageError, match=r"generator\.books = 3"):
        settings.check_fits(tokenizer("residual").token_spec(8, 12)._replace(books=4), ["a"] * 5, "tokens")
    with pytest.raises(UsageError, match="one code at a place"):
        settings.check_fits(tokenizer("flow").token_spec(8, 12), ["a"] * 5, "tokens")
    settings.check_fits(tokenizer("residual").token_spec(8, 12), ["a"] * 5, "tokens")


# ---------------------------------------------------------------------------------------------- diffusion and flows


def test_noise_grows_until_nothing_is_left_of_the_data():
    for betas in (linear_betas(), cosine_betas()):
        schedule = Diffusion(betas)
        assert (schedule.cumulative[1:] < schedule.cumulative[:-1]).all()
        assert schedule.cumulative[-1] < 1e-4


def test_visiting_every_step_is_the_schedule_itself():
    schedule = Diffusion(linear_betas())
    again = schedule.respaced(spaced_steps(1000, 1000))
    torch.testing.assert_close(again.betas, schedule.betas, rtol=1e-10, atol=1e-12)
    assert spaced_steps(1000, 1) == [0]
    assert ddim_steps(1000, 4) == [0, 250, 500, 750]
    with pytest.raises(UsageError, match="divisor"):
        ddim_steps(1000, 999)
    with pytest.raises(UsageError, match="from 1 to 1000"):
        spaced_steps(1000, 1001)


def test_a_perfect_prediction_of_noise_has_no_loss_but_that_of_its_variance():
    schedule = Diffusion(linear_betas())
    clean, noise = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    step = torch.tensor([1, 10, 100, 500, 900, 999])
    # A variance of the smallest kind is the true one, so the divergence vanishes as well.
    perfect = lambda noised, steps: torch.cat([noise, torch.full_like(noise, -1)], 1)  # noqa: E731
    terms = schedule.losses(perfect, clean, step, noise)
    assert terms["noise"].abs().max() < 1e-20
    assert terms["variance"].abs().max() < 1e-9


def test_the_variational_term_in_float32_is_that_of_float64():
    clean, noise = torch.randn(2, 64, 4, 3, 3)
    output = torch.cat([noise + 0.05 * torch.randn_like(noise), 2 * torch.randn_like(noise)], 1)
    step, schedule = torch.arange(64) % 4, Diffusion(linear_betas())
    terms = schedule.losses(lambda x, _: output, clean, step, noise)["variance"]
    exact = schedule.losses(lambda x, _: output.double(), clean.double(), step, noise.double())["variance"]
    assert (terms - exact).abs().max() < 1e-6 * exact.abs().max()


def test_sampling_multiplies_the_steps_that_it_visits_anew():
    steps = spaced_steps(1000, 6)
    products = torch.cumprod(1 - cosine_betas(), 0)[steps]
    spaced = Diffusion(cosine_betas()).respaced(steps)
    published = torch.cumprod(1 - (1 - products / torch.cat([products.new_ones(1), products[:-1]])), 0)
    assert torch.equal(spaced.cumulative, published)


def test_ddim_with_perfect_predictions_returns_the_data():
    schedule = Diffusion(linear_betas()).respaced(spaced_steps(1000, 10))
    clean, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    point = schedule.noised(clean, torch.tensor([9, 9]), noise)
    for step in reversed(range(10)):
        point = schedule.ddim_step(torch.cat([noise, torch.zeros_like(noise)], 1), point, step)
    torch.testing.assert_close(point, clean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_leads_from_noise_to_data_at_its_own_velocity(path):
    transport = Transport(path)
    data, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    end = transport.between(data, noise, torch.ones(2, dtype=torch.float64) - 1e-9)[0]
    torch.testing.assert_close(end, data, rtol=1e-3, atol=1e-3)
    time = torch.tensor([0.3, 0.7], dtype=torch.float64)
    before, after = (transport.between(data, noise, time + shift)[0] for shift in (-1e-6, 1e-6))
    torch.testing.assert_close(transport.between(data, noise, time)[1], (after - before) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_predictions_are_the_same_field_in_other_words(path, prediction):
    data, noise = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    time = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    transport = Transport(path, prediction)
    point, velocity = transport.between(data, noise, time)
    output = noise if prediction == "noise" else -noise / transport.parts(time, data).noise
    torch.testing.assert_close(transport.velocity(output, point, time), velocity, rtol=1e-8, atol=1e-8)
    assert transport.loss(lambda *_: output, data, noise, time).abs().max() < 1e-20


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_an_ode_sampler_has_its_order(method, order):
    field = lambda x, t: -x * t[:, None]  # noqa: E731
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(list(solve_ode(field, start, points, method))[-1].item() - math.exp(-0.5)) for points in (41, 81)]
    assert 0.9 * 2**order < errors[0] / errors[1] < 1.1 * 2**order


def test_an_sde_sampler_keeps_the_distribution():
    """For normal data of deviation 2 the field is known; samples must have that deviation."""
    transport = Transport()

    def field(x, t):
        data, noise = t[:, None], 1 - t[:, None]
        variance = 4 * data**2 + noise**2
        return (4 * data - noise) / variance * x  # E[data - noise | x]

    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, dtype=torch.float64, generator=draws)
    draw = lambda number: torch.randn(20_000, 1, dtype=torch.float64, generator=draws)  # noqa: E731
    found = list(solve_sde(transport, field, noise, 120, draw, interval=(0.0, 1.0)))[-1]
    assert found.std().item() == pytest.approx(2, rel=0.03)


def test_uniform_numbers_become_normal_ones():
    found = normal((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    assert found.mean().abs() < 1e-12
    assert found.std().item() == pytest.approx(1, abs=1e-3)
    assert normal(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).isfinite().all()


def test_every_token_of_masked_autoregression_is_drawn_once():
    for length, steps in ((16, 4), (256, 64), (3, 10)):
        hidden, drawn = length, []
        for step in range(steps):
            after = hidden_after(length, hidden, step, steps)
            drawn.append(hidden - after)
            hidden = after
        assert hidden == 0
        assert sum(drawn) == length
        assert min(drawn) >= 0


@pytest.mark.parametrize(
    "table, message",
    [
        ({"objective": "diffusion", "learned_variance": True, "path": "gvp"}, "path reach nothing"),
        ({"objective": "diffusion", "learned_variance": True, "times": "mode"}, "times reach nothing"),
        ({"weighting": "velocity"}, "weighting reaches nothing"),
        ({"patch": 5}, "patch = 5 does not divide"),
        ({"width": 30}, "width must be a multiple"),
    ],
)
def test_options_of_a_flow_that_do_not_go_together_are_refused(table, message):
    with pytest.raises(UsageError, match=message):
        network_config({**FAMILIES["flow"], **table})


# ---------------------------------------------------------------------------------------------- recipes

RECIPES = Path(__file__).parents[1] / "recipes"
PUBLISHED = {  # parameters, the fixed positions of DiT and SiT included
    "dit_xl": 675_129_632,
    "sit_xl": 675_129_632,
    "mar_b": 207_924_768,
    "mar_l": 478_326_304,
    "mar_h": 942_403_104,
    "var_d16": 310_283_520,
    "var_d20": 600_917_136,
    "var_d24": 1_033_399_360,
    "var_d30": 2_010_020_356,
    "rq_480m": 480_921_088,
    "rq_800m": 820_899_328,
    "rq_1400m": 1_387_529_728,
    "rq_3800m": 3_822_488_064,
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_have_the_published_parameter_counts(recipe):
    resolved = load(RECIPES / f"generator_{recipe}.toml", GeneratorRecipe)
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(transformer=resolved.generator))
    assert sum(parameter.numel() for parameter in generator.parameters()) == PUBLISHED[recipe]


SIZES = {  # width, layers, heads; parameters by patch, the fixed positions included
    "S": (384, 12, 6, {2: 32_963_360, 4: 32_945_024, 8: 33_148_160}),
    "B": (768, 12, 12, {2: 130_512_416, 4: 130_475_648, 8: 130_881_536}),
    "L": (1024, 24, 16, {2: 458_102_816, 4: 458_053_760, 8: 458_594_816}),
    "XL": (1152, 28, 16, {2: 675_129_632, 4: 675_074_432, 8: 675_683_072}),
}


@pytest.mark.parametrize("recipe", ["dit_xl", "sit_xl"])
@pytest.mark.parametrize("size", SIZES)
def test_the_recipes_of_dit_and_sit_become_their_other_sizes_by_four_options(recipe, size):
    width, layers, heads, counts = SIZES[size]
    for patch, parameters in counts.items():
        options = {"width": width, "layers": layers, "heads": heads, "patch": patch}
        changes = [f"generator.{name}={value}" for name, value in options.items()]
        resolved = load(RECIPES / f"generator_{recipe}.toml", GeneratorRecipe, changes)
        with torch.device("meta"):
            generator = Generator(GeneratorConfig(transformer=resolved.generator))
        assert sum(parameter.numel() for parameter in generator.parameters()) == parameters


@pytest.mark.parametrize("kind", ["flow", "continuous", "next_scale", "residual", "masked", "random_order"])
def test_the_small_recipe_of_a_family_is_of_that_family(kind):
    assert load(RECIPES / f"generator_{kind}_small.toml", GeneratorRecipe).generator.kind == kind


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name.startswith(("next_scale", "residual", "continuous"))]
)
def test_a_pruned_generator_gives_the_codes_that_stay_their_old_losses_and_logits(name):
    generator = make(name)
    kept = torch.tensor([0, 2, 3, 7, 10])
    small = generator.prune(kept)
    if generator.needs_tokenizer:
        small.attach(prune_tokenizer(generator.tokenizer, kept))
    numbers = torch.randint(0, 5, (2, *generator.grid), generator=torch.Generator().manual_seed(0))
    condition = torch.tensor([0, 1])
    results = []
    for one, tokens in ((generator, kept[numbers]), (small, numbers)):
        torch.manual_seed(0)
        found = one(tokens, condition)
        results.append(next(iter(found.values())) if isinstance(found, dict) else found.logits)
    if isinstance(results[0], Tensor):  # a model of the codes' vectors has no rows of codes
        torch.testing.assert_close(results[1], results[0])
        return
    for new, old in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(new, old[..., kept], atol=1e-12, rtol=1e-12)


def test_a_diffusion_that_predicts_noise_alone_has_the_variance_of_its_betas():
    schedule = Diffusion(linear_betas()).respaced(spaced_steps(1000, 5))
    noised, noise = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64)
    believed = schedule.posterior(noise, noised, torch.tensor([0, 1, 2, 4]))
    smallest = schedule.betas * (1 - schedule.before) / (1 - schedule.cumulative)
    expected = torch.stack([smallest[1], *schedule.betas[[1, 2, 4]]]).log()  # the first step has none of its own
    torch.testing.assert_close(believed.log_variance, expected.view(4, 1, 1, 1).expand(4, 1, 2, 2))
    table = {**FAMILIES["diffusion"], "learned_variance": False}
    generator = Generator(GeneratorConfig(transformer=network_config(table)))
    terms = generator.losses(torch.randn(2, 4, 4, 6), torch.tensor([0, 1]))
    assert list(terms) == ["noise"]
    assert generator.sample([0, 1], cfg_scale=2.0, steps=2).isfinite().all()


@pytest.mark.parametrize("name", ["continuous", "next_scale-shared"])
def test_the_epsilon_of_norms_is_an_option(name):
    table = {**FAMILIES[name], "norm_eps": 1e-3}
    network = Generator(GeneratorConfig(transformer=network_config(table))).transformer.network
    blocks = [part for name, part in network.named_modules() if isinstance(part, nn.LayerNorm) and "block" in name]
    assert blocks
    assert {part.eps for part in blocks} == {1e-3}


def test_learned_tables_of_a_residual_generator_may_be_one_for_all_depths():
    table = {**FAMILIES["residual-tables"], "codebook_size": 11, "shared_tables": True, "depth_sigmoid_gelu": True}
    network = Generator(GeneratorConfig(transformer=network_config(table))).transformer.network
    codes = torch.randint(0, 11, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.tok_emb(codes), network.tok_emb.weight[codes])
    x = torch.linspace(-2, 2, 5)
    torch.testing.assert_close(network.head_transformer.blocks[0].mlp[1](x), x * torch.sigmoid(1.702 * x))
    with pytest.raises(UsageError, match="shared_tables reaches nothing where codebook_dim is not 0"):
        network_config({**FAMILIES["residual"], "shared_tables": True})


def test_published_rq_transformers_sum_code_vectors_and_never_tables():
    own = "transformer.network."
    sizes = {"pos_emb_d": (1, 2, 8), "pos_emb_hw": (1, 4, 8), "classifier.linear.weight": (11, 8)}
    sizes |= {"classifier.linear.bias": (11,), "input_mlp.weight": (8, 4)}
    state = {own + name: torch.empty(size) for name, size in sizes.items()}
    state["transformer.classes.weight"] = torch.empty(3, 8)
    tables = {**state, f"{own}tok_emb.weight": torch.empty(22, 8)}
    block = {"block_size": [2, 2, 2]}
    for tensors, options, cumulative in (
        (state, {}, True),
        (state, block, False),
        (state, {**block, "cumsum_depth_ctx": True}, True),
        (tables, {**block, "cumsum_depth_ctx": True}, False),
    ):
        assert rq_transformer._config(tensors, options)["cumulative"] is cumulative
