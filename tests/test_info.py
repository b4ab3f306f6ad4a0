"""What deq.info() reports, and that a library which cannot be used never breaks `import deq`."""

import ctypes.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import deq
from deq import _library
from deq.plan import BACKENDS

ROOT = Path(__file__).resolve().parents[1]


def test_versions_and_threads():
    found = deq.info()
    assert (found.deq, found.torch, found.python) == (deq.__version__, torch.__version__, platform.python_version())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert deq.info().threads == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
def test_says_which_instruction_set_is_used(isa):
    found = deq.info()
    assert found.isa == isa
    assert isa in found.isas_built
    assert Path(found.library).name == "libdeq.so"
    assert found.backends["cpu"] == found.why_no_library == ""


def test_every_backend_is_usable_or_says_why_not():
    found = deq.info()
    assert set(found.backends) == {"cpu", "triton", "cuda", "reference"}
    assert found.backends["reference"] == ""
    for name, why in found.backends.items():
        assert why == "" or len(why) > 10
        assert why != "" or name in BACKENDS


def test_report_is_readable():
    found = deq.info()
    lines = str(found).splitlines()
    assert all(len(line) <= 80 or len(line.split()) == 2 for line in lines)  # a long path stands alone, unbroken
    assert all(line[13] == " " and line[14] != " " for line in lines)  # labels, then one column of text
    for fact in (found.deq, found.torch, found.library or found.why_no_library.split()[0], *found.backends):
        assert fact in str(found)


def test_as_dict_is_plain_json():
    as_dict = deq.info().as_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["backends"]["reference"] == ""


def test_without_library_says_why_and_what_it_costs(monkeypatch):
    monkeypatch.setattr(_library, "compiled", None)
    monkeypatch.setattr(_library, "reason", "no working C++ compiler was found")
    found = deq.info()
    assert found.library is None
    assert found.isa == ""
    assert found.backends["cpu"] != ""
    text = " ".join(str(found).split())
    assert "none: no working C++ compiler was found" in text
    assert "slower" in text


# ---- a library that cannot be used ----------------------------------------------------------------------------------

LOAD = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import deq, torch
    sol = deq.solve(torch.eye(3) / 2, torch.ones(2, 3))
print(json.dumps([deq.info().as_dict(), [str(w.message) for w in caught], sol.z.tolist()]))
"""


def load_beside(library: Path | None, folder: Path, version: str | None = None):
    """Import a copy of deq that has ``library`` as its libdeq.so, in a process that knows no other deq."""
    shutil.copytree(ROOT / "deq", folder / "deq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", folder / "deq" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    if library:
        shutil.copy(library, folder / "deq" / "libdeq.so")
    if version:
        init = folder / "deq" / "__init__.py"
        init.write_text(init.read_text().replace(f'__version__ = "{deq.__version__}"', f'__version__ = "{version}"'))
    # -S: no .pth file, so that an editable install of deq cannot answer the import.
    path = os.pathsep.join((str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-S", "-c", LOAD], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, warned, z = json.loads(done.stdout)
    assert torch.allclose(torch.tensor(z), torch.full((2, 3), 2.0), atol=1e-4)
    return found, [w for w in warned if "compiled library" in w]


def broken(tmp_path: Path) -> Path:
    file = tmp_path / "broken.so"
    file.write_bytes(b"this is no library")
    return file


def foreign(tmp_path: Path) -> Path:
    name = ctypes.util.find_library("m")
    maps = Path("/proc/self/maps").read_text().split()
    ctypes.CDLL(name)
    return next(Path(word) for word in maps if word.startswith("/") and Path(word).name.startswith("libm"))


@pytest.mark.parametrize("make, why", [(broken, "cannot be loaded"), (foreign, "deq_version")])
def test_unusable_library_warns_once_and_leaves_the_reference(tmp_path, make, why):
    found, warned = load_beside(make(tmp_path), tmp_path / "site")
    assert found["library"] is None
    assert why in found["why_no_library"]
    assert len(warned) == 1
    assert why in warned[0]


@pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
def test_library_of_another_version_is_refused(tmp_path):
    found, warned = load_beside(_library.path, tmp_path / "site", version="99.0.0")
    assert f"belongs to deq {deq.__version__}, this is deq 99.0.0" in found["why_no_library"]
    assert len(warned) == 1


def test_no_library_is_no_reason_to_warn(tmp_path):
    found, warned = load_beside(None, tmp_path / "site")
    assert "nothing has been built" in found["why_no_library"]
    assert warned == []
