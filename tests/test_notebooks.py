"""Static gates: what every notebook must look like, without running it."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {p.stem: json.loads(p.read_text("utf-8")) for p in PATHS}
REPO = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["grpodx"]["repo"]
HELPER = ast.parse((ROOT / "grpodx_utils.py").read_text("utf-8"))
HELPER_NAMES = {
    n.name for n in HELPER.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
}


def sources(nb, kind):
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == kind]


@pytest.fixture(params=list(NOTEBOOKS))
def stem(request):
    return request.param


@pytest.fixture
def nb(stem):
    return NOTEBOOKS[stem]


def test_the_series_is_complete():
    assert [p.stem[:2] for p in PATHS] == [f"{i:02d}" for i in range(1, len(PATHS) + 1)]
    assert len(PATHS) >= 7


def test_head_cell(stem, nb):
    head = "".join(nb["cells"][0]["source"])
    assert head.startswith(f"# {stem[:2]} · ")
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
    assert max(len(line) for c in code for line in c.splitlines()) <= 100
    assert any("assert" in c for c in code)


def test_ends_with_recap_try_next(nb):
    tail = "\n".join(sources(nb, "markdown")[-2:])
    assert "## Recap" in tail and "## Try it" in tail and "## Next" in tail


def test_no_helper_is_defined_again(nb):
    for cell in sources(nb, "code"):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.name not in HELPER_NAMES, node.name


def test_every_gx_name_exists(nb):
    names = HELPER_NAMES | {
        t.id
        for n in HELPER.body
        if isinstance(n, ast.Assign)
        for t in n.targets
        if isinstance(t, ast.Name)
    }
    used = set(re.findall(r"\bgx\.([A-Za-z_]+)", "\n".join(sources(nb, "code"))))
    assert used <= names, used - names


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
               ".github"}  # fmt: skip
    assert {p.split("/")[0] for p in listed} <= allowed
