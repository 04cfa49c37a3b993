"""Training objectives by name: `loss, metrics = objective(outputs, batch, rng)`.

A new one is a file here and a line below.
"""

from mmjax.objectives import contrastive

OBJECTIVES = {"sigmoid": contrastive.sigmoid, "softmax": contrastive.softmax}
