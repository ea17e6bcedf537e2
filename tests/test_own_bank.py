"""The README's way to one's own diseases: another bank, a new tiny doctor, training."""

import json

import papermill
import pytest
from conftest import ROOT

import grpodx_utils as gx


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bank of 14 diseases, none of which the notebooks mention."""
    folder = tmp_path_factory.mktemp("own")
    mine = gx.read_json(gx.DATA / "disease_bank.json")[1:15]
    (folder / "mine.json").write_text(json.dumps(mine))
    return folder


@pytest.mark.parametrize(
    ("notebook", "options"),
    [
        ("02_disease_bank", {}),
        ("07_sft_warm_start", {"STEPS": 30, "OUTPUT_DIR": "doctor"}),
        ("04_grpo_training", {"MODEL_NAME": "doctor", "OUTPUT_DIR": "grpo"}),
        ("05_evaluation", {"ADAPTER": "grpo/adapter"}),
        ("06_live_chat", {"ADAPTER": "grpo/adapter"}),
    ],
)
def test_notebooks_run_with_another_bank(place, notebook, options, monkeypatch):
    monkeypatch.setenv("GRPODX_SMOKE", "1")
    options = {
        k: str(place / v) if isinstance(v, str) else v for k, v in options.items()
    }
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{notebook}.ipynb",
        place / f"{notebook}.ipynb",
        {"BANK": str(place / "mine.json"), **options},
        cwd=ROOT,
        kernel_name="python3",
        progress_bar=False,
    )
    if notebook == "02_disease_bank":
        assert "14 diseases, " in (place / f"{notebook}.ipynb").read_text()
