"""Decode steps of a generator beside LlamaGen's own sampler and transformers' Llama: `benchmarks generator --peer`.

All three are LlamaGen's network of one size, with guidance: a batch of b images is 2 b rows. LlamaGen is run from a
checkout of it (https://github.com/FoundationVision/LlamaGen), and ours has its weights: the logits of a few positions
are compared before anything is timed. transformers' model has the same sizes and random weights.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import published, results
from benchmarks.generator import POSITIONS, TOKENS, Fast, milliseconds
from lexel.convert import convert
from lexel.generators.next_token.decoding import Decoder
from lexel.generators.sampling import guide

CLASSES = 1000
HALF = torch.bfloat16
LEXEL: dict[str, tuple[str, torch.dtype | None]] = {
    "Lexel, float32": ("packed", None),
    "Lexel, bf16": ("packed", HALF),
    "Lexel, int8": ("int8", None),
}
PEERS = ("LlamaGen, float32", "LlamaGen, bf16", "transformers, float32", "transformers, bf16")


class LlamaGen:
    """One decode step of the published sampler."""

    def __init__(self, modules: tuple[Any, Any], model: Any, labels: Tensor) -> None:
        self.model, self.decode = model, modules[1].decode_one_token
        model.setup_caches(len(labels), TOKENS + 1, model.tok_embeddings.weight.dtype)

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, scale: float) -> Tensor:
        place = torch.tensor([position], dtype=torch.int)
        half = tokens[: len(tokens) // 2, None]
        return self.decode(self.model, half, place, scale, True, temperature=1.0, top_k=0, top_p=1.0)[0]


class Llama:
    """One decode step of transformers' model with a static cache, guided and drawn as the published code does."""

    def __init__(self, model: Any) -> None:
        from transformers import StaticCache  # type: ignore[import-not-found, unused-ignore]

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=TOKENS + 8)

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, scale: float) -> Tensor:
        if self.cache.get_seq_length() >= TOKENS:  # the whole cache is attended to at every position
            self.cache.reset()
        logits = self.model(tokens[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1].float()
        half = len(logits) // 2
        return torch.multinomial(guide(logits[:half], logits[half:], scale).softmax(-1), 1)


def llama(width: int, layers: int, heads: int, inner: int, codes: int) -> Any:
    """transformers' Llama of a size; None where the package is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(
        vocab_size=codes,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS + 8,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def same_logits(model: Any, decoder: Decoder) -> None:
    """Compares the logits of the class and of three tokens.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    labels, tokens = (torch.tensor([3, CLASSES]), torch.tensor([[5, 700, 9], [5, 700, 9]]))
    cache = decoder.start(labels, 4)
    model.setup_caches(2, 4, torch.float32)
    with torch.no_grad():
        for position in range(4):
            given = (None, labels) if position == 0 else (tokens[:, position - 1 : position], None)
            theirs = model(*given, torch.tensor([position]))[0][:, -1]
            ours = decoder.logits(cache, decoder.decode(cache, tokens, position, position + 1))
            if (ours.view_as(theirs) - theirs).abs().max() > 1e-4 * theirs.abs().max():
                raise SystemExit(f"position {position}: logits differ from the published model's")


def beside(checkout: Path, size: str, batches: list[int], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of a decode step of each way by batch, medians over rounds in turns, and ratios of rounds."""
    torch.manual_seed(0)
    modules, model = published.generator(checkout, size, CLASSES, TOKENS)
    nn.init.normal_(model.output.weight, std=0.02)  # it begins at zero: every draw would be the same
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "published.pt"
        torch.save({"model": model.state_dict()}, path)
        own: Any = convert(path, "llamagen_generator").model.eval()
    same_logits(model, Decoder(own.transformer, "plain"))
    config = own.config.transformer
    inner = model.layers[0].feed_forward.w1.weight.shape[0]
    reference = llama(config.width, config.layers, config.heads, inner, config.codebook_size)
    by_batch: dict[str, Any] = {}
    for batch in batches:
        labels = torch.cat([torch.arange(batch), torch.full((batch,), CLASSES)])
        tokens = torch.zeros(2 * batch, dtype=torch.long)
        ways: dict[str, Any] = {
            name: Fast(Decoder(own.transformer, *kind), labels, clock) for name, kind in LEXEL.items()
        }
        times: dict[str, list[float]] = {name: [] for name in [*LEXEL, *PEERS]}
        # One precision of the peers at a time: they are converted in place. Ours takes turns with both.
        for dtype, name in ((torch.float32, "float32"), (HALF, "bf16")):
            theirs: dict[str, Any] = {f"LlamaGen, {name}": LlamaGen(modules, model.to(dtype), labels)}
            if reference is not None:
                theirs[f"transformers, {name}"] = Llama(reference.to(dtype))
            turns = {**ways, **theirs}
            for round_ in range(rounds + 1):
                for way, one in turns.items():
                    each = [milliseconds(one.step, tokens, position, clock) for position in POSITIONS]
                    once = one.once * 1e3 if isinstance(one, Fast) else 0.0
                    if round_:
                        times[way].append(statistics.median(each) + once)
        model.to(torch.float32)
        if reference is not None:
            reference.to(torch.float32)
        by_batch[str(batch)] = {way: [round(value, 2) for value in found] for way, found in times.items() if found}
    return {
        "ms": by_batch,
        "parameters": sum(parameter.numel() for parameter in own.parameters()),
        "commit": results.commit(),
        "peer": published.commit(checkout),
        "transformers": transformers_version() if reference is not None else None,
        "machine": results.machine("cpu", torch.get_num_threads()),
        "clock": clock.__name__,
    }


def run(arguments: argparse.Namespace, batches: list[int], clock: Callable[[], float]) -> None:
    """Adds a size to the page."""
    entry = beside(arguments.peer, arguments.size, batches, arguments.rounds, clock)
    figures = results.read(arguments.out)
    kept = figures.setdefault("samplers", {})
    kept[arguments.size] = entry
    results.write(arguments.out, figures, "samplers", section(kept))
    print("\n".join(section({arguments.size: entry})))


def transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def section(figures: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [
        "`python -m benchmarks generator --peer`: a decode step of LlamaGen's network with guidance (256 tokens,",
        "random weights, in Lexel and LlamaGen the same: their logits agree, or nothing is timed) by LlamaGen's own",
        "sampler, by transformers' Llama of the same size with a static cache, and by Lexel. Medians, ways in",
        "turns. *times*: how many times Lexel is as fast as each peer in the same precision; int8, which the peers",
        "lack here, is compared with their float32.",
    ]
    for size, entry in figures.items():
        version = entry["transformers"]
        lines += [
            "",
            f"Size {size}, {entry['parameters'] / 1e6:.0f} million parameters; {entry['machine']}, {entry['clock']}; "
            f"commit {entry['commit']}, LlamaGen {entry['peer']}, transformers {version or 'not installed'}.",
            "",
            "| batch | way | ms a step | tokens/s | times LlamaGen | times transformers |",
            "|---|---|---|---|---|---|",
        ]
        for batch, times in entry["ms"].items():
            for way, found in times.items():
                step = statistics.median(found)
                cells = []
                for peer in ("LlamaGen", "transformers"):
                    precision = way.split(", ")[1].replace("int8", "float32")
                    theirs = times.get(f"{peer}, {precision}")
                    cells.append(f"{statistics.median(theirs) / step:.2f}" if theirs and way in LEXEL else "-")
                lines.append(
                    f"| {batch} | {way} | {step:.1f} | {int(batch) / step * 1e3:.1f} | {cells[0]} | {cells[1]} |"
                )
    return lines
