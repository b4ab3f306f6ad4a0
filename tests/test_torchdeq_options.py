"""Options of deq.torchdeq: wrong ones, those that are left out, and those of parts that a program registers."""

import argparse

import pytest
import torch
from torch import nn

import deq.torchdeq as ours


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"stop_mode": "rel"}, "'f_stop_mode'"),
        ({"f_anderson_m": 3}, "allowed are"),
        ({"f_solvr": "anderson"}, "'f_solver'"),
        ({"max_iter": 3}, "'f_max_iter'"),
    ],
)
def test_ignored_options_are_errors(option, hint):
    with pytest.raises(TypeError, match=f"get_deq has no option .*{hint}"):
        ours.get_deq(**option)
    with pytest.raises(TypeError, match="get_deq has no option"):
        ours.get_deq(option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_solver": "andersen"}, "solver must be one of"),
        ({"f_max_iter": 2.5}, "f_max_iter must be a positive integer"),
        ({"f_stop_mode": "relative"}, "f_stop_mode must be 'abs' or 'rel'"),
        ({"grad": 0}, "grad must be positive integers"),
        ({"grad": [1, 2, 3]}, "grad must have one number or 1"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        ours.get_deq(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_max_iter": "many"}, "f_max_iter must be a number; got 'many'"),
        ({"f_tol": "small"}, "f_tol must be a number; got 'small'"),
        ({"grad": 0.5}, "grad must be a sequence of integers; got 0.5"),
        ({"sup_loc": ["end"]}, "sup_loc must be a sequence of integers; got one with 'end'"),
    ],
)
def test_values_of_another_type(options, message):
    with pytest.raises(TypeError, match=message):
        ours.get_deq(**options)


def test_options_that_are_none():
    """As torchdeq's classes have them by default."""
    f = lambda z: 0.5 * z + 1  # noqa: E731
    states, _ = ours.DEQSliced(indexing=None, sup_loc=None, grad=3)(f, torch.zeros(2, 2))
    assert len(states) == 1


@pytest.mark.parametrize("start", [None, [], 1.0, [1.0, 2.0], [None]])
def test_a_start_that_is_none(start):
    with pytest.raises(TypeError, match="z_init must be a tensor, or a tuple or list of tensors"):
        ours.get_deq()(lambda z: z, start)


def test_solver_options():
    f = lambda z: 0.5 * z + 1  # noqa: E731
    with pytest.raises(TypeError, match=r"has no option mm=3; did you mean 'm'\?"):
        ours.get_deq(f_solver="anderson")(f, torch.zeros(2, 2), solver_kwargs={"mm": 3})
    with pytest.warns(UserWarning, match="lam has no effect"):
        ours.get_deq(f_solver="anderson")(f, torch.zeros(2, 2), solver_kwargs={"lam": 1e-4})
    loose = ours.get_deq()(f, torch.zeros(2, 2), solver_kwargs={"tol": 0.5})[1]["nstep"]
    assert (loose < ours.get_deq()(f, torch.zeros(2, 2))[1]["nstep"]).all()


@pytest.mark.parametrize(
    ("solver", "options", "error", "message"),
    [
        ("anderson", {"m": 0}, ValueError, "m must be at least 1"),
        ("broyden", {"LBFGS_thres": 0}, ValueError, "LBFGS_thres must be at least 1"),
        ("anderson", {"m": 2.5}, TypeError, "m must be an integer; got 2.5"),
        ("anderson", {"tau": 0.0}, ValueError, "tau must lie between 0 and 2; got 0.0"),
        ("fixed_point_iter", {"tau": "half"}, TypeError, "tau must be a number; got 'half'"),
        ("anderson", {"tol": None}, TypeError, "tol must be a number; got None"),
        ("anderson", {"max_iter": "few"}, TypeError, "max_iter must be a number; got 'few'"),
    ],
)
def test_wrong_values_of_a_solver(solver, options, error, message):
    f = lambda z: 0.5 * z + 1  # noqa: E731
    with pytest.raises(error, match=message):
        ours.get_solver(solver)(f, torch.zeros(2, 2), **options)
    assert ours.get_solver("broyden")(f, torch.zeros(2, 2), LBFGS_thres=None)[0].shape == (2, 2)


def test_the_callers_options_are_left_alone():
    args = argparse.Namespace(f_max_iter=7, lr=0.1)
    ours.get_deq(args, ift=True)
    assert vars(args) == {"f_max_iter": 7, "lr": 0.1}
    config = {"f_max_iter": 7}
    ours.get_deq(config, ift=True)
    assert config == {"f_max_iter": 7}


def test_registered_parts():
    ours.register_solver("mine", lambda func, x0, **options: (func(x0), [func(x0)], {"nstep": torch.ones(len(x0))}))
    states, info = ours.get_deq(f_solver="mine")(lambda z: 0 * z + 2, torch.zeros(3, 1))
    assert torch.equal(states[0], torch.full((3, 1), 2.0)) and "nstep" in info
    ours.register_weight_func("last", lambda n, k: float(k == n - 1))
    assert ours.fp_correction(lambda a: a, ([torch.tensor(1.0), torch.tensor(5.0)],), weight_func="last") == 5
    with pytest.raises(TypeError, match="fp_correction has no option"):
        ours.fp_correction(lambda a: a, ([torch.tensor(1.0)],), weight_func="exponential")
    for args in ((), ([], torch.tensor(1.0))):
        with pytest.raises(ValueError, match="args must hold a tensor, or a list of at least one"):
            ours.fp_correction(lambda *args: args[0], args)
    total, values = ours.fp_correction(lambda a: a, ([torch.tensor(1.0)] * 3,), "const", return_loss_values=True, c=2.0)
    assert total == 6 and values == [1, 1, 1]


@pytest.mark.parametrize("how", ["keyword", "dict", "namespace"])
def test_registered_classes_have_options_of_their_own(how):
    """A core, one derived from a core of deq, and a norm."""
    args = {"dict": {"strength": 3}, "namespace": argparse.Namespace(strength=3, lr=0.1)}.get(how)
    keywords = {"strength": 3} if how == "keyword" else {}

    class Core(nn.Module):
        def __init__(self, args):
            super().__init__()
            self.strength = args.get("strength")

    class Derived(ours.DEQSliced):
        def __init__(self, args):
            super().__init__(args)
            self.strength = self.args["strength"]

    class Norm:
        @classmethod
        def apply(cls, module, deq_args, strength=None):
            norm = cls()
            norm.strength = deq_args.get("strength", strength)
            return norm

    for core in (Core, Derived):
        ours.register_deq("own", core)
        assert ours.get_deq(args, core="own", **keywords).strength == 3
    Norm._target_modules = {nn.Linear: ("weight", 0)}
    ours.register_norm("own", Norm)
    model = nn.Sequential(nn.Linear(2, 2))
    ours.apply_norm(model, "own", args=args, **keywords)
    assert model[0]._deq_norm.strength == 3
    with pytest.raises(TypeError, match="get_deq has no option strength=3"):
        ours.get_deq(strength=3)
