"""One look at the whole tree of a configuration before anything is built."""

from core.config.configurable import Configurable
from core.config.errors import joined
from core.config.fields import Problem, abstract_problem, field_types, join, type_problems, walk


def validate(config: Configurable.Config) -> None:
    """Raise one `UserError` that lists everything wrong in the tree, a line `path: message` each."""
    if problems := problems_of(config):
        raise joined(problems)


def problems_of(config: Configurable.Config) -> list[Problem]:
    """Everything wrong in the tree.

    A config that has a wrong type in or below it is not asked for its `problems()`, which may rely on the types.
    """
    wrong_types = wrong_field_types(config)
    problems = list(wrong_types)
    for path, node in walk(config):
        if reason := abstract_problem(type(node)):
            problems.append((path, reason))
        elif not any(inside(wrong, path) for wrong, _ in wrong_types):
            problems += [(join(path, name), message) for name, message in node.problems()]
    return problems


def wrong_field_types(config: Configurable.Config) -> list[Problem]:
    """Every field of the tree whose value does not fit its type."""
    return [
        problem
        for path, node in walk(config)
        for name, annotation in field_types(type(node)).items()
        for problem in type_problems(getattr(node, name), annotation, join(path, name))
    ]


def inside(path: str, root: str) -> bool:
    """Whether a path is `root` or lies below it."""
    return not root or f"{path}.".startswith(f"{root}.")
