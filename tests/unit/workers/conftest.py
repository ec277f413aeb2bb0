"""No clock decides here: a busy machine makes these tests slow, never red."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("no clocks", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clocks")


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)  # these tensors are too small to share out
    torch.manual_seed(11)
