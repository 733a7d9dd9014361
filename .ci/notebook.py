"""Run notebooks/alexnet.ipynb from top to bottom; an error in a cell is an error here.

With --write the notebook is stored with its new outputs, pictures in 128 colors.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
notebook = nbformat.read(FOLDER / "alexnet.ipynb", as_version=4)
resources = {"metadata": {"path": str(FOLDER)}}
NotebookClient(notebook, resources=resources, timeout=1200, startup_timeout=120).execute()
if sys.argv[1:] == ["--write"]:
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of day
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                small = io.BytesIO()
                picture.convert("RGB").quantize(128).save(small, "PNG", optimize=True)
                output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    nbformat.write(notebook, FOLDER / "alexnet.ipynb")
