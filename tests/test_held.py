"""The tensors that a function holds: replaced in a copy of it, and given their gradients."""

import pytest
import torch

import deq
from deq.held import frozen, with_others


def holders(x, y):
    """Functions of z that hold x, and their value at z: ``0.3 z + 2 x + y``."""

    def nested(z):
        def inner():
            return 0.3 * z + x

        return inner() + x + y

    def pair(z, values=(x, x)):  # defaults are taken as they are: a tuple in them is not looked into
        return 0.3 * z + sum(values) + y

    several = [x, x]

    def mutual(z):
        return nested(z)

    def assigning(z):
        nonlocal x
        x = x + 0
        return 0.3 * z + 2 * x + y

    return {
        "closure": lambda z: 0.3 * z + 2 * x + y,
        "nested": nested,
        "list": lambda z: 0.3 * z + sum(several) + y,
        "default": lambda z, x=x: 0.3 * z + 2 * x + y,
        "keyword": lambda z, *, x=x: 0.3 * z + 2 * x + y,
        "pair": pair,
        "behind": mutual,
        "assigning": assigning,
    }


@pytest.mark.parametrize("kind", holders(torch.zeros(1), torch.zeros(1)))
def test_exchange_of_what_a_function_holds(kind):
    """A copy of it that holds another tensor, where it is the function itself that holds it; f is left as it was."""
    x, y, new, z = (torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(4))
    f = holders(x, y)[kind]
    g = with_others(f, [x], [new])
    possible = kind not in ("pair", "behind", "assigning")
    assert (g is not None) == possible
    if possible:
        torch.testing.assert_close(g(z), 0.3 * z + 2 * new + y)
        torch.testing.assert_close(f(z), 0.3 * z + 2 * x + y)


@pytest.mark.parametrize("kind", [kind for kind in holders(torch.zeros(1), torch.zeros(1)) if kind != "assigning"])
def test_gradients_whatever_holds_the_tensor(kind):
    """To a leaf that f uses itself and through a tensor computed from it. One that assigns is no function of z: what
    it assigns without gradients has none."""
    c = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = deq.fixed_point(holders(3 * c, c)[kind], torch.zeros_like(c), tol=1e-13).z
    (grad,) = torch.autograd.grad(z.sum(), c)
    torch.testing.assert_close(z, 10 * c, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad, torch.full_like(c, 10.0), rtol=1e-11, atol=1e-11)


def test_a_frozen_function_keeps_what_it_held():
    """Its variables, and those of functions that it holds; but not those that are assigned to by one of them."""
    count, total = 0, 0

    def step(z):
        nonlocal total
        total += 1
        return a * z + b[0]

    def f(z):
        nonlocal count
        count += 1
        return (f if z < 0 else step)(abs(z)) + count + total + missing

    a, b = torch.tensor(2.0), (torch.tensor(3.0),)
    g = frozen(f)
    a, b = None, None
    missing = 0  # not yet there when f was frozen
    assert g(1.0) == 5 + 1 + 1 and (count, total) == (1, 1)
    with pytest.raises(TypeError):
        f(1.0)
    plain = lambda z: z  # noqa: E731
    assert frozen(plain) is plain and frozen(torch.cos) is torch.cos
