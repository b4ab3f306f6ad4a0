"""The Cayley map: the equation ``z = act(W z + c)`` iterated with another matrix, in fewer and surer steps.

The activation is the resolvent ``act = (1 + dF)^-1`` of a monotone ``dF``, so that the equation says
``0 in (I - W) z - c + dF(z)``. Peaceman-Rachford splitting with step ``alpha`` iterates the two reflected resolvents:

    x <- K (2 act(x) - x) + c',  z = act(x),  V = ((1 + alpha) I - alpha W)^-1,  K = 2 V - I,  c' = alpha (c + K c).

Its fixed point solves the equation. For ``alpha = 1`` and ANY activation, x is the pre-activation ``u = W z + c``:
``(2 I - W) u = W (2 act(u) - u) + 2 c`` is ``2 u = 2 W act(u) + 2 c`` less ``W u``, ``K = (2 I - W)^-1 W`` and
``c' = 2 (2 I - W)^-1 c``. For another ``alpha`` the activation of the splitting is the resolvent of ``alpha dF``, which
is act itself only for relu (``dF`` a cone); then ``x = (1 - alpha) z + alpha u``, and ``2 relu(x) - x = |x|``.
The adjoint ``p = g + W^T D p`` with the gradient ``u = D p`` is the same with act replaced by D, 0 <= D <= 1:

    x <- K^T (2 D - I) x + alpha (g + K^T g),  u = D x,     alpha = 1, or D of zeros and ones.

Neither needs more than K. A step moves x by ``2 (y - z)``, ``y = V (2 z - x + alpha c)``, which is no residual of the
equation. With a product by W it is: ``x <- x + (I + K) ((1 - alpha) z + alpha (W z + c) - x)`` is the same step in
exact arithmetic, and its fixed point is exact however coarse K is.

Convergence: ``(W + W^T) / 2 < I`` (:func:`is_certified`) gives ``||K||_2 < 1`` for every alpha, and as ``2 act - 1``
does not expand for a nondecreasing 1-Lipschitz act (all of the table but gelu and silu), the map contracts, where the
plain one may diverge. Without the certificate K may still be used, accelerated (Lions, Mercier 1979, SIAM J. Numer.
Anal. 16; for equilibrium models Winston, Kolter 2020).

Mean iterations to 1e-5 (relu, 64 samples, float64, m = 256, trained nets 128, alpha of :func:`choose_alpha`; on demand:
from a measured contraction of 0.8 on; AA3, AA5: Anderson of that depth from the first evaluation):

    | W                       | plain    | plain, AA5 on demand | Cayley   | Cayley, AA3 | Cayley, AA5 |
    | Gaussian, norm 0.9      | 13       | 13                   | 9        | 9           | 9           |
    | Gaussian, radius 1.0    | 38       | 38                   | 24       | 23          | 22          |
    | Gaussian, radius 1.2    | 83       | 62                   | 45       | 39          | 37          |
    | symmetric, norm 0.99    | 30       | 30                   | 14       | 12          | 11          |
    | one mode at 0.95        | 145      | 51                   | 74       | 25          | 20          |
    | monotone, mu = 0.1      | diverges | 132                  | 28       | 27          | 27          |
    | monotone, mu = 1        | diverges | 82                   | 17       | 16          | 16          |
    | net trained for 10 ep.  | 27       | 27                   | 16       | 15          | 14          |
    | net trained for 20 ep.  | 1 fails  | 1 fails              | 15 fail  | 27          | 24          |
"""

import math
import threading

import torch
from torch import Tensor

from .. import _library
from ..activations import get_activation
from ..products import multiply

_kept = threading.local()
BASE = 64  # blocks inverted by elimination; from 48 to 96 all the same, 32 is 1.1x, 128 twice the time at m = 128
ACCURATE = 100.0  # machine epsilons of the probe's residual above which the pivoted inverse is tried as well
TYPICAL_SIZE = 1.5  # root mean square singular value of alpha (I - W) that alpha aims at; choose_alpha says why


@torch.no_grad()
def cayley_matrix(W: Tensor, alpha: float = 1.0) -> Tensor | None:
    """``K = 2 ((1 + alpha) I - alpha W)^-1 - I``, outside autograd: gradients are those of the equation, not of K.

    W: (m, m) or (S, m, m), float32, float64, or 16 bits, for which K is float32; any strides. Returns K contiguous, or
    None where the inverse does not exist, is not finite, or is wrong to half the digits of its dtype; on a GPU, where
    nothing waits for the answer, never None.
    On a CPU a recursive 2 x 2 block inverse without pivoting, stable where ``sym(W) < (1 + 1 / alpha) I``: 2 m^3 flops
    in matrix products (:mod:`deq.products`), no temporary but m^2 / 2. In products (m, m) x (m, m) of torch, one
    thread, Zen 5: 2.9 at m = 128, 1.1 at 256, 0.65 at 512, 0.62 at 1024 (with the blocks multiplied by torch 3.3, 1.6,
    1.2 and 1.16). The blocks on the diagonal are inverted by one thread. The result is checked on a random vector; the
    pivoted inverse takes over when it is not good.
    """
    _check_weight(W)
    if not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a positive number; got {alpha!r}")
    dtype = W.dtype if W.dtype == torch.float64 else torch.float32
    out = torch.empty(W.shape, dtype=dtype, device=W.device)  # W may be batched in any strides; out never is
    for A, K in zip(W.unsqueeze(0) if W.dim() == 2 else W, out.unsqueeze(0) if W.dim() == 2 else out, strict=True):
        if not _fill(K, A, alpha):
            return None
    return out


def _fill(K: Tensor, W: Tensor, alpha: float) -> bool:
    """Write the K of one W; whether it can be used."""
    eps = torch.finfo(K.dtype).eps
    if K.is_cuda:  # not probed, as that would wait for the device: what a bad K leads to is judged with W itself
        _half_shifted(K, W, alpha)
        K.copy_(torch.linalg.inv_ex(K)[0])
        K.diagonal().sub_(1.0)
        return True
    error = math.inf
    if K.device.type == "cpu" and K.shape[0] > BASE:
        _half_shifted(K, W, alpha)
        _invert_(K)
        K.diagonal().sub_(1.0)
        error = _probe_error(K, W, alpha)
    if not error <= ACCURATE * eps:  # true for NaN
        fast = K.clone() if math.isfinite(error) else None
        _half_shifted(K, W, alpha)
        K.copy_(torch.linalg.inv_ex(K)[0])
        K.diagonal().sub_(1.0)
        pivoted = _probe_error(K, W, alpha)
        if fast is not None and not pivoted <= error:
            K.copy_(fast)
        else:
            error = pivoted
    return error <= math.sqrt(eps)


def _half_shifted(K: Tensor, W: Tensor, alpha: float) -> None:
    """``K = ((1 + alpha) I - alpha W) / 2``, whose inverse is 2 V."""
    torch.mul(W.to(K.dtype), -0.5 * alpha, out=K)
    K.diagonal().add_(0.5 * (1.0 + alpha))


def _invert_(K: Tensor) -> None:
    """Invert K (m, m), contiguous, in place, without pivoting between blocks."""
    m = K.shape[0]
    _invert_part_(K, 0, m, _workspace(m * m // 2 + m * BASE, K.dtype), 0)


def _invert_part_(K: Tensor, at: int, size: int, work: Tensor, free: int) -> None:
    """Invert the block of K on its diagonal of ``size`` rows from ``at`` on; ``work`` is free from ``free`` on.

    No nested function: one that calls itself keeps K and work alive until the garbage collector comes."""
    if size <= BASE:
        _invert_block_(_block(K, at, at, size, size))
        return
    head = -(-(size // 2) // BASE) * BASE
    tail, middle = size - head, at + head
    A, B = _block(K, at, at, head, head), _block(K, at, middle, head, tail)
    C, D = _block(K, middle, at, tail, head), _block(K, middle, middle, tail, tail)
    T = work.as_strided((head, tail), (tail, 1), free)
    _invert_part_(K, at, head, work, free)
    multiply(A, B, T)
    multiply(C, T, D, -1.0, adds=True)  # the Schur complement D - C A^-1 B
    _invert_part_(K, middle, tail, work, free + head * tail)
    multiply(T, D, B, -1.0)
    T = work.as_strided((tail, head), (head, 1), free)
    multiply(C, A, T)
    multiply(B, T, A, -1.0, adds=True)
    multiply(D, T, C, -1.0)


def _block(K: Tensor, row: int, column: int, rows: int, columns: int) -> Tensor:
    m = K.shape[0]
    return K.as_strided((rows, columns), (m, 1), K.storage_offset() + row * m + column)  # half the cost of two slices


def _workspace(count: int, dtype: torch.dtype) -> Tensor:
    """Unwritten memory of this thread, kept up to 8 MB: its page faults were a tenth of the time of K at m = 512."""
    held = getattr(_kept, "memory", None)
    if held is None or held.numel() < count or held.dtype != dtype:
        with torch.inference_mode(False):  # what is made inside could not be written to outside
            held = torch.empty(count, dtype=dtype, device="cpu")
        if held.nbytes <= 8 << 20:
            _kept.memory = held
    return held


def _invert_block_(A: Tensor) -> None:
    """Invert a block of at most BASE rows in place. With LAPACK and its calls K takes 1.6 times as long at m = 128."""
    if _library.compiled is not None:
        torch.ops.deq.invert_.default(A)
    else:
        A.copy_(torch.linalg.inv_ex(A)[0])


def _probe_error(K: Tensor, W: Tensor, alpha: float) -> float:
    """``||((1 + alpha) I - alpha W) V x - x|| / ||x||`` for one random x, two products with a vector."""
    m = K.shape[0]
    x = torch.randn(m, dtype=torch.float32, device="cpu", generator=torch.Generator().manual_seed(m)).to(K)
    y = (torch.mv(K, x) + x) / 2
    back = (1.0 + alpha) * y - alpha * torch.mv(W.to(K.dtype), y)
    return float(torch.linalg.vector_norm(back - x) / torch.linalg.vector_norm(x))


@torch.no_grad()
def is_certified(W: Tensor) -> bool:
    """Whether ``(W + W^T) / 2 < I`` is proved: then ``||K||_2 < 1``, and the equilibrium exists and is unique.

    W (m, m) or (S, m, m), all of them. The proof is a Cholesky factorisation in float64, m^3 / 3 flops, that runs to
    completion with a shift above its rounding errors (Rump 2006): about the time of one float32 product (m, m) x (m, m)
    from m = 1024 on, so once for weights at rest, not at every step of a training. False says that there is no proof.
    ``(W + W^T) / 2 < 2 I`` is enough for the unpivoted inverse, not for the contraction: W = 1.5 I has K = 3 I.
    """
    _check_weight(W)
    for A in W.unsqueeze(0) if W.dim() == 2 else W:
        if not bool((A.diagonal() < 1).all()):  # necessary, and the whole answer for most weights that fail
            return False
        A = A.double()
        S = (A + A.mT).mul_(-0.5)
        S.diagonal().add_(1.0)
        m = S.shape[0]
        u = 2.0**-53
        rounding = (m + 2) * u / (1 - (m + 2) * u) * float(S.trace()) + 3 * u * float(torch.linalg.matrix_norm(S))
        S.diagonal().sub_(2 * rounding)
        if not math.isfinite(rounding) or int(torch.linalg.cholesky_ex(S).info) != 0:
            return False
    return True


@torch.no_grad()
def choose_alpha(W: Tensor, activation: str) -> float:
    """The step ``alpha`` for W (m, m) or (S, m, m): 1 but for relu, where it is ``min(1, 1.5 / rms(I - W))`` with the
    root mean square singular value ``rms(A) = ||A||_F / sqrt(m)``.

    A splitting is fast where ``alpha (I - W)`` has eigenvalues near 1 in size. Mean iterations, alpha = 1 -> chosen:
    monotone with mu 0.1: 31 -> 28, mu 1: 26 -> 17, with A or B doubled 50 -> 30 and 60 -> 29; every W of norm at most
    1.1 and the trained ones keep 1. A larger alpha is not chosen: 2 to 3 suits one slow positive mode (outlier 0.95:
    76 -> 31), but Anderson(5) leaves 15 % of that (21 -> 18), and on trained weights alpha = 2 diverges. On a GPU it is
    always 1, as the host does not wait for a number there.
    """
    _check_weight(W)
    if get_activation(activation).name != "relu" or W.numel() == 0 or W.is_cuda:
        return 1.0
    wide = W.to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    m = W.shape[-1]
    largest = float(wide.abs().amax())
    if not 0 < largest < math.inf:
        return 1.0
    # ||I - W||_F^2 = m - 2 tr W + ||W||_F^2, in a unit whose square does not overflow
    unit, count = max(1.0, largest), m * (W.numel() // (m * m))
    wide = wide / unit
    trace = float(wide.diagonal(dim1=-2, dim2=-1).sum())
    frobenius = float(torch.linalg.vector_norm(wide))
    mean_square = (1.0 / unit - 2.0 * trace / count) / unit + frobenius**2 / count
    return min(1.0, TYPICAL_SIZE / math.sqrt(mean_square) / unit) if mean_square > 0 else 1.0


def _check_weight(W: Tensor) -> None:
    if not isinstance(W, Tensor) or not W.dtype.is_floating_point:
        kind = W.dtype if isinstance(W, Tensor) else type(W).__name__
        raise TypeError(f"W must be a floating-point tensor; got {kind}")
    if W.dim() not in (2, 3) or W.shape[-1] != W.shape[-2] or W.shape[-1] == 0:
        raise ValueError(f"W must be (m, m) or (S, m, m) with m of at least 1; got shape {tuple(W.shape)}")
