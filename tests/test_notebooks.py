"""Static gates: what every notebook must look like, without running it."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import median

import grpodx_utils as gx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {p.stem: json.loads(p.read_text("utf-8")) for p in PATHS}
NUMBERS = [p.stem.split("_")[0] for p in PATHS]  # 01, 02, 03, 03b, ...
REPO = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["grpodx"]["repo"]
HELPER = ast.parse((ROOT / "grpodx_utils.py").read_text("utf-8"))


def sources(nb, kind):
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == kind]


@pytest.fixture(params=list(NOTEBOOKS))
def stem(request):
    return request.param


@pytest.fixture
def nb(stem):
    return NOTEBOOKS[stem]


def test_the_series_is_complete():
    assert sorted(NUMBERS) == NUMBERS and len(set(NUMBERS)) == len(NUMBERS)
    whole = [n for n in NUMBERS if len(n) == 2]
    assert whole == [f"{i:02d}" for i in range(1, len(whole) + 1)] and len(whole) >= 10


def test_head_cell(stem, nb):
    head = "".join(nb["cells"][0]["source"])
    number = stem.split("_")[0]
    assert head.startswith(f"# {number} · ")
    link = f"https://colab.research.google.com/github/{REPO}/blob/main/notebooks/"
    assert f"{link}{stem}.ipynb" in head
    for words in (
        "You will learn",
        "**Needs:**",
        "**Run time:**",
        "not medical advice",
    ):
        assert words in head, words
    assert "@" not in head, "a run time is still missing"
    for other in re.findall(r"notebooks/(\w+)\.ipynb", head):
        assert other in NOTEBOOKS, other


def test_setup_cell_is_the_same_everywhere(nb):
    first = next(iter(NOTEBOOKS.values()))
    assert sources(nb, "code")[0] == sources(first, "code")[0]
    assert f'REPO = "{REPO}"' in sources(nb, "code")[0]


def test_readme_uses_the_same_repository_name():
    readme = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?=[/#)\s`]|\.git)", readme)
    found = [f for f in found if not f.startswith("assets")]
    mine = [f for f in found if f.split("/")[1] == REPO.split("/")[1]]
    assert mine and set(mine) == {REPO}
    for stem in NOTEBOOKS:
        assert f"{REPO}/blob/main/notebooks/{stem}.ipynb" in readme


def test_parameters_cell(nb):
    tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert [c for c in nb["cells"] if c["cell_type"] == "code"].index(tagged[0]) == 1


def test_parameters_are_known_and_checked(nb, tmp_path, monkeypatch):
    """One line checks them, before anything that needs them; as given they pass."""
    cells = [c for c in nb["cells"] if c["cell_type"] == "code"]
    set_here = re.findall(r"^([A-Z_]+)\b", "".join(cells[1]["source"]), re.M)
    known = json.loads((ROOT / "data" / "schemas.json").read_text("utf-8"))
    assert set(set_here) <= set(known["parameters"]["properties"])
    rest = [c for c in cells[2:] if "definitions" not in c["metadata"].get("tags", [])]
    assert "gx.check_parameters(globals())" in "".join(rest[0]["source"])
    monkeypatch.chdir(tmp_path)
    given = {"gx": gx}
    exec("".join(cells[1]["source"]), given)
    gx.check_parameters(given)


def test_metadata(nb):
    meta = nb["metadata"]
    assert meta["accelerator"] == "GPU" and meta["colab"]["gpuType"] == "T4"
    assert meta["kernelspec"]["name"] == "python3"
    assert "widgets" not in meta, "widget state is saved; run nbstripout"


def test_size_and_balance(nb):
    code, text = sources(nb, "code"), sources(nb, "markdown")
    assert 20 <= len(nb["cells"]) <= 45
    assert len(text) >= 0.6 * len(code)
    lengths = [len(c.splitlines()) for c in code[1:]]
    assert max(lengths) <= 30 and median(lengths) <= 13
    assert max(len(line) for c in code for line in c.splitlines()) <= 88
    assert any("assert" in c for c in code)


def test_ends_with_recap_try_next(nb):
    tail = "\n".join(sources(nb, "markdown")[-2:])
    assert "## Recap" in tail and "## Try it" in tail and "## Next" in tail


MODEL_LIBRARIES = {"torch", "transformers", "trl", "unsloth", "peft", "openai"}


def imported(tree):
    """Top-level names of all modules that a piece of code imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            found |= {ast.unparse(a).strip("'\"").split(".")[0] for a in node.args}
    return found


def test_the_helper_is_thin_and_knows_no_model_library():
    text = (ROOT / "grpodx_utils.py").read_text("utf-8")
    assert len(text.splitlines()) <= 780
    assert not imported(HELPER) & MODEL_LIBRARIES
    inside = imported(ast.parse("def f():\n    from torch import nn"))
    assert "torch" in inside and "trl" in imported(
        ast.parse("importlib.import_module('trl.trainer')")
    )


def defined(tree):
    """Names of functions, classes and constants that a piece of code defines on top."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if is_name(n)}
    return names


def is_name(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def used_from_helper(nb):
    return set(re.findall(r"\bgx\.([A-Za-z_]+)", "\n".join(sources(nb, "code"))))


def carried(tree):
    """Types that come with public functions and classes: what these take, return or
    raise. Nobody has to name them."""
    found = set()
    for node in tree.body:
        for part in ast.walk(node):
            if isinstance(part, (ast.arg, ast.AnnAssign)) and part.annotation:
                found |= set(re.findall(r"\w+", ast.unparse(part.annotation)))
            elif isinstance(part, ast.FunctionDef) and part.returns:
                found |= set(re.findall(r"\w+", ast.unparse(part.returns)))
            elif isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call):
                found.add(ast.unparse(part.exc.func))
    return {n for n in found if n[0].isupper() and not n.isupper()}


def test_every_public_name_of_the_helper_is_used_by_two_notebooks():
    public = {n for n in defined(HELPER) if not n.startswith("_")} - carried(HELPER)
    counts = dict.fromkeys(public, 0)
    for nb in NOTEBOOKS.values():
        for name in used_from_helper(nb) & public:
            counts[name] += 1
    few = {name: n for name, n in counts.items() if n < 2}
    assert not few, few


def test_every_gx_name_exists(nb):
    assert used_from_helper(nb) <= defined(HELPER), used_from_helper(nb) - defined(
        HELPER
    )


def definitions(nb):
    """The parsed cells of a notebook that are tagged `definitions`."""
    tagged = [c for c in nb["cells"] if "definitions" in c["metadata"].get("tags", ())]
    return [ast.parse("".join(c["source"])) for c in tagged]


def named(tree):
    """Functions, classes and CONSTANTS: what must stand in one place only."""
    return {n for n in defined(tree) if n[0].isupper() or is_defined(tree, n)}


def is_defined(tree, name):
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(n, kinds) and n.name == name for n in tree.body)


def test_no_definition_stands_twice():
    """What the helper or an earlier notebook defines is not defined again."""
    owner = {n: "the helper" for n in defined(HELPER)}
    for stem, nb in NOTEBOOKS.items():
        shared = {n for tree in definitions(nb) for n in named(tree)}
        everything = [ast.parse(c) for c in sources(nb, "code")]
        mine = {n for tree in everything for n in defined(tree) if is_defined(tree, n)}
        again = {n: owner[n] for n in mine | shared if n in owner}
        assert not again, (stem, again)
        owner |= dict.fromkeys(shared, stem)


def has_effect(node):
    """Whether a top-level statement of a definitions cell may do more than define."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
        return False
    if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)):
        return True
    calls = [n.func for n in ast.walk(node.value) if isinstance(n, ast.Call)]
    return any(ast.unparse(call) not in HARMLESS for call in calls)


HARMLESS = {"gx.notebook", "torch.cuda.is_available", "dict", "set"}
HARMLESS.add("os.environ.setdefault")  # for a library that reads it when imported
HARMLESS.add("'q_proj k_proj v_proj o_proj gate_proj up_proj down_proj'.split")


def test_definitions_only_define(nb):
    for tree in definitions(nb):
        odd = [ast.unparse(node)[:80] for node in tree.body if has_effect(node)]
        assert not odd, odd
    for code in ("print(1)", "x = open('a')", "model.eval()", "y = load_doctor()"):
        assert has_effect(ast.parse(code).body[0]), code


def test_notebooks_import_from_earlier_ones_only(stem, nb):
    code, number = "\n".join(sources(nb, "code")), stem.split("_")[0]
    calls = re.findall(r"gx\.notebook\((\w+|\"\w+\")\)(.*)", code)
    for argument, rest in calls:
        listed = re.findall(r"\"(\w+)\"", argument + rest)
        assert listed and all(n in NUMBERS and n < number for n in listed), listed


@pytest.mark.parametrize("number", NUMBERS)
def test_definitions_run_without_the_rest_of_their_notebook(number):
    """In one process, as tests and later notebooks use them; and only once."""
    names = {n for tree in definitions(nb_of(number)) for n in defined(tree)}
    module = gx.notebook(number)
    assert names <= set(vars(module)) and module is gx.notebook(number)


def nb_of(number):
    return next(nb for stem, nb in NOTEBOOKS.items() if stem.split("_")[0] == number)


def test_an_unknown_notebook_is_one_sentence():
    with pytest.raises(ValueError, match="no file notebooks/77_"):
        gx.notebook("77")


def test_no_secrets_and_no_absolute_paths(nb):
    code = "\n".join(sources(nb, "code"))
    assert not re.search(
        r"sk-[A-Za-z0-9]{8}|hf_[A-Za-z]{10}|api_key\s*=\s*[\"']\w", code
    )
    every = json.dumps(nb)
    assert not re.search(r"[\"' ](/home/|/root/|/Users/|/work/|/tmp/)", every)


def test_outputs_are_from_a_full_clean_run(nb):
    cells = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for out in cell["outputs"]:
            assert out["output_type"] != "error"
            text = "".join(out.get("text", ""))
            assert "Traceback" not in text and len(text.splitlines()) < 60
    assert "SMOKE = True" not in json.dumps(nb)


def test_helper_import_is_light_and_silent():
    code = "import sys, grpodx_utils; print([m for m in ('torch', 'trl', 'unsloth', "
    code += "'transformers', 'matplotlib', 'pandas') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert run.stdout.strip() == "[]" and run.stderr == ""


def test_nothing_at_the_top_level_that_is_not_asked_for():
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    allowed = {"notebooks", "grpodx_utils.py", "data", "README.md", "requirements.txt",
               "tests", "Makefile", "pyproject.toml", "LICENSE", ".gitignore", ".ci",
               ".github", "CITATION.cff", "CONTRIBUTING.md"}  # fmt: skip
    assert {p.split("/")[0] for p in listed} <= allowed
