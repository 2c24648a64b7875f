"""The curriculum: schedules of hardness, the scheduler that applies them, the hand-over, and `Progressive`."""

from provq.curriculum.adaptive import Adaptive
from provq.curriculum.handover import HandOver, hand_over
from provq.curriculum.learned import Learned
from provq.curriculum.progressive import Progressive
from provq.curriculum.scheduler import HardnessScheduler
from provq.curriculum.schedules import Constant, Cosine, Deferred, Linear, Observation, Piecewise, Schedule

__all__ = [
    "Adaptive",
    "Constant",
    "Cosine",
    "Deferred",
    "HandOver",
    "HardnessScheduler",
    "Learned",
    "Linear",
    "Observation",
    "Piecewise",
    "Progressive",
    "Schedule",
    "hand_over",
]
