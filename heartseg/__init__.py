"""heartseg: segmentation of LV cavity, myocardium and left atrium in apical echocardiograms.

Two names serve most users: `heartseg.load(run)` rebuilds a trained model, and the model's `predict(image)`
returns the mask on the image's own grid.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("heartseg")
except PackageNotFoundError:  # run from a submitted working directory, not installed
    __version__ = "0.1.0"


def __getattr__(name: str):
    """Import `load` only when it is used, so that `import heartseg` does not import torch."""
    if name == "load":
        from heartseg.inference.segmenter import load

        return load
    raise AttributeError(f"module 'heartseg' has no attribute {name!r}")
