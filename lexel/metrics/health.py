"""Is the codebook healthy? Counts of codes, the gradient that reaches the encoder, and a verdict in words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.metrics.states import Sums

SOFTMAX_ELEMENTS = 1 << 24  # latents are taken in groups so small that the N x K softmax stays below this


class CodeHistogram(Sums):
    """Counts of each code's choices, over a whole data set and over all processes.

    `usage` is the share of codes chosen at least once, `perplexity` is exp(entropy) of the same histogram: the number
    of equally frequent codes that would carry as much information. With several books (residual, product) each
    has a histogram of its own; usage is over all their codes, perplexity the geometric mean.

    Args:
        codebook_size: number of codes, K.
        books: how many codebooks of that size, Q; None where indices have no axis for them.
        device: where the counts lie.
    """

    what = "a code histogram"
    parts = ("counts",)

    def __init__(self, codebook_size: int, books: int | None = None, device: torch.device | str = "cpu") -> None:
        self.books = books
        self.counts = torch.zeros(books or 1, codebook_size, dtype=torch.int64, device=device)

    def add(self, indices: Tensor) -> None:
        """Counts indices: (B, *grid), or (B, Q, *grid) where there are books."""
        rows = indices[None] if self.books is None else indices.movedim(1, 0)
        for counts, row in zip(self.counts, rows, strict=True):
            counts += torch.bincount(row.flatten(), minlength=len(counts)).to(counts.device)

    @property
    def used(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def dead(self) -> int:
        return self.counts.numel() - self.used

    @property
    def usage(self) -> float:
        return self.used / self.counts.numel()

    @property
    def perplexity(self) -> float:
        """In [1, K]; nan before anything was counted."""
        totals = self.counts.sum(1, keepdim=True)
        if not bool(totals.all()):
            return math.nan
        shares = self.counts.double() / totals
        return math.exp(-torch.xlogy(shares, shares).sum(1).mean().item())


class GradientHealth(NamedTuple):
    """The gradient before and after the quantizer, compared."""

    ratio: float  # |dL/dz| / |dL/dz_q|; 1 for a straight-through estimator
    cosine: float  # mean over positions of cos(dL/dz, dL/dz_q); 1 for a straight-through estimator
    # mean over positions of exp(entropy of softmax(z . codes)); None without one table
    softmax_perplexity: float | None


class TokenizerLike(Protocol):
    """The two ends of a tokenizer that gradients pass through."""

    @property
    def quantizer(self) -> Any: ...

    def latents(self, images: Tensor) -> Tensor: ...

    def decode_codes(self, z_q: Tensor) -> Tensor: ...


@contextmanager
def rehearsal(module: nn.Module) -> Iterator[None]:
    """A pass without lasting effect: buffers and the random state come back as they were.

    In training mode it gives what the next training pass will give, with the same random numbers.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = {tensor.device for tensor in (*module.buffers(), *module.parameters()) if tensor.is_cuda}
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def gradient_health(tokenizer: TokenizerLike, images: Tensor) -> GradientHealth:
    """Compares the gradient of the reconstruction's L1 error before and after the quantizer.

    Index backpropagation hands the encoder the decoder's gradient times the covariance of the codes under the
    softmax. Where that product is tiny the encoder stops learning; where it is nearly orthogonal to what came in, the
    encoder learns noise. Both come before the codebook collapses, so they are worth watching. Loss terms of the
    quantizer itself are left out.

    The quantizer is measured as it works in training, and no statistics of its own move.

    Args:
        tokenizer: a Tokenizer.
        images: (B, 3, H, W) in [-1, 1]; a handful is enough.
    """
    quantizer = tokenizer.quantizer
    modes = {part: part.training for part in quantizer.modules()}
    quantizer.train()
    with torch.enable_grad(), rehearsal(quantizer):
        z = tokenizer.latents(images).detach().requires_grad_(True)
        z_q = quantizer(z).z_q
        decoded = z_q.detach().requires_grad_(True)
        (decoder_gradient,) = torch.autograd.grad(F.l1_loss(tokenizer.decode_codes(decoded), images), decoded)
        encoder_gradient = None
        if z_q.requires_grad:
            (encoder_gradient,) = torch.autograd.grad(z_q, z, decoder_gradient, allow_unused=True)
    for part, training in modes.items():
        part.training = training
    before = decoder_gradient.double()
    after = torch.zeros_like(before) if encoder_gradient is None else encoder_gradient.double()
    ratio = after.norm() / before.norm().clamp(min=torch.finfo(torch.float64).tiny)
    cosine = F.cosine_similarity(_vectors(after), _vectors(before), dim=1, eps=1e-30).mean()
    return GradientHealth(float(ratio), float(cosine), softmax_perplexity(tokenizer.quantizer, z.detach()))


@torch.no_grad()
def softmax_perplexity(quantizer: Any, z: Tensor) -> float | None:
    """The mean over positions of exp(entropy) of softmax(z . codes), in [1, K]; z is (B, D, *grid).

    1 means that only the chosen code feels the gradient of index backpropagation, K that all feel it alike. None for
    quantizers with several tables.
    """
    codebook = quantizer.codebook.detach().float()
    if codebook.ndim != 2:
        return None
    vectors = _vectors(z).float()
    total = 0.0
    for group in vectors.split(max(1, SOFTMAX_ELEMENTS // len(codebook))):
        log_p = (group @ codebook.T).log_softmax(1)
        total += float((-(log_p.exp() * log_p).sum(1)).exp().double().sum())
    return total / len(vectors)


def _vectors(z: Tensor) -> Tensor:
    """(B, D, *grid) as rows (N, D)."""
    return z.movedim(1, -1).flatten(0, -2)


# ---------------------------------------------------------------------------------------------- the verdict


class Finding(NamedTuple):
    """One thing the numbers of a run show."""

    level: Literal["good", "note", "warning", "problem"]
    seen: str  # the observation, with its numbers
    cause: str  # the likely reason; empty where all is well
    change: str  # what to try; empty where all is well


class DescribesItself(Protocol):
    """The interface of a quantizer for `diagnose`; see `lexel.quantizers.Quantizer`."""

    codebook_size: int
    similarity: Any
    straight_through: bool
    comparable_norms: bool
    starts_collapsed: bool

    def dead_codes(self, seen: Mapping[str, float]) -> tuple[str, str]: ...


def diagnose(
    quantizer: DescribesItself,
    validation: Sequence[Mapping[str, float]],
    train: Sequence[Mapping[str, float]] = (),
) -> list[Finding]:
    """Findings about a codebook from logged numbers, most severe first; one `good` finding if nothing is wrong.

    Args:
        quantizer: any quantizer; one without memory will do (`lexel.quantizers.outline`).
        validation: the validation lines of `metrics.jsonl`, oldest first. `usage` and `perplexity` are needed;
            `tokens`, `gradient_ratio`, `gradient_cosine`, `softmax_perplexity`, `code_norm`, `latent_norm`,
            `quantization_error` are used where they are.
        train: its train lines, oldest first.
    """
    if not validation:
        return [Finding("note", "no validation yet", "the run is too young", "wait for train.validate_every steps")]
    now = validation[-1]
    findings = [
        finding
        for check in (_usage, _fall, _gradient, _saturation, _norms, _evenness, _discriminator)
        if (finding := check(quantizer, validation, train)) is not None
    ]
    if not findings:
        seen = f"{now['usage']:.1%} of {quantizer.codebook_size} codes in use, perplexity {now['perplexity']:.0f}"
        if "gradient_cosine" in now:
            seen += f", the encoder gets {now['gradient_ratio']:.2g} times the decoder's gradient"
        findings = [Finding("good", seen, "", "")]
    order = ("problem", "warning", "note", "good")
    return sorted(findings, key=lambda finding: order.index(finding.level))


Lines = Sequence[Mapping[str, float]]


def _usage(quantizer: DescribesItself, validation: Lines, train: Lines) -> Finding | None:
    size, usage, perplexity = quantizer.codebook_size, validation[-1]["usage"], validation[-1]["perplexity"]
    used = round(usage * size)
    if used <= 2 or perplexity < 1.5:
        seen = f"collapsed: {used} of {size} codes in use, perplexity {perplexity:.1f}"
        if quantizer.starts_collapsed and len(validation) < 3:
            return Finding("note", seen, "all codes start alike, by the method's design", "wait")
        return Finding("problem", seen, *quantizer.dead_codes(validation[-1]))
    # Few tokens cannot show a large codebook: of K codes used evenly, so many of them show this share on average.
    tokens = validation[-1].get("tokens", math.inf)
    shown = 1 - (1 - 1 / size) ** tokens
    limit = f" where {tokens:.0f} tokens could show {shown * size:.0f}" if shown < 0.95 else ""
    if usage < 0.25 * shown:
        return Finding(
            "problem",
            f"most codes are dead: {used} of {size} in use ({usage:.1%}){limit}",
            *quantizer.dead_codes(validation[-1]),
        )
    if limit:
        return Finding(
            "note",
            f"{used} of {size} codes in use{limit}",
            "the held-out pictures that are measured are too few for this codebook",
            "raise train.validation_images, or run lexel evaluate on more pictures",
        )
    if usage < 0.8:
        return Finding(
            "warning",
            f"{size - used} of {size} codes are dead ({usage:.1%} in use)",
            *quantizer.dead_codes(validation[-1]),
        )
    return None


def _fall(quantizer: DescribesItself, validation: Lines, train: Lines) -> Finding | None:
    best = max(line["usage"] for line in validation)
    now = validation[-1]["usage"]
    if best - now < 0.1 or now > 0.9 * best:
        return None
    when = next(int(line["step"]) for line in validation if line["usage"] == best)
    return Finding(
        "warning",
        f"usage fell from {best:.1%} at step {when} to {now:.1%}",
        "the latents drift faster than the codes follow, which often begins when the learning rate falls",
        "go back to the best checkpoint (--weights best); lower lr, or anneal it linearly instead of in drops",
    )


def _gradient(quantizer: DescribesItself, validation: Lines, train: Lines) -> Finding | None:
    now = validation[-1]
    if "gradient_ratio" not in now or quantizer.straight_through:
        return None
    ratio, cosine = now["gradient_ratio"], now["gradient_cosine"]
    if ratio < 0.01:
        return Finding(
            "problem",
            f"the encoder gets {ratio:.1e} of the decoder's gradient",
            "the codes have too small a variance (1 is meant), or the softmax has saturated on one code",
            "start from unit-variance codes; lower codebook_dim or the latents' norm",
        )
    if cosine < 0.15:
        return Finding(
            "warning",
            f"the encoder's gradient is nearly orthogonal to the decoder's (cosine {cosine:.2f}, ratio {ratio:.2g})",
            "the softmax is saturated: the latents are long, so only a few codes carry the gradient",
            "lower codebook_dim (32 instead of 256) or lr, so that the latents stay short",
        )
    if ratio > 10:
        return Finding(
            "warning",
            f"the encoder gets {ratio:.1f} times the decoder's gradient",
            "the codes' variance has grown far beyond 1",
            "clip gradients (train.clip = 1.0) or lower lr",
        )
    return None


def _saturation(quantizer: DescribesItself, validation: Lines, train: Lines) -> Finding | None:
    perplexity = validation[-1].get("softmax_perplexity")
    if quantizer.straight_through or quantizer.similarity != "dot" or len(validation) < 2:
        return None
    if perplexity is None or perplexity > 1.2:
        return None
    return Finding(
        "note",
        f"softmax perplexity {perplexity:.2f}: on average little more than the chosen code is felt",
        "latents or codes have grown long, which the plain dot product rewards",
        "watch gradient_cosine; if it falls with usage, lower lr or codebook_dim",
    )


def _norms(quantizer: DescribesItself, validation: Lines, train: Lines) -> Finding | None:
    now = validation[-1]
    if "latent_norm" not in now or not now.get("code_norm") or not quantizer.comparable_norms:
        return None
    ratio = now["latent_norm"] / now["code_norm"]
    if 0.1 <= ratio <= 10:
        return None
    where = "much longer" if ratio > 1 else "much shorter"
    return Finding(
        "warning" if quantizer.straight_through else "note",
        f"latents are {where} than codes (mean norms {now['latent_norm']:.2g} and {now['code_norm']:.2g})",
        "latents and codes live apart, so few codes can be chosen",
        "raise the weight of codebook (moves codes) or commitment (holds latents)",
    )


def _evenness(quantizer: DescribesItself, validation: Lines, train: Lines) -> Finding | None:
    now = validation[-1]
    used = now["usage"] * quantizer.codebook_size
    if now["usage"] < 0.8 or now["perplexity"] > 0.1 * used:
        return None
    return Finding(
        "note",
        f"codes are used unevenly: {used:.0f} in use, but perplexity {now['perplexity']:.0f}",
        "flat image regions ask for the same few codes, or the pull towards even use is weak",
        "often harmless; a more negative weight of entropy_batch evens it out",
    )


def _discriminator(quantizer: DescribesItself, validation: Lines, train: Lines) -> Finding | None:
    recent = [line for line in train if "logits_real" in line][-5:]
    if len(recent) < 5 or min(line["logits_real"] - line["logits_fake"] for line in recent) < 4:
        return None
    return Finding(
        "warning",
        "the discriminator tells real from reconstructed with ease (logits more than 4 apart)",
        "it learns faster than the tokenizer, so its gradient carries little",
        "start it later (train.discriminator.start), lower its lr, or add LeCAM (train.discriminator.lecam = 0.05)",
    )
