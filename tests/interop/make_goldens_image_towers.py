"""Writes goldens/image_towers.npz: what transformers makes of the inputs of test_image_towers.py.

python -m tests.interop.make_goldens_image_towers
"""

import tempfile
from pathlib import Path

import numpy as np

from mmjax.interop import pretrained
from tests.interop import folders, image_towers, peers


def main():
    transformers, results = peers.transformers(), {}
    for name, case in image_towers.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            case.write(Path(folder))
            encoder = pretrained.load_config(folder).model.encoders.image
            model = getattr(transformers, case.kind).from_pretrained(folder).eval()
        found = image_towers.theirs(model, peers.normalized(folders.pixels(3, image_towers.SIZE), encoder))
        results |= {f"{name} {output}": value for output, value in found.items()}
    np.savez_compressed(folders.GOLDENS / "image_towers.npz", **results)


if __name__ == "__main__":
    main()
