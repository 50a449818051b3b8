"""Every setting of a configuration as an option of the command line: its path, how its value is read, what it means."""

import ast
import inspect
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache, reduce
from operator import or_
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from core.config.configurable import Configurable
from core.config.errors import UserError
from core.config.fields import alternatives, default_of, field_types, is_config, join

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec


@dataclass(frozen=True, slots=True)
class Option:
    """One field of one config in a tree."""

    path: str
    node: Configurable.Config
    name: str

    @property
    def annotation(self) -> Any:
        return written_type(field_types(type(self.node))[self.name])

    @property
    def value(self) -> Any:
        return getattr(self.node, self.name)

    def read(self, words: Sequence[str]) -> Any:
        """The value that the words after the option stand for; a flag alone means True. Raises `UserError`."""
        words = list(words)
        if holds(self.annotation, lambda option: option is bool):
            words = [word.capitalize() if word.lower() in ("true", "false") else word for word in words]
        if bool in alternatives(self.annotation):
            words = words or ["True"]
        spec = reader(self.annotation)
        counts = (spec.nargs,) if isinstance(spec.nargs, int) else spec.nargs
        try:
            if counts != "*" and len(words) not in counts or set(words) - set(spec.choices or words):
                raise ValueError
            return spec.instance_from_str(words)
        except ValueError:
            text = shlex.join(words) or "nothing"
            got = f"got {text if len(text) < 200 else f'{text[:60]}... of {len(text):,} characters'}"
            raise UserError(f"--{self.path}: expected {spec.metavar}, {got}") from None

    def text(self) -> str:
        """What `--help` says: the option, its value here, the default of its class if that is another, its meaning."""
        spec = reader(self.annotation)
        field = next(field for field in fields(self.node) if field.name == self.name)
        default = default_of(field)
        shown = [self._shown(self.value)]
        if default is not MISSING and default != self.value:
            shown.append(f"default {self._shown(default)}")
        metavar = "" if self.annotation is bool else f" {spec.metavar}"
        head = f"  --{self.path}{metavar} = {', '.join(shown)}"
        lines = textwrap.wrap(field_docs(type(self.node)).get(self.name, ""), 110)
        return "\n".join([head, *(f"      {line}" for line in lines)])

    def _shown(self, value: Any) -> str:
        if isinstance(value, Configurable.Config):
            return type(value).__qualname__
        return shlex.join(reader(self.annotation).str_from_instance(value)) or "(nothing)"


def options(node: Configurable.Config, path: str) -> Iterator[Option]:
    """The fields of one config that a command line can change."""
    for name, annotation in field_types(type(node)).items():
        if written_type(annotation) is not None:
            yield Option(join(path, name), node, name)


def written_type(annotation: Any) -> Any:
    """What of a type can be written as words: all of it that has no Config in it. None where that is nothing, or what
    says that there is none."""
    words = [option for option in alternatives(annotation) if not holds(option, is_config)]
    return reduce(or_, words) if set(words) - {NoneType} else None


def comparable(name: str) -> str:
    """A name as it is compared: without leading dashes, and with `_` for every `-`."""
    return name.lstrip("-").replace("-", "_")


def holds(annotation: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a type that fits may stand in a value of this type."""
    return fits(annotation) or any(holds(argument, fits) for argument in get_args(annotation))


@cache
def reader(annotation: Any) -> "PrimitiveConstructorSpec":
    """How tyro reads and writes values of this type."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo  # 0.1 s to import

    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(annotation, set()))
    assert isinstance(spec, PrimitiveConstructorSpec), f"tyro cannot read {annotation}"
    return spec


@cache
def field_docs(config: type) -> dict[str, str]:
    """The string under each field in the source of the class and its parents; without the source there is none."""
    docs = {}
    for parent in reversed(config.__mro__[:-1]):
        docs |= _docs_in(parent.__module__).get(parent.__qualname__, {})
    return docs


@cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    docs: dict[str, dict[str, str]] = {}
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    while todo:
        name, node = todo.pop()
        body = getattr(node, "body", [])
        todo += [(join(name, child.name), child) for child in body if isinstance(child, ast.ClassDef)]
        for field, below in zip(body, body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs.setdefault(name, {})[key] = inspect.cleandoc(text)
    return docs
