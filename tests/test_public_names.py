"""``__all__`` of every module is a sorted tuple of exactly the public names that the module defines."""

from __future__ import annotations
import __future__

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

import ktls

PACKAGE: Final = Path(__file__).parents[1] / "src" / "ktls"


def module_names() -> list[str]:
    """Every module below ktls, without importing any."""

    def walk(directory: Path, prefix: str) -> list[str]:
        found = []
        for info in pkgutil.iter_modules([str(directory)], prefix):
            found.append(info.name)
            if info.ispkg:
                found += walk(directory / info.name.rpartition(".")[2], info.name + ".")
        return found

    return walk(PACKAGE, "ktls.")


MODULES: Final = [name for name in module_names() if not name.endswith("__main__")]


def tree_of(name: str) -> ast.Module:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(source.read_text(), str(source))


def is_package(name: str) -> bool:
    return PACKAGE.joinpath(*name.split(".")[1:]).is_dir()


def defined(body: list[ast.stmt], *, imported: bool) -> set[str]:
    """Public names bound at the top level of a module, also under ``if`` and ``try``; imports only if asked for."""
    names: set[str] = set()
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Assign(targets=targets):
                for target in targets:
                    names |= {n.id for n in ast.walk(target) if is_stored_name(n)}  # type: ignore[attr-defined]  # is_stored_name has looked
            case ast.AnnAssign(target=ast.Name(id=bound)):
                names.add(bound)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case ast.If(body=then, orelse=otherwise):
                names |= defined(then + otherwise, imported=imported)
            case ast.Try(body=attempt, handlers=handlers, orelse=otherwise):
                names |= defined(attempt + otherwise, imported=imported)
                for handler in handlers:
                    names |= defined(handler.body, imported=imported)
            case ast.ImportFrom(module=module, names=aliases, level=level) if imported:
                if level or (module or "").partition(".")[0] == "ktls":
                    names |= {alias.asname or alias.name for alias in aliases}
            case _:
                pass
    return {name for name in names if not name.startswith("_")}


def is_stored_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def listed(tree: ast.Module) -> tuple[str, ...] | None:
    """``__all__`` as written, if it is written as a tuple of strings."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            assert isinstance(node.value, ast.Tuple), "__all__ is not a tuple"
            return tuple(ast.literal_eval(node.value))
    return None


def sort_key(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """As ruff's RUF022 sorts: constants, classes, the rest; numbers inside names by their value."""
    is_constant, is_class = name.isupper() and len(name) > 1, name[:1].isupper()
    kind = 0 if is_constant else 1 if is_class else 2
    parts = re.split(r"(\d+)", name)
    return kind, [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def test_sort_key_sorts_as_ruff_does() -> None:
    names = ["MAX", "UP_TO", "Alert", "KTLSError", "KeyLimits", "Part2", "Part10", "build", "seal"]
    assert sorted(set(names), key=sort_key) == names


@pytest.mark.parametrize("name", MODULES)
def test_all_names_exactly_what_is_defined(name: str) -> None:
    tree = tree_of(name)
    names = listed(tree)
    if is_package(name):
        # What a package's __init__ imports is there to be re-exported, or else has an underscore.
        available = defined(tree.body, imported=True)
        assert names is not None or not available, "no __all__"
        assert set(names or ()) == available
    else:
        assert names is not None, "no __all__"
        assert set(names) == defined(tree.body, imported=False)
    assert list(names or ()) == sorted(set(names or ()), key=sort_key), "not sorted, or twice"


@pytest.mark.parametrize("name", MODULES)
def test_every_name_can_be_had(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public)


def test_the_package_lists_what_it_has() -> None:
    public = {
        name
        for name, value in vars(ktls).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType | __future__._Feature)  # ``annotations``
    }
    names: tuple[str, ...] = getattr(ktls, "__all__", ())
    modules = {name for name in names if isinstance(getattr(ktls, name), ModuleType)}
    assert set(names) - modules == public
    assert isinstance(names, tuple)
    assert list(names) == sorted(set(names), key=sort_key)
