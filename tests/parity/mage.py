"""MAGE: its tokenizer, encoder, decoder, loss and sampler."""

import math
from typing import Any

import torch
from torch import Tensor

from lexel.generators.batch import SampleBatch
from lexel.generators.masked import Masked, MaskedOptions
from lexel.generators.sampling import guidance_scales
from tests.parity.fixture import Fixture, Run


class PublishedDraws:
    """The likeliest token, and the recorded Gumbel noise."""

    def __init__(self, gumbel: list[Tensor]) -> None:
        self.noise = gumbel

    def tokens(self, step: int, logits: Tensor, temperature: float, filters: dict[str, Any]) -> Tensor:
        return logits.argmax(-1)

    def gumbel(self, step: int) -> Tensor:
        return self.noise[step]


def check(fixture: Fixture) -> None:
    for run in fixture.runs():
        model: Masked = run.load("mage")
        tokenizer = model.tokenizer.to(run.dtype)
        tokens = tokenizer.encode(2 * run["x"] - 1)  # the published encoder takes pixels of 0 to 1
        run.same("gt_indices", tokens)
        flat, count = tokens.flatten(1), model.token_spec.cells
        condition = model.condition.example(len(flat))
        noise = run.content["inputs"]["mask_noise"]
        rates = torch.full((len(flat),), run.content["inputs"]["mask_rate"], dtype=torch.float64)
        ranks = noise.argsort(1).argsort(1)
        least = run.content["config"]["mask_ratio_min"]
        dropped, masked = ranks < math.ceil(count * least), ranks < (count * rates).ceil()[:, None]
        run.same("token_drop_mask", torch.nn.functional.pad(dropped, (1, 0)))
        run.same("token_all_mask", torch.nn.functional.pad(masked, (1, 0)))
        hidden = flat.masked_fill(masked, model.mask)
        run.close("latent", model.transformer.encode(hidden, condition, dropped))
        normed: list[Tensor] = []
        keep = lambda _, __, output, normed=normed: normed.append(output)  # noqa: E731
        hook = model.transformer.decoder_norm.register_forward_hook(keep)
        logits = model.transformer(hidden, condition, dropped)
        hook.remove()
        words = all_words(run, model, normed[0])
        first = words[:, : model.condition.length, : model.mask]  # of the class, which the network leaves out
        run.close("logits_codebook_part", torch.cat([first, logits], 1))
        images, positions = run.expected["logits_full_first"].shape[:2]
        run.close("logits_full_first", words[:images, :positions])
        loss = model.mage_losses(flat, condition, rates, noise)["masked_nll"]
        run.close("loss", loss)
        loss.backward()
        gradients = published_gradients(model)
        shapes = {name: theirs.shape for name, theirs in run.expected["grads"].items()}
        run.close_gradients({name: padded(gradients[name], shapes[name]) for name in shapes.keys() & gradients.keys()})
        generate(run, model)


def all_words(run: Run, model: Masked, x: Tensor) -> Tensor:
    """Logits of all published words, those that stand for no code too, at every position, the class's included."""
    network, state = model.transformer, run.content["state_dict"]
    vectors = network.vector_norm(torch.nn.functional.gelu(network.to_vectors(x)))
    words, bias = (run.cast(state[name]) for name in ("token_emb.word_embeddings.weight", "mlm_layer.bias"))
    return vectors @ words.T + bias[0]


def padded(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient of a table's first rows, as a file may have it; zero in published rows that the network has not."""
    rows = gradient[tuple(slice(0, size) for size in shape)]
    whole = torch.zeros(shape, dtype=gradient.dtype)
    whole[tuple(slice(0, size) for size in rows.shape)] = rows
    return whole


def published_gradients(model: Masked) -> dict[str, Tensor]:
    grads = {name.removeprefix("transformer."): value.grad for name, value in model.named_parameters()}
    tokens, codes = grads.pop("tokens.weight"), model.mask
    words = torch.zeros(codes + 1001, tokens.shape[1], dtype=tokens.dtype)
    words[:codes], words[codes + 76], words[-1] = tokens[:codes], grads.pop("start.weight")[0], tokens[codes]
    found = {
        "token_emb.word_embeddings.weight": words,
        "token_emb.position_embeddings.weight": grads.pop("positions"),
        "decoder_pos_embed_learned": grads.pop("decoder_positions")[None],
        "mlm_layer.bias": grads.pop("bias")[None, None],
    }
    renames = {
        "embedding_norm": "token_emb.LayerNorm",
        "attention.qkv": "attn.qkv",
        "attention.out": "attn.proj",
        "feed_forward": "mlp",
        "to_decoder": "decoder_embed",
        "to_vectors": "mlm_layer.fc",
        "vector_norm": "mlm_layer.ln",
    }
    for name, gradient in grads.items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        if gradient is not None:
            found[name] = gradient
    return found


def generate(run: Run, model: Masked) -> None:
    settings, expected = run.content["inputs"]["generate"], run.expected["generate"]
    steps, count = settings["num_iter"], len(expected["ids"])
    options = MaskedOptions(
        steps=steps, schedule="cosine", order="maskgit", choice_temperature=settings["choice_temperature"]
    )
    batch = SampleBatch(
        condition=model.condition.example(count),
        null=None,
        tokens=torch.full((count, model.token_spec.cells), -1),
        scales=[guidance_scales("constant", 1.0, steps)],
        filters=[{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}],
        seed=0,
        numbers=list(range(count)),
        options=options,
        dtype=None,
        report=lambda share: None,
    )
    with torch.no_grad():
        found = model.fill(batch, PublishedDraws([run.cast(noise) for noise in settings["gumbel"]]))
        run.same("generate: ids", found, expected["ids"])
        codes = model.tokenizer.quantizer.indices_to_codes(found.view(count, *model.grid))
        image = model.tokenizer.decode_codes(codes)  # not clamped
        run.close("generate: image", (image + 1) / 2, expected["image"])
