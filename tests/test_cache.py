"""What is derived from a weight is found again by content: never stale, never more than the budget."""

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

import deq
from deq import _library, cache
from deq.profiling import record

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")


@pytest.fixture(autouse=True)
def empty_cache():
    cache.clear()
    yield
    cache.clear()


class Counted:
    """A ``make`` that counts its calls."""

    def __init__(self, value=None):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return torch.full((3,), float(self.calls)) if self.value is None else self.value


def hits(W, other, what="x", other_what="x") -> bool:
    """Is what was derived from W found for ``other``?"""
    cache.clear()
    make = Counted()
    first = cache.remembered(W, what, make)
    second = cache.remembered(other, other_what, make)
    assert make.calls == (1 if first is second else 2)
    return first is second


def matrix(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (1, 1), (17, 17), (100, 3), (2, 5, 5), (2, 3, 4, 5), (300, 300), (0, 4)]
)
def test_found_again_by_content(shape, dtype):
    W = matrix(*shape, dtype=dtype)
    assert hits(W, W) and hits(W, W.clone()) and hits(W, torch.nn.Parameter(W.clone()))


@needs_library
def test_every_element_and_its_place_count():
    for m in (1, 5, 33, 290):
        W = matrix(m, m)
        for i, j in {(0, 0), (m // 2, m - 1), (m - 1, m // 2), (m - 1, m - 1)}:
            other = W.clone()
            other[i, j] = torch.nextafter(other[i, j], torch.tensor(torch.inf))
            assert not hits(W, other), f"({i}, {j}) of width {m}"
    W = matrix(6, 6)
    assert not hits(W, W.flip(0)) and not hits(W, W.mT) and not hits(W, W.mT.contiguous())
    assert not hits(torch.zeros(4, 9), torch.zeros(9, 4)) and not hits(torch.zeros(4), torch.zeros(4).double())
    assert not hits(W, W, "inverse", "lu")
    symmetric = W + W.mT
    assert hits(symmetric, symmetric.clone())


@needs_library
def test_strides_do_not_have_to_be_contiguous():
    wide = matrix(12, 14)
    for view in (wide[:, 1:5], wide[2:9, ::2], wide[::3, ::2], wide[0].expand(3, 14), matrix(3, 4, 5).permute(1, 2, 0)):
        assert hits(view, view) and not hits(view, view + 1)


@needs_library
def test_writing_through_data_is_seen():
    W = torch.nn.Parameter(matrix(8, 8))
    make = Counted()
    first = cache.remembered(W, "x", make)
    W.data[3, 4] += 1
    assert cache.remembered(W, "x", make) is not first
    W.data[3, 4] = matrix(8, 8)[3, 4]
    assert cache.remembered(W, "x", make) is first and make.calls == 2


@needs_library
def test_budget_drops_the_least_recently_used(monkeypatch):
    monkeypatch.setattr(cache, "BUDGET_BYTES", 10 * 400)
    weights = [matrix(3, 3, seed=i) for i in range(12)]
    values = [cache.remembered(W, "x", lambda: (torch.zeros(60), {"b": torch.zeros(40)})) for W in weights[:10]]
    assert cache.remembered(weights[0], "x", Counted()) is values[0]  # all ten fit; the first is now the newest
    cache.remembered(weights[10], "x", lambda: torch.zeros(100))
    assert cache.remembered(weights[0], "x", Counted()) is values[0]
    make = Counted(torch.zeros(100))
    assert cache.remembered(weights[1], "x", make) is make.value
    assert cache.clear() == 10 * 400 and cache.clear() == 0


@needs_library
def test_the_newest_stay_however_large(monkeypatch):
    monkeypatch.setattr(cache, "BUDGET_BYTES", 0)
    weights = [matrix(3, 3, seed=i) for i in range(cache.ALWAYS_KEPT + 1)]
    make = Counted()
    for W in weights:
        cache.remembered(W, "x", make)
    for W in weights[1:]:
        cache.remembered(W, "x", make)
    assert make.calls == len(weights)
    cache.remembered(weights[0], "x", make)
    assert make.calls == len(weights) + 1


@needs_library
def test_made_without_gradients_and_good_for_training():
    W = matrix(4, 4).requires_grad_()
    assert not cache.remembered(W, "x", lambda: W * 2).requires_grad
    with torch.inference_mode():
        made = cache.remembered(matrix(4, 4, seed=1), "x", lambda: matrix(4, 4, seed=1) * 2)
    (W * made).sum().backward()  # an inference tensor could not be saved for this
    assert torch.equal(W.grad, made)


@needs_library
def test_errors_are_not_remembered():
    def fail():
        raise ValueError("singular")

    W = matrix(4, 4)
    with pytest.raises(ValueError, match="singular"):
        cache.remembered(W, "x", fail)
    assert cache.remembered(W, "x", lambda: 5) == 5


@needs_library
def test_threads():
    weights = [matrix(20, 20, seed=i) for i in range(5)]
    wrong = []

    def work():
        for n in range(200):
            W = weights[n % 5]
            if not torch.equal(cache.remembered(W, "x", lambda W=W: W + 1), W + 1):
                wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Subclass(torch.Tensor):
    pass


def test_nothing_is_remembered_where_content_cannot_be_read(monkeypatch):
    W = matrix(3, 3)
    assert not hits(W.as_subclass(Subclass), W.as_subclass(Subclass))
    assert not hits(W.to("meta"), W.to("meta"))
    assert not hits(W.to_sparse(), W.to_sparse())
    make = Counted()
    torch.func.vmap(lambda W: cache.remembered(W, "x", make))(W)
    torch.func.vmap(lambda W: cache.remembered(W, "x", make))(W)
    assert make.calls == 2
    monkeypatch.setattr(_library, "compiled", None)
    assert not hits(W, W)


def test_compiled_graphs_do_not_look_up():
    f = torch.compile(lambda W: cache.remembered(W, "x", lambda: W * 2), backend="eager", fullgraph=True)
    assert torch.equal(f(matrix(3, 3)), matrix(3, 3) * 2) and torch.equal(
        f(matrix(3, 3, seed=1)), matrix(3, 3, seed=1) * 2
    )


def test_on_a_gpu_by_version():
    """As for CUDA tensors, whose content nobody reads."""
    W, make = matrix(4, 4), Counted()
    first = cache.by_version(W, "x", make)
    assert cache.by_version(W, "x", make) is first and make.calls == 1
    cache.by_version(W, "y", make)
    W.add_(1)
    assert cache.by_version(W, "x", make) is not first and make.calls == 3
    held = weakref.ref(cache.by_version(W, "x", make))
    assert held() is not None
    del W
    gc.collect()
    assert held() is None, "what was derived goes with its weight"


def test_nothing_is_remembered_of_a_weight_that_a_graph_works_with(monkeypatch):
    """Replays of a captured training step write to it, and its version stays."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(cache, "is_plain", lambda W: True)
    monkeypatch.setattr(cache, "_captured", WeakTensorKeyDictionary())
    W, other = (torch.ones(2, 2).as_subclass(OnGpu) for _ in range(2))
    make = Counted()
    monkeypatch.setattr(cache, "_stream_of", lambda W: 1)
    monkeypatch.setattr(cache, "is_captured", lambda W: False)
    assert cache.remembered(W, "x", make) is cache.remembered(W, "x", make)
    monkeypatch.setattr(cache, "_key", lambda W, what: None)
    monkeypatch.setattr(cache, "is_captured", lambda W: True)
    cache.remembered(W, "x", make)
    monkeypatch.setattr(cache, "is_captured", lambda W: False)
    assert cache.remembered(W, "x", make) is not cache.remembered(W, "x", make)
    assert cache.remembered(other, "x", make) is cache.remembered(other, "x", make)


def test_streams_of_a_gpu_share_no_values(monkeypatch):
    """What one has queued another may not read yet, and memory given back is used again in the order of its own."""
    W, make, current = matrix(4, 4), Counted(), [1]
    monkeypatch.setattr(cache, "_stream_of", lambda W: current[0])
    first = cache.by_version(W, "x", make)
    current[0] = 2
    second = cache.by_version(W, "x", make)
    assert second is not first and cache.by_version(W, "x", make) is second
    current[0] = 1
    assert cache.by_version(W, "x", make) is first and make.calls == 2
    held, _ = weakref.ref(second), W.add_(1)
    del second
    assert cache.by_version(W, "x", make) is not first and held() is None


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_weights_follow_every_change(dtype):
    """A change that a sample of W shows spares the reading of the rest; no other change is missed, forward or backward.
    Weights that stay are packed once more after that, and then found; those used in place (backward) only then."""
    m = 256
    W = matrix(m, m, dtype=dtype) * 0.5 / m**0.5
    c = matrix(5, m, seed=1, dtype=dtype)

    def packed(W) -> tuple[int, torch.Tensor, torch.Tensor]:
        leaf = W.detach().requires_grad_()
        with record(inside=True) as recorder:
            z = deq.solve(leaf, c).z
            (dW,) = torch.autograd.grad(z.sum(), leaf)
        return sum(event.name == "pack" for event in recorder.events), z.detach(), dW

    def fresh(W) -> tuple[torch.Tensor, torch.Tensor]:
        _library.compiled.deq_cpu_clear_cache()
        answer = packed(W.clone())[1:]
        _library.compiled.deq_cpu_clear_cache()
        return answer

    _library.compiled.deq_cpu_clear_cache()
    in_place = dtype == torch.float32 and _library.increments() != "native"
    assert [packed(W)[0] for _ in range(3)] == [2, 1 if in_place else 0, 0]
    W *= 0.99
    assert [packed(W)[0] for _ in range(4)] == [2, 2, 1 if in_place else 0, 0]
    generator = torch.Generator().manual_seed(2)
    for flat in [0, m * m - 1, *torch.randint(m * m, (12,), generator=generator).tolist()]:
        packed(W)
        W.view(-1)[flat] += 0.25
        count, z, dW = packed(W)
        expected = fresh(W)
        assert count == 2 and torch.equal(z, expected[0]) and torch.equal(dW, expected[1])


def fingerprint(W):
    found = torch.empty(2, dtype=torch.int64)
    torch.ops.deq.fingerprint.default(W, found)
    return tuple(found.tolist())


@needs_library
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_no_two_changes_of_a_bit_cancel(isa):
    """Of words that meet in a lane of the hash, whatever their bits: a sign and a 0 that becomes 2 did."""
    if not _library.use_isa(isa):
        pytest.skip(f"this CPU or build has no {isa}")
    try:
        words = torch.randint(-(2**62), 2**62, (4, 64), generator=torch.Generator().manual_seed(0))
        seen = set()
        for i in range(0, 64, 3):
            for j in range(64):
                for distance in (1, 2):
                    changed = words.clone()
                    changed[0, 5] ^= -(2**63) if i == 63 else 1 << i
                    changed[distance, 5] ^= -(2**63) if j == 63 else 1 << j
                    seen.add(fingerprint(changed.view(torch.float64)))
        assert len(seen) == 22 * 64 * 2
    finally:
        _library.use_isa("auto")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matrices_of_few_values_are_told_apart(dtype):
    """Graphs, ternary weights, permutations: nearly all of their bits are zero."""
    generator = torch.Generator().manual_seed(1)
    W = torch.zeros(64, 64, dtype=dtype)
    seen, made = {fingerprint(W)}, {W.numpy(force=True).tobytes() if dtype != torch.bfloat16 else bytes(8192)}
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=dtype)
    for _ in range(5000):
        places = torch.randint(64 * 64, (2,), generator=generator)
        W.view(-1)[places] = values[torch.randint(7, (2,), generator=generator)]
        seen.add(fingerprint(W))
        made.add(bytes(W.view(torch.uint8).numpy()))
    assert len(seen) == len(made)


@needs_library
def test_small_entries_are_forgotten_too():
    """What takes no bytes by itself, such as bounds, takes some as an entry."""
    cache.clear()
    for step in range(3 * cache.MOST_KEPT):
        cache.remembered(torch.full((4,), float(step)), "bounds", lambda: [0.0, 1.0])
    assert len(cache._entries) == cache.MOST_KEPT and cache.held() == 0
