"""A repository seen as text: its files, its modules, and what each of them imports. Nothing of it is imported here."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDERS = [".ci", "benchmarks", "core", "docs", "experiments", "models", "tests"]
MADE = {"__pycache__", "dist", "outputs"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain that begins with a name, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (root := dotted(node.value)):
        return f"{root}.{node.attr}"
    return ""


def inside(name: str, package: str) -> bool:
    """Whether `name` is `package` or lies in it."""
    return f"{name}.".startswith(f"{package}.")


def walk_start(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: no function bodies, nothing under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS | ast.Lambda):
            continue
        if isinstance(child, ast.If) and dotted(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            continue
        yield child
        yield from walk_start(child)


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The full name of everything that is imported, `a.b` for `from a import b`; relative ones keep their dots."""
    for node in nodes:
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from ("." * level + ".".join(filter(None, [module, name.name])) for name in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if dotted(function).rpartition(".")[2] in {"import_module", "__import__"}:
                    yield name


@dataclass(eq=False)
class Module:
    """One source file of a package; `wing` is the top folder it lives under: core, models or experiments."""

    name: str
    path: Path
    wing: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def syntax(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.syntax))

    @cached_property
    def imports(self) -> set[str]:
        """Everything imported, also inside functions, under TYPE_CHECKING and by a literal import_module."""
        return set(imported(self.nodes))

    @cached_property
    def start_imports(self) -> set[str]:
        """What is imported as soon as this module is."""
        return set(imported(walk_start(self.syntax)))

    @cached_property
    def mentions(self) -> set[str]:
        """Imported names, and what is reached through them: `import torch as t; t.ops.x` mentions torch.ops.x."""
        bound = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                roots = [name.name.split(".")[0] for name in node.names if not name.asname]
                bound |= dict(zip(roots, roots, strict=True))
                bound |= {name.asname: name.name for name in node.names if name.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                bound |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        chains = [dotted(node).partition(".") for node in self.nodes if isinstance(node, ast.Attribute)]
        return self.imports | {f"{bound[root]}.{rest}" for root, _, rest in chains if root in bound}

    @cached_property
    def n_lines(self) -> int:
        """Lines of text without those of tables: constants NAME = {...}, [...] or (...) at the top level."""
        total = len(self.text.splitlines())
        for node in self.syntax.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if all(dotted(target).isupper() for target in targets):
                    total -= (node.end_lineno or node.lineno) - node.lineno + 1
        return total


class Tree:
    """The modules of the packages below `root`, by name, and every file that belongs to the repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        sources = [(root / "core/src", "core")]
        sources += [(path, wing) for wing in ("models", "experiments") for path in sorted(root.glob(f"{wing}/*/src"))]
        self.modules: dict[str, Module] = {}
        for folder, wing in sources:
            for path in sorted(folder.rglob("*.py")):
                name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
                self.modules[name] = Module(name, path, wing)
        self.wings = {name.split(".")[0]: module.wing for name, module in self.modules.items()}

    @cached_property
    def rooms(self) -> set[str]:
        """The folders and files directly in core."""
        return {".".join(name.split(".")[:2]) for name in self.modules if name.startswith("core.")}

    @cached_property
    def files(self) -> list[Path]:
        """Every file that belongs to the repository; hidden and made ones are left out."""
        found = [path for path in sorted(self.root.iterdir()) if path.is_file() and not path.name.startswith(".")]
        for folder in FOLDERS:
            for path in sorted((self.root / folder).rglob("*")):
                parts = path.relative_to(self.root / folder).parts
                if path.is_file() and not any(part in MADE or part.startswith(".") for part in parts):
                    found.append(path)
        return found

    def short(self, path: Path) -> str:
        """The path as seen from the root."""
        return path.relative_to(self.root).as_posix()

    def resolve(self, name: str) -> str | None:
        """The first-party module that an imported name lives in; the name may be of a class or a function."""
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return name or None

    @cached_property
    def needs(self) -> dict[str, set[str]]:
        """module -> the first-party modules that it imports anywhere."""
        return {name: self.own(module.imports) for name, module in self.modules.items()}

    @cached_property
    def start_needs(self) -> dict[str, set[str]]:
        """module -> the first-party modules that are imported as soon as it is."""
        return {name: self.own(module.start_imports) for name, module in self.modules.items()}

    def own(self, names: set[str]) -> set[str]:
        """The first-party modules among imported names."""
        return {module for name in names if (module := self.resolve(name))}


def closure(needs: dict[str, set[str]], start: Iterable[str]) -> set[str]:
    """Everything that is reached from `start`, itself included."""
    seen: set[str] = set()
    todo = list(start)
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += needs[name]
    return seen


def package_files(tree: Tree) -> dict[str, list[set[str]]]:
    """folder -> the modules in it, a set for each package: models/<name>/src/<name> stands for those of all models."""
    found: dict[str, list[set[str]]] = {}
    for folder, wing in {module.path.parent: module.wing for module in tree.modules.values()}.items():
        name = tree.short(folder)
        if wing != "core":
            package = name.split("/")[1]
            name = "/".join("<name>" if part == package else part for part in name.split("/"))
        found.setdefault(name, []).append({path.name for path in folder.glob("*.py")} - {"__init__.py"})
    return found


def drawn_tree(tree: Tree) -> dict[str, set[str]]:
    """folder -> the Python files that README names in it, below its heading `The tree`.

    A row that begins with a name and `/` is a folder, those indented more are in it; `<anything>` is written <name>.
    """
    readme = tree.root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    block = text.partition("\n## The tree\n")[2].partition("```")[2].partition("```")[0]
    drawn: dict[str, set[str]] = {}
    open_folders: list[tuple[int, str]] = []
    for row in filter(str.strip, block.splitlines()):
        indent, first = len(row) - len(row.lstrip()), row.split()[0]
        open_folders = [each for each in open_folders if each[0] < indent]
        if first.endswith("/"):
            open_folders.append((indent, re.sub("<.*?>", "<name>", first.rstrip("/"))))
        folder = "/".join(name for _, name in open_folders)
        drawn.setdefault(folder.partition("/")[0], set())
        drawn.setdefault(folder, set()).update(re.findall(r"(?<![\w./])\w+\.py\b", row))
    return drawn


def is_tensor(argument: ast.arg) -> bool:
    """Whether an argument is annotated as a tensor, or as something of tensors."""
    names = ast.walk(argument.annotation) if argument.annotation else ()
    return any(dotted(node).rpartition(".")[2] == "Tensor" for node in names)


def public_functions(tree: Tree, module: Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """The public functions and methods of a module, each with its docstring and that of its class.

    A method that overrides that of a first-party class is described there, unless it has a docstring itself.
    """
    described = {(cls, name) for each in tree.modules.values() for cls, name, _ in methods(each)}
    for node in module.syntax.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            parents = [dotted(base).rpartition(".")[2] for base in node.bases]
            for _, name, method in methods(module, node):
                own = ast.get_docstring(method) or ""
                if not name.startswith("_") and (own or not any((parent, name) in described for parent in parents)):
                    yield method, own + (ast.get_docstring(node) or "")


def methods(
    module: Module, of: ast.ClassDef | None = None
) -> Iterator[tuple[str, str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Class, name and text of every method of a module, or of one class in it."""
    for node in [of] if of else module.syntax.body:
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, FUNCTIONS):
                yield node.name, part.name, part
