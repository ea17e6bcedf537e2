"""Run the notebooks' own setup cell as Colab would; WORK stands for /content."""

import json
import os
import shutil
import subprocess
import sys
import types
from importlib import import_module, invalidate_caches
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = sys.argv[1]
LEFT_ALONE = (
    "torch torchvision numpy pandas scipy matplotlib ipywidgets ipython ipykernel"
)


def versions():
    invalidate_caches()
    return {d.name.lower().replace("_", "-"): d.version for d in distributions()}


notebook = json.loads((ROOT / "notebooks/02_disease_bank.ipynb").read_text("utf-8"))
cell = next("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
here = cell.replace("/content", WORK).replace("https://github.com/{REPO}", str(ROOT))
for name in ("IPython", "PIL", "numpy"):  # what Colab loads before the first cell
    import_module(name)


def run_cell():
    os.chdir(WORK)
    sys.modules["google.colab"] = types.ModuleType("google.colab")
    try:
        exec(here, {})
    finally:
        del sys.modules["google.colab"]


before = versions()
run_cell()
after = versions()
for name in sorted(before):
    if before[name] != after.get(name):
        print(f"   moved: {name} {before[name]} -> {after.get(name)}")
print("   new:", ", ".join(f"{n} {after[n]}" for n in sorted(set(after) - set(before))))

for name in LEFT_ALONE.split():
    assert after[name] == before[name], f"the setup must leave {name} alone"
print("   left alone:", ", ".join(f"{n} {after[n]}" for n in LEFT_ALONE.split()))
lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x[0] != "#"]
wanted = [x.split("#")[0].strip() for x in lines if "# local" not in x]
for name, pin in (x.split("==") for x in wanted if "==" in x):
    assert after[name.replace("_", "-")] == pin, f"{name} is not {pin}"
print("   as pinned:", ", ".join(x for x in wanted if "==" in x))

ours = {x.split("=")[0].split(">")[0].replace("_", "-") for x in wanted}
pip_check = [sys.executable, "-m", "pip", "check"]
for line in subprocess.run(
    pip_check, capture_output=True, text=True
).stdout.splitlines():
    if line.split()[0].lower().replace("_", "-") in ours:
        print("   pip check:", line)

for name in ("unsloth", "trl", "datasets"):  # in the process that installed them
    import_module(name)
print("   unsloth, datasets and trl load without a restart")

# Once more, as if pandas had loaded the old pyarrow before the upgrade.
shutil.rmtree(f"{WORK}/GRPODx")
sys.modules["pyarrow"].__version__ = before["pyarrow"]
try:
    run_cell()
except SystemExit as stop:
    print("   with the old pyarrow loaded it says:", stop)
else:
    raise AssertionError("the setup cell must ask for a restart")
