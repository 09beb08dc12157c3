"""MAR: encoder, decoder, diffusion loss with gradients, and whole generations with the recorded noise."""

import torch
from torch import Tensor

from lexel.generators.continuous import Continuous
from lexel.generators.continuous.generator import denoise, hidden_after
from lexel.generators.flow.diffusion import Diffusion, cosine_betas, spaced_steps, time_features
from tests.parity.fixture import Fixture, Run

STEPS = 1000


def visible(masked: Tensor) -> Tensor:
    """Positions that are not masked, for rows with equally many."""
    return (~masked).nonzero()[:, 1].view(len(masked), -1)


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        model: Continuous = run.load(
            "mar", {"transformer.scale": 1.0, "transformer.norm_eps": run.content.get("norm_eps", 1e-6)}
        )
        network, head = model.transformer.network, model.transformer.head
        masked, labels = run.content["inputs"]["mask"].bool(), run["labels"]
        tokens = model.patchify(run["latents"])
        evaluated = run.expected["eval"]
        run.close("patchified", tokens, evaluated["patchified"])
        run.close("unpatchified_again", model.unpatchify(tokens), evaluated["unpatchified_again"])
        vector = model.transformer.condition(labels)[:, 0]
        encoded = network.encode(tokens, visible(masked), vector)
        run.close("encoder_out", encoded, evaluated["encoder_out"])
        run.close("z", network.decode(encoded, visible(masked)), evaluated["z"])
        schedule = Diffusion(cosine_betas(STEPS))
        spaced = schedule.respaced(spaced_steps(STEPS, int(run.content["config"]["num_sampling_steps"])))
        numbers = run.content["schedule"]
        run.close("train_alphas_cumprod", schedule.cumulative[numbers["at"]], numbers["train_alphas_cumprod"])
        run.close("spaced_betas", spaced.betas, numbers["spaced_betas"])
        run.close("spaced_alphas_cumprod", spaced.cumulative, numbers["spaced_alphas_cumprod"])
        run.close("spaced_log_variance", spaced.log_variance, numbers["spaced_posterior_log_variance_clipped"])
        run.close("spaced_coef1", spaced.clean_part, numbers["spaced_posterior_mean_coef1"])
        run.close("spaced_coef2", spaced.noised_part, numbers["spaced_posterior_mean_coef2"])
        for name, theirs in numbers.items():
            if name.startswith("timesteps_of_"):
                ours = spaced_steps(STEPS, int(name.removeprefix("timesteps_of_")))
                run.same(name, torch.tensor(ours), torch.tensor(theirs))
        train_step(run, model, tokens, masked, labels, schedule)
        diffusion(run, head, schedule, spaced)
        with torch.no_grad():
            for number in range(len(run.expected["sample_tokens"])):
                sample(run, model, spaced, number)


def train_step(
    run: Run, model: Continuous, tokens: Tensor, masked: Tensor, labels: Tensor, schedule: Diffusion
) -> None:
    table = model.transformer.condition.weight
    dropped = run["train_label_drop_uniform"] < run.content["config"]["label_drop_prob"]
    vector = torch.where(dropped[:, None], table[-1], table[labels])
    z = model.transformer(tokens, visible(masked), vector)
    times = run.content["config"]["diffusion_batch_mul"]
    wanted, clean = (x.flatten(0, 1).repeat(times, 1) for x in (z, tokens))
    weight = masked.flatten().repeat(times).to(run.dtype)
    terms = schedule.losses(
        lambda noised, step: model.transformer.head(noised, step, wanted), clean, run["train_t"], run["train_noise"]
    )
    total = ((terms["noise"] + terms["variance"]) * weight).sum() / weight.sum()
    expected = run.expected["train_step"]
    run.close("train_step: loss", total, expected["loss"])
    ours = dict(model.transformer.network.named_parameters())
    ours |= {f"diffloss.net.{name}": value for name, value in model.transformer.head.named_parameters()}
    joined = torch.autograd.grad(total, table, retain_graph=True)[0]
    for name, theirs in expected["grads"].items():
        if name == "class_emb.weight":
            gradient = joined[:-1]
        elif name == "fake_latent":
            gradient = joined[-1:]
        else:
            gradient = torch.autograd.grad(total, ours[name], retain_graph=True)[0]
        run.close(f"train_step: grads:{name}", gradient, theirs)


def diffusion(run: Run, head: torch.nn.Module, schedule: Diffusion, spaced: Diffusion) -> None:
    inputs = {name: run.cast(value) for name, value in run.content["inputs"]["diffusion"].items()}
    expected = run.expected["diffusion"]
    noised = schedule.noised(inputs["x_start"], inputs["t"], inputs["noise"])
    run.close("diffusion: x_t", noised, expected["x_t"])
    run.close("diffusion: t_freq", time_features(inputs["t"].to(run.dtype), 256), expected["t_freq"])
    output = head(noised, inputs["t"], inputs["z"])
    run.close("diffusion: net_out", output, expected["net_out"])
    model = lambda x, step: head(x, step, inputs["z"])  # noqa: E731
    terms = schedule.losses(model, inputs["x_start"], inputs["t"], inputs["noise"])
    run.close("diffusion: mse", terms["noise"], expected["mse"])
    run.close("diffusion: vb", terms["variance"], expected["vb"])
    run.close("diffusion: loss", terms["noise"] + terms["variance"], expected["loss"])
    one = run.expected["one_step"]
    index = run.published("", one["t_index"])  # steps that are given
    run.same("timestep_map", spaced.steps, one["timestep_map"])
    start = inputs["x_start"]
    output = head(start, spaced.steps[index], inputs["z"])
    believed = spaced.posterior(output, start, index)
    run.close("one_step: mean", believed.mean, one["mean"])
    run.close("one_step: log_variance", believed.log_variance, one["log_variance"])
    run.close("one_step: pred_xstart", believed.clean, one["pred_xstart"])
    for name in one:
        if name.startswith("sample_temperature"):
            scaled = scale_of(name, "sample_temperature") * run["one_step_noise"]
            steps = [spaced.ancestral_step(output[[n]], start[[n]], int(t), scaled[[n]]) for n, t in enumerate(index)]
            run.close(f"one_step: {name}", torch.cat(steps), one[name])
    for name in expected:
        if name.startswith("net_out_cfg"):
            run.close(
                f"diffusion: {name}", guided_output(head, noised, inputs, scale_of(name, "net_out_cfg")), expected[name]
            )


def scale_of(name: str, before: str) -> float:
    """The number in a name: 2.5 in `net_out_cfg2p5`."""
    return float(name.removeprefix(before).replace("p", "."))


def guided_output(head: torch.nn.Module, noised: Tensor, inputs: dict[str, Tensor], scale: float) -> Tensor:
    """Both halves from the first half's point: noise is guided, variances are each half's own."""
    half = noised[: len(noised) // 2]
    steps = inputs["t"][: len(half)].repeat(2)
    noise, rest = head(torch.cat([half, half]), steps, inputs["z"]).chunk(2, 1)
    conditional, unconditional = noise.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([guided, guided]), rest], 1)


def sample(run: Run, model: Continuous, spaced: Diffusion, number: int) -> None:
    """A whole generation; the recorded noise is of the guided half and of the other, which is not looked at."""
    case, draws = run.expected["sample_tokens"][number], run.content["inputs"]["sampling_draws"][number]
    settings = case["settings"]
    steps, scale, count = settings["num_iter"], settings["cfg"], 1 + len(spaced.steps)
    condition, labels, orders = model.transformer.condition, run["labels"], run.content["inputs"]["orders"]
    given = condition.null(labels) if settings.get("labels", labels) is None else labels
    vectors = [condition(given)[:, 0]]
    if scale != 1:
        vectors.append(condition(condition.null(labels))[:, 0])
    length = orders.shape[1]
    latents = torch.zeros(len(labels), length, model.settings.token_channels, dtype=run.dtype)
    hidden = length
    hid, scales = [], []
    for step in range(steps):
        before, hidden = hidden, hidden_after(length, hidden, step, steps)
        # The published schedule reaches its full scale at no step: a last token is counted as hidden.
        left = max(hidden, 1)
        now = (
            1 + (scale - 1) * (length - left) / length if settings.get("cfg_schedule", "linear") == "linear" else scale
        )
        hid.append(left)
        scales.append(now)
        masked = torch.zeros(orders.shape, dtype=torch.bool).scatter(1, orders[:, :before], True)
        if "masks" in case:
            after = torch.zeros(orders.shape, dtype=torch.bool).scatter(1, orders[:, :left], True)
            run.same(f"sample_tokens {number}: masks", after, case["masks"][step])
        drawn = masked & ~torch.zeros_like(masked).scatter(1, orders[:, :hidden], True)
        z = [model.transformer(latents, visible(masked), vector)[drawn] for vector in vectors]
        noise = torch.stack([draw[: len(z[0])].to(run.dtype) for draw in draws[step * count : (step + 1) * count]])
        latents[drawn] = denoise(model.transformer.head, spaced, z, now, noise, settings["temperature"])
    run.close(f"sample_tokens {number}: latents", model.unpatchify(latents), case["latents"])
    run.same(f"sample_tokens {number}: mask_len_after_step", torch.tensor(hid), case["mask_len_after_step"])
    guidance = torch.tensor(scales, dtype=torch.float64)
    run.close(f"sample_tokens {number}: cfg_of_step", guidance, case["cfg_of_step"])
