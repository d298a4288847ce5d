"""The notebook of configs/examples, cell by cell in a kernel, on two arms of two steps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from paths import CHECKOUT
from small_corpus import prose_layer, texts, write_folder

NOTEBOOK = CHECKOUT / "configs" / "examples" / "tiny_2x2.ipynb"


def test_the_notebook_has_no_outputs() -> None:
    code = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebook_trains_shows_the_report_and_reads_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="the notebook runs in a kernel: pip install 'replication[test]'")
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbformat import read

    write_folder(tmp_path / "corpus", texts(40))
    suite = {
        "name": "short",
        "arms": ["baseline", "both"],
        "seeds": [1],
        "run": {
            "data": prose_layer(tmp_path / "corpus"),
            "model": {"vocab_size": 300, "n_blocks": 2, "d_model": 32, "d_head": 8, "d_ff": 16},
            "cluster": {"accelerator": "cpu", "threads": 1},
            "training": {"steps": 2, "batch_tokens": 64, "warmup_steps": 1},
            "validation": {"every_steps": 1, "sequences": 4},
            "generation": {"prompts": None},
        },
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(suite))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [CHECKOUT, *filter(None, sys.path)])))
    notebook = read(NOTEBOOK, as_version=4)
    notebook.cells[1].source = 'SUITE, OUT, FLAGS = "short.yaml", "out", ""'
    kernel = AsyncKernelManager()
    kernel._kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
    NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [[output.data for output in cell.outputs if "data" in output] for cell in code]
    page = shown[2][0]["text/html"]
    assert "&lt;h1" in page and (tmp_path / "out" / "report.html").is_file()
    differences, curves, last = (shown[i][0]["text/plain"] for i in (3, 4, -1))
    assert "both" in differences and "baseline/seed-1" in curves
    assert any("image/png" in data for data in shown[5])
    baseline, both = (float(x) for x in last.splitlines()[-1].split()[1:])
    assert baseline == 0.0 != both
