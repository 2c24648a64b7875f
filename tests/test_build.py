"""What `hatch_build.py` compiles at installation, and that nothing is left where it cannot."""

import ctypes
import importlib.util
import shutil

import pytest

pytest.importorskip("hatchling", reason="the build hook runs inside of hatchling")


@pytest.fixture(scope="module")
def build(root):
    spec = importlib.util.spec_from_file_location("hatch_build", root / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(build, root):
    return root / build.SOURCES / "group_norm.cpp"


@pytest.mark.parametrize("name", ["group_norm", "nearest_code"])
def test_a_source_compiles(build, root, tmp_path, name):
    library = tmp_path / f"{name}.so"
    fault = build.compiled(root / build.SOURCES / f"{name}.cpp", library)
    if fault == "there is no C++ compiler":
        pytest.skip(fault)
    assert not fault
    assert list(tmp_path.iterdir()) == [library]
    assert ctypes.CDLL(str(library)).provq_register() in (0, 16, 32, 64)


class Project:
    """What of hatchling a hook asks."""

    def __init__(self):
        self.warnings = []

    def display_warning(self, message):
        self.warnings.append(message)


def hooked(build, sources, folder):
    """What the hook says of a wheel, and what it tells, for copies of sources in a folder."""
    to = folder / build.SOURCES
    to.mkdir(parents=True)
    for file in sources.iterdir():
        if file.suffix in (".cpp", ".h"):
            shutil.copy(file, to)
    project, said = Project(), {"artifacts": []}
    hook = build.NativeCode(str(folder), {}, None, None, str(folder), "wheel", app=project)
    hook.initialize("standard", said)
    return said, project.warnings


def test_a_wheel_has_a_library_of_each_source(build, root, tmp_path):
    said, warnings = hooked(build, root / build.SOURCES, tmp_path)
    if any("no C++ compiler" in warning for warning in warnings):
        pytest.skip("there is no C++ compiler")
    assert said.pop("tag").startswith("py3-none-")
    libraries = [f"{build.SOURCES}/{name}.so" for name in ("group_norm", "nearest_code")]
    assert said == {"artifacts": libraries, "pure_python": False}
    assert all((tmp_path / library).exists() for library in libraries)


def test_a_wheel_without_a_compiler_is_pure_python(build, root, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    said, warnings = hooked(build, root / build.SOURCES, tmp_path)
    assert said == {"artifacts": []}
    assert [warning.split()[4] for warning in warnings] == ["group_norm.so", "nearest_code.so"]


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler --flag"])
def test_a_compiler_that_fails_is_told_and_leaves_nothing(build, source, tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert compiler.split()[0] in build.compiled(source, tmp_path / "group_norm.so")
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_is_told(build, source, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in build.compiled(source, tmp_path / "group_norm.so")
