"""The variables of Python functions: of outer functions, frozen in a copy, and global ones, listed."""

import dis
import functools
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType, ModuleType

from torch import Tensor, nn

HELD = (Tensor, nn.Module, int, float, tuple, list, dict)  # what a backward pass wants as it was in the call


def frozen(f: Callable) -> Callable:
    """A copy of f that goes on with the tensors, modules, numbers and containers that variables of outer functions hold
    now, and so do the functions that it holds; f itself if it uses no such variables.

    A loop gives such variables other values before the backward pass evaluates f again. Those that f, or a function
    that it holds, assigns to are left as they are.
    """
    return _frozen(f, _written(f, set()), {}) if _has_closure(f) else f


def _frozen(f: FunctionType, written: set[int], copies: dict[int, Callable]) -> Callable:
    copies[id(f)] = f  # for one that holds itself
    cells, is_other = list(f.__closure__), False
    for i, cell in enumerate(f.__closure__):
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        if not isinstance(content, HELD):
            if not _has_closure(content):
                continue
            content = copies.get(id(content)) or _frozen(content, written, copies)
        if id(cell) not in written:
            cells[i], is_other = CellType(content), True
    if is_other:
        copies[id(f)] = copied(f, cells)
    return copies[id(f)]


def _written(f: FunctionType, visited: set[int]) -> set[int]:
    """The cells, by number, that f or a function that it holds assigns to."""
    visited.add(id(f))
    names, found = assigned(f.__code__), set()
    if names:
        found = {id(cell) for name, cell in zip(f.__code__.co_freevars, f.__closure__, strict=True) if name in names}
    for cell in f.__closure__:
        try:
            content = cell.cell_contents
        except ValueError:  # an empty cell
            continue
        if _has_closure(content) and id(content) not in visited:
            found |= _written(content, visited)
    return found


def _has_closure(f: object) -> bool:
    """Whether f is a function with variables of outer ones, and no compiled one, which is to stay the same object."""
    return type(f) is FunctionType and bool(f.__closure__) and "_torchdynamo_orig_callable" not in f.__dict__


def copied(f: FunctionType, cells: Sequence[CellType]) -> FunctionType:
    g = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, tuple(cells))
    if f.__kwdefaults__:
        g.__kwdefaults__ = f.__kwdefaults__
    if f.__dict__:
        g.__dict__.update(f.__dict__)
    return g


@functools.lru_cache(maxsize=256)
def assigned(code: CodeType) -> frozenset[str]:
    """The variables of outer functions that a function, or one inside of it, assigns to or deletes."""
    inner = (assigned(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_DEREF", "DELETE_DEREF")}
    return frozenset(own).union(*inner)


def globals_read(f: Callable) -> list[tuple[dict, str, object]]:
    """The global variables that f reads, or a function of its module that it names or holds: the dictionary, the name
    and the value of each. Of a module that is its own forward, not those of modules inside of it.

    They are no copy's, as those of :func:`frozen` are: a function with another dictionary of globals is slower,
    and writes where nobody reads.
    """
    f = type(f).forward if isinstance(f, nn.Module) else f
    f = getattr(f, "__func__", f)
    if type(f) is not FunctionType:
        return []
    place, found, stack, visited = f.__globals__, [], [f], set()
    for function in stack:
        if function.__code__ in visited:
            continue
        visited.add(function.__code__)
        for name in _global_names(function.__code__):
            value = place.get(name)
            if type(value) is ModuleType:
                continue
            if type(value) is FunctionType and value.__globals__ is place:
                stack.append(value)
                found.append((place, name, value))
            elif isinstance(value, HELD):
                found.append((place, name, value))
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            if type(content) is FunctionType and content.__globals__ is place:
                stack.append(content)
    return found


@functools.lru_cache(maxsize=256)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The global variables that a function, or one inside of it, reads and does not assign to."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    read, assigned = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            assigned.add(instruction.argval)
    return tuple(sorted(read.union(*map(_global_names, inner)) - assigned))
