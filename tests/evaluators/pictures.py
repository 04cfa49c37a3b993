"""A model whose features tell the samples' images, for tests of evaluators on labelled images."""

import json

import jax
import numpy as np

from mmjax import config as configs
from mmjax.data import image
from mmjax.sharding.mesh import make_mesh
from tests.data import samples


class Pictures:
    """The feature of sample n is row n of a table."""

    def __init__(self, table, devices=1):
        self.config = configs.default()
        self.config.model.encoders.image = configs.image_encoder(image_size=16)
        self.mesh = make_mesh(devices=jax.devices()[:devices])
        self.table = np.asarray(table, np.float32)
        self.means = [image.for_evaluation(image.decode(samples.png(n)), image.Fit(16)).mean() for n in range(30)]
        self.seen = []

    def agreed(self, array):
        return array

    def features_rows(self, modality, count, load_rows, batch_size):
        assert modality == "image"
        images = load_rows(np.arange(count))
        known = np.abs(images.mean(axis=(1, 2, 3))[:, None] - np.array(self.means)).argmin(axis=1)
        self.seen.append(known.tolist())
        return self.table[known]


def evaluate(make, entry, model):
    """All metrics of an evaluator."""
    evaluator = make(entry)
    evaluator.open()
    return dict(evaluator.evaluate(model))


def write_splits(folder, train=range(0, 30, 2), test=range(1, 30, 2), label=samples.label):
    """JSON Lines of the samples with these numbers; returns what to write into a config's `source`."""
    for number in {*train, *test}:
        (folder / f"{number}.png").write_bytes(samples.png(number))
    for split, numbers in (("train", train), ("test", test)):
        rows = [json.dumps({"filepath": f"{n}.png", "label": label(n), "kind": f"k{label(n)}"}) for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return f"jsonl:{folder}/{{split}}.jsonl"
