"""What schedules that close the loop are tested with: traces of observations, and what follows from them."""

from hypothesis import strategies as st

from provq.curriculum import Observation

losses = st.floats(1e-6, 10)


@st.composite
def traces(draw):
    """Any losses, at 2 %, 4 % ... of the run."""
    number = draw(st.integers(0, 50))
    return [Observation((i + 1) / 50, *draw(st.tuples(losses, losses, losses))) for i in range(number)]


def followed(schedule, trace):
    """The hardness after each observation."""
    hardnesses = []
    for observation in trace:
        schedule.observe(observation)
        hardnesses.append(schedule(observation.progress))
    return hardnesses
