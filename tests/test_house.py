"""The layout rules: who may import what, one stem per op in all its places, what C++ may include, sizes of files."""

import ast
import graphlib
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from curvkern.bench.cases import CASES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "curvkern"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Part of curvkern -> (other parts it may import, packages besides the standard library). Data flows one way:
# checkpoint -> layerwise -> curvature -> methods -> restore. Imports inside functions count like those at the top.
MAY_IMPORT = {
    "__init__": ({"backend", "ops", "restore"}, set()),
    "__main__": ({"cli", "env"}, set()),
    "backend": ({"_C"}, {"torch"}),
    "kernels": (set(), {"torch", "triton"}),
    "ops": ({"backend", "kernels"}, {"torch"}),
    "trace": (set(), {"torch"}),
    "memory": (set(), set()),
    "checkpoint": ({"trace"}, {"torch", "safetensors", "huggingface_hub"}),
    "layerwise": ({"checkpoint", "memory", "trace"}, {"torch", "transformers"}),
    "curvature": ({"backend", "ops", "layerwise", "trace"}, {"torch", "transformers", "safetensors"}),
    "methods": ({"ops", "curvature", "checkpoint"}, {"torch", "pydantic"}),
    "training": ({"backend", "ops"}, {"torch", "transformers"}),
    "evaluate": (set(), {"torch", "transformers"}),
    "report": ({"memory", "ops", "trace"}, {"torch", "rich", "jinja2", "matplotlib"}),
    "measure": ({"curvature", "evaluate", "report"}, {"rich"}),
    "progress": (set(), {"rich"}),
    # A method may score prompts while it searches, so this knows how a model is evaluated.
    "restore": (
        {"checkpoint", "layerwise", "curvature", "methods", "evaluate", "ops", "report", "memory", "progress", "trace"},
        {"torch", "transformers", "pydantic", "yaml"},
    ),
    "sweep": ({"methods", "evaluate", "report", "restore"}, {"rich", "matplotlib"}),
    # Makes everything it needs, as a user would: all that is public.
    "demo": (
        {"__init__", "checkpoint", "ops", "curvature", "methods", "evaluate", "report", "restore", "training"},
        {"torch", "transformers", "tokenizers", "peft", "rich", "matplotlib"},
    ),
    # Compiles references for comparison, so it asks the registry for them; tunes kernels; makes the models of the pass.
    "bench": (
        {"__init__", "backend", "kernels", "ops", "report", "curvature", "layerwise", "checkpoint", "trace"},
        {"torch", "rich", "matplotlib", "safetensors", "transformers", "tokenizers"},
    ),
    # Says where _C lies, without importing it.
    "env": ({"__init__", "backend", "ops", "_C"}, {"torch"}),
    "cli": (
        {"__init__", "restore", "report", "sweep", "demo", "env", "bench", "checkpoint", "curvature", "measure"},
        {"typer", "yaml", "torch"},
    ),
}

PARTS = "|".join([*MAY_IMPORT, "_C"])

# What is no op although it lies where ops lie.
NO_OPS = {
    "csrc/cuda/device.cu": "questions about the driver",
    "csrc/cpu/parallel.cpp": "the thread loop that all CPU kernels share",
    "curvkern/ops/mix_lists.py": "mix of whole lists of tensors",
    "curvkern/ops/mix_passes.py": "the passes that mix is made of",
    "curvkern/ops/philox.py": "random words, which ops regenerate instead of storing",
    "curvkern/kernels/philox.py": "the same in Triton",
    "curvkern/kernels/tuned.py": "launches measured on this GPU",
    "curvkern/ops/score.py": "scores and gates, which select and rollback share",
    "curvkern/ops/selector.py": "the class over select's ops",
    "curvkern/ops/alignment_scores.py": "scores from small Grams, over subspace's map",
    "curvkern/ops/token_loss.py": "rows of logits, on which loss's functions work",
    "tests/ops/test_philox.py": "their test",
    "curvkern/ops/delta.py": "the alignment delta, on which subspace's ops work",
    "curvkern/ops/samples.py": "packed samples, on which fisher's ops work",
    "curvkern/ops/sample_products.py": "fisher's norms and dots of samples",
    "curvkern/ops/fisher_cpu.py": "fisher on the CPU",
    "curvkern/kernels/packed.py": "loads and products of packed tokens, for fisher and sample_products",
    "curvkern/kernels/fisher_tiles.py": "fisher's tiles for each GPU",
    "curvkern/kernels/sample_products.py": "fisher's norms and dots of samples",
}


def part(path):
    """``ops`` for curvkern/ops/rollback.py, ``cli`` for curvkern/cli.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Full names of all modules a file imports: by statement at any depth, or by a string that names one of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{a.name}" if node.module == "curvkern" else node.module for a in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"curvkern\.({PARTS})(\.\w+)*(:\w+)?", str(node.value)):
            yield node.value.split(":")[0]


def name(path):
    return str(path.relative_to(ROOT))


# imports --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_follow_the_table(path):
    here = part(path)
    parts, packages = MAY_IMPORT[here]
    for module in imported(path):
        top, _, rest = module.partition(".")
        if top == "curvkern":
            there = rest.split(".")[0]
            there = there if there in MAY_IMPORT or there == "_C" else "__init__"  # a name of the public API
            assert there == here or there in parts, f"{here} may not import {module}"
        else:
            assert top in sys.stdlib_module_names or top in packages, f"{here} may not import {top}"


def test_the_table_has_no_circle():
    graphlib.TopologicalSorter({here: parts for here, (parts, _) in MAY_IMPORT.items()}).prepare()


def test_the_parts_of_the_pass_import_each_other_one_way():
    files = sorted((PACKAGE / "restore").glob("[!_]*.py"))
    graph = {f"curvkern.restore.{path.stem}": set(imported(path)) for path in files}
    assert "curvkern.restore.stream" in graph["curvkern.restore.run"]
    assert not any("curvkern.restore" in modules for modules in graph.values()), "the package imports its files"
    graphlib.TopologicalSorter(graph).prepare()


def test_only_launch_imports_the_native_extension():
    importers = {name(path) for path in MODULES if "curvkern._C" in imported(path)}
    assert importers == {"curvkern/backend/launch.py", "curvkern/env.py"}


def test_only_register_calls_torch_library():
    callers = {name(path) for path in MODULES if re.search(r"\btorch\.library\b", code(path))}
    assert callers == {"curvkern/backend/register.py"}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part(p) in ("ops", "kernels", "methods", "curvature")], ids=name
)
def test_no_environment_variables_below_the_choice_of_backend(path):
    assert not re.search(r"\bos\.(environ|getenv)\b", code(path))


def code(path):
    """A file's statements without docstrings and comments."""
    return ast.unparse(_Undocumented().visit(ast.parse(path.read_text())))


class _Undocumented(ast.NodeTransformer):
    def visit_Expr(self, node):
        return ast.Pass() if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


# one stem -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CASES)
def test_every_op_is_in_all_its_places(op):
    for place in (f"curvkern/ops/{op}.py", f"curvkern/kernels/{op}.py", f"tests/ops/test_{op}.py"):
        assert (ROOT / place).is_file(), f"{op} has no {place}"
    assert CASES[op], f"{op} has no case"
    for case in CASES[op]:
        assert case.op == op


@pytest.mark.parametrize(
    "pattern", ["csrc/cuda/*.cu", "csrc/cpu/*.cpp", "curvkern/kernels/*.py", "curvkern/ops/*.py", "tests/ops/test_*.py"]
)
def test_what_lies_where_ops_lie_is_an_op(pattern):
    """A test file may also be named for an op and an aspect of it: test_subspace_basis.py."""
    stems = {path: path.stem.removeprefix("test_") for path in ROOT.glob(pattern)}
    strange = [
        name(path)
        for path, stem in stems.items()
        if stem not in {*CASES, "__init__"}
        and name(path) not in NO_OPS
        and not (path.name.startswith("test_") and any(stem.startswith(f"{op}_") for op in CASES))
    ]
    assert not strange, "no op of that name in bench/cases.py"


def test_exceptions_are_still_there():
    for path in NO_OPS:
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("op", CASES)
def test_every_function_that_is_measured_has_its_reference(op):
    module = import_module("curvkern.ops")
    for function in {case.function for case in CASES[op]}:
        assert callable(getattr(module, function))
        stem = function.rstrip("_")
        # The list form of an op on one tensor has that op's.
        assert any(callable(getattr(module, f"{name}_ref", None)) for name in (stem, stem.removesuffix("_list")))


# C++ ------------------------------------------------------------------------------------------------------------------

PLAIN = r"<cstdint>"
STANDARD = r"<[a-z_]+>"
# Of the standard library CPU kernels get fixed-width integers and intrinsics only: whatever it defines inline would be
# compiled once per instruction set under one name, and the linker would keep any one of them.
MAY_INCLUDE = {
    "csrc/launch.h": PLAIN,
    "csrc/rules.h": rf'"launch\.h"|{PLAIN}',
    "csrc/common.cuh": rf'"(launch|rules)\.h"|<cuda\w*\.h>|{PLAIN}',
    "csrc/cpu/parallel.cpp": r'"cpu\.h"|<thread>|<dlfcn\.h>|<pthread\.h>|<sys/mman\.h>',
    "csrc/cpu/": rf'"\.\./(launch|rules)\.h"|"\w+\.h"|<immintrin\.h>|<arm_neon\.h>|{PLAIN}',
    "csrc/cuda/": rf'"\.\./common\.cuh"|"\w+\.cuh"|<cuda\w*\.h>|{PLAIN}',
    "csrc/pairs.h": rf'"launch\.h"|<pybind11/\w+\.h>|{STANDARD}',
    "csrc/bindings.cpp": rf'"(launch|pairs)\.h"|<pybind11/\w+\.h>|{STANDARD}',
}
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes_follow_the_table(path):
    allowed = next(rule for prefix, rule in MAY_INCLUDE.items() if name(path).startswith(prefix))
    for include in re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(), re.MULTILINE):
        assert re.fullmatch(allowed, include), f"{name(path)} may not include {include}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix in (".cu", ".cuh")], ids=name)
def test_launchers_allocate_nothing_and_wait_for_nothing(path):
    assert not re.findall(r"\bcuda(?:Malloc|Free|Memcpy|Memset)\w*|\bcuda\w*Synchronize|\bnew\b|\bmalloc\b", bare(path))


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cpu").glob("*.*")), ids=name)
def test_cpu_kernels_allocate_nothing_and_keep_nothing_outside_their_namespace(path):
    text = bare(path)
    assert not re.findall(r"\b(new|malloc|calloc|realloc|free)\b", text)
    if path.suffix == ".cpp" and path.stem != "parallel":
        assert "namespace curvkern::cpu::CURVKERN_ISA {" in text


@pytest.mark.parametrize("kind, declared", [("CPU", r"CURVKERN_CPU_LAUNCHER\((\w+)\("), ("CUDA", r"\nStatus (\w+)\(")])
def test_every_launcher_is_bound(kind, declared):
    launchers = re.findall(declared, (ROOT / "csrc/launch.h").read_text())
    bound = re.findall(rf"^\s+{kind}\((\w+)\);", (ROOT / "csrc/bindings.cpp").read_text(), re.MULTILINE)
    assert launchers
    assert sorted(launchers) == sorted(bound)


def bare(path):
    """C++ without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


# habits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_assert_checks_input(path):
    """Python run with -O skips them."""
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


def test_a_thing_is_named_by_what_it_does():
    folders = [PACKAGE, ROOT / "csrc", ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"]
    assert not [
        name(p)
        for folder in folders
        for p in folder.rglob("*")
        if re.fullmatch(r"(utils?|helpers?|misc|common)\.py", p.name)
    ]


@pytest.mark.parametrize("folder", ["curvkern", "tests", "benchmarks", "examples", "csrc"])
def test_files_can_be_read_in_one_sitting(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")]
    sizes = {name(path): len(path.read_text().splitlines()) for path in files}
    assert not {path: lines for path, lines in sizes.items() if lines > 400}
