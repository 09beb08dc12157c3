"""Text that survives: what an OCR network still reads in a reconstruction, relative to the original."""

from typing import Any

from lexel.data import to_display, to_uint8
from lexel.errors import UsageError
from lexel.evaluate.metric import GROUPS, Batch, Context, Metric, Values
from lexel.metrics.text import TextState, survival
from lexel.networks.reader import Reader


class TextSurvival(Metric):
    """The share of characters read in the originals that are read again in the reconstructions, at their place.

    Pictures are rounded to 8 bits, as a viewer sees them. Pictures without text do not count.
    """

    needs = frozenset({"originals"})

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.reader: Reader | None = None
        try:
            self.reader = Reader()
        except UsageError as error:
            self.left_out["text_survival"] = str(error)
        self.states = {"text": TextState(GROUPS)}

    def update(self, batch: Batch) -> None:
        if self.reader is None:
            return
        sides = [
            [self.reader.read(to_display(picture)) for picture in to_uint8(images)]
            for images in (batch.originals, batch.images)
        ]
        found = [survival(original, made) for original, made in zip(*sides, strict=True)]
        self.states["text"].add(found, self.context.plan.group[batch.numbers])

    def compute(self) -> Values:
        values, state = Values(), self.states["text"]
        if self.reader is None:
            return values
        if not state.pictures:
            self.left_out["text_survival"] = "no text is read in any of the originals"
            return values
        values.metrics["text_survival"] = state.share
        interval = state.interval()
        if interval is not None:
            values.intervals["text_survival"] = interval._asdict()
        values.warnings.append(f"text was read in {state.pictures} of the originals; text_survival is of those")
        return values

    def about(self) -> dict[str, Any]:
        return {} if self.reader is None else self.reader.about()
