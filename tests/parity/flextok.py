"""What Lexel has of FlexTok: FSQ, how many tokens are kept, times of a flow, guidance, the way to the data.

Its time runs from data (0) to noise (1), ours the other way. The trunk and the table of positions are not
compared: no autoencoder of Lexel has them.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from lexel import quantizers
from lexel.autoencoders.first_tokens import FirstTokens, NestedConfig
from lexel.generators.flow.diffusion import time_features
from lexel.generators.flow.guidance import ProjectedGuidance
from lexel.generators.flow.network import TimeEmbedding
from lexel.generators.flow.times import mode, training_times
from lexel.generators.flow.transport import Transport, solve_ode
from lexel.quantizers.nested import Nested
from tests.parity.fixture import Fixture, Run


def scale_of(name: str) -> float:
    """The guidance in a name: 2.5 in `apg_2p5`."""
    return float(name.rsplit("_", 1)[1].replace("p", "."))


KEEP = {"uniform": "uniform", "pow2": "powers", "uniform_pow2": "rounded"}


def check(fixture: Fixture) -> None:
    for dtype in (torch.float64, torch.float32):
        run = Run(fixture, {"f64": {}}, dtype)
        for name, part in fixture.content["fsq"].items():
            fsq(Run(fixture, part, dtype, f"fsq {name} "))
        if dtype == torch.float32:  # the file has times of float32, and 1 - time rounded once more, in float64 too
            noising(run, fixture.content["rf_noise"])
        guidance(run, fixture.content["guidance"])
        euler(run, fixture.content["euler"])
        times(Run(fixture, fixture.content["time_embedding"], dtype, "time_embedding "))
        for name, frequencies in fixture.content["nested_dropout"].items():
            if name.startswith("sampled_keep_k_frequencies_N"):
                kept(run, frequencies, int(name.rsplit("N", 1)[1]))
        first_tokens(run, fixture.content["nested_dropout"])


def fsq(run: Run) -> None:
    content, levels = run.content, run.content["levels"]
    options = {"codebook_size": content["codebook_size"], "codebook_dim": len(levels), "levels": levels}
    quantizer = quantizers.build("fsq", options).to(run.dtype)
    z = run.cast(content["z"]).requires_grad_(True)
    result = quantizer(z.movedim(-1, 1))
    z_q = result.z_q.movedim(1, -1)
    run.close("quant", z_q)
    run.same("tokens", result.indices)
    weights = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).view(z.shape)
    run.close("grad_weighted", torch.autograd.grad((z_q * weights).sum(), z)[0])
    run.close("embedding_of_tokens", quantizer.indices_to_codes(run.expected["tokens"]).movedim(1, -1))
    run.close("first_codes", quantizer.codebook[: len(run.expected["first_codes"])])


def noising(run: Run, content: dict) -> None:
    clean = [run.cast(each) for each in content["clean"]]
    for name, part in content.items():
        if name == "clean":
            continue
        settings = part["settings"]
        stratified = settings["ln"] and settings.get("stratisfied", False)  # spelt so; only normal ones are
        distribution = "logit_normal" if settings["ln"] else "uniform"
        *noise, draw = (run.cast(each) for each in part["draws"])
        if settings["ln"] and not stratified:  # drawn as normal numbers
            draw = torch.special.ndtr(draw)
        sigma = training_times(draw, distribution, stratified)
        if settings.get("mode_scale") and not settings["ln"]:
            sigma = mode(sigma, settings["mode_scale"])
        run.close(f"rf_noise {name} sigmas", sigma, content[name]["sigmas"], 1e-6)
        between = zip(clean, noise, 1 - sigma, strict=True)
        noised = [Transport().between(data, pure, time[None])[0] for data, pure, time in between]
        run.close(f"rf_noise {name} noised", in_a_row(noised), content[name]["noised"], 1e-6)


def in_a_row(samples: list[Tensor]) -> Tensor:
    """All numbers of samples that may differ in size."""
    return torch.cat([sample.flatten() for sample in samples])


def guidance(run: Run, content: dict) -> None:
    conditional, unconditional = run.cast(content["cond"]), run.cast(content["uncond"])
    options = (content["momentum"], content["norm_threshold"], content["eta"])
    projected = ProjectedGuidance(*options)
    (scale,) = {scale_of(name) for name in content if name.startswith(("cfg_", "apg_no_momentum_"))}
    for name in content:
        if name.startswith("apg_no_momentum_"):
            once = ProjectedGuidance(0.0, *options[1:])(conditional, unconditional, scale)
            run.close(name, once, content[name])
        elif name.startswith("cfg_"):
            run.close(name, unconditional + scale * (conditional - unconditional), content[name])
    run.close("apg_step1", projected(conditional, unconditional, scale), content["apg_step1"])
    changed = [float(number) for number in re.findall(r"\d+\.\d+", content["apg_step2_inputs"])]
    second = projected(conditional * changed[0] + changed[1], unconditional * changed[2], scale)
    run.close("apg_step2", second, content["apg_step2"])


def euler(run: Run, content: dict) -> None:
    noise = [run.cast(each) for each in content["noise"]]
    first, second = (float(number) for number in re.findall(r"(\d+\.\d+)\*x", content["model"]))

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return first * x + t

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return second * x - t

    def rounded(time: Tensor) -> Tensor:
        """The published loop has its times in float32, whatever the precision."""
        return time.float().to(run.dtype)

    def field_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        if name == "plain":
            return conditional
        scale = scale_of(name)
        if name.startswith("apg_"):
            projected = ProjectedGuidance()
            return lambda x, t: projected(conditional(x, t), unconditional(x, t), scale)
        return lambda x, t: unconditional(x, t) + scale * (conditional(x, t) - unconditional(x, t))

    for name in content.keys() - {"noise", "model", "steps"}:
        found = []
        for start in noise:
            field = field_of(name)
            ours = lambda x, time, field=field: -field(x, rounded(1 - time).view(-1, 1, 1, 1))  # noqa: E731
            *_, last = solve_ode(ours, start, content["steps"] + 1)
            found.append(last)
        run.close(f"euler {name}", in_a_row(found), content[name])


def times(run: Run) -> None:
    config, state = run.content["config"], run.content["state_dict"]
    embedding = TimeEmbedding(config["dim"], config["frequency_embedding_size"])
    embedding.load_state_dict(state)
    embedding = embedding.to(run.dtype)
    time = run.cast(run.content["t"]) * 1000 / config["max_timestep"]
    features = time_features(time, config["frequency_embedding_size"], float(config["max_period"]))
    run.close("t_freq", features)
    run.close("emb", embedding.mlp(features))


def first_tokens(run: Run, content: dict) -> None:
    """Samples, each with the number of its tokens that stay."""
    found = []
    for x, count in zip(content["x"], content["keep_k"], strict=True):
        part = FirstTokens(x.shape[1], x.shape[2], NestedConfig()).to(run.dtype)
        part.load_state_dict({"left_out": content["state_dict"]["dropout_mask_token"].flatten()})
        found.append(part.cut(run.cast(x).transpose(1, 2), torch.tensor([count])).transpose(1, 2))
    run.close("nested_dropout", in_a_row(found), content["out"])


def kept(run: Run, frequencies: dict, depth: int) -> None:
    """The published frequencies are of 20,000 draws; ours are probabilities."""
    for name, published in frequencies.items():
        counts = Nested(16, 4, depth=depth, keep=KEEP[name]).prefix_lengths
        ours = torch.tensor([counts.count(int(count)) / len(counts) for count in published], dtype=torch.float64)
        difference = (ours - torch.tensor(list(published.values()), dtype=torch.float64)).abs().max().item()
        run.fixture.compared[f"kept {name}"] = None
        if difference > 0.02 or not set(counts) <= {int(count) for count in published}:
            run.fixture.faults.append(f"numbers of kept tokens, {name}, differ in frequency by {difference:.3f}")
