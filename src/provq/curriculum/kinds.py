"""The schedules that a recipe can name."""

from provq.curriculum.adaptive import Adaptive
from provq.curriculum.learned import Learned
from provq.curriculum.schedules import Constant, Cosine, Deferred, Linear, Piecewise, Schedule

KINDS: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "deferred": Deferred,
    "piecewise": Piecewise,
    "adaptive": Adaptive,
    "learned": Learned,
}
