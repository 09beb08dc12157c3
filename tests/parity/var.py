"""VAR: the transformer with its own quantizer, losses, gradients, guided greedy generations; its filters."""

import torch
from torch import Tensor, nn

from lexel.generators.next_scale import NextScale
from lexel.generators.sampling import filter_logits
from lexel.quantizers import Multiscale
from tests.parity.fixture import Fixture, Run


def quantizer(run: Run) -> Multiscale:
    """The published tokenizer's quantizer, from its own tensors."""
    config, sides = run.content["vae_config"], run.content["config"]["patch_nums"]
    tensors = {
        name.removeprefix("quantize."): run.cast(value)
        for name, value in run.content["vae_quantizer_state_dict"].items()
        if "ema_vocab_hit" not in name
    }
    codes = tensors.pop("embedding.weight")
    names = sorted(tensors)
    smoothers = len(names) // 2
    made = Multiscale(len(codes), codes.shape[1], sides, smoothing=abs(config["quant_resi"]), smoothers=smoothers or 1)
    made = made.to(run.dtype)
    state = {name: torch.zeros_like(value) for name, value in made.state_dict().items()}  # without smoothers nothing is
    state["base.weight"] = codes
    for number in range(smoothers):
        for kind in ("weight", "bias"):
            found = [name for name in names if name.endswith(f".{number}.{kind}" if smoothers > 1 else f".{kind}")]
            state[f"smoothers.{number}.{kind}"] = tensors[found[0]]
    made.load_state_dict(state)
    return made.eval()


class Attached(nn.Module):
    """A tokenizer that is nothing but its quantizer."""

    def __init__(self, inner: Multiscale) -> None:
        super().__init__()
        self.quantizer = inner


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        model: NextScale = run.load("var")
        model._tokenizer = [Attached(quantizer(run))]  # type: ignore[list-item]
        tokens = torch.cat(run.content["inputs"]["indices"], 1)
        labels = run["labels"]
        drop = run.content["config"]["cond_drop_rate"]
        dropped = run.content["inputs"]["cond_drop_uniform"] < drop
        run.same("dropped", dropped)
        run.close("var_input", model.multiscale().next_inputs(tokens))
        used = torch.where(dropped, model.condition.null(labels), labels)
        predicted = model(tokens, used)
        run.close("logits", predicted.logits[0])
        assert predicted.nll is not None
        total = predicted.nll.mean()
        run.close("loss", total)
        ours = dict(model.transformer.network.named_parameters())
        run.gradients(total, {**ours, "class_emb.weight": model.transformer.condition.weight})
        with torch.no_grad():
            for number, case in enumerate(run.expected["infer"]):
                generate(run, model, labels, number, case)


def generate(run: Run, model: NextScale, labels: Tensor, number: int, case: dict) -> None:
    cfg = run.published("", case["cfg"]).item()
    scale = 1 + cfg  # conditional + t (conditional - unconditional), t rising to cfg at the last scale
    found = model.sample(labels, scale, "linear", top_k=1)
    scales = case["greedy_ids"]
    for ours, theirs in zip(found.split([scale.shape[1] for scale in scales], 1), scales, strict=True):
        run.same(f"infer {number}: greedy_ids", ours, theirs)
    tokens = torch.cat(scales, 1)
    conditional = model(tokens, labels).logits[0]
    unconditional = model(tokens, model.condition.null(labels)).logits[0]
    levels = model.transformer.network.levels(labels.device)
    share = (cfg * levels.double() / levels[-1]).to(run.dtype)[:, None]
    mixed = (1 + share) * conditional - share * unconditional
    theirs = case["mixed_logits_first"]
    run.close(f"infer {number}: mixed_logits_first", mixed[:, : theirs.shape[1]], theirs)
    first = int((levels == levels[0]).sum())
    last = mixed.shape[1] - int((levels == levels[-1]).sum())
    for name, begin in {"mixed_logits_second": first, "mixed_logits_last": last}.items():
        theirs = case[name]
        if isinstance(theirs, Tensor):
            run.close(f"infer {number}: {name}", mixed[:, begin : begin + theirs.shape[1]], theirs)
    run.close(f"infer {number}: f_hat", model.multiscale().partial_sums(tokens)[-1], case["f_hat"])


def check_filters(fixture: Fixture) -> None:
    """Top-k, then top-p: probabilities after both. A published top_p of 0 is off, which is 1 here."""
    logits: Tensor = fixture.content["logits"]
    for run in fixture.runs():
        if logits.dtype == torch.float32 and run.dtype == torch.float64:
            continue  # the published filter works in float32 only
        for case in fixture.content["cases"]:
            rows = logits.flatten(0, -2).to(run.dtype)
            temperature = case.get("temperature", 1.0)
            kept = filter_logits(rows, temperature, case["top_k"], case["top_p"] or 1.0)
            name = f"top_k {case['top_k']}, top_p {case['top_p']}"
            run.close(name, kept.softmax(-1), case["probabilities"].flatten(0, -2), 1e-4)
