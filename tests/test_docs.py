"""Every python block of README.md runs when it is pasted alone, and those of a page in docs/ one after the other.
Docstrings tell the arguments and errors of what packages export, and a file's legend every letter of its names.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
Definition = ast.FunctionDef | ast.ClassDef
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in path.read_text(encoding="utf-8")
]


def blocks(page: str) -> list[tuple[int, str]]:
    """(line number, code) of each python block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (text[: found.start(1)].count("\n"), found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


ALONE = [pytest.param(line, code, id=f"line {line}") for line, code in blocks("README.md")]


@pytest.mark.parametrize(("line", "code"), ALONE)
def test_a_block_of_the_readme_runs_alone(
    line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n" * line + code, str(ROOT / "README.md"), "exec"), {"__name__": "README.md"})


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page}
    with torch.random.fork_rng(devices=[]):
        for line, code in blocks(page):
            # blank lines before it make a traceback name the line of the page
            exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)


def test_there_is_something_to_run() -> None:
    assert {"README.md", "docs/transformers.md"} <= set(PAGES) and all(blocks(page) for page in PAGES)


class Sources:
    """What packages export, read off their files; nothing is imported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.definitions: dict[str, dict[str, Definition]] = {}
        self.imports: dict[str, dict[str, tuple[str, str]]] = {}

    def exported(self) -> dict[str, Definition]:
        """Functions and classes that a package names in its `__all__`, by the dotted name of where they are defined."""
        found = {}
        for path in self.root.rglob("__init__.py"):
            package = ".".join(path.parent.relative_to(self.root).parts)
            for name in exports(ast.parse(path.read_text(encoding="utf-8"))):
                place = self.place_of(package, name)
                if place is not None:
                    found[f"{place[0]}.{name}"] = place[1]
        return dict(sorted(found.items()))

    def place_of(self, module: str, name: str) -> tuple[str, Definition] | None:
        """The module that defines `name`, and how, for one that may import it; None for what is neither."""
        if module not in self.definitions:
            stem = self.root.joinpath(*module.split("."))
            path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            body = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
            # the last of a name: what follows its overloads
            self.definitions[module] = {x.name: x for x in body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
            checked = [part for node in body if isinstance(node, ast.If) for part in node.body]
            self.imports[module] = {
                alias.asname or alias.name: (node.module, alias.name)
                for node in [*body, *checked]
                if isinstance(node, ast.ImportFrom) and node.module not in (None, module)
                for alias in node.names
            }
        if name in self.definitions[module]:
            return module, self.definitions[module][name]
        return self.place_of(*self.imports[module][name]) if name in self.imports[module] else None


def exports(tree: ast.Module) -> list[str]:
    """The strings of `__all__`, and of a table of lazy names that it is made of."""
    given = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and node.value is not None
    }
    if not isinstance(given.get("__all__"), ast.List):
        return []
    found = []
    for item in given["__all__"].elts:  # type: ignore[attr-defined]
        if isinstance(item, ast.Starred) and isinstance(item.value, ast.Name):
            found += [key.value for key in given[item.value.id].keys]  # type: ignore[attr-defined]
        else:
            found.append(item.value)
    return found


def lacks(node: Definition) -> list[str]:
    """What the docstring of a function or class leaves out, in words."""
    doc, maker, head = ast.get_docstring(node) or "", None, "Args"
    parameters, more = [], True
    if isinstance(node, ast.FunctionDef):
        maker = node
    else:
        methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        if any(ast.unparse(call).startswith("dataclass") for call in node.decorator_list):
            maker, head = methods.get("__post_init__"), "(?:Args|Attributes)"
            annotated = [ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)]
            parameters = [name for name in annotated if not name.startswith("_")]
        elif "__init__" in methods:
            maker = methods["__init__"]
            doc += "\n\n" + (ast.get_docstring(maker) or "")
    if maker is not None and maker.name != "__post_init__":
        arguments = maker.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        parameters = [argument.arg for argument in every if argument.arg not in ("self", "cls")]
        more = bool(arguments.vararg or arguments.kwarg)
    named = names_in(section(doc, head))
    found = [f"no word on {name}" for name in parameters if name not in named and len(parameters) > 1]
    found += [f"{name} is no parameter" for name in sorted(named - set(parameters)) if not more]
    raises = maker is not None and any(isinstance(part, ast.Raise) for part in ast.walk(maker))
    if raises and not section(doc, "Raises"):
        found.append("no Raises")
    return found


def section(doc: str, head: str) -> str:
    """The indented lines under a heading."""
    found = re.search(rf"^( *){head}:\n((?:\1 +.*\n|\n)*)", doc + "\n", re.MULTILINE)
    return "" if found is None else found.group(2)


def names_in(entries: str) -> set[str]:
    """`a` and `b` of an entry "a, b: ...", which begins a line or follows a semicolon."""
    heads = re.findall(r"(?:^ *|; )(\w+(?:, \w+)*):", entries, re.MULTILINE)
    return {name for head in heads for name in head.split(", ")} - {"None", "True", "False"}


def test_what_is_exported_tells_its_arguments_and_errors() -> None:
    exported = Sources(ROOT / "src").exported()
    assert len(exported) > 300
    short = [f"{name}: {', '.join(found)}" for name, node in exported.items() if (found := lacks(node))]
    assert not short, "\n".join(short)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(a, b):\n '''Of a and b.'''", ["no word on a", "no word on b"]),
        ("def f(a, b):\n '''Of both.\n\n Args:\n  a: one. b: in the text alone.\n '''", ["no word on b"]),
        ("def f(a, *, b):\n '''Of both.\n\n Args:\n  a: one; b: two.\n '''", []),
        ("def f(a, b, **c):\n '''Of both.\n\n Args:\n  a, b: them; d: one of c.\n '''", []),
        ("def f(a, b):\n '''Of both.\n\n Args:\n  a, b: them.\n  c: gone.\n '''", ["c is no parameter"]),
        ("def f(a):\n '''Of one.'''\n raise ValueError", ["no Raises"]),
        ("def f(a):\n '''Of one.\n\n Raises:\n  ValueError: always.\n '''\n raise ValueError", []),
        ("class C:\n '''Of both.'''\n def __init__(self, a): raise ValueError", ["no Raises"]),
        ("class C:\n '''Of both.\n\n Args:\n  a, b: them.\n '''\n def __init__(self, a, b): pass", []),
        ("@dataclass(frozen=True)\nclass C:\n '''Of both.'''\n a: int\n b: int", ["no word on a", "no word on b"]),
        ("@dataclass\nclass C:\n '''Of both.\n\n Attributes:\n  a, b: them.\n '''\n a: int\n b: int", []),
    ],
)  # fmt: skip
def test_a_short_docstring_is_found(code: str, expected: list[str]) -> None:
    node = ast.parse(code).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef)) and lacks(node) == expected


def letters_without_a_word(text: str) -> str:
    """Letters in the suffixes of a file's names, `q_BHND`, that its legend does not list."""
    code = re.sub(r'"""(?:.|\n)*?"""|\'{3}(?:.|\n)*?\'{3}|"[^"\n]*"|\'[^\'\n]*\'|#.*', "", text)
    suffixes = re.findall(r"\b_?[a-z]\w*?_([A-Z][A-Za-z0-9]*)\b", code)
    legend = re.search(r"^Shape letters: (.*(?:\n.+)*)", text, re.MULTILINE)
    listed = re.findall(r"(?<!\w)[A-Za-z](?!\w)", legend.group(1)) if legend else []
    return "".join(sorted({letter for letter in "".join(suffixes) if letter.isalpha()} - set(listed)))


def test_a_file_lists_the_letters_of_its_names() -> None:
    """The letters of a room's `authors.py` and `claim.py` are those of its other files."""
    files = [path for path in (ROOT / "src").rglob("*.py") if path.name not in ("authors.py", "claim.py")]
    short = [
        f"{path}: {found}" for path in files if (found := letters_without_a_word(path.read_text(encoding="utf-8")))
    ]
    assert not short, "\n".join(short)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_BHN = 1", "BHN"),
        ('"""Of tokens.\n\nShape letters: B batch, N tokens,\nH heads.\n"""\nq_BHN = _made(k_BH1D)', "D"),
        ('"""Of tokens.\n\nShape letters: B batch, H, W picture, n, m blocks.\n"""\nkeep_BHnm = x_BHW + LARGE_N', ""),
    ],
)
def test_a_letter_that_is_not_listed_is_found(text: str, expected: str) -> None:
    assert letters_without_a_word(text) == expected
