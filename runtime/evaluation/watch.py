"""The watch for reward hacking: the trained reward rises at the expense of what is not trained.

At every evaluation the policy is compared with the frozen teacher on the same noise. Once the trained reward is above the
teacher's, held-out rewards that are not trained should not have fallen, and the images of a prompt should not have become more
similar. A reward's fall counts if it is both large, above the limit in the experiment's `watch`, and significant, above CLEAR
paired standard errors. The rule is ours; the default limits are chosen by judgement, not measured.
"""

from __future__ import annotations

from collections.abc import Collection

from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.statistics import paired
from runtime.experiment.config import WatchSection

CLEAR = 3.0
"""Standard errors."""


def watch_metrics(result: Evaluated, teacher: Evaluated, trained: Collection[str]) -> dict[str, float]:
    """`watch/<label>`, the fall of a reward that is not trained, in standard deviations of the teacher's scores, and
    `watch/diversity`, the share of the teacher's diversity that is lost. A rise is negative.

    trained: the labels that are trained, "total" among them. A reward whose scores do not vary is excluded.
    """
    line = {}
    for label, before in teacher.scores.items():
        known = ~(before + result.scores[label]).isnan()
        spread = before[known].std().item()
        if label not in trained and spread > 0:
            line[f"watch/{label}"] = (before[known].mean() - result.scores[label][known].mean()).item() / spread
    if teacher.diversity > 0:
        line["watch/diversity"] = 1 - result.diversity / teacher.diversity
    return line


def suspicions(line: dict[str, float], result: Evaluated, teacher: Evaluated, limits: WatchSection) -> list[str]:
    """Reasons to suspect reward hacking in the metrics of an evaluation, one sentence each."""
    if line["heldout/total"] <= line["heldout/base/total"]:
        return []
    found = []
    for key, fall in line.items():
        label = key.removeprefix("watch/")
        if label == key or label == "diversity":
            continue
        difference, error = paired(result.scores[label], teacher.scores[label])
        if fall > limits.reward_drop and -difference > CLEAR * error:
            found.append(
                f"{label} fell by {-difference:.3g}, {fall:.2f} of its standard deviation, while the trained reward rose"
            )
    if (fall := line.get("watch/diversity", 0.0)) > limits.diversity_drop:
        found.append(f"diversity fell by {100 * fall:.0f} % while the trained reward rose")
    return found
