import pytest

from benchmarks import workloads
from benchmarks.measure import full_size


@pytest.fixture(scope="session")
def workload():
    """Makes a workload by name, once per session."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = workloads.make(name, full=full_size())
        return made[name]

    return make
