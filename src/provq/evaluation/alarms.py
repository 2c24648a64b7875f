"""What goes wrong in a run, in plain sentences: what happened, and which keys of the recipe to change.

A rule reads the records of looks at held-out items (`probe`). A number that is not defined, NaN or absent, raises
no alarm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

Look = Mapping[str, Any]
_HIGH_USAGE = 0.5  # share of codes; below it, dead codes are the first thing to see to
_FLAT = 0.5  # of the directions that codes could span
_FALL = 0.8  # of the best perplexity so far
_REFIT_GAP = 0.5
_FEW_TOKENS = 4  # a code: of fewer, one that is used evenly may be missed by chance (exp(-4) is 2 %)
_DEAD = 0.1  # share of codes


def alarms(looks: Sequence[Look], *, ended: bool) -> dict[str, str]:
    """What is wrong at the last of some looks, a sentence a rule.

    Args:
        looks: The records of a run so far, the oldest first, each with `hardness`.
        ended: Whether the last look is that at the end of the run.
    """
    if not looks:
        return {}
    rules = {**_RULES, **(_RULES_OF_THE_END if ended else {})}
    found = {name: rule(looks) for name, rule in rules.items()}
    return {name: sentence for name, sentence in found.items() if sentence is not None}


@final
class Alarms:
    """Remembers the looks of a run, and raises each alarm once; its state is part of a checkpoint."""

    def __init__(self) -> None:
        self._looks: list[Look] = []
        self._raised: list[str] = []

    def after(self, look: Look, *, ended: bool) -> dict[str, str]:
        """The sentences of rules that hold for the first time at this look."""
        self._looks.append(dict(look))
        found = alarms(self._looks, ended=ended)
        new = {name: sentence for name, sentence in found.items() if name not in self._raised}
        self._raised += new
        return new

    def state_dict(self) -> dict[str, Any]:
        """What was seen and raised."""
        return {"looks": list(self._looks), "raised": list(self._raised)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` gave."""
        self._looks, self._raised = list(state["looks"]), list(state["raised"])


def _collapse(looks: Sequence[Look]) -> str | None:
    last = looks[-1]
    usage, dimension = _number(last, "usage"), _number(last, "effective_dim")
    # As many as latents ever had, so that latents and codes which went flat together are found too; but no more than
    # so few bits can describe.
    within_reach = [min(look["latent_dim"], look["active_directions"]) for look in looks if _is_described(look)]
    spanned = max(within_reach, default=math.nan)
    if last["hardness"] > 0 and usage >= _HIGH_USAGE and dimension < _FLAT * spanned:
        return (
            f"dimensional collapse: {100 * usage:.0f} % of the codes are in use, but they lie in {dimension:.0f} "
            f"directions of {spanned:.0f} that they could span; begin to quantize later (training.curriculum.start), "
            "and let hand-overs found the codebook (training.hand_overs: 5)"
        )
    return None


def _fall(looks: Sequence[Look]) -> str | None:
    last = looks[-1]
    now = _number(last, "perplexity")
    inside = [_number(look, "perplexity") for look in looks if 0 < look["hardness"] < 1]
    best = max((number for number in inside if not math.isnan(number)), default=math.nan)
    if 0 < last["hardness"] < 1 and now < _FALL * best:
        return (
            f"perplexity fell from {best:.1f} to {now:.1f} inside the anneal, at hardness {last['hardness']:.2f}; "
            "anneal more slowly (a later training.curriculum.end), or revive dead codes (quantizer.revive_below: 0.1)"
        )
    return None


def _codebook_lags(looks: Sequence[Look]) -> str | None:
    last = looks[-1]
    gap = _number(last, "refit_gap")
    # Codes that never move are a fixed grid, or were founded in this very step: neither can be refitted.
    if 0 < last["hardness"] < 1 and gap > _REFIT_GAP and _number(last, "code_travel") > 0:
        return (
            "the codebook lags behind the encoder: k-means centres in its place would make the error of latents "
            f"{100 * gap / (1 + gap):.0f} % smaller; raise training.codebook_learning_rate, set "
            "quantizer.revive_below: 0.1, or found the codebook more often (training.hand_overs: 5)"
        )
    return None


def _soft_at_the_end(looks: Sequence[Look]) -> str | None:
    last = looks[-1]
    gap = _number(last, "train_eval_gap")
    if gap != 0 and not math.isnan(gap):
        hard, current = _number(last, "loss_hard"), _number(last, "loss_current")
        return (
            f"training ended at hardness {last['hardness']:.2f}: with hard codes, as they are used, the error is "
            f"{hard:.4g} and not {current:.4g}; let hardness reach 1 within the run (training.curriculum.end below 1)"
        )
    return None


def _dead_at_the_end(looks: Sequence[Look]) -> str | None:
    last = looks[-1]
    dead, codes, tokens = (_number(last, name) for name in ("dead_codes", "codes", "tokens"))
    if tokens >= _FEW_TOKENS * codes and dead > _DEAD * codes:
        return (
            f"{dead:.0f} of {codes:.0f} codes are dead: none of {tokens:.0f} held-out tokens is one of them; set "
            "quantizer.revive_below: 0.1, or take fewer codes (quantizer.codebook_size)"
        )
    return None


def _is_described(look: Look) -> bool:
    return not any(math.isnan(_number(look, name)) for name in ("latent_dim", "active_directions"))


def _number(look: Look, name: str) -> float:
    value = look.get(name)
    return math.nan if value is None else float(value)


Rule = Callable[[Sequence[Look]], str | None]
_RULES: dict[str, Rule] = {
    "dimensional_collapse": _collapse,
    "perplexity_falls": _fall,
    "codebook_lags": _codebook_lags,
}
_RULES_OF_THE_END: dict[str, Rule] = {"soft_at_the_end": _soft_at_the_end, "dead_codes": _dead_at_the_end}
