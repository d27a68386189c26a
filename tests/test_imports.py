"""The map of imports: bench, tests → dcgan → kernels → kernels._triton | _cuda | cpu | reference."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("bench", "tests", "dcgan", "kernels")
MAY_IMPORT = {
    "bench": {"bench", "dcgan", "kernels"},
    "tests": {"tests", "bench", "dcgan", "kernels"},
    "dcgan": {"dcgan", "kernels"},
    "kernels": {"kernels"},
}
BACKENDS = ("kernels._triton", "kernels._cuda", "kernels.cpu", "kernels.reference")
VOCABULARY = ("kernels.geometry", "kernels.arguments", "kernels.dependent", "kernels.pool")
WITHOUT_TORCH = ("dcgan.errors", "dcgan.data")


def modules():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Full names of all that a file imports, those inside functions too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_run_one_way(path):
    package = name_of(path).split(".")[0]
    for imported in imports_of(path):
        top = imported.split(".")[0]
        assert top not in PACKAGES or top in MAY_IMPORT[package], f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_backends_know_the_vocabulary_and_themselves_alone(path):
    own = next((backend for backend in BACKENDS if f"{name_of(path)}.".startswith(f"{backend}.")), None)
    for imported in imports_of(path):
        if own and imported.startswith("kernels"):
            assert imported.startswith((own, *VOCABULARY)), f"{name_of(path)} imports {imported}"
        if imported.startswith("kernels._C"):
            assert name_of(path) == "kernels._cuda", f"{name_of(path)} reaches the extension past kernels._cuda"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_decoders_start_without_torch(module):
    """A worker that decodes pictures would otherwise spend seconds and hundreds of megabytes on it."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_map_would_catch_a_back_edge(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    path = tmp_path / "kernels" / "conv.py"
    path.write_text("def f():\n    from dcgan.arch import Arch\n")
    with pytest.raises(AssertionError, match=r"kernels.conv imports dcgan\.arch\.Arch"):
        test_imports_run_one_way(path)


def test_kernels_is_ours():
    """A package of the same name is on the package index; this one must be the one imported."""
    import kernels

    assert Path(kernels.__file__).parent == ROOT / "kernels"


def test_every_package_is_installed():
    """pyproject.toml names them one by one: one left out is missing from an install that is no editable one."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        installed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {path.parent for package in ("bench", "dcgan", "kernels") for path in (ROOT / package).rglob("*.py")}
    assert sorted(installed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
