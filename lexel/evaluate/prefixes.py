"""Rate against quality of tokenizers that learned by nested dropout: every prefix of an image's tokens decodes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lexel.data import ImageSet
from lexel.errors import UsageError
from lexel.evaluate.reconstructions import evaluate_tokenizer
from lexel.metrics import Protocol
from lexel.nested_dropout import powers_of_two
from lexel.runtime import runtime
from lexel.token_spec import TokenSpec
from lexel.tokenizer import Tokenizer

KEPT = ("metrics", "intervals", "tokens")  # of every prefix's result


class Prefix:
    """A tokenizer of which only the first tokens of an image are kept, or the first levels of residual codes.

    Args:
        tokenizer: with nested dropout.
        count: how many tokens of a line, or levels, are kept.

    Raises:
        UsageError: prefixes of its tokens do not decode, or there are not so many.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        most = tokenizer.prefixes
        if most is None:
            raise UsageError(
                "prefixes decode only after nested dropout: quantizer.kind = 'nested', or autoencoder.nested of titok"
            )
        if not 1 <= count <= most:
            raise UsageError(f"a prefix has 1 to {most} of an image's tokens or levels, got {count}")
        self.tokenizer, self.count = tokenizer, count
        self.provenance = tokenizer.provenance

    def encode(self, images: Tensor) -> Tensor:
        """The first of each image's indices, int64 (B, count) or (B, count, *grid)."""
        return self.tokenizer.encode(images)[:, : self.count]

    def decode(self, indices: Tensor) -> Tensor:
        """Images (B, C, H, W) of them."""
        return self.tokenizer.decode(indices)

    def token_spec(self, height: int, width: int) -> TokenSpec:
        """How those that are kept lie."""
        spec = self.tokenizer.token_spec(height, width)
        return spec._replace(grids=((self.count,),)) if spec.books is None else spec._replace(books=self.count)

    def fingerprint(self) -> str:
        """The tokenizer's, and how many are kept."""
        return f"{self.tokenizer.fingerprint()}:{self.count}"


def evaluate_prefixes(
    tokenizer: Tokenizer,
    source: str | Path | ImageSet,
    protocol: str | Protocol = "lexel",
    counts: Sequence[int] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Measures what an image's first tokens, or first levels, are worth: quality at several rates.

        result = evaluate_prefixes(lexel.load("runs/nested"), "photos", size=64, metrics=["psnr"])
        [(row["tokens"]["bits"], row["metrics"]["psnr"]) for row in result["prefixes"]]

    Args:
        tokenizer: with nested dropout.
        source, protocol: as for `evaluate_tokenizer`.
        counts: how many are kept; by default the powers of two, and all.
        settings: of `evaluate_tokenizer`; not `resume` and `part`.

    Returns:
        The result of all tokens, with `prefixes`: for each count `kept`, `metrics`, `intervals` and `tokens` (the
        length and bits of an image).

    Raises:
        UsageError: prefixes do not decode, or as `evaluate_tokenizer`.
    """
    for name in ("resume", "part"):
        if settings.get(name) is not None:
            raise UsageError(f"prefixes are measured one after the other, whole; leave {name} out")
    most = tokenizer.prefixes
    counts = counts or powers_of_two(most)
    shortened = [Prefix(tokenizer, count) for count in dict.fromkeys(counts)] or [Prefix(tokenizer, 1)]
    tokenizer.to(runtime(settings.get("device", "auto")).device)
    whole = evaluate_tokenizer(tokenizer, source, protocol, **settings)
    rows = []
    for prefix in shortened:
        result = whole if prefix.count == most else evaluate_tokenizer(prefix, source, protocol, **settings)
        rows.append({"kept": prefix.count, **{name: result[name] for name in KEPT}})
    return {**whole, "prefixes": rows}


def plainly(result: dict[str, Any]) -> list[list[str]]:
    """Rows of a table of prefixes: kept, tokens, bits, and every metric that all have."""
    names = [name for name in result["metrics"] if all(name in row["metrics"] for row in result["prefixes"])]
    table = [["kept", "tokens", "bits", *names]]
    for row in result["prefixes"]:
        values = [row["metrics"][name] for name in names]
        numbers = [str(row["kept"]), f"{row['tokens']['length']:,}", f"{row['tokens']['bits']:,.0f}"]
        table.append([*numbers, *("-" if value is None else f"{value:,.5g}" for value in values)])
    return table
