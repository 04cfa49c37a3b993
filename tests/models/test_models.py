from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax import config as configs
from mmjax.building import init_params, make_module
from mmjax.errors import UserError
from mmjax.models import attention, dense, flops, position, variants
from mmjax.models.attention import ATTENTION, Attention
from mmjax.models.multimodal import ImageEncoder, MultimodalModel, tower_size
from mmjax.models.outputs import Outputs
from mmjax.models.patch import PatchEmbed
from mmjax.models.pooling import QUERY_NORMS, Pool, Queries
from mmjax.models.transformer import Block, Style, Transformer
from mmjax.objectives import captioning, contrastive
from mmjax.validation import validate
from tests import tiny

KEY = jax.random.key(0)


def image_tower(**fields):
    return ImageEncoder(FrozenDict(configs.image_encoder(**fields).to_dict()))


def encode(tower, image, rng=None):
    """For the `method` of a tower: its tokens, and what it makes of them."""
    tokens, valid = tower(image, rng)
    return {"tokens": tokens, "pooled": tower.pool(tokens, valid)}


def parameter_count(tower, image):
    params = jax.eval_shape(partial(tower.init, method=encode), KEY, image)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# Backbones with a class token at 224 pixels, without a classifier: the counts of timm's models
# vit_{tiny,small,base}_patch16_224, vit_large_patch16_224, vit_huge_patch14, vit_giant_patch14 (pool='token').
PUBLISHED = {
    "Ti/16": 5_524_416,
    "S/16": 21_665_664,
    "B/16": 85_798_656,
    "L/16": 303_301_632,
    "H/14": 630_764_800,
    "g/14": 1_011_202_432,
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameter_counts_are_the_published_ones(mesh, variant):
    tower = image_tower(variant=variant, pooling="cls")
    assert parameter_count(tower, jnp.zeros((1, 224, 224, 3), jnp.uint8)) == PUBLISHED[variant]


def test_so400m_with_attention_pooling_has_the_published_size(mesh):
    """SigLIP So400m/14 at 224 pixels: 427.7 M parameters in the vision tower."""
    tower = image_tower(variant="So400m/14", pooling="map")
    count = parameter_count(tower, jnp.zeros((1, 224, 224, 3), jnp.uint8))
    assert count == pytest.approx(427.7e6, rel=1e-3)


def test_unknown_variants_are_refused():
    for name in ("XL/16", "B/x", "B/0"):
        with pytest.raises(UserError, match="variant"):
            variants.parse(name)
    assert variants.parse("B") == (variants.SIZES["B"], 0)


@pytest.mark.parametrize("tokens, chosen", [(5, "xla"), (40, "heads_first")])
def test_attention_is_the_textbook_formula(mesh, tokens, chosen):
    """Softmax(QK'/sqrt(d) + B)V with numpy, self and cross, with a mask; also where its weights are asked for."""
    x, context = np.random.default_rng(0).normal(size=(2, 2, tokens, 12)).astype(np.float32)
    mask = np.random.default_rng(1).random((2, 1, 1, tokens)) < 0.7
    mask[..., 0] = True
    bias = np.random.default_rng(2).normal(size=(1, 3, tokens, tokens)).astype(np.float32)
    module = Attention(heads=3)
    heads_of_x = x.reshape(2, tokens, 3, 4)
    assert attention.implementation(heads_of_x, heads_of_x, mask) == chosen
    for keys, added in ((x, None), (context, None), (x, bias)):
        params = module.init(KEY, x, keys, mask)
        p = jax.tree.map(np.asarray, params["params"])

        def heads(name, tokens, p=p):
            return (tokens @ p[name]["kernel"] + p[name]["bias"]).reshape(2, -1, 3, 4).transpose(0, 2, 1, 3)

        q, k, v = heads("query", x), heads("key", keys), heads("value", keys)
        scores = np.where(mask, q @ k.transpose(0, 1, 3, 2) / 2 + (0 if added is None else added), -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        out = (weights @ v).transpose(0, 2, 1, 3).reshape(2, tokens, 12) @ p["out"]["kernel"] + p["out"]["bias"]
        np.testing.assert_allclose(module.apply(params, x, keys, mask, bias=added), out, atol=1e-5)
        shown, found = module.apply(params, x, keys, mask, bias=added, mutable=[ATTENTION])
        np.testing.assert_allclose(shown, out, atol=1e-5)
        np.testing.assert_allclose(found[ATTENTION]["weights"], weights / weights.sum(-1, keepdims=True), atol=1e-5)


def test_every_implementation_of_attention_has_the_same_gradient(mesh):
    x = jax.random.normal(KEY, (2, 40, 12))
    mask, bias = jnp.arange(40) < 33, jax.random.normal(KEY, (1, 3, 40, 40))
    module = Attention(heads=3)
    params = module.init(KEY, x)

    def gradient(params, x, bias):
        def value(*inputs):
            return (module.apply(*inputs[:2], mask=mask[None, None, None], bias=inputs[2]) ** 3).sum()

        return jax.grad(value, argnums=(0, 1, 2))(params, x, bias)

    with attention.portable():
        expected = gradient(params, x, bias)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient(params, x, bias), expected)


def test_attention_on_a_gpu_takes_every_mask(mesh, monkeypatch):
    """cuDNN broadcasts no mask over the queries: what reaches it has their length."""
    seen = {}

    def attention(query, key, value, bias=None, mask=None, implementation=None):
        seen.update(mask=mask, implementation=implementation)
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    x, mask = jnp.zeros((2, 12, 128), jnp.bfloat16), jnp.ones((2, 1, 1, 12), bool)
    Attention(heads=4, dtype=jnp.bfloat16).init(KEY, x, mask=mask)
    assert seen["implementation"] == "cudnn" and seen["mask"].shape == (2, 1, 12, 12)
    Attention(heads=4, dtype=jnp.bfloat16).init(KEY, x[:, :11], mask=mask[..., :11])
    assert seen["implementation"] == "xla"
    Attention(heads=4, dtype=jnp.bfloat16).init(KEY, x, bias=jnp.zeros((1, 4, 12, 12)))
    assert seen["implementation"] == "xla"


@pytest.mark.parametrize(
    "image, text",
    [
        ({"pooling": "cls", "relative_position": "layer"}, {"pooling": "eos", "causal": True, "end_id": 2}),
        (
            {"pooling": "cls", "relative_position": "shared", "layer_scale": 0.1},
            {"pooling": "last", "class_token": True},
        ),
        ({"pooling": "last"}, {"pooling": "cls", "mask_padding": True, "norm": "post", "pool_dense": True}),
    ],
)
def test_where_one_token_is_pooled_the_last_layer_computes_no_other(mesh, image, text):
    config = tiny.get_config()
    config.model.encoders.image.update(image)
    config.model.encoders.text.update(text)
    module = make_module(config)
    params = init_params(config, module)
    ids = np.random.default_rng(0).integers(3, 99, (4, 8))
    ids[np.arange(4), [7, 3, 0, 5]] = 2  # where the text ends
    ids[1, 4:] = ids[3, 6:] = config.model.encoders.text.pad_id
    inputs = {"image": np.random.default_rng(1).integers(0, 256, (4, 28, 28, 3), np.uint8), "text": ids}
    for modality, rows in inputs.items():
        apply = partial(module.apply, {"params": params}, modality, rows)
        assert apply(method="tokens", pooled_only=True)[0].shape[1] == 1
        expected, found = apply(method="encode"), apply(method="features")
        for name in ("pooled", "projected", "embedding"):
            np.testing.assert_allclose(found[name], expected[name], atol=2e-5)
        assert np.ptp(expected["embedding"], axis=0).max() > 1e-3


def test_scan_unroll_and_rematerialisation_change_neither_value_nor_gradient(mesh):
    x = jax.random.normal(KEY, (2, 6, 16))
    reference = Transformer(3, 2, 32)
    params = reference.init(KEY, x)

    def value_and_gradient(module):
        return jax.jit(jax.value_and_grad(lambda p: (module.apply(p, x) ** 3).sum()))(params)

    value, gradient = value_and_gradient(reference)
    for settings_ in ({"unroll": 0}, {"unroll": 2}, *({"remat": name} for name in ("dots", "minimal", "full"))):
        other = Transformer(3, 2, 32, **settings_)
        jax.tree.map(np.testing.assert_array_equal, other.init(KEY, x), params)
        other_value, other_gradient = value_and_gradient(other)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other_gradient, gradient)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_a_block_saves_two_arrays_of_its_mlp_one_of_its_weights_and_ten_of_its_input(mesh, activation):
    """Flax's normalisation alone would save four of its input, and GELU three or four of the MLP's."""
    rows, tokens, width, heads, mlp_dim = 2, 64, 16, 2, 64
    module, x = Block(heads, mlp_dim, style=Style(activation=activation)), jnp.zeros((rows, tokens, width))
    params = module.init(KEY, x)
    saved = jax.eval_shape(lambda params, x: jax.vjp(lambda *each: module.apply(*each)[0], params, x)[1], params, x)
    inputs = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = rows * tokens * (10 * width + 2 * mlp_dim + heads * tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(saved)) < 1.05 * expected + inputs


@pytest.mark.parametrize("outputs", [3, 16])
def test_the_gradient_of_a_dense_layer_is_that_of_its_product(outputs):
    x, kernel = jax.random.normal(KEY, (2, 5, 8)), jax.random.normal(KEY, (8, outputs))

    def gradient(product):
        how = (((2,), (0,)), ((), ()))
        return jax.grad(lambda *each: (product(*each, how) ** 3).sum(), argnums=(0, 1))(x, kernel)

    for ours, expected in zip(gradient(dense.product), gradient(jax.lax.dot_general), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    text = jax.jit(lambda *each: jax.vjp(lambda *each: dense.product(*each, None), *each)[1](each[0] @ each[1]))
    narrower = text.lower(x, kernel).as_text().splitlines()
    (of_kernel,) = [line for line in narrower if "dot_general" in line and "contracting_dims = [0, 1]" in line]
    first = of_kernel.partition(": (")[2].partition(">")[0]
    assert first == f"tensor<2x5x{min(8, outputs)}xf32"


def test_full_rematerialisation_keeps_less(mesh):
    x = jnp.zeros((64, 32, 64))

    def temporary_bytes(remat):
        module = Transformer(8, 4, 256, remat=remat)
        params = jax.eval_shape(module.init, KEY, x)
        step = jax.jit(jax.grad(lambda p: (module.apply(p, x) ** 2).sum()))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("full") < 0.6 * temporary_bytes("none")


def test_patches_are_cut_row_by_row(mesh):
    image = np.arange(4 * 6 * 3, dtype=np.float32).reshape(1, 4, 6, 3)
    module = PatchEmbed(patch=2, width=12)
    params = {"params": {"patch_embed": {"kernel": np.eye(12, dtype=np.float32), "bias": np.zeros(12, np.float32)}}}
    tokens = module.apply(params, image)
    assert tokens.shape == (1, 6, 12)
    np.testing.assert_array_equal(tokens[0, 4], image[0, 2:4, 2:4].ravel())
    left_over = np.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=7.0)
    np.testing.assert_array_equal(module.apply(params, left_over), tokens)
    with pytest.raises(ValueError, match="4x6 cannot be cut into patches of 5"):
        PatchEmbed(patch=5, width=12).init(KEY, image)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6))
@settings(deadline=None)
def test_sincos_positions_are_distinct_and_of_one_norm(rows, columns):
    table = position.sincos_2d((rows, columns), 16)
    assert table.shape == (rows * columns, 16)
    np.testing.assert_allclose((table**2).sum(axis=1), 8, rtol=1e-5)
    assert len(np.unique(table.round(5), axis=0)) == rows * columns


@pytest.mark.parametrize("kind", ["learned", "sincos2d"])
@pytest.mark.parametrize("pooling, tokens", [("map", 12), ("cls", 13)])
def test_a_model_runs_at_another_resolution(mesh, kind, pooling, tokens):
    tower = image_tower(variant="Ti/16", depth=1, image_size=64, position=kind, pooling=pooling)
    params = jax.jit(partial(tower.init, method=encode))(KEY, jnp.zeros((1, 64, 64, 3), jnp.uint8))
    out = tower.apply(params, jnp.zeros((2, 96, 32, 3), jnp.uint8), method=encode)
    assert out["tokens"].shape == (2, tokens, 192) and out["pooled"].shape == (2, 192)


def test_resized_positions_keep_what_is_smooth():
    ramp = jnp.repeat(jnp.arange(4.0), 4)[:, None]
    np.testing.assert_array_equal(position.resize(ramp, (4, 4), (4, 4)), ramp)
    larger = position.resize(ramp, (4, 4), (8, 8)).reshape(8, 8)
    np.testing.assert_allclose(larger[2:-2, 0], np.arange(0.75, 2.5, 0.5), atol=0.1)


def test_tables_that_pytorch_interpolates_keep_a_constant_and_the_order_of_a_ramp():
    for old, new in ((5, 3), (3, 7), (4, 1), (1, 4), (37, 16)):
        weights = position.bicubic_weights(old, new)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)
        assert (np.diff(weights @ np.arange(old, dtype=np.float32)) > (0 if old > 1 else -1)).all()
    table = np.arange(12.0, dtype=np.float32)[:, None]
    resized = position.resize(table, (3, 4), (6, 4), "bicubic").reshape(6, 4)
    np.testing.assert_allclose(np.diff(resized, axis=1), 1, atol=1e-5)


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), class_token=st.booleans())
@settings(deadline=None)
def test_a_relative_position_is_that_of_all_tokens_as_far_apart(rows, columns, class_token):
    relative = position.Relative((rows, columns), class_token)
    index, places = relative.index(), {}
    tokens = [None] * class_token + [(row, column) for row in range(rows) for column in range(columns)]
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            apart = (query[0] - key[0], query[1] - key[1]) if query and key else (query is None, key is None)
            assert places.setdefault((bool(query and key), *apart), index[i, j]) == index[i, j]
    assert len({*places.values()}) == len(places) and index.max() < relative.places()
    if class_token:
        last = relative.places() - 1
        assert index[0, 0] == last and {*index[0, 1:]} == {last - 2} and {*index[1:, 0]} == {last - 1}


def test_poolings(mesh):
    x = jax.random.normal(KEY, (2, 5, 8))
    valid = jnp.array([[True] * 5, [True, True, False, False, False]])

    def pool(kind, tokens=x, mask=None):
        module = Pool(kind, 2, 16)
        return module.apply(module.init(KEY, x), tokens, mask)

    np.testing.assert_allclose(pool("mean"), x.mean(1), atol=1e-6)
    np.testing.assert_allclose(pool("mean", mask=valid)[1], x[1, :2].mean(0), atol=1e-6)
    np.testing.assert_array_equal(pool("cls"), x[:, 0])
    np.testing.assert_array_equal(pool("last"), x[:, -1])
    changed = x.at[1, 3].add(5.0)  # a token that the mask hides
    np.testing.assert_allclose(pool("map", changed, valid), pool("map", x, valid), atol=1e-6)
    assert np.abs(pool("map", changed) - pool("map"))[1].max() > 1e-3


def model(**text):
    config = tiny.get_config().model
    config.encoders.text.update(text)
    module = MultimodalModel(FrozenDict(config.to_dict()))
    batch = {"image": jnp.zeros((2, 28, 28, 3), jnp.uint8), "text": jnp.ones((2, 8), jnp.int32)}
    return module, jax.jit(module.init)(KEY, batch)


def encode_text(module, params, rows):
    return module.apply(params, "text", jnp.array(rows), method="encode")


def test_masked_padding_does_not_reach_the_embedding(mesh):
    module, params = model()
    rows = [[5, 6, 7, 0, 0, 0, 0, 0]]
    before = encode_text(module, params, rows)["embedding"]
    table = params["params"]["text"]["embed"]["position"]
    # Not by a constant: normalisations would take it away.
    params["params"]["text"]["embed"]["position"] = table.at[3:].add(jax.random.normal(KEY, table[3:].shape))
    np.testing.assert_allclose(encode_text(module, params, rows)["embedding"], before, atol=1e-6)


def test_a_causal_tower_does_not_look_ahead(mesh):
    module, params = model(causal=True)
    one = encode_text(module, params, [[5, 6, 7, 8, 9, 1, 2, 3]])["tokens"]
    two = encode_text(module, params, [[5, 6, 7, 8, 1, 2, 3, 4]])["tokens"]
    np.testing.assert_allclose(one[0, :4], two[0, :4], atol=1e-6)
    assert np.abs(one[0, 4:] - two[0, 4:]).max() > 1e-3


CLASS_TOKEN = {"causal": True, "class_token": True, "pooling": "last", "mask_padding": True}


def test_a_class_token_stands_after_the_text_and_changes_none_of_it(mesh):
    rows = [[5, 6, 7, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 1]]
    module, params = model(**CLASS_TOKEN)
    encoded = encode_text(module, params, rows)
    text = params["params"]["text"]
    assert text["embed"]["position"].shape[0] == 9
    np.testing.assert_array_equal(encoded["pooled"], encoded["tokens"][:, 8])
    plain, _ = model(**CLASS_TOKEN | {"class_token": False})
    bare = {name: value for name, value in text.items() if name != "class_token"}
    bare["embed"] = text["embed"] | {"position": text["embed"]["position"][:8]}
    tokens = encode_text(plain, {"params": params["params"] | {"text": bare}}, rows)["tokens"]
    np.testing.assert_allclose(tokens[0, :3], encoded["tokens"][0, :3], atol=1e-5)
    np.testing.assert_allclose(tokens[1], encoded["tokens"][1, :8], atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_what_a_class_token_sees_of_padding(mesh, shifted):
    """Nothing; with the shifted mask the first padding, and of itself nothing where there is padding."""
    module, params = model(**CLASS_TOKEN, shifted_mask=shifted)
    rows = [[5, 6, 7, 0, 0, 0, 0, 0]]
    table = params["params"]["text"]["embed"]["position"]

    def moves(place):
        added = jax.random.normal(KEY, table.shape[1:])
        changed = {**params["params"]["text"]["embed"], "position": table.at[place].add(added)}
        text = params["params"]["text"] | {"embed": changed}
        found = encode_text(module, {"params": params["params"] | {"text": text}}, rows)["embedding"]
        return np.abs(found - encode_text(module, params, rows)["embedding"]).max() > 1e-4

    assert [moves(place) for place in range(8)] == [True] * 3 + [shifted] + [False] * 4


def test_everything_in_cocas_published_structure_is_trained(mesh):
    """Queries whose outputs another query pools, a class token of the text, and a decoder that reads both."""
    config = tiny.get_config()
    config.model.encoders.image.update({"queries": 3, "query_width": 16, "query_heads": 4, "pooling": "query"})
    config.model.encoders.text.update(CLASS_TOKEN)
    config.model.decoder = configs.decoder(depth=2, reads="text", width=32, heads=4, mlp_dim=64)
    config.objectives.captioning = configs.objective(kind="captioning")
    validate(config, 8)
    module = make_module(config)
    params = jax.jit(partial(init_params, config, module))()
    images = jax.random.randint(KEY, (4, 28, 28, 3), 0, 256, jnp.uint8)
    ids = jnp.array([[5, 6, 7, 1, 0, 0, 0, 0], [8, 1, 0, 0, 0, 0, 0, 0], [9, 4, 3, 5, 6, 7, 8, 1], [3, 4, 1] + [0] * 5])
    batch = {"image": images, "text": ids, "rng": jax.random.split(KEY, 4)}

    def loss(params):
        outputs = Outputs(module, params, batch)
        own = [contrastive.softmax(outputs, batch, KEY), captioning.captioning(outputs, batch, KEY)]
        return sum(each[0] for each in own)

    grads = jax.jit(jax.grad(loss))(params)
    still = {name for name, leaf in flatten_dict(grads, sep="/").items() if not np.abs(leaf).max() > 0}
    # Keys' biases move no attention, and softmax no bias of logits.
    assert all(name.endswith("key/bias") or name == "logit_bias" for name in still), still
    assert grads["image"]["queries"]["probe"].shape == (3, 16)


def test_queries_normalise_what_they_are_told_to(mesh):
    x = 5 + 2 * jax.random.normal(KEY, (2, 6, 8))
    found = {}
    for norm in QUERY_NORMS:
        module = Queries(3, 4, 2, norm=norm)
        params = module.init(KEY, x)
        found[norm] = module.apply(params, x)
        assert ("norm" in params["params"]) == (norm != "input")
        scaled = module.apply(params, 3 * x)
        assert np.allclose(scaled, found[norm], atol=1e-4) == (norm != "output")
    for norm in ("output", "both"):
        np.testing.assert_allclose(found[norm].mean(axis=-1), 0, atol=1e-5)
    assert np.abs(found["input"].mean(axis=-1)).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"query_norm": "none"}}, 'image.query_norm: unknown "none"'),
        ({"image": {"queries": -1}}, "image.queries: -1 is less than 0"),
        ({"image": {"queries": 2, "query_width": 20, "query_heads": 8}}, "query_heads: 8 heads do not divide width 20"),
        ({"image": {"query_width": 16}}, "query_width: it needs queries"),
        ({"image": {"queries": 2, "query_width": 16}}, "query_width: pooling map needs the tower's own, 32"),
        ({"text": {"class_token": True}}, "class_token: it stands after the text: pooling has to be last"),
        ({"text": {"shifted_mask": True}}, "shifted_mask: it needs class_token and mask_padding"),
    ],
)
def test_settings_of_queries_and_class_tokens_that_cannot_work_are_named(changes, message):
    config = tiny.get_config()
    for name, fields in changes.items():
        config.model.encoders[name].update(fields)
    with pytest.raises(UserError, match=message):
        validate(config, 1)


def test_embeddings_have_unit_norm_and_the_scale_is_clamped(mesh):
    module, params = model()
    embedding = encode_text(module, params, [[5, 1, 0, 0, 0, 0, 0, 0], [9, 8, 1, 0, 0, 0, 0, 0]])["embedding"]
    np.testing.assert_allclose((embedding**2).sum(-1), 1, rtol=1e-5)
    assert module.apply(params, method="logits")["logit_scale"] == pytest.approx(10, rel=1e-5)
    params["params"]["logit_scale"] = jnp.array(50.0)
    assert module.apply(params, method="logits")["logit_scale"] == pytest.approx(100, rel=1e-5)


def test_flops_agree_with_what_xla_counts(mesh):
    """Matrix products dominate a wide tower, so the compiler's count of everything is close."""
    encoder = configs.image_encoder(variant="Ti/16", depth=2, image_size=128, unroll=0)
    tower = ImageEncoder(FrozenDict(encoder.to_dict()))
    image = jnp.zeros((4, 128, 128, 3), jnp.uint8)
    params = jax.eval_shape(tower.init, KEY, image)
    counted = jax.jit(tower.apply).lower(params, image).compile().cost_analysis()["flops"] / 4
    assert flops.tower_flops(encoder) == pytest.approx(counted, rel=0.1)
    assert tower_size(encoder).depth == 2
    encoder.update({"queries": 96, "query_width": 96, "pooling": "query", "depth": 1})
    tower = ImageEncoder(FrozenDict(encoder.to_dict()))
    params = jax.eval_shape(partial(tower.init, method=encode), KEY, image)
    run = partial(tower.apply, method=encode)
    counted = jax.jit(run).lower(params, image).compile().cost_analysis()["flops"] / 4
    assert flops.tower_flops(encoder) == pytest.approx(counted, rel=0.1)


def test_peaks_are_found_by_the_names_that_devices_have():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("cpu") is None
