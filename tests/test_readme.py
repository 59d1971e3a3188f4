"""Commands and code in the README and in docs/ run as written.

All pages share one project. What several pages show runs once: commands first, in the order of the
pages, then Python.
"""

from __future__ import annotations

import gc
import hashlib
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from arrowhead.cli import cluster
from arrowhead.cli.main import main
from arrowhead.data.known_datasets import DATASETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
GENERATED = {"cli.md", "python.md"}  # in docs/reference, see tests/test_docs.py
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "start")),
    *(
        ROOT / "docs" / "guides" / f"{name}.md"
        for name in (
            "fetch",
            "train",
            "tables",
            "shards",
            "backbones",
            "heads",
            "race",
            "advise",
            "finetune",
            "examine",
            "score",
            "slices",
            "features",
            "search",
            "label_errors",
            "duplicates",
            "python",
            "cluster",
            "s3",
            "deploy",
            "mlflow",
        )
    ),
    ROOT / "docs" / "asked.md",
]
UNEXECUTED_PAGES = [ROOT / f"docs/{name}.md" for name in ("faults", "determinism", "performance")]
# Output, and commands that are not run, are marked as one of the second pair.
EXECUTED_LANGUAGES, OUTPUT_LANGUAGES = (
    {"bash", "python"},
    {"text", "console"},
)
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Paragraphs of text: no heading, list, table, picture or code.
PARAGRAPH = re.compile(r"^(?![#|\-!<])\S.*(?:\n(?![#|\-!<]).*\S.*)*", re.MULTILINE)


def blocks(language: str) -> list[str]:
    """Code of all pages in order, each distinct block once."""
    result = [
        text
        for page in PAGES
        for block_language, text in FENCE.findall(page.read_text())
        if block_language == language
    ]
    return list(dict.fromkeys(result))


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return list(dict.fromkeys(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Iterator[Path]:
    """photos, new-photos, photos.tar, two tables, and a torch cache with a small ResNet34 (one
    block per stage instead of three to six): no test here depends on what it predicts.
    """
    import torch
    from torchvision import models

    directory = tmp_path_factory.mktemp("readme")
    shutil.copytree(image_folder, directory / "photos", ignore=shutil.ignore_patterns("new"))
    shutil.copytree(image_folder / "new", directory / "new-photos")
    with tarfile.open(directory / "photos.tar", "w") as tar:
        tar.add(directory / "photos", "photos")
    write_tables(directory)
    cache = directory / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    draft = cache / "draft"
    monkeypatch, full = pytest.MonkeyPatch(), models.resnet._resnet
    monkeypatch.setattr(
        models.resnet, "_resnet", lambda block, _, *more, **kw: full(block, [1] * 4, *more, **kw)
    )
    torch.save(models.resnet34(weights=None).state_dict(), draft)
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()
    cached = draft.rename(cache / f"resnet34-{digest[:8]}.pth")
    entry = models.ResNet34_Weights.DEFAULT.value
    before = entry.url
    # A frozen dataclass that the whole process shares.
    object.__setattr__(entry, "url", f"http://127.0.0.1:9/{cached.name}")
    yield directory
    object.__setattr__(entry, "url", before)
    monkeypatch.undo()


def write_tables(directory: Path) -> None:
    """Write labels.csv with the guide's columns, tags.csv with one or two labels per image, and
    fixes.csv with a new label for one image.
    """
    photos = sorted((directory / "photos").rglob("*.jpg"))[::3]
    rows = [(path.relative_to(directory / "photos"), path.parent.name) for path in photos]
    labels = [
        f"{path},{label},{'train' if i % 4 else 'val'}" for i, (path, label) in enumerate(rows)
    ]
    (directory / "labels.csv").write_text("\n".join(["image,breed,split", *labels]) + "\n")
    tags = [f"{path},{label}{'|dark' * (i % 2)}" for i, (path, label) in enumerate(rows)]
    path, label = rows[0]
    other = next(other for _, other in rows if other != label)
    (directory / "fixes.csv").write_text(f"path,label,new_label\n{path},{label},{other}\n")
    (directory / "tags.csv").write_text("\n".join(["path,tags", *tags]) + "\n")


@pytest.fixture(autouse=True)
def _change_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(folder / "indexes"))
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "hub"))


def is_tested_elsewhere(program: str, words: list[str]) -> bool:
    """Whether tests/test_submit.py (a cluster), test_sources.py (an object store) or test_fetch.py
    (the network) runs such a command; here only its files and flags are checked.
    """
    if program == "cluster/local.sh":
        return (ROOT / program).is_file()
    after = words[words.index("--") + 1 :] if "--" in words else []
    if program == "RAY_AUTH_MODE=token":  # ray job submit … -- python train.py …
        assert after[:2] == ["python", "train.py"]
        absolute = [
            str(ROOT / "jobs" / word) if word.endswith(".toml") else word for word in after[2:]
        ]
        return cluster.parse_command(["train", *absolute]) is not None
    if program == "arrowhead" and words[0] == "submit":
        return cluster.parse_command(after) is not None
    if program == "arrowhead" and any(word.startswith("s3://") for word in words):
        return cluster.parse_command(words) is not None
    if program == "arrowhead" and words[0] == "fetch":
        name = words[1]
        return name in DATASETS or name.startswith("https://") or name.endswith(".tar.gz")
    return program == "arrowhead" and words[0] == "jobs"


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What each command printed."""
    return {}


@pytest.mark.slow
def test_documented_commands_run_as_written(capsys, outputs):
    for command in commands():
        program, *words = shlex.split(command)
        if is_tested_elsewhere(program, words):
            continue
        if program == "mlflow":  # a server; tests/test_fit.py reads what it would show
            assert Path("mlflow.db").is_file()
            continue
        if program in ("python", "curl"):  # a server and its client; see tests/test_serve.py
            assert program == "curl" or (ROOT / words[0]).is_file()
            continue
        assert program == "arrowhead"
        with pytest.raises(SystemExit) as exit_info:
            main(words)
        printed = capsys.readouterr()
        assert exit_info.value.code == 0, (command, printed.err)
        outputs[command] = printed.out + printed.err
    assert "0 decoded" in outputs["arrowhead fit photos out --head lesson --epochs 5"]
    assert Path("model.onnx").is_file()


@pytest.mark.slow
def test_documented_python_runs_as_written(capsys):
    """In the order of the pages, after the commands."""
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks("python")), "the pages", "exec"), names)
    names.clear()
    gc.collect()  # end the decoders of unclosed models here, not in another test
    output = capsys.readouterr().out
    assert "epoch  train loss  valid loss  accuracy" in output
    assert "'path', 'image_id', 'view', 'feature', 'fault'" in output
    assert "photo-0000.jpg" in output


@pytest.mark.slow
def test_tour_shows_the_current_output_of_the_commands(outputs):
    """Numbers and names differ from those of real photos; the words must not."""
    [tour] = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    result = {line_prefix(line) for printed in outputs.values() for line in printed.splitlines()}
    for line in tour.splitlines():
        if line.startswith("$ "):
            assert cluster.parse_command(shlex.split(line)[2:]) is not None
        elif line.startswith("not read: "):  # tests/test_score.py has broken files
            assert any('"not read: ' in file.read_text() for file in (ROOT / "src").rglob("*.py"))
        elif line != "…":
            assert line_prefix(line) in result, line


def line_prefix(line: str) -> str:
    """A line up to its colon, or its first words, with numbers masked."""
    return re.sub(r"\d[\d.]*", "#", line)[:20].partition(":")[0]


def test_every_block_is_run_or_marked_as_output():
    docs = [page for page in (ROOT / "docs").rglob("*.md") if not page.is_symlink()]
    assert {page for page in docs if page.parent.name == "guides"} < set(PAGES)
    for page in {*PAGES, *docs}:
        if page.name not in GENERATED or page.parent.name != "reference":
            languages = {language for language, _ in FENCE.findall(page.read_text())}
            assert languages <= (
                OUTPUT_LANGUAGES | EXECUTED_LANGUAGES if page in PAGES else OUTPUT_LANGUAGES
            ), page


def test_readme_is_under_200_lines():
    lines = README.splitlines()
    assert len(lines) < 200


@pytest.mark.parametrize("page", [*PAGES, *UNEXECUTED_PAGES], ids=lambda page: page.stem)
def test_no_paragraph_exceeds_four_lines(page):
    for paragraph in PARAGRAPH.findall(FENCE.sub("", page.read_text())):
        assert paragraph.count("\n") < 4, paragraph
        visible = re.sub(r"\]\([^)]*\)", "]", paragraph)  # without link targets
        assert max(map(len, visible.splitlines())) <= 120, paragraph


def test_makefile_has_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "docs", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make demo" in README.split("## ")[0]
    assert "make test" in README.split("## ")[0]


def test_readme_links_resolve():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
