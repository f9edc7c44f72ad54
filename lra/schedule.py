"""The published schedule: PyTorch's OneCycleLR, linear, with its default cycle of Adam's beta1."""

from dataclasses import dataclass

_START_DIVISOR = 25.0
_END_DIVISOR = 1e4
_BETA1_ENDS, _BETA1_PEAK = 0.95, 0.85


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage of training does."""

    steps: int
    """Optimizer steps."""
    warmup_steps: int
    """Steps of rising learning rate."""
    learning_rate: float
    """Peak."""
    eval_every: int
    """Steps between evaluations; there is one after the last step, too."""

    def at(self, step: int) -> tuple[float, float]:
        """Learning rate and beta1 of a step, counted from 0."""
        return one_cycle(
            step, steps=self.steps, warmup_steps=self.warmup_steps, peak=self.learning_rate
        )


def one_cycle(step: int, *, steps: int, warmup_steps: int, peak: float) -> tuple[float, float]:
    """Learning rate and beta1 of a step.

    The rate rises from peak / 25 to `peak` and falls to peak / 250,000 at the last step; beta1 goes
    from 0.95 to 0.85 and back, although AdamW was asked for 0.9: the published code leaves the
    cycling of the momentum on.

    Args:
        step: from 0 to `steps - 1`.
        steps: of the whole run.
        warmup_steps: the peak is reached in the last of these.
        peak: highest learning rate.
    """
    start = peak / _START_DIVISOR
    top = warmup_steps - 1
    if step <= top:
        share = step / top if top else 1.0
        return _between(start, peak, share), _between(_BETA1_ENDS, _BETA1_PEAK, share)
    share = (step - top) / (steps - 1 - top)
    end = start / _END_DIVISOR
    return _between(peak, end, share), _between(_BETA1_PEAK, _BETA1_ENDS, share)


def _between(first: float, last: float, share: float) -> float:
    return first + (last - first) * share
