"""What deq.info() reports, and that a library which cannot be used never breaks `import deq`."""

import json
import platform
import shutil
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


def test_library_is_loaded_wherever_it_was_built():
    assert (_library.compiled is not None) == _library.build.get("compiled", False), _library.reason


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


@pytest.fixture
def load_beside(tmp_path, run_with):
    """``load_beside(library)``: import a copy of deq that has ``library`` as its libdeq.so; info and warnings."""

    def load(library: Path | None, version: str = deq.__version__) -> tuple[dict, list[str]]:
        package = tmp_path / "site" / "deq"
        shutil.copytree(ROOT / "deq", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        if library:
            shutil.copy(library, package / "libdeq.so")
        init = (package / "__init__.py").read_text()
        (package / "__init__.py").write_text(init.replace(f'"{deq.__version__}"', f'"{version}"'))
        found, warned, z = json.loads(run_with(package.parent, LOAD))
        assert torch.allclose(torch.tensor(z), torch.full((2, 3), 2.0), atol=1e-4)
        return found, [w for w in warned if "compiled library" in w]

    return load


def broken(tmp_path: Path) -> Path:
    file = tmp_path / "broken.so"
    file.write_bytes(b"this is no library")
    return file


def foreign(tmp_path: Path) -> Path:
    """A library that loads but is not ours: the C library's mathematics, which this process already holds."""
    mapped = Path("/proc/self/maps").read_text().split()
    return next(Path(word) for word in mapped if word.startswith("/") and Path(word).name.startswith("libm.so"))


@pytest.mark.parametrize("make, why", [(broken, "cannot be loaded"), (foreign, "deq_version")])
def test_unusable_library_warns_once_and_leaves_the_reference(load_beside, tmp_path, make, why):
    found, warned = load_beside(make(tmp_path))
    assert found["library"] is None
    assert why in found["why_no_library"]
    assert len(warned) == 1
    assert why in warned[0]


@pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
def test_library_of_another_version_is_refused(load_beside):
    found, warned = load_beside(_library.path, version="99.0.0")
    assert f"belongs to deq {deq.__version__}, this is deq 99.0.0" in found["why_no_library"]
    assert len(warned) == 1


def test_no_library_is_no_reason_to_warn(load_beside):
    found, warned = load_beside(None)
    assert "nothing has been built" in found["why_no_library"]
    assert warned == []
