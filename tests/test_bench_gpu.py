"""bench/gpu.py on a machine without a GPU: the output says so and has no GPU results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"
SECTIONS = {
    *("machine", "truth", "sustained", "decode", "forward", "copies", "pipeline"),
    *("correctness", "hostile"),
}


spec = importlib.util.spec_from_file_location("bench_gpu", PROGRAM)
assert spec and spec.loader
gpu = importlib.util.module_from_spec(spec)
sys.modules["bench_gpu"] = gpu
spec.loader.exec_module(gpu)


def settings(folder: Path) -> Any:
    options = {"body": "shufflenet_v2_x0_5", "weights": "random", "size": 32, "gpu": False}
    return gpu.Settings(data=str(folder), images=8, cores=1, **options)


def run_benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--cpu", *flags], capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def run(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path, dict[str, Any]]:
    """A completed run over a few photos, its output folder and its JSON result."""
    out = tmp_path_factory.mktemp("results")
    small_flags = ["--images", "24", "--size", "64", "--body", "shufflenet_v2_x0_5"]
    completed = run_benchmark("--data", str(image_folder), "--out", str(out), *small_flags)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed, out, json.loads(next(out.glob("*.json")).read_text())


def test_the_result_has_every_section_and_no_failure(run):
    _, _, result = run
    assert {row["section"] for row in result["rows"]} == SECTIONS
    assert result["seconds"].keys() > SECTIONS
    assert result["failures"] == []
    assert all(row["value"] is not None for row in result["rows"] if row["on"] == "CPU")


def test_without_a_gpu_no_gpu_row_has_a_value(run):
    _, _, result = run
    assert result["gpu"] is None
    assert "CPU only" in result["mode"]
    rows = [row for row in result["rows"] if row["on"] == "GPU"]
    assert {row["section"] for row in rows} == SECTIONS
    assert all(row["value"] is None and row["passed"] is None for row in rows)


def test_every_line_of_the_table_says_cpu_only(run):
    completed, out, result = run
    table = next(out.glob("*.md")).read_text()
    assert completed.stdout.strip() == table.strip()
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(result["rows"])
    assert all("| CPU only" in line for line in lines)
    assert sorted(file.name[:12] for file in out.iterdir()) == ["gpu_cpuonly_"] * 2


def test_ray_and_mlflow_are_not_imported_and_the_table_lists_what_was_left_out(run):
    completed, _, result = run
    assert result["imported"] == []
    assert "neither Ray nor MLflow" in completed.stdout
    assert {"Ray", "MLflow"} < result["left_out"].keys()


def test_all_thresholds_that_need_no_gpu_are_passed(run):
    _, _, result = run
    marked = {row["what"]: row for row in result["rows"] if row["passed"] is not None}
    assert all(row["passed"] for row in marked.values())
    assert "features against the CPU's in smaller batches, least" in marked
    assert marked["CPU back end: wrong images"]["value"] == 0
    assert "of 32 decodes; 0 refused" in marked["CPU back end: wrong images"]["note"]
    rows = marked["hostile files made here: rows accounted for"]
    assert rows["value"] == 128, rows["note"]


def test_a_section_that_crashes_keeps_its_rows_and_is_reported(tmp_path, monkeypatch):
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal, sys\n"
        "with open(sys.argv[3], 'a') as file: file.write('{\"row\": 1}\\n')\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(dying))
    lines = gpu.run(["decode"], settings(tmp_path), 30, tmp_path)
    assert lines[0] == {"row": 1}
    assert "SIGSEGV" in lines[1]["failure"]["error"]


def test_a_failure_is_reported_and_the_rest_of_its_section_runs(tmp_path):
    file = tmp_path / "lines.jsonl"
    gpu.run_sections(["decode"], file, settings(tmp_path))  # a folder without photos
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    failures = [line["failure"] for line in lines if "failure" in line]
    assert len(failures) == 2  # nvImageCodec and DALI, on the CPU
    assert all("no .jpg below" in failure["error"] for failure in failures)
    assert len([line for line in lines if "row" in line]) == 20


def test_the_pipeline_is_compared_with_its_slowest_stage():
    def row(what: str, ceiling: str, value: float | None) -> dict[str, Any]:
        return {
            "what": what,
            "on": "GPU",
            "ceiling": ceiling,
            "value": value,
            "section": "pipeline",
        }

    rows = [row("a", "decode", 5000.0), row("b", "decode", 8000.0), row("c", "forward", 9000.0)]
    rows += [row("d", "copy", None), row("pump", "pipeline", 4000.0)]
    (share,) = gpu.shares(rows, gpu=True)
    assert share["value"] == 0.5
    assert "decode" in share["what"]


def test_an_exhausted_time_budget_is_reported(image_folder, tmp_path):
    completed = run_benchmark("--data", str(image_folder), "--out", str(tmp_path), "--seconds", "1")
    assert completed.returncode == 1
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {failure["section"] for failure in result["failures"]} == SECTIONS
    assert "time was used up" in completed.stdout
