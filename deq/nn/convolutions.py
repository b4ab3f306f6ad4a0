"""Convolutions that guarantee an equilibrium, whatever training does."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


def convolution_norm_bound(weight: Tensor) -> Tensor:
    """Upper bound of the 2-norm of a convolution with ``weight`` (out, in, h, w), stride 1, zero padding. A scalar in
    float64, or float32 for any other weight.

    The least of: the sum over positions of the norms of the (out, in) matrices there (triangle inequality), and
    ``sqrt(h w)`` times the norm of the weight as a matrix, unfolded in each of four ways (Singla and Feizi 2021).
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # torch has no norms of matrices in 16 bits
    out, into, h, w = weight.shape
    places = weight.permute(2, 3, 0, 1).reshape(h * w, out, into)
    by_place = torch.linalg.matrix_norm(places, 2).sum()
    unfolded = (
        weight.permute(0, 2, 1, 3).reshape(out * h, into * w),
        weight.permute(0, 3, 1, 2).reshape(out * w, into * h),
        weight.reshape(out, into * h * w),
        weight.permute(1, 0, 2, 3).reshape(into, out * h * w),
    )
    norms = torch.stack([torch.linalg.matrix_norm(matrix, 2) for matrix in unfolded])
    return torch.minimum(by_place, norms.amin() * (h * w) ** 0.5)


class _Contractive(nn.Module):
    def __init__(self, bound: float):
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        norm = convolution_norm_bound(weight)
        exceeds = norm > self.bound
        # Not the bound over the norm, clamped: of a weight of zeros that has no derivative.
        return weight * torch.where(exceeds, self.bound / torch.where(exceeds, norm, 1.0), 1.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def contractive_convolution(layer: nn.Conv2d, bound: float = 0.95) -> nn.Conv2d:
    """Keep the 2-norm of ``layer`` at most ``bound``, by a parametrisation of its weight in place; returns the layer.

    ``z = act(conv(z) + c)`` with a 1-Lipschitz activation then has one equilibrium and the plain iteration finds it.
    Raises ValueError for strides, dilations, groups and padding modes for which the bound does not hold.
    """
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"layer must be a Conv2d; got {type(layer).__name__}")
    if layer.stride != (1, 1) or layer.dilation != (1, 1) or layer.groups != 1 or layer.padding_mode != "zeros":
        raise ValueError(f"layer must have stride 1, dilation 1, one group and zero padding; got {layer}")
    if not 0 < bound < 1:
        raise ValueError(f"bound must lie in (0, 1); got {bound!r}")
    parametrize.register_parametrization(layer, "weight", _Contractive(bound))
    return layer


class MonotoneConv2d(nn.Module):
    """The linear map ``W z = (1 - mu) z - A^T A z + B z - B^T z`` of convolutions A and B on z (B, channels, H, W).

    ``sym(I - W) >= mu I`` whatever A and B are, so that ``z = act(W z + c)`` has one equilibrium for any nondecreasing
    1-Lipschitz activation (Winston and Kolter 2020). The plain iteration need not find it: solve with Anderson, Broyden
    or Newton-Krylov.

    kernel_size: odd, positive. mu: in (0, 1]. Parameters A, B (channels, channels, k, k), started so that W is small.
    """

    def __init__(self, channels: int, kernel_size: int = 3, mu: float = 0.1, device=None, dtype=None):
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels must be a positive integer; got {channels!r}")
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd and positive; got {kernel_size!r}")
        if not 0 < mu <= 1:
            raise ValueError(f"mu must lie in (0, 1]; got {mu!r}")
        self.mu, self.padding = mu, kernel_size // 2
        shape = (channels, channels, kernel_size, kernel_size)
        self.A = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``A = sqrt(1 - mu)`` at the centre and noise elsewhere cancels the identity of W."""
        channels, _, k, _ = self.A.shape
        std = 0.1 / (channels * k * k) ** 0.5
        self.A.normal_(0.0, std)
        self.A[:, :, self.padding, self.padding] += (1 - self.mu) ** 0.5 * torch.eye(
            channels, dtype=self.A.dtype, device=self.A.device
        )
        self.B.normal_(0.0, std)

    def forward(self, z: Tensor) -> Tensor:
        convolve = lambda z, K: F.conv2d(z, K, padding=self.padding)  # noqa: E731
        transpose = lambda z, K: F.conv_transpose2d(z, K, padding=self.padding)  # noqa: E731
        return (1 - self.mu) * z - transpose(convolve(z, self.A), self.A) + convolve(z, self.B) - transpose(z, self.B)

    def extra_repr(self) -> str:
        return f"{self.A.shape[0]}, kernel_size={self.A.shape[2]}, mu={self.mu}"
