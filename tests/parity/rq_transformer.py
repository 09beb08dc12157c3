"""RQ-Transformer: logits, losses with hard and soft targets, gradients, greedy codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.generators.residual import ResidualGenerator
from tests.parity.fixture import Fixture, Run


class Codes(nn.Module):
    """Stands for the tokenizer: nothing but its codebooks, (depths, K, D)."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        state = run.content["quantizer_state_dict"]
        depths = sum(name.endswith(".weight") for name in state)
        books = [run.cast(state[f"codebooks.{depth}.weight"])[:-1] for depth in range(depths)]  # the last row pads
        self.quantizer = nn.Module()
        self.quantizer.codebook = nn.Parameter(torch.stack(books))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """As published: the logarithm of the sum of exponentials plus 1e-7, after the largest logit is subtracted."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return -(targets * (shifted - (shifted.exp().sum(-1, keepdim=True) + 1e-7).log())).sum(-1)


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        model: ResidualGenerator = run.load("rq_transformer")
        model._tokenizer = [Codes(run)]  # type: ignore[list-item]
        codes, asked = run["codes"], run["cond"]
        words = model.condition.kind == "words"
        prepared = asked if words else asked[:, 0]
        tokens = codes.permute(0, 3, 1, 2)  # (B, depths, h, w)

        def logits(codes: Tensor, model: ResidualGenerator = model, prepared: Tensor = prepared) -> Tensor:
            found = model(codes.permute(0, 3, 1, 2), prepared).logits[0]  # (B, depths h w, K)
            return found.unflatten(1, (codes.shape[3], *codes.shape[1:3])).permute(0, 2, 3, 1, 4)

        run.close("logits", logits(codes))
        nll = model(tokens, prepared).nll
        assert nll is not None
        run.close("ce", nll.mean())
        run.close("codebook_ce", nll.unflatten(1, (codes.shape[3], -1)).mean((0, 2)))
        soft = run.expected["soft"]
        for name in ("codes", "soft_codes"):  # of the tokenizer, given to the transformer
            run.published("", soft[name])
        found = logits(soft["codes"])
        run.close("soft: logits", found, soft["logits"])
        losses = soft_cross_entropy(found, soft["soft_codes"])
        run.close("soft: soft_ce", losses.mean(), soft["soft_ce"])
        run.close("soft: codebook_soft_ce", losses.mean((0, 1, 2)), soft["codebook_soft_ce"])
        total = losses.mean()
        if words:
            _, predicted = model._predicted(tokens, prepared)
            assert predicted is not None
            run.close("cond_logits", predicted)
            run.close("cond_ce", F.cross_entropy(predicted.flatten(0, 1), asked[:, 1:].flatten()))
            total = sum(model.losses(tokens, prepared).values(), torch.zeros(()))
            run.close("total_0p9_image_0p1_text", total)
        ours = dict(model.transformer.network.named_parameters())
        run.gradients(total, {**ours, "cond_emb.weight": model.transformer.condition.weight})
        with torch.no_grad():
            greedy = model.sample(prepared, top_k=1)
        run.same("greedy_codes", greedy.permute(0, 2, 3, 1))
