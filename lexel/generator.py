"""The generator: class labels in, tokens of new images out."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel import __version__, checkpoint, transformer
from lexel.config import Config, check
from lexel.decoding import Decoder, Keep, Sequences, fits
from lexel.errors import UsageError
from lexel.sampling import check_filters, draw, filter_logits, guidance_scales, guide, uniforms
from lexel.tokenizer import Tokenizer
from lexel.transformer import TransformerConfig, join_tokens, split_tokens

TOKENIZER = "tokenizer"  # the folder inside a generator's folder that holds the tokenizer it belongs to
MEMINFO = Path("/proc/meminfo")  # of Linux
FREE = -1  # in `given`: a token to be sampled


class GeneratorConfig(Config):
    """A transformer, whose tokens it speaks, and what its classes are called."""

    transformer: TransformerConfig = TransformerConfig()
    tokenizer: str | None = None  # fingerprint; tokens of another tokenizer mean other images
    class_names: list[str] | None = None


class Predicted(NamedTuple):
    """What a generator expects of every token, given those before it."""

    logits: tuple[Tensor, ...]  # (B, T, V) for each sub-vocabulary, one for a plain head
    nll: Tensor  # (B, T) float, -log p(token) in nats


class Generator(nn.Module):
    """A transformer over the tokens of images, class by class.

    Raises:
        UsageError: the configuration is inconsistent.
    """

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = config or GeneratorConfig()
        names = self.config.class_names
        if names is not None and len(names) != self.config.transformer.classes:
            raise UsageError(f"{len(names)} class names for {self.config.transformer.classes} classes")
        self.transformer = transformer.build(self.config.transformer)
        self.provenance: dict[str, Any] = {}  # where the weights come from, as `save_pretrained` was told
        self._tokenizer: list[Tokenizer] = []  # in a list, so that its weights are not this module's
        self._folder: Path | None = None
        self._decoders: dict[Any, Decoder] = {}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.config.transformer.rows, self.config.transformer.columns

    # ------------------------------------------------------------------------------------------ likelihood

    def forward(self, indices: Tensor, class_labels: Tensor) -> Predicted:
        """Logits and negative log-likelihood of every token, given the class and the tokens before it.

        Args:
            indices: int64 (B, h, w), or (B, T) in raster order.
            class_labels: int64 (B,) in [0, classes]; number `classes` is the null class. In training, labels are
                dropped to it at random.

        Raises:
            UsageError: shapes or values do not fit.
        """
        tokens = self._check_tokens(indices, lowest=0)
        labels = self._check_labels(class_labels, len(tokens))
        logits = self.transformer(tokens, labels)
        parts = split_tokens(tokens, self.transformer.vocabularies)
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        nll = torch.stack(
            [
                F.cross_entropy(logit.flatten(0, 1).to(wide), part.flatten(), reduction="none")
                for logit, part in zip(logits, parts, strict=True)
            ]
        ).sum(0)
        return Predicted(logits, nll.view(tokens.shape))

    @torch.no_grad()
    def likelihood(
        self,
        indices: Tensor,
        class_labels: Tensor | Sequence[int],
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Negative log-likelihoods in nats, (B, T), as the way to decode that `sample` would take sees them.

        Beside `forward` this tells what a fast path costs: `likelihood(..., implementation="int8") - forward(...).nll`.

        Args:
            indices: int64 (B, h, w), or (B, T) in raster order.
            class_labels: (B,) in [0, classes].
            implementation, dtype: as for `sample`.
        """
        tokens = self._check_tokens(indices, lowest=0).to(self.transformer.classes.weight.device)
        labels = self._check_labels(torch.as_tensor(class_labels), len(tokens))
        decoder, count = self._decoder(implementation, dtype), tokens.shape[1]
        sequences = decoder.begin(labels, count)
        positions = torch.arange(count, device=tokens.device)
        seen = positions <= positions[:, None]
        hidden = decoder.run(
            sequences, decoder.embed(sequences, tokens, 0, count), positions, Keep(positions, count, seen)
        )
        parts = split_tokens(tokens, self.transformer.vocabularies)
        columns = []
        for position in range(count):
            nll = torch.zeros((), device=tokens.device)
            for number, part in enumerate(parts):
                first = parts[0][:, position] if number else None
                logits = decoder.logits(sequences, hidden[:, position], first)
                nll = nll + F.cross_entropy(logits, part[:, position], reduction="none")
            columns.append(nll)
        return torch.stack(columns, 1)

    @torch.no_grad()
    def extra_bits(
        self,
        indices: Tensor,
        class_labels: Tensor | Sequence[int],
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> float:
        """What a way to decode adds to the bits of these tokens, a token; arguments as for `likelihood`."""
        exact = self.likelihood(indices, class_labels, "plain")
        fast = self.likelihood(indices, class_labels, implementation, dtype)
        return float((fast.double() - exact.double()).mean()) / math.log(2)

    # ------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        class_labels: Tensor | Sequence[int],
        cfg_scale: float | Sequence[float] = 1.0,
        cfg_schedule: str = "constant",
        temperature: float | Sequence[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        image_numbers: Sequence[int] | Tensor | None = None,
        given: Tensor | None = None,
        *,
        window: int | None = None,
        implementation: str = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """New images of classes, as tokens: int64 (B, h, w).

        An image is a function of (weights, class, settings, seed, image number): neither the batch it is made in nor
        the number of processes changes its random numbers. In float64 it is the same token for token; in float32 and
        below, another batch size may round logits differently, and a token whose draw lies that near to an edge flips.

        Args:
            class_labels: (B,) in [0, classes]; number `classes` is the null class.
            cfg_scale: guidance, unconditional + scale (conditional - unconditional); 1 is off and costs nothing.
                A factorised vocabulary takes one for each sub-token too.
            cfg_schedule: how the scale runs over the image: see `lexel.sampling.guidance_scales`.
            temperature: divides the logits; for each sub-token likewise.
            top_k: samples of the k likeliest tokens; 0 is off, 1 is greedy.
            top_p: samples of the likeliest tokens that hold p of the probability; 1 is off.
            min_p: samples of tokens at least min_p times as probable as the likeliest; 0 is off.
            seed: of the random numbers, with the image's number.
            image_numbers: (B,) names of the images in the random stream; 0 to B - 1 by default. A part of a larger set
                gives the numbers its images have there.
            given: (B, h, w) tokens that stay as they are; -1 where tokens are to be sampled.
            window: decodes rows in a wavefront: a row starts when the row above is this many tokens ahead, so an image
                of h rows takes w + (h - 1) window steps, not h w. Tokens near a row's end then miss some of what
                stands above to the right; a window of w or more is exact. None is off.
            implementation: of `lexel.decoding.IMPLEMENTATIONS`; `likelihood` tells what `int8` costs.
            dtype: of weights, caches and arithmetic while sampling; the parameters' own by default.
            batch_size: the most images at once; what fits into memory by default.
            progress: called with tokens done and tokens in all.

        Raises:
            UsageError: an argument is out of range.
        """
        config, parts = self.config.transformer, len(self.transformer.vocabularies)
        labels = self._check_labels(
            torch.as_tensor(class_labels, dtype=None if len(class_labels) else torch.long), None
        )
        count = len(labels)
        numbers = list(range(count)) if image_numbers is None else [int(number) for number in image_numbers]
        if len(numbers) != count:
            raise UsageError(f"{len(numbers)} image_numbers for {count} class_labels")
        if given is None:
            tokens = torch.full((count, config.tokens), FREE, device=labels.device)
        else:
            tokens = self._check_tokens(given, lowest=FREE).to(labels.device)
            if len(tokens) != count:
                raise UsageError(f"{len(tokens)} images given for {count} class_labels")
        if window is not None and window < 1:
            raise UsageError(f"window must be at least 1 token, got {window}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        temperatures = _for_each(temperature, parts, "temperature")
        for value in temperatures:
            check_filters(value, top_k, top_p, min_p)
        settings = _Settings(
            [guidance_scales(cfg_schedule, scale, config.tokens) for scale in _for_each(cfg_scale, parts, "cfg_scale")],
            [{"temperature": value, "top_k": top_k, "top_p": top_p, "min_p": min_p} for value in temperatures],
        )

        decoder = self._decoder(implementation, dtype)
        size = batch_size or _images_at_once(decoder, config.tokens, 2 if settings.guided else 1)
        walk = _raster if window is None else _wavefront
        done = []
        for begin in range(0, count, size):
            end = min(begin + size, count)
            random = uniforms(seed, numbers[begin:end], config.tokens * parts)
            if labels.device.type != "mps":  # Apple's GPUs have no float64: there the draw is the CPU's
                random = random.to(labels.device)
            batch = _Batch(
                decoder=decoder,
                settings=settings,
                labels=labels[begin:end],
                tokens=tokens[begin:end].clone(),
                random=random.view(end - begin, config.tokens, parts),
                window=min(window or config.columns, config.columns),
                report=None if progress is None else _reporter(progress, begin, end - begin, count, config.tokens),
            )
            done.append(walk(batch))
            if progress is not None:
                progress(end * config.tokens, count * config.tokens)
        return torch.cat(done).view(count, config.rows, config.columns) if done else tokens.view(0, *self.grid)

    def _decoder(self, implementation: str, dtype: torch.dtype | None) -> Decoder:
        """The decoder for the weights as they are now; the last one is kept."""
        key = (implementation, dtype, fits(self.transformer))
        if key not in self._decoders:
            self._decoders.clear()  # a decoder holds a copy of the weights
            self._decoders[key] = Decoder(self.transformer, implementation, dtype)
        return self._decoders[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoders": {}}  # packed weights cannot be copied, and are made again when needed

    # ------------------------------------------------------------------------------------------ classes

    def class_numbers(self, names: Sequence[str]) -> list[int]:
        """The numbers of classes given by number or by label.

        Raises:
            UsageError: a number is out of range, or no class has that label.
        """
        classes, known = self.config.transformer.classes, self.config.class_names or []
        numbers = []
        for name in names:
            if name in known:
                numbers.append(known.index(name))
            elif name.isdecimal() and int(name) < classes:
                numbers.append(int(name))
            else:
                near = [label for label in known if name.lower() in label.lower()][:5]
                hint = f"; labels like it are {', '.join(near)}" if near else ""
                raise UsageError(
                    f"no class {name!r}; classes are 0 to {classes - 1}{' or a label' * bool(known)}{hint}"
                )
        return numbers

    # ------------------------------------------------------------------------------------------ folders

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose tokens these are.

        Raises:
            UsageError: the generator has none, or the one in its folder is not the one it was trained with.
        """
        if not self._tokenizer:
            if self._folder is None or not (self._folder / TOKENIZER).is_dir():
                raise UsageError(
                    "this generator has no tokenizer beside it; decode with the tokenizer of fingerprint "
                    f"{self.config.tokenizer or '(not recorded)'}"
                )
            found = Tokenizer.from_pretrained(self._folder / TOKENIZER)
            self.check_tokenizer(found.fingerprint(), f"the tokenizer in {self._folder}")
            self._tokenizer.append(found)
        return self._tokenizer[0]

    def attach(self, tokenizer: Tokenizer) -> None:
        """Makes `tokenizer` the one whose tokens these are, and records its fingerprint."""
        self.config = self.config.model_copy(update={"tokenizer": tokenizer.fingerprint()})
        self._tokenizer = [tokenizer]

    def check_tokenizer(self, fingerprint: str, what: str) -> None:
        """Refuses tokens of another tokenizer; `what` names where they come from."""
        expected = self.config.tokenizer
        if expected is not None and fingerprint != expected:
            raise UsageError(
                f"{what} has fingerprint {fingerprint[:12]}, this generator speaks the tokens of {expected[:12]}; "
                "use the tokenizer it was trained with"
            )

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes `config.json`, `model.safetensors` and, if there is one, the tokenizer in `tokenizer/`.

        Args:
            folder: made if it does not exist.
            tokenizer: the tokenizer whose tokens these are; by default the one that came with the generator.
            provenance: where the weights come from (recipe, step, source file), kept in `config.json`.

        Raises:
            UsageError: it is not the tokenizer of these tokens.
        """
        if tokenizer is not None:
            self.check_tokenizer(tokenizer.fingerprint(), "the tokenizer to save")
        elif self._tokenizer or (self._folder is not None and (self._folder / TOKENIZER).is_dir()):
            tokenizer = self.tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(Path(folder) / TOKENIZER, tokenizer.provenance)
        config = {
            "model": "generator",
            "lexel": __version__,
            **self.config.model_dump(mode="json"),
            "provenance": dict(self.provenance if provenance is None else provenance),
        }
        checkpoint.save_folder(folder, config, self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """A generator in evaluation mode, from a folder or a hub id.

        Raises:
            UsageError: the folder is not there, not whole, or holds something else.
        """
        folder = checkpoint.find_folder(source, (checkpoint.CONFIG, checkpoint.WEIGHTS, f"{TOKENIZER}/*"))
        return cls.from_folder(folder, *checkpoint.load_folder(folder))

    @classmethod
    def from_folder(cls, source: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """A generator from the two parts of a model folder; `source` is the folder."""
        table = {name: value for name, value in config.items() if name not in ("model", "lexel", "provenance")}
        if config.get("model") != "generator":
            raise UsageError(f"{source} holds a {config.get('model', 'model of another library')}, not a generator")
        generator = cls.with_weights(check(table, GeneratorConfig, f"{source}/config.json"), tensors, source)
        generator.provenance = dict(config.get("provenance", {}))
        generator._folder = Path(source)
        return generator

    @classmethod
    def with_weights(cls, config: GeneratorConfig, tensors: Mapping[str, Tensor], source: str | Path) -> Self:
        """A generator in evaluation mode that takes over `tensors`, so that nothing is held twice."""
        with torch.device("meta"):
            generator = cls(config)
        checkpoint.load_strict(generator, tensors, source)
        return generator.eval()

    def fingerprint(self) -> str:
        """Names these weights in result files."""
        return checkpoint.fingerprint(self.config.model_dump(mode="json"), self.state_dict())

    # ------------------------------------------------------------------------------------------ checks

    def _check_labels(self, labels: Tensor, count: int | None) -> Tensor:
        classes = self.config.transformer.classes
        if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise UsageError(f"class_labels must be integers (B,), got {labels.dtype} {tuple(labels.shape)}")
        if count is not None and len(labels) != count:
            raise UsageError(f"{len(labels)} class_labels for {count} images")
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) > classes):
            raise UsageError(
                f"class_labels must be in [0, {classes}] ({classes} is the null class), "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.to(self.transformer.classes.weight.device, torch.long)

    def _check_tokens(self, indices: Tensor, lowest: int) -> Tensor:
        """Tokens in raster order, (B, T)."""
        config = self.config.transformer
        shapes = ((config.rows, config.columns), (config.tokens,))
        if tuple(indices.shape[1:]) not in shapes or indices.dtype.is_floating_point or indices.dtype == torch.bool:
            given = f"{indices.dtype} {tuple(indices.shape)}"
            raise UsageError(f"tokens must be integers (B, {config.rows}, {config.columns}), got {given}")
        if indices.numel():
            low, high = (int(bound) for bound in indices.aminmax())
            if low < lowest or high >= config.codebook_size:
                wrong = low if low < lowest else high
                raise UsageError(f"tokens must be in [{lowest}, {config.codebook_size}), got {wrong}")
        return indices.flatten(1).long()


# ---------------------------------------------------------------------------------------------- the walk over an image


class _Settings(NamedTuple):
    scales: list[list[float]]  # for each sub-vocabulary, for each token
    filters: list[dict[str, Any]]  # for each sub-vocabulary

    @property
    def guided(self) -> bool:
        return any(scale != 1 for scales in self.scales for scale in scales)

    def guided_at(self, position: int) -> bool:
        return any(scales[position] != 1 for scales in self.scales)


class _Batch(NamedTuple):
    """Images that are made together."""

    decoder: Decoder
    settings: _Settings
    labels: Tensor  # (B,)
    tokens: Tensor  # (B, T), FREE where nothing is known yet
    random: Tensor  # (B, T, sub-tokens) float64 in [0, 1)
    window: int
    report: Callable[[int], None] | None

    def begin(self, slots: int) -> Sequences:
        """Sequences of the labels and, if there is guidance, as many of the null class after them."""
        null = torch.full_like(self.labels, self.decoder.transformer.config.classes)
        return self.decoder.begin(torch.cat([self.labels, null]) if self.settings.guided else self.labels, slots)

    def choose(self, sequences: Sequences, hidden: Tensor, position: int) -> Tensor:
        """The tokens at a position, (B,); hidden is (B, C), or (2 B, C) with the unguided rows after the others."""
        count, scales, vocabularies = len(self.labels), self.settings.scales, self.decoder.transformer.vocabularies
        parts: list[Tensor] = []
        for part, filters in enumerate(self.settings.filters):
            first = parts[0].repeat(len(hidden) // count) if parts else None
            logits = self.decoder.logits(sequences, hidden, first)
            if len(hidden) > count:
                logits = guide(logits[:count], logits[count:], scales[part][position])
            filtered = filter_logits(logits.to(self.random.device), **filters)
            parts.append(draw(filtered, self.random[:, position, part]).to(hidden.device))
        return join_tokens(parts, vocabularies)


def _raster(batch: _Batch) -> Tensor:
    """Token after token. Rows of the null class run only where guidance is on, and catch up in one pass before."""
    decoder, tokens, count = batch.decoder, batch.tokens, len(batch.labels)
    free = tokens == FREE
    wanted = free.any(0).tolist()  # positions where any image needs a token
    whole = batch.begin(tokens.shape[1])
    conditional = whole.rows(0, count)
    unconditional = whole.rows(count, 2 * count)
    ran = {"conditional": 0, "unconditional": 0}  # positions whose keys and values are in the cache

    def extend(sequences: Sequences, end: int, *names: str) -> Tensor:
        known = tokens.repeat(len(names), 1)
        hidden = decoder.extend(sequences, known, ran[names[0]], end)
        ran.update(dict.fromkeys(names, end))
        return hidden

    for position in range(tokens.shape[1]):
        if batch.report is not None:
            batch.report(position)
        if not wanted[position]:
            continue  # its keys and values follow with the next token that is sampled
        if not batch.settings.guided_at(position):
            hidden, sequences = extend(conditional, position + 1, "conditional"), conditional
        else:
            sequences = whole
            for name, half in (("conditional", conditional), ("unconditional", unconditional)):
                if ran[name] < position:
                    extend(half, position, name)
            hidden = extend(whole, position + 1, "conditional", "unconditional")
        found = batch.choose(sequences, hidden, position)
        tokens[:, position] = torch.where(free[:, position], found, tokens[:, position])
    return tokens


def _wavefront(batch: _Batch) -> Tensor:
    """Row after row, overlapping: at a step, every row under way gets one token (https://arxiv.org/abs/2412.04062).

    The token before a row's first is the last of the row above, which is not there yet. Until it is, the newest token
    of the row above stands in for it, at its position; keys and values of the stand-in are not kept.
    """
    decoder, tokens, window = batch.decoder, batch.tokens, batch.window
    config = decoder.transformer.config
    rows, columns, device = config.rows, config.columns, tokens.device
    free = tokens == FREE
    halves = 2 if batch.settings.guided else 1
    # Slot s is the input at position s (the token before token s); stand-ins use the slots after these, one a row.
    sequences = batch.begin(config.tokens + rows)
    filled = torch.zeros(config.tokens + rows, dtype=torch.bool, device=device)
    steps = columns + (rows - 1) * window
    late: list[int] = []  # positions whose true input is known by now and not in the cache yet

    for step in range(steps):
        if batch.report is not None:
            batch.report(step * config.tokens // steps)
        at = [(row, step - row * window) for row in range(rows) if 0 <= step - row * window < columns]
        inputs, positions, slots = [], [], []
        for position in late:
            inputs.append(tokens[:, position - 1])
            positions.append(position)
            slots.append(position)
        for row, column in at:
            position = row * columns + column
            stands_in = row > 0 and column == 0
            source = (row - 1) * columns + window - 1 if stands_in else position - 1
            inputs.append(tokens[:, max(source, 0)])
            positions.append(position)
            slots.append(config.tokens + row if stands_in else position)

        x = decoder.embed_tokens(torch.stack(inputs, 1).clamp(min=0).repeat(halves, 1))
        if positions[0] == 0:
            x = torch.cat([sequences.start, x[:, 1:]], 1)
        position_of = torch.tensor(positions, device=device)
        slot_of = torch.tensor(slots, device=device)
        filled[slot_of[slot_of < config.tokens]] = True
        # An input sees what stands before it in raster order and is there, and itself: a stand-in itself alone, even if
        # the token it stands in for has come by now.
        ahead = torch.arange(len(filled), device=device) - position_of[:, None]
        seen = filled & torch.where((slot_of < config.tokens)[:, None], ahead <= 0, ahead < 0)
        seen[torch.arange(len(slots), device=device), slot_of] = True
        hidden = decoder.run(sequences, x, position_of, Keep(slot_of, len(filled), seen))

        for (row, column), state in zip(at, hidden[:, len(late) :].unbind(1), strict=True):
            position = row * columns + column
            found = batch.choose(sequences, state, position)
            tokens[:, position] = torch.where(free[:, position], found, tokens[:, position])
        # The last token of a row is the input of the next row's first position, where a stand-in has been.
        late = [(row + 1) * columns for row, column in at if column == columns - 1 and row + 1 < rows]
    return tokens


def _for_each(value: float | Sequence[float], parts: int, name: str) -> list[float]:
    """A number for each sub-vocabulary, from one for all or a sequence."""
    values = [float(value)] * parts if isinstance(value, int | float) else [float(each) for each in value]
    if len(values) != parts or not all(math.isfinite(each) for each in values):
        raise UsageError(f"{name} must be a number, or {parts} of them (one for each sub-token), got {value}")
    return values


def _images_at_once(decoder: Decoder, slots: int, rows_per_image: int) -> int:
    """How many images fit into half of the memory that is free."""
    return max(1, _free_bytes(decoder) // 2 // (rows_per_image * decoder.bytes_per_row(slots)))


def _free_bytes(decoder: Decoder) -> int:
    if decoder.device.type == "cuda":
        return torch.cuda.mem_get_info(decoder.device)[0] + decoder.kept_bytes
    if MEMINFO.is_file():  # "MemAvailable:    20971520 kB" counts what the system would give back from its file cache
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return 4 * 2**30  # a system that does not tell


def _reporter(
    progress: Callable[[int, int], None], before: int, images: int, count: int, tokens: int
) -> Callable[[int], None]:
    """Turns a position within one batch into tokens done of tokens in all."""
    return lambda position: progress(before * tokens + images * position, count * tokens)
