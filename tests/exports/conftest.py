import functools

import pytest


@pytest.fixture(scope="session", autouse=True)
def translations_once():
    """torch reads its whole table of translations anew for each network, which takes longer than all else."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    with pytest.MonkeyPatch.context() as patch:
        read = registration.ONNXRegistry.from_torchlib
        patch.setattr(registration.ONNXRegistry, "from_torchlib", staticmethod(functools.cache(read)))
        yield
