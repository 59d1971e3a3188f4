"""Execute the notebooks in examples/ and write them with their outputs, kept small.

    python docs/make_notebooks.py                        # all, in place
    python docs/make_notebooks.py --out FOLDER lesson    # one, into another folder

Each notebook runs in an empty folder of its own. A cell that fails ends the command.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CELL_SECONDS = 600
MAX_PICTURE_BYTES = 20_000  # of a picture; as base64 it is a third larger
COLOURS = 64  # of a chart


def execute(notebook: NotebookNode) -> None:
    """Execute a notebook in an empty folder with this environment's kernel."""
    for cell in notebook.cells:
        cell.metadata.clear()
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=resources
        )
        client.execute()
    clean(notebook)


def clean(notebook: NotebookNode) -> None:
    """Remove times and versions from a notebook, and make its pictures small."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.clear()
        if cell.cell_type != "code":
            continue
        cell.outputs = merge_prints(cell.outputs)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                shrink(output.data)


def merge_prints(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join printed texts that follow each other: how they are divided depends on timing."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            merged.append(output)
    return merged


def shrink(data: NotebookNode) -> None:
    """Make a PNG small: fewer colours, which is enough for charts, or else a JPEG."""
    content = base64.b64decode(data.pop("image/png"))
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    kind, content = "png", encoded(picture.quantize(COLOURS, dither=Image.Dither.NONE), "PNG")
    while len(content) > MAX_PICTURE_BYTES:
        kind, content = "jpeg", encoded(picture, "JPEG")
        picture = picture.resize((picture.width * 9 // 10, picture.height * 9 // 10))
    data[f"image/{kind}"] = base64.b64encode(content).decode()


def encoded(picture: Image.Image, kind: str) -> bytes:
    """The bytes of a picture as PNG or JPEG."""
    file = io.BytesIO()
    picture.save(file, kind, optimize=True)
    return file.getvalue()


def main() -> None:
    """Execute the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="names without .ipynb; default: all")
    parser.add_argument("--out", type=Path, default=EXAMPLES, help="folder for the results")
    arguments = parser.parse_args()
    names = arguments.names or sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
    for name in names:
        notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
        execute(notebook)
        nbformat.write(notebook, arguments.out / f"{name}.ipynb")
        print(f"{name}: {len(notebook.cells)} cells", file=sys.stderr)


if __name__ == "__main__":
    main()
