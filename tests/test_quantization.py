"""Weights as bfloat16 and as eight-bit integers: what is stored, what a model computes with it, and where it lies."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import PartitionSpec as P

from mmjax import api
from mmjax.data import sources, text
from mmjax.errors import UserError
from mmjax.interop import store
from mmjax.models.quantized import QuantizedArray
from mmjax.quantization import WEIGHTS, quantized
from mmjax.sharding.mesh import make_mesh
from mmjax.sharding.rules import parameter_shardings, path_name
from tests.interop import folders
from tests.interop.test_clip import settings_with
from tests.test_api_text import IMAGES, TEXTS, config_of

UNSHARDED, SHARDED = (1, 1, 1), (2, 2, 2)


@cache
def model(shape=UNSHARDED, weights="float32"):
    """Every part of a model, with random parameters of the sizes that they have in the beginning."""
    config, mesh = config_of(), make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(partial(api.init_params, config, api.make_module(config)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path_name(path).endswith("scale") and leaf.ndim:  # of a normalisation
            return np.ones(leaf.shape, np.float32)
        size = leaf.shape[-2] ** -0.5 if path_name(path).endswith("kernel") else 0.2
        return rng.normal(0, size, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    params = jax.device_put(params, parameter_shardings(params, mesh))
    tokenizer = text.load(sources.tokenizer_path("openmoji:en", ()))
    return api.Model(config, quantized(params, weights, mesh), tokenizer, mesh)


def is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


def leaves(params):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)}


@cache
def outputs(*of):
    """What a model says of the same images and texts, by each of its parts."""
    return outputs_of(model(*of))


def outputs_of(one):
    rows, ids = np.arange(5), one.token_ids(TEXTS)
    load = one._loader(IMAGES)
    return {
        "image": one.encode_image(IMAGES),
        "text": one.encode_text(TEXTS),
        "match": one.match(IMAGES, TEXTS),
        "caption": one.caption_likelihood_rows(rows, rows, load, lambda rows: ids[rows]),
    }


SHAPES = st.sampled_from([(1, 1), (5, 3), (2, 4, 3)])  # each is compiled
FLOATS = SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-1e6, 1e6, width=32)))


@given(FLOATS)
@settings(deadline=None, max_examples=50)
def test_a_weight_is_at_most_half_a_step_off(values):
    tree = {"image": {"blocks" if values.ndim == 3 else "pool": {"out": {"kernel": values}}}}
    (found,) = leaves(quantized(tree, "int8", make_mesh(devices=jax.devices()[:1]))).values()
    largest = np.abs(values).max(axis=-2, keepdims=True)
    assert found.values.dtype == jnp.int8 and found.values.shape == found.shape == values.shape
    assert found.scale.dtype == found.dtype == jnp.float32
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6, atol=1e-37)  # what is smaller is 0
    assert (np.abs(jnp.asarray(found) - values) <= largest * (0.5 / 127 + 1e-6) + 1e-36).all()
    assert np.abs(np.asarray(found.values)).max() <= 127


def test_rows_are_taken_as_of_an_array():
    rng = np.random.default_rng(0)
    for axis in (0, 1):
        one = QuantizedArray(
            jnp.asarray(rng.integers(-127, 128, (6, 4)), jnp.int8),
            jnp.asarray(rng.random((6, 1) if axis == 0 else (1, 4)), jnp.float32),
        )
        for along in (0, 1):
            taken = one.take(jnp.array([[3, 0], [3, 1]]), along)
            assert is_quantized(taken)
            np.testing.assert_array_equal(jnp.asarray(taken), jnp.asarray(one).take(jnp.array([[3, 0], [3, 1]]), along))


@pytest.mark.parametrize("weights, dtype", [("bfloat16", jnp.bfloat16), ("int8", jnp.int8)])
def test_matrices_are_stored_small_and_nothing_else(openmoji_folder, weights, dtype):
    before, after = leaves(model().params), leaves(model(UNSHARDED, weights).params)
    assert before.keys() == after.keys()
    small = {name for name in before if name.rpartition("/")[2] in ("kernel", "embedding", "vocab")}
    assert len(small) > 20
    for name, leaf in after.items():
        assert leaf.shape == before[name].shape
        stored = leaf.values if is_quantized(leaf) else leaf
        assert stored.dtype == (dtype if name in small else jnp.float32), name
    size = {name: sum(leaf.nbytes for leaf in jax.tree.leaves([after[name]])) for name in small}
    whole = {name: before[name].nbytes for name in small}
    assert sum(size.values()) < sum(whole.values()) * (0.5 if weights == "bfloat16" else 0.32) + 1
    kernel = "image/transformer/blocks/mlp/up/kernel"
    if weights == "int8":  # a scale for each output of each layer, and for each token
        assert after[kernel].scale.shape == (1, 1, 64)
        assert after["text/embed/token_embed/embedding"].scale.shape == (4096, 1)


@pytest.mark.parametrize("weights, least", [("bfloat16", 0.9995), ("int8", 0.999)])
def test_embeddings_hardly_change_but_do(openmoji_folder, weights, least):
    exact, found = outputs(), outputs(UNSHARDED, weights)
    for modality in ("image", "text"):
        cosines = (exact[modality] * found[modality]).sum(axis=1)
        assert cosines.min() > least
        assert np.abs(exact[modality] - found[modality]).max() > 1e-5


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_every_part_computes_with_the_weights_that_are_stored(openmoji_folder, weights):
    """The same as a float32 model with these weights, to its rounding; captions too."""
    small = model(UNSHARDED, weights)
    floats = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), small.params, is_leaf=is_quantized)
    exact = model().with_params(floats, 0)
    expected, found = outputs_of(exact), outputs(UNSHARDED, weights)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    captions = small.caption(IMAGES)
    assert captions == exact.caption(IMAGES) and len(set(captions)) > 1


@pytest.mark.sharding
def test_the_same_on_eight_devices(openmoji_folder):
    """The integers lie as the floats do, and so do the scales, but for the axis that they lack."""
    eight = model(SHARDED, "int8")
    expected, found = outputs(UNSHARDED, "int8"), outputs(SHARDED, "int8")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    places, params = leaves(parameter_shardings(model(SHARDED).params, eight.mesh)), leaves(eight.params)
    for name, leaf in params.items():
        stored = leaf.values if is_quantized(leaf) else leaf
        assert stored.sharding.is_equivalent_to(places[name], stored.ndim), name
    up, table = params["image/transformer/blocks/mlp/up/kernel"], params["text/embed/token_embed/embedding"]
    assert up.values.sharding.spec == P(None, "fsdp", "tensor") and up.scale.sharding.spec == P(None, None, "tensor")
    assert table.values.sharding.spec == P("tensor", "fsdp") and table.scale.sharding.spec == P("tensor")


def test_layers_become_floats_one_at_a_time(openmoji_folder):
    """Under the scan the compiled tower has memory for one layer's floats, not for those of the stack."""
    config = config_of(everything=False)
    tower = config.model.encoders.image
    tower.depth, tower.width, tower.mlp_dim, tower.heads = 16, 128, 512, 2
    mesh, module = make_mesh(devices=jax.devices()[:1]), api.make_module(config)
    with jax.set_mesh(mesh):
        params = jax.jit(partial(api.init_params, config, module))()
        blocks = params["image"]["transformer"]["blocks"]
        stack = sum(leaf.nbytes for leaf in jax.tree.leaves(blocks))
        small = quantized(params, "int8", mesh)

        def encode(params, images):
            return module.apply({"params": params}, "image", images, method="encode")["embedding"]

        analysis = jax.jit(encode).lower(small, IMAGES[:1]).compile().memory_analysis()
    assert analysis.argument_size_in_bytes < stack / 3
    assert analysis.temp_size_in_bytes < stack / 4


@pytest.mark.parametrize("weights, share", [("float32", 1.0), ("int8", 0.5)])
def test_a_pretrained_model_is_made_smaller_while_it_is_read(tmp_path, monkeypatch, weights, share):
    """Only one parameter is there in float32: with int8 half of the bytes never are."""
    settings = settings_with("gelu")
    settings["text_config"] |= {"num_hidden_layers": 4}
    folder, held = folders.write(tmp_path, "clip", settings), []

    def float_bytes():
        return sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.float32 and x.ndim > 1)

    tensors, before = store.open_tensors(store.find(folder)), float_bytes()
    get = tensors.get
    monkeypatch.setattr(tensors, "get", lambda name: held.append(float_bytes() - before) or get(name))
    monkeypatch.setattr(store, "open_tensors", lambda *_: tensors)
    one = api.load(folder, weights=weights)
    matrices = [leaf for name, leaf in leaves(one.params).items() if name.endswith(("kernel", "embedding"))]
    assert all(is_quantized(leaf) == (weights == "int8") for leaf in matrices)
    whole = sum(4 * np.prod(leaf.shape) for leaf in matrices)
    assert (max(held) > 0.7 * whole) if weights == "float32" else (max(held) < share * whole)


def test_unknown_weights_are_refused_before_anything_is_read():
    with pytest.raises(UserError, match='weights: unknown type "int4"; did you mean "int8"?'):
        api.load("there/is/nothing", weights="int4")
    with pytest.raises(UserError, match="weights: unknown type"):
        quantized({}, "half", make_mesh())
    assert WEIGHTS == ("float32", "bfloat16", "int8")
