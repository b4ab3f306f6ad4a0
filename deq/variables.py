"""The variables of Python functions: of outer functions, frozen in a copy, and global ones, listed."""

import dis
import functools
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

from torch import nn


def frozen(f: Callable) -> Callable:
    """A copy of f that goes on with what variables of outer functions hold now, and so do the functions that it holds;
    f itself if it is a function that uses no such variables.

    A function holds others in such variables and as defaults; a method, and a :class:`functools.partial`, what they are
    made of. A loop gives such variables other values before the backward pass evaluates f again. Those that f, or a
    function that it holds, assigns to are left as they are.
    """
    return _frozen(f, _written(f, set()), {}) if _has_others(f) else f


def _frozen(f: Callable, written: set[int], copies: dict[int, Callable]) -> Callable:
    if not _has_others(f):
        return f
    if id(f) not in copies:
        copies[id(f)] = f  # for one that holds itself
        again = functools.partial(_frozen, written=written, copies=copies)
        if type(f) is MethodType:
            copies[id(f)] = MethodType(again(f.__func__), f.__self__)
        elif type(f) is functools.partial:
            keywords = {name: again(value) for name, value in f.keywords.items()}
            copies[id(f)] = functools.partial(again(f.func), *map(again, f.args), **keywords)
        else:
            copies[id(f)] = _frozen_function(f, written, again)
    return copies[id(f)]


def _frozen_function(f: FunctionType, written: set[int], again: Callable[[object], object]) -> FunctionType:
    cells = list(f.__closure__ or ())
    for i, cell in enumerate(cells):
        content = _content(cell)
        other = again(content)
        if content is not _EMPTY and id(cell) not in written:
            cells[i] = CellType(other)
    positional = [again(value) for value in f.__defaults__ or ()]
    keywords = {name: again(value) for name, value in (f.__kwdefaults__ or {}).items()}
    before = (*(f.__closure__ or ()), *defaults(f))
    if all(a is b for a, b in zip((*cells, *positional, *keywords.values()), before, strict=True)):
        return f
    g = copied(f, cells)
    g.__defaults__, g.__kwdefaults__ = tuple(positional) or None, keywords or None
    return g


def _written(f: Callable, visited: set[int]) -> set[int]:
    """The cells, by number, that f or a function that it holds assigns to."""
    visited.add(id(f))
    found = set()
    if type(f) is FunctionType and (names := assigned(f.__code__)):
        cells = f.__closure__ or ()
        found = {id(cell) for name, cell in zip(f.__code__.co_freevars, cells, strict=True) if name in names}
    for value in _held_by(f):
        if _has_others(value) and id(value) not in visited:
            found |= _written(value, visited)
    return found


def _has_others(f: object) -> bool:
    """Whether f may hold variables of outer functions, and is no compiled function, which is to stay the same."""
    if type(f) is FunctionType:
        return bool(f.__closure__ or f.__defaults__ or f.__kwdefaults__) and _COMPILED not in f.__dict__
    return type(f) in _MADE_OF_OTHERS


_MADE_OF_OTHERS = (MethodType, functools.partial)
_COMPILED = "_torchdynamo_orig_callable"


def _held_by(f: Callable) -> list[object]:
    """What a function holds in its closure and as defaults; what a method or a partial function is made of."""
    if type(f) is MethodType:
        return [f.__func__]
    if type(f) is functools.partial:
        return [f.func, *f.args, *f.keywords.values()]
    return [*defaults(f), *contents(f)]


def defaults(f: Callable) -> list[object]:
    return [*(getattr(f, "__defaults__", None) or ()), *(getattr(f, "__kwdefaults__", None) or {}).values()]


def contents(f: Callable) -> list[object]:
    """What the variables of outer functions hold that f uses."""
    return [_content(cell) for cell in getattr(f, "__closure__", None) or ()]


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


_EMPTY = object()  # a variable that has no value yet


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
    f = getattr(type(f), "forward", None) if isinstance(f, nn.Module) else f  # TorchScript's classes have none
    first = _function_of(f)
    if first is None:
        return []
    place, found, stack, visited = first.__globals__, [], [f], set()
    for value in stack:
        if type(value) is not FunctionType:
            stack += _held_by(value) if type(value) in _MADE_OF_OTHERS else ()
        elif value.__globals__ is place and value.__code__ not in visited:
            visited.add(value.__code__)
            for name in global_names(value.__code__):
                content = place.get(name, _EMPTY)  # builtins are elsewhere
                if content is not _EMPTY and type(content) is not ModuleType:
                    found.append((place, name, content))
                    stack.append(content)
            stack += _held_by(value)
    return found


def _function_of(f: object) -> FunctionType | None:
    """What is called in the end, if that is a function."""
    while type(f) in _MADE_OF_OTHERS:
        f = _held_by(f)[0]
    return f if type(f) is FunctionType else None


@functools.lru_cache(maxsize=256)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The global variables that a function, or one inside of it, reads and does not assign to."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    read, assigned = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            assigned.add(instruction.argval)
    return tuple(sorted(read.union(*map(global_names, inner)) - assigned))
