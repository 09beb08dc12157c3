"""MaskGIT generators of TiTok, with a BERT or a U-ViT."""

import math
from typing import Any

import torch
from torch import Tensor

from lexel.generators.batch import SampleBatch
from lexel.generators.masked import SCHEDULES, Masked, MaskedOptions
from lexel.generators.sampling import guidance_scales
from tests.parity.fixture import Fixture, Run


class PublishedDraws:
    """The recorded uniform numbers, alternately for tokens and for confidences; notes what each step chose."""

    def __init__(self, uniforms: list[Tensor], dtype: torch.dtype) -> None:
        self.step, self.chosen = 0, {}
        self.noise = [-(-u.to(dtype).clamp(min=1e-20).log()).clamp(min=1e-20).log() for u in uniforms]

    def tokens(self, step: int, logits: Tensor, temperature: float, filters: dict[str, Any]) -> Tensor:
        self.chosen[step] = (logits + temperature * self.noise[2 * step]).argmax(-1)
        return self.chosen[step]

    def gumbel(self, step: int) -> Tensor:
        self.step = step + 1
        return self.noise[2 * step + 1]


def schedule(settings: dict[str, Any]) -> tuple[float, str]:
    """Our scale and schedule for published settings; constant and linear add to the conditional logits there."""
    scale, decay = settings["guidance_scale"], settings["guidance_decay"]
    if decay == "power-cosine":
        return scale, f"cosine-power:{settings.get('guidance_scale_pow', 3.0)}"
    return 1 + scale, {"constant": "constant", "linear": "ramp"}[decay]


def check(fixture: Fixture) -> None:
    family = "maskgit_uvit" if "UViT" in fixture.family else "maskgit_bert"
    for run in fixture.runs():
        model: Masked = run.load(family, overrides(run))
        tokens, labels = run["tokens"], run["labels"]
        seen: dict[str, Tensor] = {}
        model.transformer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(tokens=inputs[0]))
        model.transformer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.update(logits=output))
        order = run.content["inputs"]["mask_order_uniform"].argsort(-1)
        loss = model.masked_losses(tokens, labels, run.content["inputs"]["mask_timesteps"].to(run.dtype), order)
        run.same("masked_tokens", seen["tokens"])
        run.same("masks", seen["tokens"] == model.mask)
        run.close("logits", seen["logits"])
        null = model.condition.null(labels)
        run.close("uncond_logits", model.transformer(run.expected["masked_tokens"], null))
        masks = run.expected["masks"]
        accuracy(run, seen["logits"].argmax(-1) == tokens, masks)
        total = loss["masked_nll"]
        loss_logits = model(tokens.masked_fill(masks, -1), labels).logits[0]
        assert torch.equal(loss_logits, model.transformer(run.expected["masked_tokens"], labels))
        run.close("loss", total)
        gradients(run, model, total)
        generate(run, model)


def accuracy(run: Run, right: Tensor, masks: Tensor) -> None:
    """The share of masked tokens that are right; a file does not say whether it is each sample's mean or of all."""
    samples = (right & masks).sum(1).to(run.dtype) / (masks.sum(1).to(run.dtype) + 1e-8)
    ours = [right[masks].to(run.dtype).mean(), samples.mean()]
    theirs = run.expected["accuracy_on_masked"]
    run.close("accuracy_on_masked", min(ours, key=lambda share: abs(share - theirs)))


def overrides(run: Run) -> dict[str, Any]:
    losses = run.content["config"]["losses"]
    return {
        "transformer.label_smoothing": losses["label_smoothing"],
        "transformer.unmasked_weight": losses["loss_weight_unmasked_token"],
    }


def gradients(run: Run, model: Masked, total: Tensor) -> None:
    """Published gradients, of tables that we cut and of projections that we join too."""
    total.backward()
    run.close_gradients(published_gradients(model))


def published_gradients(model: Masked) -> dict[str, Tensor]:
    grads = {name.removeprefix("transformer."): value.grad for name, value in model.named_parameters()}
    found: dict[str, Tensor] = {}
    words = torch.cat([grads.pop("tokens.weight"), grads.pop("classes.weight")])
    bert = "types.weight" in grads
    found["model.embeddings.word_embeddings.weight" if bert else "embeddings.weight"] = words
    places = grads.pop("positions")
    found["model.embeddings.position_embeddings.weight" if bert else "pos_embed"] = places if bert else places[None]
    renames = {
        "attention.out": "attention.output.dense" if bert else "attn.proj",
        "feed_forward.fc1": "intermediate.dense" if bert else "mlp.fc1",
        "feed_forward.fc2": "output.dense" if bert else "mlp.fc2",
    }
    middle = len(model.transformer.blocks) - 1
    for name, gradient in grads.items():
        if gradient is None:
            continue
        if bert and ".attention.qkv." in name:
            layer, kind = name.split(".")[1], name.split(".")[-1]
            for part, value in zip(("query", "key", "value"), gradient.chunk(3), strict=True):
                found[f"model.encoder.layer.{layer}.attention.self.{part}.{kind}"] = value
            continue
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        name = name.replace("attention.qkv", "attn.qkv").replace(".skip.", ".skip_linear.").replace("head.", "lm_head.")
        if bert:
            name = name.replace("types.weight", "embeddings.token_type_embeddings.weight")
            name = name.replace("blocks.", "encoder.layer.") if name.startswith("blocks.") else name
            name = "model." + (name.replace("norm.", "embeddings.LayerNorm.") if name.startswith("norm.") else name)
            name = name.replace(".norm1.", ".attention.output.LayerNorm.").replace(".norm2.", ".output.LayerNorm.")
        elif name.startswith("blocks."):
            name = name.replace(f"blocks.{middle}.", "mid_block.") if f"blocks.{middle}." in name else "in_" + name
        found[name] = gradient
    return found


def generate(run: Run, model: Masked) -> None:
    labels = run["labels"]
    recorded = run.content["gumbel_uniform"]
    for number, case in enumerate(run.expected["generate"]):
        settings = case["settings"]
        scale, name = schedule(settings)
        steps = settings["num_sample_steps"]
        options = MaskedOptions(
            steps=steps,
            order="titok",
            choice_temperature=float(settings["randomize_temperature"]),
            annealing=bool(settings.get("softmax_temperature_annealing", False)),
        )
        batch = SampleBatch(
            condition=labels,
            null=model.condition.null(labels),
            tokens=torch.full_like(run["tokens"], -1),
            scales=[guidance_scales(name, scale, steps)],
            filters=[{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}],
            seed=0,
            numbers=list(range(len(labels))),
            options=options,
            dtype=None,
            report=lambda share: None,
        )
        draws, rows = PublishedDraws(recorded[number], run.dtype), len(labels)
        given: dict[int, Tensor] = {}  # the tokens that each step sees
        logits: list[Tensor] = []
        hooks = [
            model.transformer.register_forward_pre_hook(
                lambda _, inputs, given=given, draws=draws: given.setdefault(draws.step, inputs[0]) is None or None
            ),
            model.transformer.register_forward_hook(lambda _, __, output, logits=logits: logits.append(output)),
        ]
        with torch.no_grad():
            found = model.fill(batch, draws)
        for hook in hooks:
            hook.remove()
        run.same(f"generate {number}: ids", found, case["ids"])
        run.close(f"generate {number}: first logits", logits[0][:rows], case["first_step"]["cond_logits"])
        for step, theirs in enumerate(case["steps"]):
            tokens = given[step][:rows]
            run.same(f"generate {number}: ids_in", tokens, theirs["ids_in"])
            if step in draws.chosen:
                run.same(f"generate {number}: sampled_ids", draws.chosen[step], theirs["sampled_ids"])
            else:  # the likeliest are taken without a draw, and stay where they stay known
                after = given[step + 1][:rows] if step + 1 in given else found
                kept = (tokens == model.mask) & (after != model.mask)
                run.same(f"generate {number}: sampled_ids", after[kept], theirs["sampled_ids"].masked_select(kept))
                run.published("", theirs["sampled_ids"])


def check_schedules(fixture: Fixture) -> None:
    """How many tokens stay masked, and guidance, at every step; both are numbers, the same in any precision."""
    for run in fixture.runs():
        for name, expected in run.content["remasked_after_step"].items():
            tokens, steps = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
            left, counts = tokens, []
            for step in range(steps):
                left = max(1, min(left - 1, int(tokens * SCHEDULES["arccos"](math, (step + 1) / steps))))
                counts.append(left)
            run.same(name, torch.tensor(counts), torch.tensor(expected))
        for name, expected in run.content["cfg_power_cosine"].items():
            scale, power, steps = (float(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in name.split("_"))
            ours = guidance_scales(f"cosine-power:{power}", scale, int(steps))
            run.close(name, torch.tensor(ours, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64))
