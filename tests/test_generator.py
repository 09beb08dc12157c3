"""Generation: the published samples, equality of every way to decode, likelihoods, folders, in-painting."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from test_transformer import GPT, PAIRS, START, TINY, published, shake
from torch import Tensor

from lexel.errors import UsageError
from lexel.generators import FREE, Generator, GeneratorConfig, NextToken, NextTokenConfig, base, batch
from lexel.generators.next_token import decoding, linears
from lexel.generators.next_token.decoding import Decoder
from lexel.generators.next_token.heads import join_tokens, split_tokens
from lexel.generators.sampling import filter_logits, guide, sample_index, uniform_stream

LABELS = [0, 1, 2, 3, 1]
HOT = {"cfg_scale": 2.0, "temperature": 1.3, "top_k": 25, "top_p": 0.95, "min_p": 0.001}


def make(config: NextTokenConfig = TINY, dtype: torch.dtype = torch.float64) -> Generator:
    generator = Generator(GeneratorConfig(transformer=config))
    shake(generator)
    return generator.to(dtype)


def from_fixture(parity) -> tuple[Generator, dict]:
    model, fixture = published(parity)
    generator = Generator(GeneratorConfig(transformer=model.config)).eval()
    generator.transformer.load_state_dict(model.state_dict())
    return generator, fixture


def sample_without_cache(
    generator: Generator, labels: list[int], seed: int = 0, scale: float = 1.0, **filters
) -> Tensor:
    """The plain way: the whole network over everything so far for every token, with and without the class."""
    config, vocabularies = generator.config.transformer, generator.transformer.vocabularies
    random = uniform_stream(seed, range(len(labels)), config.tokens * len(vocabularies))
    random = random.view(len(labels), config.tokens, -1)
    tokens = torch.zeros(len(labels), config.tokens, dtype=torch.long)
    null = torch.full((len(labels),), config.classes)
    for position in range(config.tokens):
        parts = split_tokens(tokens[:, position], vocabularies)
        for part in range(len(vocabularies)):
            conditional = generator(tokens, torch.tensor(labels)).logits[part][:, position]
            unconditional = generator(tokens, null).logits[part][:, position]
            logits = filter_logits(guide(conditional, unconditional, scale), **filters)
            parts[part] = sample_index(logits, random[:, position, part])
            tokens[:, position] = join_tokens(parts, vocabularies)  # the second sub-token sees the first
    return tokens.view(len(labels), config.rows, config.columns)


# ---------------------------------------------------------------------------------------------- the published samples


@pytest.mark.parametrize("implementation", ["plain", "packed"])
def test_cached_logits_are_the_published_ones(parity, implementation):
    generator, fixture = from_fixture(parity)
    indices, labels = fixture["teacher"]["idx"], fixture["teacher"]["cls"][:, 0]
    decoder = Decoder(generator.transformer, implementation)
    sequences = decoder.start(labels, 16)
    for position in range(16):
        hidden = decoder.decode(sequences, indices, position, position + 1)
        logits = decoder.logits(sequences, hidden)
        torch.testing.assert_close(logits, fixture["cached_logits"][:, position], rtol=1e-5, atol=1e-5)


def test_greedy_samples_are_the_published_ones(parity):
    generator, fixture = from_fixture(parity)
    greedy = [case for case in fixture["samples"] if case["greedy"]]
    assert len(greedy) == 2
    for case in greedy:
        found = generator.sample(
            case["classes"][:, 0], case["cfg_scale"], temperature=case["temperature"], top_k=1, top_p=case["top_p"]
        )
        assert torch.equal(found.flatten(1), case["tokens"])


def test_published_samples_come_from_torch_multinomial_over_our_filtered_logits(parity, monkeypatch):
    generator, fixture = from_fixture(parity)
    monkeypatch.setattr(batch, "sample_index", lambda logits, uniform: torch.multinomial(logits.softmax(-1), 1)[:, 0])
    random = [case for case in fixture["samples"] if not case["greedy"]]
    assert len(random) == 4
    for case in random:
        torch.manual_seed(case["seed"])
        settings = {name: case[name] for name in ("cfg_scale", "temperature", "top_k", "top_p")}
        assert torch.equal(generator.sample(case["classes"][:, 0], **settings).flatten(1), case["tokens"]), settings


def test_guidance_of_one_runs_and_is_the_conditional_model(parity):
    generator, _ = from_fixture(parity)
    generator.double()
    assert torch.equal(generator.sample([3, 7], cfg_scale=1.0), sample_without_cache(generator, [3, 7]))


# ---------------------------------------------------------------------------------------------- equalities


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
@pytest.mark.parametrize("top_k", [0, 1], ids=["seeded", "greedy"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_cached_sampling_equals_the_plain_way(config, top_k, scale):
    generator = make(config)
    found = generator.sample(LABELS, scale, temperature=1.2, top_k=top_k, top_p=0.97, seed=5)
    expected = sample_without_cache(generator, LABELS, 5, scale, temperature=1.2, top_k=top_k, top_p=0.97)
    assert torch.equal(found, expected)
    assert found.shape == (5, 2, 3)
    assert len(found.unique(dim=0)) > 1


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_an_image_does_not_depend_on_its_batch(config):
    generator = make(config)
    together = generator.sample(LABELS, seed=3, **HOT)
    for batch_size in (1, 2):
        assert torch.equal(generator.sample(LABELS, seed=3, batch_size=batch_size, **HOT), together)
    backwards = generator.sample(LABELS[::-1], seed=3, image_numbers=[4, 3, 2, 1, 0], **HOT)
    assert torch.equal(backwards.flip(0), together)
    alone = generator.sample([LABELS[2]], seed=3, image_numbers=[2], **HOT)
    assert torch.equal(alone[0], together[2])
    assert not torch.equal(generator.sample(LABELS, seed=4, **HOT), together)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine-power:1.5", "interval:0.34,0.67", "interval:0,0.5"])
@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_rows_that_join_late_or_leave_early_change_nothing(schedule, config, monkeypatch):
    generator = make(config)
    lazy = generator.sample(LABELS, 3.0, schedule, seed=1)
    # The same with unguided rows at every step: a scale that only differs from 1 by rounding.
    scales = base.guidance_scales
    monkeypatch.setattr(
        base,
        "guidance_scales",
        lambda *arguments: [scale if scale != 1 else 1 + 1e-14 for scale in scales(*arguments)],
    )
    assert torch.equal(generator.sample(LABELS, 3.0, schedule, seed=1), lazy)


def test_guidance_that_is_off_does_not_double_the_batch(monkeypatch):
    generator, rows = make(), []
    run = Decoder._run
    monkeypatch.setattr(
        Decoder, "_run", lambda self, sequences, x, *rest: rows.append(len(x)) or run(self, sequences, x, *rest)
    )
    generator.sample(LABELS, cfg_scale=1.0, cfg_schedule="linear")
    assert rows == [5] * 6
    rows.clear()
    generator.sample(LABELS, cfg_scale=2.0, cfg_schedule="interval:0.5,0.8")  # tokens 3 and 4 of 6
    assert rows == [5, 5, 5, 5, 10, 10, 5]  # the unguided rows' first three positions in one pass


def test_the_class_matters_and_guidance_sharpens_it():
    generator = make()
    labels = [0] * 40
    plain, guided = (generator.sample(labels, scale, seed=2) for scale in (1.0, 4.0))
    other = generator.sample([1] * 40, 1.0, seed=2)
    assert not torch.equal(plain, other)
    chosen, anything = torch.zeros(40, dtype=torch.long), torch.full((40,), 4)

    def evidence(tokens: Tensor) -> float:  # for the class against none
        return (generator(tokens, anything).nll - generator(tokens, chosen).nll).sum(1).mean().item()

    assert evidence(guided) > evidence(plain) + 1


# ---------------------------------------------------------------------------------------------- given tokens


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
@pytest.mark.parametrize("window", [None, 2])
def test_given_tokens_stay_and_the_rest_is_sampled(config, window):
    generator = make(config)
    given = torch.tensor([[[7, FREE, FREE], [FREE, 9, FREE]], [[7, 3, FREE], [2, FREE, FREE]]])
    found = generator.sample([0, 1], 2.0, given=given, seed=1, window=window)
    assert torch.equal(found[given >= 0], given[given >= 0])
    assert (found >= 0).all()
    assert torch.equal(generator.sample([0, 1], given=found, window=window), found)  # nothing left to do


def test_giving_back_the_beginning_of_an_image_completes_it_as_before():
    generator = make()
    whole = generator.sample(LABELS, 2.0, seed=6)
    for known in range(7):
        given = whole.flatten(1).clone()
        given[:, known:] = FREE
        assert torch.equal(generator.sample(LABELS, 2.0, seed=6, given=given.view(5, 2, 3)), whole), known


# ---------------------------------------------------------------------------------------------- wavefront


@pytest.mark.parametrize("shape", [(2, 3), (4, 4), (3, 5)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_window_of_a_whole_row_is_exact(shape, scale):
    generator = make(TINY.model_copy(update={"rows": shape[0], "columns": shape[1]}))
    plain = generator.sample(LABELS, scale, seed=8)
    assert torch.equal(generator.sample(LABELS, scale, seed=8, window=shape[1]), plain)
    assert torch.equal(generator.sample(LABELS, scale, seed=8, window=99), plain)


def test_a_wavefront_takes_fewer_steps_and_starts_like_the_plain_way(monkeypatch):
    generator, inputs = make(TINY.model_copy(update={"rows": 4, "columns": 4})), []
    run = Decoder._run
    monkeypatch.setattr(
        Decoder, "_run", lambda self, sequences, x, *rest: inputs.append(x.shape[1]) or run(self, sequences, x, *rest)
    )
    plain = generator.sample(LABELS, seed=8)
    assert len(inputs) == 16
    inputs.clear()
    wave = generator.sample(LABELS, seed=8, window=2)
    assert len(inputs) == 4 + 3 * 2
    assert sum(inputs) == 16 + 3  # each position once, and a row's first position again when its true input is there
    assert torch.equal(wave[:, 0], plain[:, 0])  # the first row misses nothing
    assert not torch.equal(wave, plain)


def test_a_wavefront_does_not_depend_on_the_batch():
    generator = make(TINY.model_copy(update={"rows": 4, "columns": 4}))
    together = generator.sample(LABELS, seed=8, window=1, **HOT)
    assert torch.equal(generator.sample(LABELS, seed=8, window=1, batch_size=2, **HOT), together)


# ---------------------------------------------------------------------------------------------- fast paths


def divergences(generator: Generator, fast: dict, count: int = 64) -> tuple[float, float]:
    """The share of images whose tokens differ from float64's, and the largest distance (in probability) between a
    random number and the edge it had to cross at a first difference."""
    labels, config = [number % 4 for number in range(count)], generator.config.transformer
    exact = generator.double().sample(labels, seed=11, implementation="plain").flatten(1)
    random = uniform_stream(11, range(count), config.tokens)
    found = generator.float().sample(labels, seed=11, **fast).flatten(1)
    probabilities = generator.double()(exact, torch.tensor(labels)).logits[0].softmax(-1)
    edges = probabilities.cumsum(-1)
    margins = []
    for image in (exact != found).any(1).nonzero()[:, 0].tolist():
        position = int((exact[image] != found[image]).nonzero()[0, 0])
        low, high = sorted((int(exact[image, position]), int(found[image, position])))
        # Every edge between the two tokens lies between the exact and the rounded place of the random number.
        crossed = edges[image, position, [low, high - 1]]
        margins.append((crossed - random[image, position]).abs().max().item())
    return len(margins) / count, max(margins, default=0.0)


@pytest.mark.parametrize(
    ("fast", "margin", "rate"),
    [
        ({"implementation": "plain"}, 1e-5, 0.05),
        ({"implementation": "packed"}, 1e-5, 0.05),
        ({"implementation": "plain", "dtype": torch.bfloat16}, 0.08, 0.9),
        ({"implementation": "int8"}, 0.08, 0.9),
    ],
    ids=["float32", "packed", "bf16", "int8"],
)
def test_fast_paths_diverge_only_where_a_draw_lies_at_an_edge(fast, margin, rate):
    torch.manual_seed(0)  # how many images diverge is measured on one network, always the same
    generator = make(TINY.model_copy(update={"rows": 4, "columns": 4}))
    diverged, largest = divergences(generator, fast)
    print(f"{fast}: {diverged:.0%} of images diverge, margin {largest:.2g}")
    assert diverged <= rate
    assert largest <= margin


@pytest.mark.slow
def test_a_compiled_step_diverges_only_where_a_draw_lies_at_an_edge():
    generator = make(TINY.model_copy(update={"rows": 3, "columns": 3, "layers": 1}))
    diverged, largest = divergences(generator, {"implementation": "compiled"}, 16)
    assert diverged <= 0.1
    assert largest <= 1e-5


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_steps_over_fixed_lengths_equal_the_plain_way(config, monkeypatch):
    """What CUDA records, run step by step on the CPU: lengths in quarters, masks, caches kept from call to call."""

    def run_instead(graph: decoding._Graph) -> None:
        graph.slots.fill_(graph.length - 1)
        graph._step()  # the warm-up writes to the caches too
        graph.graph = SimpleNamespace(replay=lambda: setattr(graph, "hidden", graph._step()))
        lengths.append(graph.length)

    lengths: list[int] = []
    monkeypatch.setattr(decoding._Graph, "_record", run_instead)
    generator = make(config.model_copy(update={"rows": 4, "columns": 4}))
    settings = [(1.0, "constant"), (2.0, "constant"), (2.0, "interval:0.3,0.7"), (3.0, "linear")]
    plain = [generator.sample(LABELS, *setting, seed=2) for setting in settings]
    others = generator.sample([3, 2, 0, 0, 2], 3.0, seed=5)
    generator.decoder("auto", None).graphs = True
    for setting, expected in zip(settings * 2, plain * 2, strict=True):
        assert torch.equal(generator.sample(LABELS, *setting, seed=2), expected), setting
    assert set(lengths) == {4, 8, 12, 16}
    first = len(lengths)
    assert torch.equal(generator.sample([3, 2, 0, 0, 2], 3.0, seed=5), others)
    assert len(lengths) == first  # nothing was recorded again


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of the compiler's own imports
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled:UserWarning")  # and its choice of a slower kernel
@pytest.mark.parametrize("implementation", ["graph", "compiled"])
@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_recorded_steps_equal_the_plain_way_on_cuda(implementation, config):
    generator = make(config.model_copy(update={"rows": 4, "columns": 4})).cuda()
    for scale, schedule in ((1.0, "constant"), (2.0, "constant"), (2.0, "interval:0.25,0.75")):
        plain = generator.sample(LABELS, scale, schedule, seed=2, implementation="plain")
        for _ in range(2):  # recorded, then replayed
            found = generator.sample(LABELS, scale, schedule, seed=2, implementation=implementation)
            assert torch.equal(found, plain), (scale, schedule)


def test_a_decoder_follows_the_weights():
    generator = make()
    before = generator.sample(LABELS)
    with torch.no_grad():
        generator.transformer.head.weight.mul_(-1)
    assert not torch.equal(generator.sample(LABELS), before)
    assert torch.equal(generator.sample(LABELS), sample_without_cache(generator, LABELS))


def test_a_generator_that_has_sampled_can_be_copied():
    generator = make(dtype=torch.float32)
    before = generator.sample(LABELS, implementation="packed")
    assert torch.equal(copy.deepcopy(generator).sample(LABELS, implementation="packed"), before)


def test_int8_rounds_weights_to_half_a_step():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x = torch.eye(128)
    found = linears.int8(weight)(x).T
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5 * step + 0.005 * weight.abs() + 1e-6).all()  # inputs are rounded too
    assert (found - weight).abs().max() > 0


# ---------------------------------------------------------------------------------------------- likelihood and doors


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_likelihoods_of_all_images_sum_to_one(config):
    small = {"codebook_size": 4, "rows": 1, "columns": 3, "factors": [2, 2] if config is PAIRS else None}
    generator = make(config.model_copy(update=small))
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)  # all 64 images
    predicted = generator(every, torch.ones(64, dtype=torch.long))
    assert predicted.nll.shape == (64, 3)
    assert predicted.nll.sum(1).neg().exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert [logits.shape for logits in predicted.logits] == [
        (64, 3, size) for size in generator.transformer.vocabularies
    ]


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_the_likelihood_of_a_way_to_decode_is_that_of_the_network(config):
    torch.manual_seed(0)  # what int8 costs is measured on one network, always the same
    generator = make(config)
    tokens = torch.randint(30, (5, 2, 3), generator=torch.Generator().manual_seed(0))
    exact = generator(tokens, torch.tensor(LABELS)).nll
    torch.testing.assert_close(generator.likelihood(tokens, torch.tensor(LABELS)), exact, rtol=1e-10, atol=1e-10)
    rounded = generator.float().likelihood(tokens, torch.tensor(LABELS), "int8").double()
    assert 0 < (rounded - exact).detach().abs().max().item() < 0.5
    assert (rounded - exact).detach().mean().abs().item() < 0.05
    bits = generator.extra_bits(tokens, torch.tensor(LABELS), "int8")
    assert bits == pytest.approx((rounded - exact).mean().item() / math.log(2), abs=1e-5)


def test_grids_and_rows_of_tokens_mean_the_same():
    generator = make()
    tokens = torch.arange(6).view(1, 2, 3)
    a, b = generator(tokens, torch.tensor([0])), generator(tokens.flatten(1), torch.tensor([0]))
    assert torch.equal(a.nll, b.nll)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": [5]}, r"in \[0, 4\] \(4 is the null class\), got 5"),
        ({"condition": [[1]]}, "integers"),
        ({"condition": [1.5]}, "integers"),
        ({"cfg_scale": [1.0, 2.0]}, "cfg_scale must be a number, or 1 of them"),
        ({"cfg_schedule": "never"}, "unknown cfg_schedule 'never'"),
        ({"temperature": 0.0}, "temperature"),
        ({"image_numbers": [1, 2]}, "2 image_numbers for 1 images"),
        ({"given": torch.zeros(1, 3, 2, dtype=torch.long)}, r"integers \(B, 2, 3\)"),
        ({"given": torch.full((1, 2, 3), 30)}, r"in \[-1, 30\), got 30"),
        ({"given": torch.zeros(2, 2, 3, dtype=torch.long)}, "2 images given for 1"),
        ({"window": 0}, "window"),
        ({"batch_size": 0}, "batch_size"),
        ({"implementation": "fast"}, "unknown implementation 'fast'; choose from auto"),
        ({"implementation": "graph"}, "needs a CUDA device"),
        ({"implementation": "int8", "dtype": torch.float64}, "int8 weights need the CPU and float32"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        make().sample(**{"condition": [0], **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_memory_of_a_row_is_what_it_is_said_to_be(config):
    decoder = Decoder(make(config).transformer, "plain")
    sequences = decoder.start(torch.tensor(LABELS), 6)
    tensors = [*sequences.keys, *sequences.values, *(part for block in sequences.blocks for part in block)]
    logits = 32 * max(config.vocabularies)
    assert decoder.bytes_per_row(6) * len(LABELS) == sum(tensor.nbytes for tensor in tensors) + logits * len(LABELS)


@pytest.mark.parametrize(("rows_that_fit", "calls"), [(100, [5]), (4, [2, 2, 1]), (1, [1, 1, 1, 1, 1])])
def test_a_batch_larger_than_memory_is_split(monkeypatch, tmp_path, rows_that_fit, calls):
    generator, seen = make(), []
    together = generator.sample(LABELS, 2.0)
    free = 2 * rows_that_fit * generator.decoder("auto", None).bytes_per_row(6)  # half of it is used
    (tmp_path / "meminfo").write_text(f"MemFree: 1 kB\nMemAvailable:  {-(-free // 1024)} kB\n")
    monkeypatch.setattr(batch, "MEMINFO", tmp_path / "meminfo")
    sample = NextToken._sample
    monkeypatch.setattr(NextToken, "_sample", lambda self, batch: seen.append(len(batch.tokens)) or sample(self, batch))
    assert torch.equal(generator.sample(LABELS, 2.0), together)
    assert seen == calls


def test_progress_counts_up_to_every_token():
    seen = []
    make().sample(LABELS, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {30}
    assert seen[-1] == (30, 30)


def test_classes_are_found_by_number_and_by_label():
    names = ["red heart", "blue heart", "7", "sun"]
    generator = Generator(GeneratorConfig(transformer=TINY, class_names=names))
    assert generator.class_numbers(["sun", "0", "blue heart"]) == [3, 0, 1]
    with pytest.raises(UsageError, match=r"no class 'heart'.*red heart, blue heart"):
        generator.class_numbers(["heart"])
    with pytest.raises(UsageError, match="no class '4'"):
        generator.class_numbers(["4"])
    with pytest.raises(UsageError, match="1 class names for 4 classes"):
        Generator(GeneratorConfig(transformer=TINY, class_names=["red heart"]))


@pytest.mark.parametrize("config", [TINY, PAIRS, START, GPT], ids=["plain", "factorised", "start", "gpt"])
def test_a_folder_gives_the_same_generator_back(tmp_path, config):
    generator = make(config, torch.float32)
    generator.save_pretrained(tmp_path, provenance={"step": 3})
    again = Generator.from_pretrained(tmp_path)
    assert again.config == generator.config
    assert again.provenance == {"step": 3}
    assert again.fingerprint() == generator.fingerprint()
    assert torch.equal(again.sample(LABELS, **HOT), generator.sample(LABELS, **HOT))
    with pytest.raises(UsageError, match="no tokenizer beside it"):
        _ = again.tokenizer
