"""DiT and SiT: network, losses, gradients, and every sampler of the files."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lexel.generators.flow import Flow
from lexel.generators.flow.diffusion import Diffusion, ddim_steps, linear_betas, spaced_steps, time_features
from lexel.generators.flow.generator import Guided
from lexel.generators.flow.transport import SDE, Transport, solve_ode, solve_sde
from tests.parity.fixture import Fixture, Run

TABLE = "y_embedder.embedding_table.weight"


def conditioned(model: Flow, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network under labels, nothing dropped."""
    vector = model.transformer.condition(labels)[:, 0]
    return lambda z, time: model.transformer(z, time, vector)


def guided(model: Flow, labels: Tensor, scale: float) -> Guided:
    """The network under guidance of the first three channels, as published."""
    condition = model.transformer.condition
    return Guided(model.transformer, condition(labels)[:, 0], condition(condition.null(labels))[:, 0], scale, 3)


def doubled(values: Tensor) -> Tensor:
    """Published batches hold both halves of guidance."""
    return torch.cat([values, values])


def parameters(model: Flow) -> dict[str, Tensor]:
    """Our parameters by their published names."""
    ours = {name.removeprefix("network."): value for name, value in model.transformer.named_parameters()}
    return {**ours, TABLE: model.transformer.condition.weight}


def with_dropped_labels(model: Flow, run: Run, rate: float) -> Tensor:
    labels = run["y"]
    return torch.where(run["label_drop_uniform"] < rate, model.transformer.condition.null(labels), labels)


def dit(fixture: Fixture) -> None:
    for run in fixture.runs():
        model: Flow = run.load("dit")
        x, y, t, noise = run["x"], run["y"], run["t"], run["noise"]
        run.close("t_freq", time_features(t.to(run.dtype), 256))
        run.close("out", conditioned(model, y)(x, t))
        schedule = Diffusion(linear_betas())
        run.close("x_t", schedule.noised(x, t, noise))
        rate = run.content["config"]["class_dropout_prob"]
        for name, labels in (("losses", y), ("train_losses_with_label_drop", with_dropped_labels(model, run, rate))):
            terms = schedule.losses(conditioned(model, labels), x, t, noise)
            expected = run.expected[name]
            whole = sum(terms.values(), torch.zeros(()))
            run.close(f"{name}: mse", terms["noise"], expected["mse"])
            if "variance" in terms:
                run.close(f"{name}: vb", terms["variance"], expected["vb"])
            run.close(f"{name}: loss", whole, expected["loss"])
            if name == "losses":
                total = whole.mean()
                run.close("loss", total)
                run.gradients(total, parameters(model))
        numbers = run.content["schedule"]
        run.close("alphas_cumprod", schedule.cumulative[numbers["alphas_cumprod_at"]], numbers["alphas_cumprod"])
        ends = torch.tensor(numbers["linear_betas_first_last"], dtype=torch.float64)
        run.close("linear_betas_first_last", schedule.betas[[0, -1]], ends)
        for name, theirs in numbers.items():
            begin, _, count = name.rpartition("timesteps_")
            if count.isdigit():
                ours = (ddim_steps if begin else spaced_steps)(1000, int(count))
                run.same(name, torch.tensor(ours), torch.tensor(theirs))
        spaced = schedule.respaced(spaced_steps(1000, run.content["sampling_steps"]))
        run.close("spaced_betas", spaced.betas, numbers["spaced_betas"])
        with torch.no_grad():
            samplers(run, model, spaced)


def samplers(run: Run, model: Flow, spaced: Diffusion) -> None:
    x, y = run["x"], run["y"]
    half = len(x) // 2
    name = next((name for name in run.expected if name.startswith("p_sample_loop_cfg")), "p_sample_loop_cfg1")
    field = guided(model, y[:half], float(name.removeprefix("p_sample_loop_cfg").replace("p", ".")))
    run.close("out_cfg", both_halves(field, x[:half], run["t"][:half]))
    one = run.expected["one_step"]
    run.same("timestep_map", spaced.steps, one["timestep_map"])
    index = run.published("", one["t_index"])  # steps that are given
    plain = conditioned(model, y)
    output = plain(x, spaced.steps[index])
    believed = spaced.posterior(output, x, index)
    run.close("one_step: mean", believed.mean, one["mean"])
    run.close("one_step: log_variance", believed.log_variance, one["log_variance"])
    run.close("one_step: pred_xstart", believed.clean, one["pred_xstart"])
    single = [spaced.ddim_step(output[[n]], x[[n]], int(step)) for n, step in enumerate(index)]
    run.close("one_step: ddim_eta0", torch.cat(single), one["ddim_eta0"])
    points, deterministic = doubled(x[:half]), x
    recorded = run.content["inputs"].get("p_sample_noise", [])
    for number, step in enumerate(reversed(range(len(spaced.steps)))):
        original = spaced.steps[[step] * len(x)]
        deterministic = spaced.ddim_step(plain(deterministic, original), deterministic, step)
        if number < len(recorded):
            # The published halves start from noise of their own, and each goes its way under the first half's guidance.
            output = both_halves(field, points[:half], original[:half])
            points = spaced.ancestral_step(output, points, step, recorded[number].to(run.dtype))
    run.close(name, points)
    run.close("ddim_loop", deterministic)


def both_halves(field: Guided, point: Tensor, time: Tensor) -> Tensor:
    """Outputs of the guided and of the null half, which share their guided channels."""
    assert field.null is not None
    guided = field(point, time)
    rest = field.network(point, time, field.null)[:, field.channels :]
    return torch.cat([guided, torch.cat([guided[:, : field.channels], rest], 1)])


def sit(fixture: Fixture) -> None:
    for run in fixture.runs():
        model: Flow = run.load("sit")
        x1, x0, y, t = run["x1"], run["x0"], run["y"], run["t"]
        channels = x1.shape[1]
        network = conditioned(model, y)
        plain = lambda z, time, network=network, channels=channels: network(z, time)[:, :channels]  # noqa: E731
        run.close("t_freq", time_features(t, 256))
        run.close("out", plain(x1, t))
        for name, case in run.expected.items():
            if isinstance(case, dict):
                path(run, name, case, plain, parameters(model))
        half = len(x0) // 2
        with torch.no_grad():
            field = guided(model, y[:half], guidance_scale(run, model))
            run.close("out_cfg", both_halves(field, x1[:half], t[:half])[:, :channels])
            drift = lambda z, time, f=field, h=half, c=channels: both_halves(f, z[:h], time[:h])[:, :c]  # noqa: E731
            for name, expected in run.expected.items():
                if name.startswith("ode_"):
                    start = doubled(x0[:half])
                    method = name.removeprefix("ode_").replace("heun2", "heun")
                    found = [start, *solve_ode(drift, start, len(expected), method)]
                    run.close(name, torch.stack(found), expected)
            for name, draws in run.content["inputs"]["sde_noise"].items():
                _, method, form, last = name.split("_")
                sde = SDE(method.lower(), form, 1.0, last.lower(), 0.04)
                draw = lambda number, draws=draws, run=run: draws[number].to(run.dtype)  # noqa: E731
                expected = run.expected[name]
                found = list(solve_sde(Transport(), plain, x0, len(expected), draw, sde))
                run.close(name, torch.stack(found), expected)


def guidance_scale(run: Run, model: Flow) -> float:
    """The scale of a file's guidance, which it does not say: what its largest guided number needs, to five digits."""
    half = len(run["x1"]) // 2
    x, y, t = run["x1"][:half], run["y"][:half], run["t"][:half]
    with_class, without = (guided(model, y, scale)(x, t)[:, :3] for scale in (1.0, 0.0))
    theirs = run.cast(run.expected["out_cfg"])[:half, :3]
    place = (with_class - without).abs().argmax()
    scale = (theirs - without).flatten()[place] / (with_class - without).flatten()[place]
    return float(f"{scale.item():.5g}")


def path(run: Run, name: str, case: dict[str, Any], plain: Any, ours: dict[str, Tensor]) -> None:
    """One path, prediction and weighting."""
    x1, x0, t = run["x1"], run["x0"], run["t"]
    kind, prediction, weighting = (part.lower() for part in name.split("_"))
    transport = Transport(kind, prediction, weighting)
    point, velocity = transport.between(x1, x0, t)
    run.close(f"{name}: x_t", point, case["x_t"])
    run.close(f"{name}: u_t", velocity, case["u_t"])
    loss = transport.loss(plain, x1, x0, t)
    run.close(f"{name}: loss", loss, case["loss"])
    for margin, value in {"train_eps": transport.training_margin, "sample_eps": transport.sampling_margin}.items():
        run.close(f"{name}: {margin}", torch.tensor(value, dtype=torch.float64), case[margin])
    output = plain(point, t)
    run.close(f"{name}: drift", transport.velocity(output, point, t), case["drift"])
    if "score_from_velocity" in case:
        run.close(f"{name}: score", transport.score(output, point, t), case["score_from_velocity"])
    if "grads" in case:
        found = torch.autograd.grad(loss.mean(), [ours[key] for key in case["grads"]])
        for key, gradient in zip(case["grads"], found, strict=True):
            run.close(f"{name}: grads:{key}", gradient, case["grads"][key])
