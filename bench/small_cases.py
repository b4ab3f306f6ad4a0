"""``python -m bench.small_cases``: small ragged problems with every backend of the GPU, forward and backward: by
iteration, by substitution, and one that does not converge.

Stops at the first that is wrong. Made for compute-sanitizer, under which everything takes a hundred times as long.
"""

import sys

import torch

import deq

SHAPES = ((1, 1), (17, 5), (64, 33), (100, 3), (300, 2))  # m, B
SOLVERS = ("plain", "anderson")
TOL = 1e-5


def backends(device: str) -> list[str]:
    """Those that are made for the device and usable here."""
    made_for = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}.get(device, ())
    return [name for name, why in deq.info().backends.items() if name in made_for and not why]


def check(device: str, backend: str) -> int:
    """Solve every case; the number of cases. Raises AssertionError for one that is not solved or whose gradient is not
    that of the reference."""
    count = 0
    for m, B in SHAPES:
        generator = torch.Generator().manual_seed(m)
        W, c = (torch.randn(n, m, generator=generator) for n in (m, B))
        W = (W * (0.45 / m**0.5)).to(device).requires_grad_()
        c = c.to(device).requires_grad_()
        for solver in SOLVERS:
            results = {}
            for name in (backend, "reference"):
                solution = deq.solve(W, c, "tanh", tol=TOL, solver=solver, backend=name)
                assert solution.converged.all(), f"{name}, m = {m}, B = {B}, {solver}: {solution}"
                results[name] = solution.z, *torch.autograd.grad(solution.z.sum(), (W, c))
            for ours, theirs in zip(results[backend], results["reference"], strict=True):
                error = (ours - theirs).norm() / theirs.norm()
                assert error < 20 * TOL, f"{backend}, m = {m}, B = {B}, {solver}: differs by {error:.1e}"
            count += 1
        count += _check_triangular(W.detach(), c, backend)
        failing = deq.solve(30 * W.detach(), c.detach(), "tanh", backend=backend, max_iter=30, on_failure="ignore")
        assert failing.z.isfinite().all(), f"{backend}, m = {m}, B = {B}: not finite"
    return count


def _check_triangular(W: torch.Tensor, c: torch.Tensor, backend: str) -> int:
    """The same for a lower triangular weight."""
    results = {}
    for name in (backend, "reference"):
        weight = (W / 2).requires_grad_()
        z = deq.solve(deq.weights.LowerTriangular(weight), c, "tanh", solver="direct", backend=name).z
        results[name] = z, *torch.autograd.grad(z.sum(), (weight, c))
    for ours, theirs in zip(results[backend], results["reference"], strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < TOL, f"{backend}, triangular, {tuple(c.shape)}: differs by {error:.1e}"
    return 1


def main(device: str = "cuda") -> None:
    found = backends(device)
    if not found:
        raise SystemExit(f"no backend for {device} tensors is usable here\n{deq.info()}")
    for backend in found:
        print(f"{backend}: {check(device, backend)} cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
