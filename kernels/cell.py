"""The cell of a deep equilibrium model in one kernel: product with W, injection, activation and residual in one pass.

One template computes ``x = z W^T`` of a tile and ends it, while ``x`` is still in registers, in one of three ways:

    cell            out = act(x + c)
    adjoint_cell    out = d * (x + g), with A for W and u for z
    derivative      out = act'(x + c)

The first two also write what a solver judges a sample by, ``||out - z||^2`` and ``||out||^2``: one partial sum per tile
in a slot of its own, which the caller adds in a fixed order. No atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deq.activations import ACTIVATIONS, get_activation

from .activations import derivative as activation_derivative
from .activations import value as activation_value
from .compilation import Compilation
from .tiles import ALIGNMENT, DTYPES, PRECISIONS, RAGGED_SAMPLES, TILES, Tiles, cell_tiles

VALUE, ADJOINT, DERIVATIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BAND = tl.constexpr(8)
# Whether a kernel is compiled or interpreted is settled when it is defined.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def cell(
    z: Tensor, W: Tensor, c: Tensor, activation: str, *, precision: str = "ieee", tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``out = act(z W^T + c)`` and the partial sums of its residual. No autograd.

    z, c: (B, m), W: (m, m), one dtype of float32, float64, bfloat16, float16; m >= 1, B >= 0. Any strides, but what the
    kernel cannot read well is copied first: rows of z or c that are not contiguous, W when neither its rows nor its
    columns are, addresses that are no multiples of 16 elements when m is. Sums are float32, for float64 float64.
    precision: how float32 is multiplied: "ieee", or on tensor cores as "tf32x3" (three products) or "tf32" (one).
    tiles: default :func:`~deq.kernels.tiles.cell_tiles`.
    Returns out (B, m), contiguous, in the dtype of z, and step2, size2 (n, B), float32 or float64: their sums over the
    n tiles of units are ``||out - z||^2`` and ``||out||^2`` of every sample, taken before ``out`` is rounded to its
    dtype. Squares leave the range of float32 at norms of 1e19 and 1e-22: scale the problem where those may come.
    Raises ValueError for an argument with the wrong shape, dtype or device, or an unknown activation or precision.
    """
    number = get_activation(activation).number
    return _launch(VALUE.value, number, {"z": z, "W": W, "c": c}, precision, tiles)


def adjoint_cell(
    u: Tensor, A: Tensor, d: Tensor, g: Tensor, *, precision: str = "ieee", tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``out = d * (u A^T + g)`` and the partial sums of its residual: the cell of the implicit gradient.

    With ``A = W.mT``, d = :func:`derivative` at the equilibrium and g the gradient of the loss there, the fixed point
    is the gradient of c. u, d, g: (B, m), A: (m, m); all else as in :func:`cell`.
    """
    return _launch(ADJOINT.value, 0, {"u": u, "A": A, "g": g, "d": d}, precision, tiles)


def derivative(
    z: Tensor, W: Tensor, c: Tensor, activation: str, *, precision: str = "ieee", tiles: Tiles | None = None
) -> Tensor:
    """``act'(z W^T + c)``, (B, m). Arguments and errors of :func:`cell`."""
    number = get_activation(activation).number
    return _launch(DERIVATIVE.value, number, {"z": z, "W": W, "c": c}, precision, tiles)[0]


def _launch(
    epilogue: int, activation: int, operands: dict[str, Tensor], precision: str, tiles: Tiles | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(operands, precision)
    z, W, c, *rest = (readable(name, operand) for name, operand in operands.items())
    d = rest[0] if rest else None
    B, m = z.shape
    tiles = tiles or cell_tiles(B, m, _name(z.dtype), precision)
    columns = triton.cdiv(m, tiles.units)
    out = torch.empty(B, m, dtype=z.dtype, device=z.device)
    sums = torch.float64 if z.dtype == torch.float64 else torch.float32
    step2, size2 = torch.empty(2, columns, B, dtype=sums, device=z.device)
    if B > 0:
        with torch.cuda.device_of(z):
            cell_kernel[(triton.cdiv(B, tiles.samples) * columns,)](
                z,
                W,
                c,
                d,
                out,
                step2,
                size2,
                B,
                m,
                z.stride(0),
                *W.stride(),
                c.stride(0),
                d.stride(0) if rest else 0,
                EPILOGUE=epilogue,
                ACTIVATION=activation,
                PRECISION=precision,
                BLOCK_B=tiles.samples,
                BLOCK_N=tiles.units,
                BLOCK_K=tiles.depth,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
                enable_fp_fusion=True,
            )
    return out, step2, size2


def readable(name: str, operand: Tensor) -> Tensor:
    """The operand, copied if the kernel would be slow on its strides or wrong about them, or about its sign: of a view
    with torch's negative bit it would read the memory as it is."""
    operand = operand.resolve_neg()
    along, across = operand.stride(1), operand.stride(0)
    if name in ("W", "A") and along != 1:
        along, across = across, along
    aligned = operand.shape[1] % ALIGNMENT or (across % ALIGNMENT == 0 and operand.data_ptr() % 16 == 0)
    return operand if along == 1 and aligned else operand.clone(memory_format=torch.contiguous_format)


def _check(operands: dict[str, Tensor], precision: str) -> None:
    (first, z), (_, W), *_ = operands.items()
    name = _name(z.dtype)
    if name not in DTYPES:
        raise ValueError(f"{first} must be of dtype {', '.join(DTYPES)}; got {name}")
    if z.dim() != 2 or z.shape[1] < 1:
        raise ValueError(f"{first} must have shape (B, m) with m >= 1; got {tuple(z.shape)}")
    for key, operand in operands.items():
        shape = (z.shape[1], z.shape[1]) if operand is W else tuple(z.shape)
        if tuple(operand.shape) != shape:
            raise ValueError(
                f"{key} must have shape {shape} beside {first} {tuple(z.shape)}; got {tuple(operand.shape)}"
            )
        if operand.dtype != z.dtype:
            raise ValueError(f"{key} must be {name} like {first}; got {_name(operand.dtype)}")
        if operand.device != z.device:
            raise ValueError(f"{key} must be on {z.device} like {first}; got {operand.device}")
    if not z.is_cuda and not INTERPRETED.value:
        raise ValueError(f"{first} must be on a CUDA device, as Triton has no interpreter here; got {z.device}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}")
    if precision != "ieee" and z.dtype != torch.float32:
        raise ValueError(f"precision={precision!r} is a way to multiply float32; {first} is {name}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@triton.jit(do_not_specialize=["B"])  # one compilation for all batch sizes
def cell_kernel(
    z_ptr,
    w_ptr,
    c_ptr,
    d_ptr,
    out_ptr,
    step2_ptr,
    size2_ptr,
    B,
    m,
    stride_z,
    stride_wn,
    stride_wk,
    stride_c,
    stride_d,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (BLOCK_B, BLOCK_N) tile of the output. Rows of z, c and d are contiguous, their strides are between samples;
    w may have any strides. See the functions above for the operands."""
    tile_b, tile_n = tile_of(tl.program_id(0), tl.cdiv(B, BLOCK_B), tl.cdiv(m, BLOCK_N))

    in_b = tl.arange(0, BLOCK_B) < B - tile_b * BLOCK_B
    in_n = (tl.arange(0, BLOCK_N) < m - tile_n * BLOCK_N)[None, :]
    inside = in_b[:, None] & in_n
    # 64-bit offsets: B m passes 2^31 long before memory ends.
    b = tile_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = (tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    z_ptrs = z_ptr + b[:, None] * stride_z + k[None, :]
    w_ptrs = w_ptr + n * stride_wn + k[:, None] * stride_wk
    next_k = tl.full((), BLOCK_K, tl.int64)
    if z_ptr.dtype.element_ty == tl.float64:
        x = tl.zeros((BLOCK_B, BLOCK_N), tl.float64)
    else:
        x = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    # The compiler overlaps loads and products in `for` only; the interpreter of Triton 3.6 has no run-time range.
    if INTERPRETED:
        done = 0
        while done < m:
            x = multiply_add(x, z_ptrs, w_ptrs, in_b, in_n, m - done, PRECISION, BLOCK_K)
            z_ptrs += BLOCK_K
            w_ptrs += next_k * stride_wk
            done += BLOCK_K
    else:
        for done in range(0, m, BLOCK_K):
            x = multiply_add(x, z_ptrs, w_ptrs, in_b, in_n, m - done, PRECISION, BLOCK_K)
            z_ptrs += BLOCK_K
            w_ptrs += next_k * stride_wk

    # Added last: a large injection in the running sum would cost the product its low bits.
    x += tl.load(c_ptr + b[:, None] * stride_c + n, mask=inside, other=0.0).to(x.dtype)
    if EPILOGUE == VALUE:
        out = activation_value(x, ACTIVATION)
    elif EPILOGUE == ADJOINT:
        out = x * tl.load(d_ptr + b[:, None] * stride_d + n, mask=inside, other=0.0).to(x.dtype)
    else:
        out = activation_derivative(x, ACTIVATION)
    tl.store(out_ptr + b[:, None] * m + n, out.to(out_ptr.dtype.element_ty), mask=inside)
    if EPILOGUE != DERIVATIVE:
        out = tl.where(in_n, out, 0.0)  # act(0) need not be zero
        step = out - tl.load(z_ptr + b[:, None] * stride_z + n, mask=inside, other=0.0).to(x.dtype)
        slot = tile_n.to(tl.int64) * B + b
        tl.store(step2_ptr + slot, tl.sum(step * step, axis=1), mask=in_b)
        tl.store(size2_ptr + slot, tl.sum(out * out, axis=1), mask=in_b)


@triton.jit
def tile_of(program, tiles_b, tiles_n):
    """The tile that a program computes. Consecutive ones go down a band of BAND tiles of samples before they move on in
    W: what runs at the same time then shares its rows of z and of W in the L2 cache."""
    first = program // (BAND * tiles_n) * BAND
    height = tl.minimum(tiles_b - first, BAND)
    place = program - first * tiles_n
    return first + place % height, place // height


@triton.jit
def multiply_add(x, z_ptrs, w_ptrs, in_b, in_n, left, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """``x + z W^T`` for the next BLOCK_K of the ``left`` terms of the inner dimension."""
    in_k = tl.arange(0, BLOCK_K) < left
    z = tl.load(z_ptrs, mask=in_b[:, None] & in_k[None, :], other=0.0)
    w = tl.load(w_ptrs, mask=in_k[:, None] & in_n, other=0.0)
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16
        z = z.to(x.dtype)
        w = w.to(x.dtype)
    return tl.dot(z, w, x, input_precision=PRECISION, out_dtype=x.dtype)


# Ending, activation (one for each kind of arithmetic: comparison, exponential with a series, error function), the
# direction in which W is contiguous (the adjoint's A is a transposed W), and whether the width is a multiple of 16.
_KINDS = (
    ("value", "relu", "rows", "aligned"),
    ("value", "tanh", "rows", "aligned"),
    ("value", "tanh", "rows", "ragged"),
    ("value", "tanh", "columns", "aligned"),
    ("value", "gelu", "rows", "aligned"),
    ("derivative", "gelu", "rows", "aligned"),
    ("adjoint", "identity", "columns", "aligned"),
    ("adjoint", "identity", "columns", "ragged"),
    ("adjoint", "identity", "rows", "aligned"),
)
_TYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
_ENDINGS = {"value": VALUE, "derivative": DERIVATIVE, "adjoint": ADJOINT}


def compilations() -> list[Compilation]:
    """Everything that can be launched, in every kind. The backend evaluates the cell in float32 as tf32x3 alone."""
    return [
        _compilation(dtype, precision, tiles, *kind)
        for dtype in DTYPES
        for precision in (PRECISIONS if dtype == "float32" else PRECISIONS[:1])
        for tiles in TILES[dtype if precision == "ieee" else "tf32"]
        for kind in _KINDS
        if kind[-1] == "aligned" or tiles.samples <= RAGGED_SAMPLES
    ]


def _compilation(
    dtype: str, precision: str, tiles: Tiles, ending: str, activation: str, weight: str, width: str
) -> Compilation:
    constants = {
        "EPILOGUE": _ENDINGS[ending].value,
        "ACTIVATION": ACTIVATIONS[activation].number,
        "PRECISION": precision,
        "BLOCK_B": tiles.samples,
        "BLOCK_N": tiles.units,
        "BLOCK_K": tiles.depth,
    }
    if ending != "adjoint":
        constants["d_ptr"] = None
    constants["stride_wk" if weight == "rows" else "stride_wn"] = 1  # compiled in, as at run time
    sums = "*fp64" if dtype == "float64" else "*fp32"
    types = {}
    for name in cell_kernel.arg_names:
        if name not in constants:
            pointer = sums if name.endswith("2_ptr") else f"*{_TYPES[dtype]}"
            types[name] = pointer if name.endswith("_ptr") else "i32"
    aligned = (name for name in types if name.endswith("_ptr") or (width == "aligned" and name != "B"))
    multiplied = dtype if precision == "ieee" else f"{dtype} as {precision}"
    what = ending if ending == "adjoint" else f"{ending} of {activation}"
    return Compilation(
        name=f"cell, {what}, W by {weight}, {width}, {multiplied}, {tiles}",
        group=f"cell, {multiplied}, {tiles}",
        function="cell:cell_kernel",
        types=types,
        constants=constants,
        aligned=tuple(aligned),
        warps=tiles.warps,
        stages=tiles.stages,
        chosen=precision == "tf32x3",
    )
