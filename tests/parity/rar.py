"""RAR generators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.generators.random_order import RandomOrder
from lexel.generators.sampling import guidance_scales
from tests.parity.fixture import Fixture, Run


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        model: RandomOrder = run.load("rar")
        tokens, labels = run["tokens"], run["labels"]
        codes = model.token_spec.codebook_size
        run.same("condition_ids", labels + codes + 1)
        run.same("none_condition_id", model.condition.null(labels[:1]) + codes + 1)
        orders = {"permuted": run["orders"], "raster": torch.arange(tokens.shape[1]).expand_as(tokens)}
        for name, order in orders.items():
            expected = run.expected[name]
            permuted = tokens.gather(1, order)
            run.same(f"{name}: labels", permuted, expected["labels"])
            run.close(f"{name}: logits", model.transformer(permuted, labels, order), expected["logits"])
            loss = model.ordered_losses(tokens, labels, order)["nll"]
            run.close(f"{name}: loss", loss, expected["loss"])
            if "grads" in expected:
                model.zero_grad()
                loss.backward()
                run.close_gradients(published_gradients(model, run), label=name)
        null = model.condition.null(labels)
        run.close("uncond_raster_logits", model.transformer(tokens, null, orders["raster"]))
        generate(run, model)


def published_gradients(model: RandomOrder, run: Run) -> dict[str, Tensor]:
    """Gradients by their published names; rows that we have not are 0 there."""
    grads = {name.removeprefix("transformer."): value.grad for name, value in model.named_parameters()}
    found = {name: value for name, value in grads.items() if value is not None}
    tokens, classes = found.pop("tokens.weight"), found.pop("classes.weight")
    found["embeddings.weight"] = torch.cat([tokens, torch.zeros_like(tokens[:1]), classes])
    found["cls_token"] = found.pop("first")[None, None]
    found["pos_embed"] = F.pad(found.pop("positions"), (0, 0, 0, 1))[None]
    found["target_aware_pos_embed"] = F.pad(found.pop("targets"), (0, 0, 2, 1))[None]
    found["timesteps_embeddings"] = F.pad(found.pop("steps"), (0, 0, 0, 1))[None]
    renames = {
        "modulation": "adaLN_modulation.1",
        "query_norm": "attn.q_norm",
        "key_norm": "attn.k_norm",
        ".qkv": ".attn.qkv",
        ".out.": ".attn.proj.",
        "feed_forward": "mlp",
        "head.": "lm_head.",
    }
    published = {}
    for name, gradient in found.items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        published[f"adaln_before_head.{name}" if name.startswith("adaLN_modulation") else name] = gradient
    return published


def generate(run: Run, model: RandomOrder) -> None:
    labels = run["labels"]
    for number, case in enumerate(run.expected["generate"]):
        settings = case["settings"]
        found = model.sample(
            labels,
            cfg_scale=settings["guidance_scale"],
            cfg_schedule=f"cosine-power:{settings['guidance_scale_pow']}",
            temperature=settings["randomize_temperature"],
            top_k=1,
        )
        run.same(f"generate {number}: greedy_ids", found, case["greedy_ids"])
    raster = torch.arange(model.token_spec.cells).expand(len(labels), -1)
    settings = run.expected["generate"][0]["settings"]
    scales = guidance_scales(
        f"cosine-power:{settings['guidance_scale_pow']}", settings["guidance_scale"], raster.shape[1]
    )
    for place, step in enumerate(run.expected["first_steps"]):
        run.close(f"first_steps {place}: cfg", torch.tensor(scales[place], dtype=torch.float64), step["cfg"])
        known = run.expected["generate"][0]["greedy_ids"]
        both = [model.transformer(known, given, raster)[:, place] for given in (labels, model.condition.null(labels))]
        run.close(f"first_steps {place}: cond", both[0], step["cond"])
        run.close(f"first_steps {place}: uncond", both[1], step["uncond"])
        run.close(f"first_steps {place}: mixed", both[1] + scales[place] * (both[0] - both[1]), step["mixed"])
