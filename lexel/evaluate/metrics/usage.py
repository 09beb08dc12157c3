"""Codebook usage and perplexity of the indices that a tokenizer gives."""

from lexel.evaluate.metric import Batch, Context, Metric, Values
from lexel.metrics import CodeHistogram, WindowUsage


class Usage(Metric):
    """Distinct codes over the codebook's size, and exp(entropy) of the code histogram, over the whole set.

    Where the protocol counts a window of tokens, `usage` is of the window and `usage_whole_set` stands beside it.
    """

    needs = frozenset({"indices"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        assert context.codebook_size is not None
        self.states = {"histogram": CodeHistogram(context.codebook_size, context.books)}
        if context.protocol.usage.window is not None:
            self.states["window"] = WindowUsage(context.codebook_size, context.protocol.usage.window)

    def update(self, batch: Batch) -> None:
        assert batch.indices is not None
        self.states["histogram"].add(batch.indices.cpu())
        if "window" in self.states:
            self.states["window"].add(batch.indices, batch.numbers)

    def compute(self) -> Values:
        values = Values()
        histogram = self.states["histogram"]
        values.metrics["usage"] = histogram.usage
        if "window" in self.states:
            values.metrics |= {"usage": self.states["window"].usage, "usage_whole_set": histogram.usage}
        values.metrics["perplexity"] = histogram.perplexity
        draws = float(histogram.counts.sum()) / histogram.counts.numel()
        if draws < 10:
            values.warnings.append(
                f"usage of {draws:.1f} tokens a code is limited by the sample: even uniform codes would not all occur"
            )
        return values
