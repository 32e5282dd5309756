"""The watch for reward hacking: the trained reward rises at the expense of what is not trained.

At every evaluation the policy is compared with the frozen teacher on the same noise. Once the trained reward is above the
teacher's, held-out rewards that are not trained should not have fallen, and the images of a prompt should not have become more
similar. A reward's fall counts if it is both large, above the limit in the experiment's `watch`, and significant, above CLEAR
paired standard errors. Of a method with a discriminator, images that become similar and a saturated discriminator count in any
case. The rule is ours; the default limits are chosen by judgement, not measured.
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


def suspicions(
    line: dict[str, float],
    result: Evaluated,
    teacher: Evaluated,
    limits: WatchSection,
    saturated: float | None = None,
) -> list[str]:
    """Reasons to suspect reward hacking in the metrics of an evaluation, one sentence each.

    saturated: `discriminator/saturated` of the last training step, where a method has a discriminator. Its images have to
    resemble real ones whether or not a reward rises, so diversity counts in any case.
    """
    found = []
    rose, fall = line["heldout/total"] > line["heldout/base/total"], line.get("watch/diversity", 0.0)
    for key, drop in line.items():
        label = key.removeprefix("watch/")
        if not rose or label == key or label == "diversity":
            continue
        difference, error = paired(result.scores[label], teacher.scores[label])
        if drop > limits.reward_drop and -difference > CLEAR * error:
            found.append(
                f"{label} fell by {-difference:.3g}, {drop:.2f} of its standard deviation, while the trained reward rose"
            )
    if fall > limits.diversity_drop and (rose or saturated is not None):
        found.append(f"diversity fell by {100 * fall:.0f} %" + (" while the trained reward rose" if rose else ""))
    if saturated is not None and saturated > limits.discriminator_saturated:
        found.append(
            f"the discriminator is certain of {100 * saturated:.0f} % of the image pairs, so it no longer learns, and its "
            "gradient hardly depends on the images"
        )
    return found
