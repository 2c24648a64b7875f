"""What `hatch_build.py` compiles at installation, and that nothing is left where it cannot."""

import ctypes
import importlib.util

import pytest

pytest.importorskip("hatchling", reason="the build hook runs inside of hatchling")


@pytest.fixture(scope="module")
def build(root):
    spec = importlib.util.spec_from_file_location("hatch_build", root / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_source_compiles(build, root, tmp_path):
    fault = build.compiled(root / build.SOURCE, tmp_path / "nearest_code.so")
    if fault == "there is no C++ compiler":
        pytest.skip(fault)
    assert not fault
    assert [file.name for file in tmp_path.iterdir()] == ["nearest_code.so"]
    assert ctypes.CDLL(str(tmp_path / "nearest_code.so")).provq_register() in (0, 16, 32, 64)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler --flag"])
def test_a_compiler_that_fails_is_told_and_leaves_nothing(build, root, tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert compiler.split()[0] in build.compiled(root / build.SOURCE, tmp_path / "nearest_code.so")
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_is_told(build, root, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in build.compiled(root / build.SOURCE, tmp_path / "nearest_code.so")
