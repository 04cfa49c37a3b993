"""Training objectives by name: `loss, metrics = objective(outputs, batch, rng, **options)`.

A new one is a file here and a line below; its options and their defaults are in `mmjax.config.OBJECTIVES`.
`batch["rng"]` holds a key for each row: what is drawn for a row comes from there, so that it does not depend on how
the batch is split.

An objective that compares rows of the batch with each other is named in `ACROSS_ROWS`, and reads only the `embedding`s
and the logit parameters of `outputs`: it always sees the whole batch. Any other one may be run on a part of the rows:
its loss and its metrics are means over rows, or over what its metric `count` counts in them (tokens, say).
"""

from mmjax.objectives import contrastive

OBJECTIVES = {"sigmoid": contrastive.sigmoid, "softmax": contrastive.softmax}
ACROSS_ROWS = frozenset({"sigmoid", "softmax"})
