"""Every way to get the package: source archive, wheel, bare checkout, and builds that cannot or must not compile."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import deq

ROOT = Path(__file__).resolve().parents[1]
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))

USE = """
import json, torch, warnings
warnings.simplefilter("error", RuntimeWarning)  # a library that was built must load
import deq, deq.kernels, deq.bench
from deq.cli import main
torch.manual_seed(0)
W, c = 0.3 * torch.randn(8, 8) / 8**0.5, torch.randn(5, 8)
sol = deq.solve(W, c, tol=1e-6)
error = (sol.z - torch.relu(sol.z @ W.T + c)).abs().max().item()
files = [module.__file__ for module in (deq, deq.kernels, deq.bench)]
print(json.dumps([files, deq.info().as_dict(), sol.plan.backend, bool(sol.converged.all()), error]))
"""


@pytest.fixture
def use(run_with):
    """``use(site)``: solve with the deq in ``site``; deq.info() of it and the backend it chose."""

    def solve(site: Path) -> tuple[dict, str]:
        files, found, backend, converged, error = json.loads(run_with(site, USE))
        assert all(Path(file).is_relative_to(site) for file in files), files
        assert converged
        assert error < 1e-5
        return found, backend

    return solve


def build_wheel(source: Path, folder: Path, *settings: str, **environment: str) -> Path:
    """The wheel of ``source``, built without network and outside the checkout, unpacked into ``folder``/site."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["-w", folder, "--config-settings", f"build-dir={folder / 'build'}"]
    for setting in settings:
        command += ["--config-settings", setting]
    done = subprocess.run([*command, source], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True, text=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_sdist_holds_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "csrc/kernels.h", "deq/solve.py", "tests/conftest.py"} <= names
    assert any(name.startswith("kernels/") for name in names)
    assert any(name.startswith("bench/") for name in names)
    assert not any(name.startswith(("build/", ".venv/")) or name.endswith((".so", ".pyc")) for name in names)


def test_wheel_from_sdist(sdist, use, tmp_path):
    wheel = build_wheel(sdist, tmp_path)
    assert wheel.name.startswith(f"deq_engine-{deq.__version__}-py3-none-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "deq/py.typed" in names
    assert not any("/bench/results/" in name for name in names)
    assert {name.split("/")[0] for name in names} == {"deq", f"deq_engine-{deq.__version__}.dist-info"}
    found, backend = use(tmp_path / "site")
    if HAS_COMPILER:
        assert found["library"] == str(tmp_path / "site" / "deq" / "libdeq.so")
        assert "portable" in found["isas_built"]
        assert backend == "cpu"
    else:
        assert "no working C++ compiler" in found["why_no_library"]


@pytest.mark.parametrize(
    "settings, environment, why",
    [
        (["cmake.define.DEQ_COMPILED=OFF"], {}, "DEQ_COMPILED=OFF"),
        ([], {"CXX": "/nonexistent/c++"}, "no working C++ compiler"),
        ([], {"CXX": "/bin/false"}, "no working C++ compiler"),
    ],
    ids=["compiled=off", "missing compiler", "broken compiler"],
)
def test_build_without_compiled_library_works_and_says_why(use, tmp_path, settings, environment, why):
    build_wheel(ROOT, tmp_path, *settings, **environment)
    found, backend = use(tmp_path / "site")
    assert found["library"] is None
    assert why in found["why_no_library"]
    assert backend == "reference"


@pytest.mark.skipif(not (HAS_COMPILER and shutil.which("nvcc")), reason="no nvcc that could be made to look old")
@pytest.mark.parametrize(("wanted", "fails"), [("AUTO", False), ("ON", True)])
def test_an_nvcc_that_is_too_old_is_left_alone_or_said(tmp_path, wanted, fails):
    """It knows no sm_90a, and asking it for that was an error of the whole installation."""
    macros, nvcc = tmp_path / "old.h", tmp_path / "nvcc"
    version = {"MAJOR": 11, "MINOR": 5}.items()
    macros.write_text("".join(f"#undef __CUDACC_VER_{k}__\n#define __CUDACC_VER_{k}__ {v}\n" for k, v in version))
    real = shutil.which("nvcc")
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *90a*) exit 1;; esac\nexec {real} --pre-include {macros} "$@"\n')
    nvcc.chmod(0o755)
    tools = {"CUDACXX": str(nvcc), "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DDEQ_CUDA={wanted}"]
    done = subprocess.run(command, env=os.environ | tools, capture_output=True, text=True)
    if fails:
        assert done.returncode != 0 and "DEQ_CUDA=ON, but the CUDA compiler found is of version 11.5" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        built = json.loads((tmp_path / "build" / "_build.json").read_text())
        assert built["compiled"] and built["cuda"] == [] and "12.0 is needed" in built["why_not_cuda"]


def test_editable_install_puts_nothing_but_the_checkout_on_the_path(run_with, tmp_path):
    """Beside a clone stand folders of its user, and their names may be those of packages."""
    code = """if True:
        import sys; from scikit_build_core.build import build_editable
        build_editable(sys.argv[1], {"build-dir": sys.argv[1] + "/build", "cmake.define.DEQ_COMPILED": "OFF"})"""
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    added = f"import site, sys; before = set(sys.path); site.addsitedir({str(tmp_path / 'site')!r})\n"
    added += "print(*(set(sys.path) - before), sep='\\n')\n"
    *paths, found = run_with(tmp_path, added + USE).splitlines()
    assert set(paths) <= {str(tmp_path / "site"), str(ROOT)}
    files, _, _, _, _ = json.loads(found)
    assert files == [str(ROOT / package / "__init__.py") for package in ("deq", "kernels", "bench")]


def test_bare_checkout_works(use):
    found, backend = use(ROOT)
    assert "bare checkout" in found["why_no_library"]
    assert backend == "reference"
