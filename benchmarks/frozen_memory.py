"""How much memory a training step takes with the image tower frozen, and with all of the model trained.

    python benchmarks/frozen_memory.py
    python benchmarks/frozen_memory.py --variant=L/14 --batch=1024 --json=frozen_memory.json

A step of the sigmoid loss on one device: an image tower of `--variant` at 224 pixels and a text tower of its size,
AdamW, float32, no rematerialisation. Frozen means `config.optimizer.rules = (("^image/", None, 0.0),)`: no gradient
goes into the image tower, so that nothing is saved for it, and the optimizer keeps nothing of it either. The step is
compiled and not run, so any machine can tell; the compiler's plan says what it needs.

    megabytes               state, batch and temporaries
    state_megabytes         parameters and the optimizer's moments
    temporary_megabytes     activations and gradients, at their largest

`frozen_over_trained` compares the first.
"""

import argparse
from functools import partial

import report

FROZEN_IMAGE = (("^image/", None, 0.0),)
IMAGE_SIZE, LENGTH = 224, 64


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B/16", help="of the image tower; the text tower has its size")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--json", help="also write the metrics to this file")
    arguments = parser.parse_args()
    metrics = {}
    for name, rules in (("frozen", FROZEN_IMAGE), ("trained", ())):
        found = compiled_bytes(arguments.variant, arguments.batch, rules)
        metrics |= {f"{name}/{what}": value / 1e6 for what, value in found.items()}
    metrics["frozen_over_trained"] = metrics["frozen/megabytes"] / metrics["trained/megabytes"]
    report.print_table(metrics, f"A step of {arguments.batch:,} pairs, {arguments.variant}")
    if arguments.json:
        report.write_json(arguments.json, metrics)


def compiled_bytes(variant: str, batch: int, rules: tuple) -> dict[str, int]:
    """What the compiler plans for a step with these rules."""
    import jax

    from mmjax import api
    from mmjax import config as configs
    from mmjax.sharding.mesh import make_mesh
    from mmjax.training.optimizer import learning_rate_schedule, make_optimizer
    from mmjax.training.state import make_state
    from mmjax.training.step import make_train_step

    config = configs.default()
    config.model.encoders.image = configs.image_encoder(variant=variant, image_size=IMAGE_SIZE)
    config.model.encoders.text = configs.text_encoder(variant=variant.partition("/")[0], length=LENGTH)
    config.objectives.contrastive = configs.objective(kind="sigmoid")
    config.streams.train = configs.stream(batch_size=batch)
    config.optimizer.rules, config.precision.compute = rules, "float32"
    module = api.make_module(config)
    rows = {
        "image": jax.ShapeDtypeStruct((batch, IMAGE_SIZE, IMAGE_SIZE, 3), "uint8"),
        "text": jax.ShapeDtypeStruct((batch, LENGTH), "int32"),
    }
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        init = partial(api.init_params, config, module)
        optimizer = make_optimizer(config.optimizer, jax.eval_shape(init))
        state = jax.eval_shape(partial(make_state, init, optimizer, False))
        step = make_train_step(config, module, optimizer, learning_rate_schedule(config.optimizer, 1000, 100))
        compiled = jax.jit(step, static_argnums=2, donate_argnums=0).lower(state, rows, ("contrastive",)).compile()
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "megabytes": total + memory.temp_size_in_bytes,
        "state_megabytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "temporary_megabytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main()
