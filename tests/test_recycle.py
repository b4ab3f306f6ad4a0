"""Memory of large results is used again, and never while anybody can see it."""

import gc
import threading

import pytest
import torch
from problems import gaussian

import deq
from deq import recycle
from deq.profiling import memory
from deq.profiling.counter import Counter

ROWS, WIDTH = 8192, 256  # 8 MB in float32


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    recycle.clear()
    yield
    recycle.clear()


def large(dtype=torch.float32, rows=ROWS):
    return torch.empty(rows, WIDTH, dtype=dtype)


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_comes_back_when_its_tensor_dies(self, dtype):
        like = large(dtype, 2 * ROWS)
        x = recycle.empty_like(like)
        assert x.shape == like.shape and x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 64 == 0
        address = x.data_ptr()
        assert recycle.empty_like(like).data_ptr() != address  # x is alive
        del x
        assert recycle.held() >= like.nbytes
        assert recycle.empty(like, (WIDTH, 2 * ROWS)).data_ptr() == address

    @pytest.mark.parametrize(
        "hold",
        [lambda x: x[3], lambda x: x.detach(), lambda x: x.numpy(), lambda x: x.T, lambda x: x.untyped_storage()],
    )
    def test_is_kept_from_others_by_whoever_sees_it(self, hold):
        x = recycle.empty_like(large())
        x.fill_(1.0)
        address, view = x.data_ptr(), hold(x)
        del x
        assert recycle.held() == 0
        assert recycle.empty_like(large()).data_ptr() != address
        del view
        assert recycle.held() == 2 * large().nbytes

    def test_comes_back_from_another_thread(self):
        held = [recycle.empty_like(large())]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert recycle.held() == large().nbytes

    def test_small_and_other_tensors_are_left_to_torch(self):
        for like in (torch.empty(100), large(rows=ROWS - 1), large(torch.bfloat16, 2 * ROWS)):
            x = recycle.empty_like(like)
            assert x.shape == like.shape and x.dtype == like.dtype
            del x
        assert recycle.held() == 0

    def test_what_is_kept_is_bounded_and_the_size_last_used_stays(self, monkeypatch):
        monkeypatch.setattr(recycle, "BUDGET_BYTES", 40 << 20)
        live = [recycle.empty_like(large(rows=ROWS + i)) for i in range(6)]
        addresses = [x.data_ptr() for x in live]
        while live:
            live.pop(0)
        assert 32 << 20 < recycle.held() <= 40 << 20
        assert recycle.empty_like(large(rows=ROWS + 5)).data_ptr() == addresses[5]
        assert recycle.clear() > 0 and recycle.held() == 0

    def test_one_that_is_larger_than_the_bound_goes_back_to_the_system(self, monkeypatch):
        monkeypatch.setattr(recycle, "BUDGET_BYTES", 4 << 20)
        del_me = recycle.empty_like(large())
        del del_me
        assert recycle.held() == 0

    @pytest.mark.skipif(not memory.can_measure(), reason="peaks are read from Linux's /proc")
    def test_a_measured_peak_counts_it(self):
        recycle.empty_like(large())
        assert recycle.held() > 0
        assert memory.peak_of(lambda: recycle.empty_like(large()).fill_(1.0)) >= large().nbytes


class TestResults:
    def test_gradients_of_steps_share_memory_and_keep_their_values(self):
        """dW of 16 MB: one that is kept is not written over, one that is dropped is."""
        W, c, g = gaussian(2048, 4)
        W, c = W.requires_grad_(), c.requires_grad_()

        def step():
            return torch.autograd.grad(deq.solve(W, c, on_failure="raise").z, W, g)[0]

        first = step()
        kept = first.clone()
        second = step()
        assert second.data_ptr() != first.data_ptr()
        assert torch.equal(first, kept) and torch.equal(second, kept)
        address = first.data_ptr()
        del first
        assert step().data_ptr() == address

    def test_gradients_accumulate(self):
        W, c, g = gaussian(2048, 300)  # more samples than the library sums up itself
        W, c = W.requires_grad_(), c.requires_grad_()
        for _ in range(2):
            deq.solve(W, c, on_failure="raise").z.backward(g)
        twice = W.grad
        W.grad = None
        deq.solve(W, c, on_failure="raise").z.backward(g)
        torch.testing.assert_close(twice, 2 * W.grad)

    def test_equilibria(self):
        W, c, _ = gaussian(WIDTH, ROWS)
        first = deq.solve(W, c).z
        kept, address = first.clone(), first.data_ptr()
        assert torch.equal(deq.solve(W, c).z, kept) and torch.equal(first, kept)
        del first
        assert deq.solve(W, c).z.data_ptr() == address

    def test_who_counts_memory_sees_it(self):
        W, c, _ = gaussian(WIDTH, ROWS)
        with Counter() as counter:
            solution = deq.solve(W, c)
        assert counter.counts.retained == solution.z.nbytes + solution.stats.nbytes

    @pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
    def test_transforms_and_compilers(self):
        W, c, g = gaussian(WIDTH, ROWS)
        expected = deq.solve(W, c).z.clone()
        out, pull = torch.func.vjp(lambda c: deq.solve(W, c).z, c)
        torch.testing.assert_close(out, expected)
        assert pull(g)[0].isfinite().all()
        compiled = torch.compile(lambda c: deq.solve(W, c).z, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(c), expected)
