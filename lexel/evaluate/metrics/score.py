"""The inception score of reconstructions or samples."""

import math

from lexel.evaluate.metric import GROUPS, Batch, Context, Metric, Values
from lexel.evaluate.metrics.frechet import add_jackknifed
from lexel.metrics import ScoreState, shuffled


class InceptionScore(Metric):
    """`inception_score`; `inception_score_NETWORK` of a network other than FID's Inception.

    Where the protocol takes blocks in the order of the files, the score of the same blocks dealt at random is taken
    too: a class-sorted set scores far below it, and a warning says so.
    """

    needs = frozenset({"features", "logits"})
    SORTED = 0.9  # share of the shuffled score's logarithm (a mean divergence) below which the order is at fault

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        classes, plan = context.features_of.classes, context.plan
        self.states = {"score": ScoreState(classes, plan.splits, GROUPS)}
        if not context.protocol.score.shuffle and plan.splits > 1:
            self.states["shuffled"] = ScoreState(classes, plan.splits)
            self._shuffled = shuffled(plan.split, seed=0)

    def update(self, batch: Batch) -> None:
        logits = batch.features(self.context.features_of).logits
        assert logits is not None
        plan, numbers = self.context.plan, batch.numbers
        self.states["score"].add(logits, plan.split[numbers], plan.group[numbers])
        if "shuffled" in self.states:
            self.states["shuffled"].add(logits, self._shuffled[numbers])

    def compute(self) -> Values:
        values, state, network = Values(), self.states["score"], self.context.features_of.name
        name = "inception_score" if network == "inception" else f"inception_score_{network}"
        sizes = state.n.sum(0)
        groups = [group for group in range(len(sizes)) if 0 < sizes[group] < sizes.sum()]
        add_jackknifed(values, name, [state.score(), *(state.score(group) for group in groups)])
        if "shuffled" in self.states:
            dealt = self.states["shuffled"].score()
            far_below = math.log(max(values.metrics[name], 1)) < self.SORTED * math.log(max(dealt, 1))
            if far_below or self.context.sorted_by_class:
                known = "are" if self.context.sorted_by_class else "look"
                values.warnings.append(
                    f"{name} is {values.metrics[name]:.6g} in blocks of the files' order and {dealt:.6g} in blocks"
                    f" dealt at random: the images {known} sorted by class; shuffle them"
                )
        return values
