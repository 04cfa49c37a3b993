from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mmjax import api
from mmjax.errors import UserError
from mmjax.sharding import rules
from mmjax.sharding.distributed import local_rows
from mmjax.sharding.mesh import make_mesh, mesh_shape
from tests.test_config import RECIPES, load

pytestmark = pytest.mark.sharding


@pytest.mark.parametrize("path", [*RECIPES, Path(__file__).parent.parent / "tiny.py"], ids=lambda path: path.stem)
def test_every_parameter_of_every_recipe_matches_one_row(path, mesh):
    config = load(path)
    params = jax.eval_shape(partial(api.init_params, config, api.make_module(config)))
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert len(rules.logical_axes(rules.path_name(leaf_path))) == leaf.ndim
        assert leaf.dtype == jnp.float32


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="matches 0 rows"):
        rules.logical_axes("image/mystery/weights")


def test_matrices_lie_along_fsdp_and_tensor():
    def spec(path):
        return rules.RULES.parameter_spec(rules.logical_axes(path))

    assert spec("image/transformer/blocks/mlp/up/kernel") == P(None, "fsdp", "tensor")
    assert spec("image/transformer/blocks/attention/out/kernel") == P(None, "tensor", "fsdp")
    assert spec("text/embed/token_embed/embedding") == P("tensor", "fsdp")


def test_colliding_and_unknown_axes_are_refused():
    both = rules.AxisRules(parameters={"embed": "tensor", "mlp": "tensor"})
    with pytest.raises(ValueError, match="collide"):
        both.parameter_spec(("embed", "mlp"))
    with pytest.raises(ValueError, match="unknown logical axis 'bach'"):
        rules.RULES.activation_spec(("bach", "embed"))


def test_constrain_says_what_is_wrong(mesh):
    x = jnp.zeros((4, 8))
    with pytest.raises(ValueError, match="unknown logical axis"):
        rules.constrain(x, "batch", "width")
    with pytest.raises(ValueError, match="1 logical axes"):
        rules.constrain(x, "batch")


def test_constrain_needs_a_mesh():
    with pytest.raises(ValueError, match="no mesh is set"):
        rules.constrain(jnp.zeros((4, 8)), "batch", "embed")


def test_constrain_splits_the_batch():
    with jax.set_mesh(make_mesh(4, 2, 1)):
        x = jax.jit(lambda x: rules.constrain(x, "batch", "embed"))(jnp.zeros((16, 8)))
    assert x.sharding.shard_shape(x.shape) == (2, 8)


def test_mesh_sizes_fill_up_or_are_refused():
    assert mesh_shape((-1, 2, 1), 8) == (4, 2, 1)
    assert mesh_shape((8, 1, 1), 8) == (8, 1, 1)
    for sizes in ((3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 1)):
        with pytest.raises(UserError, match="mesh.data="):
            mesh_shape(sizes, 8)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_holds_every_row(shape):
    assert local_rows(rules.batch_sharding(make_mesh(*shape)), 16).tolist() == list(range(16))
