"""Recipes: the grammar, rules, JSON, and what a recipe decides for the layers of a model."""

from __future__ import annotations

import ast
import itertools
import json
import pathlib

import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import configs, errors, recipe
from qat.decision import NOT_ANNOTATED
from qat.recipe import METHODS, TERNARY, Recipe, RecipeError, Rule, TensorSpec, load_recipe
from qat.scheme import decide

layers = tf_keras.layers

# As rules keep them: the method is named.
W4 = TensorSpec(bits=4).resolved("weights")
A4 = TensorSpec(bits=4).resolved("activations")
EIGHT = TensorSpec().resolved("weights")
WEIGHTS = (1, "t", 2, 3, 4, 5, 6, 7, 8)
ACTIVATIONS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
BEST_WEIGHTS = {1: "binary", "t": "twn", 2: "lsq", 3: "lsq", 4: "lsq"}  # else min-max
BEST_ACTIVATIONS = {1: "binary", 8: "minmax", 16: "minmax"}  # else LSQ


def one_line(error) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------
# The grammar.


@pytest.mark.parametrize("weight_bits", WEIGHTS)
@pytest.mark.parametrize("activation_bits", ACTIVATIONS)
def test_every_legal_name(weight_bits, activation_bits):
    made = Recipe.from_name(f"w{weight_bits}a{activation_bits}")
    assert made.name == f"w{weight_bits}a{activation_bits}"
    *edges, rest = made.rules
    assert (rest.weights.bits, rest.activations.bits) == (weight_bits, activation_bits)
    assert rest.weights.method == BEST_WEIGHTS.get(weight_bits, "minmax")
    assert rest.activations.method == BEST_ACTIVATIONS.get(activation_bits, "lsq")
    assert (rest.layer, rest.type, rest.position, rest.keep_float) == (None, None, None, None)
    # Below eight bits the first and last layers keep eight (sixteen if all activations have it).
    if weight_bits == 8 and activation_bits >= 8:
        assert edges == []
    else:
        assert [edge.position for edge in edges] == ["first", "last"]
        for edge in edges:
            assert edge.weights == EIGHT
            bits = 16 if activation_bits == 16 else 8
            assert edge.activations == TensorSpec(bits=bits, method="minmax")


def test_the_tables_of_the_best_are_whole_and_legal():
    for role, widths in (("weights", WEIGHTS), ("activations", ACTIVATIONS)):
        best = getattr(recipe, f"BEST_FOR_{role.upper()}")
        assert tuple(sorted(best, key=str)) == tuple(sorted(widths, key=str))
        for bits, method in best.items():
            assert bits in getattr(METHODS[method], role)
            assert TensorSpec(bits=bits).resolved(role).method == method


UP_TO_8 = (2, 3, 4, 5, 6, 7, 8)
# What each method can make, from its paper and the containers: weights, activations.
MADE = {
    "minmax": (UP_TO_8, (*UP_TO_8, 16)),
    "lsq": (("t", *UP_TO_8), UP_TO_8),
    "lsqplus": ((), UP_TO_8),
    "pact": ((), UP_TO_8),
    "ewgs": (("t", *UP_TO_8), UP_TO_8),
    "dsq": (("t", *UP_TO_8), UP_TO_8),
    "dorefa": ((1, 2, 3, 4, 5, 6, 7), UP_TO_8),
    "statsq": ((2, 3, 4, 5, 6, 7), ()),
    "twn": (("t",), ()),
    "ttq": (("t",), ()),
    "xnor": ((1,), ()),
    "bwn": ((1,), ()),
    "binary": ((1,), (1,)),
    "reactnet": ((1,), (1,)),
}


def test_every_method_is_in_the_table_below():
    assert set(MADE) == set(METHODS)


@pytest.mark.parametrize("method", MADE)
def test_a_method_makes_its_widths_and_no_others(method):
    for role, made in zip(("weights", "activations"), MADE[method], strict=True):
        for bits in WEIGHTS if role == "weights" else ACTIVATIONS:
            spec = TensorSpec(bits=bits, method=method)
            if bits in made:
                assert spec.resolved(role) == spec
                continue
            with pytest.raises(RecipeError, match=f"'{method}' makes no {bits}-bit") as error:
                spec.resolved(role)
            legal = one_line(error).split("those that do: ")[1].split(", ")
            able = [name for name in MADE if bits in MADE[name][role == "activations"]]
            assert legal == able


@pytest.mark.parametrize("method", MADE)
def test_names_with_a_method(method):
    """It goes to each role that it makes at all; the other role takes the best known."""
    weights, activations = MADE[method]
    for weight_bits, activation_bits in itertools.product(WEIGHTS, ACTIVATIONS):
        name = f"w{weight_bits}a{activation_bits}-{method}"
        if (weights and weight_bits not in weights) or (
            activations and activation_bits not in activations
        ):
            with pytest.raises(RecipeError, match=f"method '{method}' makes no") as error:
                Recipe.from_name(name)
            one_line(error)
            continue
        made, plain = Recipe.from_name(name), Recipe.from_name(name.split("-")[0])
        assert made.name == name and len(made.rules) == len(plain.rules)
        rest, best = made.rules[-1], plain.rules[-1]
        assert (rest.weights.bits, rest.activations.bits) == (weight_bits, activation_bits)
        assert rest.weights.method == (method if weights else best.weights.method)
        assert rest.activations.method == (method if activations else best.activations.method)
        for edge in made.rules[:-1]:
            assert edge.weights == EIGHT  # the method is for the layers between
            assert edge.activations.bits == max(8, activation_bits)


@pytest.mark.parametrize("name", ["w8a8", "w5a8", "w8a16"])
def test_minmax_is_the_best_from_eight_bits_up(name):
    made = Recipe.from_name(f"{name}-minmax")
    assert made.name == f"{name}-minmax"
    assert made.rules == Recipe.from_name(name).rules


@pytest.mark.parametrize("name", ["w4a4", "w2a2", "w3a3"])
def test_lsq_is_the_best_below(name):
    assert Recipe.from_name(f"{name}-lsq").rules == Recipe.from_name(name).rules


def test_twn_is_the_best_for_ternary_kernels():
    assert Recipe.from_name("wta8-twn").rules == Recipe.from_name("wta8").rules


def test_w1a1_is_binary_by_any_name():
    assert Recipe.from_name("w1a1-binary").rules == Recipe.from_name("w1a1").rules


def test_the_default_is_w8a8():
    assert recipe.DEFAULT_RECIPE == "w8a8"
    assert load_recipe("w8a8") == Recipe.from_name("w8a8")


@pytest.mark.parametrize(
    "name",
    ["", "w8", "a8", "8a8", "W8A8", "w8a8 ", " w8a8", "w8a8\n", "w8a8-", "w8-a8", "w8.0a8"]
    + ["w0a8", "w9a8", "w16a8", "w32a32", "w8a0", "w8a9", "w8a12", "w8a15", "w8a17", "w8a32"]
    + ["w-4a8", "int8", "w8a8-magic", "w8a8-lsq-minmax", "w1a1-minmax", "w8a8-binary"]
    + ["w08a8", "w8a08", "w\u0664a8", "tw8a8", "w8a8\x00", "default"]
    + ["w8at", "wTa8", "w2ta8", "wt2a8", "wtat", "ta8", "wta8-minmax", "w8a8-LSQ", "w8a8-statsq"],
)
def test_illegal_names(name):
    with pytest.raises(RecipeError) as error:
        Recipe.from_name(name)
    message = one_line(error)
    # It says what was wrong, or how names read.
    assert "w<W>a<A>" in message or "method" in message


def test_an_illegal_name_is_quoted_with_the_grammar():
    with pytest.raises(RecipeError) as error:
        load_recipe("w4b4")
    message = one_line(error)
    assert "'w4b4'" in message and "w<W>a<A>[-<method>]" in message and "w8a8" in message


@pytest.mark.parametrize("bad", [None, 8, 8.0, ["w8a8"], {"name": "w8a8"}])
def test_what_is_no_recipe_is_refused(bad):
    with pytest.raises(RecipeError) as error:
        load_recipe(bad)
    one_line(error)


# ---------------------------------------------------------------------------------------------
# Specs and rules.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must be one of"),
        ({"bits": 9}, "bits must be one of"),
        ({"bits": 4.0}, "bits must be one of"),
        ({"bits": "4"}, "bits must be one of"),
        ({"bits": True}, "bits must be one of"),
        ({"bits": 4, "method": "magic"}, "unknown method 'magic'"),
        ({"bits": 4, "method": ["lsq"]}, "unknown method"),
        ({"bits": "T"}, "bits must be one of"),
        ({"bits": [4]}, "bits must be one of"),
        ({"bits": None}, "bits must be one of"),
        ({"options": [1]}, "options must be a mapping"),
        ({"per_channel": 1}, "per_channel must be true or false"),
    ],
)
def test_illegal_specs(options, message):
    with pytest.raises(RecipeError, match=message) as error:
        TensorSpec(**options)
    one_line(error)


def test_a_spec_without_a_method_takes_the_best_of_its_role():
    spec = TensorSpec(bits=5, per_channel=False, options={"backward": "ewgs"})
    assert spec.method is None
    weights, activations = spec.resolved("weights"), spec.resolved("activations")
    assert (weights.method, activations.method) == ("minmax", "lsq")
    for resolved in (weights, activations):  # nothing else changes
        assert (resolved.bits, resolved.per_channel) == (5, False)
        assert resolved.options == {"backward": "ewgs"}
        assert resolved != spec
    assert spec.method is None
    assert TensorSpec(bits=1).resolved("weights").method == "binary"
    assert TensorSpec(bits=4, per_channel=False) != TensorSpec(bits=4)


@pytest.mark.parametrize(
    ("role", "bits", "legal"), [("weights", 16, WEIGHTS), ("activations", TERNARY, ACTIVATIONS)]
)
def test_a_width_that_the_role_does_not_have(role, bits, legal):
    for method in (None, "minmax", "lsq"):
        with pytest.raises(RecipeError, match=f"{role} have one of") as error:
            TensorSpec(bits=bits, method=method).resolved(role)
        message = one_line(error)
        assert repr(bits) in message and all(repr(width) in message for width in legal)


def test_rules_resolve_their_specs():
    rule = Rule(weights=TensorSpec(bits=4), activations=TensorSpec(bits=16))
    assert (rule.weights, rule.activations) == (W4, TensorSpec(bits=16, method="minmax"))
    named = TensorSpec(bits=4, method="statsq")
    assert Rule(weights=named).weights == named
    # Equal by any way of writing it, so that a recipe equals the one read from its file.
    assert Rule(weights=TensorSpec(bits=4)) == Rule(weights=W4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either weights/activations or keep_float"),
        ({"layer": "conv"}, "either weights/activations or keep_float"),
        ({"keep_float": "slow", "weights": W4}, "either weights/activations or keep_float"),
        ({"keep_float": "slow", "activations": A4}, "either weights/activations or keep_float"),
        ({"layer": "conv", "keep_float": ""}, "keep_float needs a reason"),
        ({"keep_float": "  "}, "keep_float needs a reason"),
        ({"position": "middle", "weights": W4}, "position must be one of"),
        ({"weights": TensorSpec(bits=16)}, "weights have one of"),
        ({"activations": TensorSpec(bits="t")}, "activations have one of"),
        ({"weights": TensorSpec(bits=4, method="binary")}, "'binary' makes no 4-bit weights"),
        ({"weights": TensorSpec(bits=1, method="minmax")}, "'minmax' makes no 1-bit weights"),
        ({"weights": TensorSpec(bits=4, method="pact")}, "'pact' makes no 4-bit weights"),
        ({"weights": TensorSpec(bits=8, method="dorefa")}, "'dorefa' makes no 8-bit weights"),
        ({"activations": TensorSpec(bits=1, method="lsq")}, "'lsq' makes no 1-bit activations"),
        ({"activations": TensorSpec(bits=4, method="statsq")}, "makes no 4-bit activations"),
    ],
)
def test_illegal_rules(options, message):
    with pytest.raises(RecipeError, match=message) as error:
        Rule(**options)
    one_line(error)


def test_a_rule_names_itself_by_what_it_matches():
    with pytest.raises(RecipeError, match="layer='conv'"):
        Rule(layer="conv", keep_float=" ")
    assert str(Rule(layer="b*", type="Conv?D", position="last", weights=W4)) == (
        "Rule(layer='b*', type='Conv?D', position='last')"
    )


MATCHES = [  # rule, layer name, type, positions, whether
    ({}, "conv", "Conv2D", (), True),
    ({"layer": "conv"}, "conv", "Conv2D", (), True),
    ({"layer": "conv"}, "conv1", "Conv2D", (), False),
    ({"layer": "conv*"}, "conv1", "Conv2D", (), True),
    ({"layer": "block_?_conv"}, "block_1_conv", "Conv2D", (), True),
    ({"layer": "block_?_conv"}, "block_12_conv", "Conv2D", (), False),
    ({"layer": "block_[12]_*"}, "block_2_x", "Conv2D", (), True),
    ({"layer": "CONV"}, "conv", "Conv2D", (), False),
    ({"type": "Conv2D"}, "x", "DepthwiseConv2D", (), False),
    ({"type": "*Conv2D"}, "x", "DepthwiseConv2D", (), True),
    ({"position": "first"}, "x", "Dense", ("first",), True),
    ({"position": "first"}, "x", "Dense", ("last",), False),
    ({"position": "last"}, "x", "Dense", ("first", "last"), True),
    ({"position": "last"}, "x", "ReLU", (), False),
    ({"layer": "x", "type": "Dense", "position": "last"}, "x", "Dense", ("last",), True),
    ({"layer": "x", "type": "Dense", "position": "last"}, "y", "Dense", ("last",), False),
    ({"layer": "x", "type": "Dense", "position": "last"}, "x", "Conv2D", ("last",), False),
    ({"layer": "x", "type": "Dense", "position": "last"}, "x", "Dense", ("first",), False),
]


@pytest.mark.parametrize(("conditions", "name", "type_name", "positions", "whether"), MATCHES)
def test_all_conditions_must_hold(conditions, name, type_name, positions, whether):
    assert Rule(weights=W4, **conditions).matches(name, type_name, positions) is whether


def test_recipes_are_frozen_and_have_rules():
    with pytest.raises(RecipeError, match="'mine' has no rules"):
        Recipe(name="mine", rules=())
    made = Recipe(name="mine", rules=[Rule(weights=W4)])
    assert made.rules == (Rule(weights=W4),)
    for frozen, field in ((made, "name"), (made.rules[0], "layer"), (W4, "bits")):
        with pytest.raises(AttributeError):
            setattr(frozen, field, 1)


def test_with_rules_goes_first_and_copies():
    base = Recipe.from_name("w8a8")
    first, second = Rule(layer="a", weights=W4), Rule(layer="b", keep_float="no")
    assert base.with_rules(first, second).rules == (first, second, *base.rules)
    assert base == Recipe.from_name("w8a8")


# ---------------------------------------------------------------------------------------------
# JSON.

MINE = Recipe(
    name="mine",
    rules=(
        Rule(layer="conv_[0-9]*", type="Conv2D", keep_float="sensitive: measured"),
        Rule(
            position="first",
            weights=TensorSpec(bits=1, options={"surrogate": "swish", "beta": 3.0}),
            activations=TensorSpec(bits=16, options={"decay": 0.5}),
        ),
        Rule(type="Dense", weights=TensorSpec(bits=4, per_channel=False)),
        Rule(type="Conv?D", weights=TensorSpec(bits="t", method="ttq")),
        Rule(activations=TensorSpec(bits=8)),
    ),
)


ROUND_TRIPS = ("w8a8", "w1a1", "w3a2", "w4a16", "wta8", "w4a4-pact", "w1a8-xnor", "wta2-ttq")


@pytest.mark.parametrize("made", [MINE, *map(Recipe.from_name, ROUND_TRIPS)])
def test_json_round_trip(made, tmp_path):
    text = made.to_json()
    assert Recipe.from_json(text) == made
    assert Recipe.from_json(text).to_json() == text
    path = tmp_path / "recipe.json"
    path.write_text(text)
    assert load_recipe(str(path)) == load_recipe(path) == load_recipe(made) == made


def test_json_says_only_what_was_given():
    content = json.loads(MINE.to_json())
    assert content["schema_version"] == 1 and content["name"] == "mine"
    assert content["rules"][0] == {
        "layer": "conv_[0-9]*",
        "type": "Conv2D",
        "keep_float": "sensitive: measured",
    }
    assert content["rules"][3]["weights"]["bits"] == "t"
    assert content["rules"][4] == {
        "activations": {"bits": 8, "method": "minmax", "per_channel": True, "options": {}}
    }


names = st.none() | st.text(min_size=1, max_size=8)
specs = st.builds(
    TensorSpec,
    bits=st.sampled_from(WEIGHTS),
    per_channel=st.booleans(),
    options=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=2),
)
rules = st.builds(
    Rule, layer=names, type=names, position=st.sampled_from([None, "first", "last"]), weights=specs
) | st.builds(Rule, layer=names, keep_float=st.text(min_size=1).filter(str.strip))


@settings(max_examples=50)
@given(name=st.text(), rules=st.lists(rules, min_size=1, max_size=4))
def test_any_recipe_survives_json(name, rules):
    made = Recipe(name=name, rules=tuple(rules))
    assert Recipe.from_json(made.to_json()) == made


def file_with(rules, **changes):
    content = {"schema_version": 1, "name": "x", "rules": rules, **changes}
    return json.dumps({key: value for key, value in content.items() if value is not None})


BAD_FILES = {
    "empty": "",
    "no json": "w8a8",
    "cut off": MINE.to_json()[:-20],
    "list": "[]",
    "number": "3",
    "null": "null",
    "nothing": "{}",
    "no version": file_with([{"weights": {}}], schema_version=None),
    "other version": file_with([{"weights": {}}], schema_version=2),
    "no name": file_with([{"weights": {}}], name=None),
    "no rules": file_with(None),
    "empty rules": file_with([]),
    "rules no list": file_with(7),
    "unknown key": file_with([{"weights": {}}], author="me"),
    "unknown rule key": file_with([{"weights": {}, "layers": "conv"}]),
    "unknown spec key": file_with([{"weights": {"bit": 4}}]),
    "rule no mapping": file_with(["conv"]),
    "spec no mapping": file_with([{"weights": 4}]),
    "spec null": file_with([{"weights": None}]),
    "bits text": file_with([{"weights": {"bits": "4"}}]),
    "bits illegal": file_with([{"weights": {"bits": 11}}]),
    "weights 16": file_with([{"weights": {"bits": 16}}]),
    "activations ternary": file_with([{"activations": {"bits": "t"}}]),
    "bits a list": file_with([{"weights": {"bits": ["t"]}}]),
    "method of the other role": file_with([{"weights": {"bits": 4, "method": "pact"}}]),
    "method a list": file_with([{"weights": {"method": ["minmax"]}}]),
    "method": file_with([{"weights": {"method": "magic"}}]),
    "no action": file_with([{"layer": "conv"}]),
    "both actions": file_with([{"weights": {}, "keep_float": "why"}]),
    "no reason": file_with([{"layer": "conv", "keep_float": ""}]),
    "reason no text": file_with([{"layer": "conv", "keep_float": 3}]),
    "layer no text": file_with([{"layer": 3, "weights": {}}]),
    "layer a list": file_with([{"layer": ["a", "b"], "weights": {}}]),
    "type no text": file_with([{"type": 3, "weights": {}}]),
    "position": file_with([{"position": "second", "weights": {}}]),
    "per_channel text": file_with([{"weights": {"per_channel": "no"}}]),
    "name no text": file_with([{"weights": {}}], name=3),
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_illegal_files(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert str(path) in one_line(error)


def test_an_unknown_schema_version_is_said_before_anything_else():
    with pytest.raises(RecipeError, match="schema_version 2"):
        Recipe.from_json('{"schema_version": 2, "title": "of tomorrow", "stages": []}')


def test_unreadable_files(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x93")
    for name in ("absent.json", "folder.json", "binary.json"):
        with pytest.raises(RecipeError) as error:
            load_recipe(str(tmp_path / name))
        assert name in one_line(error)


# ---------------------------------------------------------------------------------------------
# What a recipe decides.


@pytest.fixture(scope="module")
def model():
    inputs = tf_keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="stem")(inputs)
    x = layers.ReLU(name="act")(x)
    x = layers.Conv2D(4, 3, name="body")(x)
    x = layers.Flatten(name="flat")(x)
    return tf_keras.Model(inputs, layers.Dense(2, name="head")(x))


def decided(model, *rules, annotated=None):
    annotated = {layer.name: None for layer in model.layers[1:]} if annotated is None else annotated
    return decide(model, Recipe(name="mine", rules=rules), annotated)


def test_every_layer_is_decided(model):
    decisions = decided(model, Rule(weights=W4, activations=A4))
    assert list(decisions) == ["stem", "act", "body", "flat", "head"]
    assert all((d.weights, d.activations) == (W4, A4) for d in decisions.values())


def test_the_first_rule_that_matches_decides(model):
    everything = Rule(weights=EIGHT, activations=EIGHT)
    stem, convolutions = Rule(layer="stem", weights=W4), Rule(type="Conv2D", keep_float="why")
    decisions = decided(model, stem, convolutions, everything)
    assert (decisions["stem"].weights, decisions["stem"].activations) == (W4, None)
    assert decisions["body"].keep_float == "why" and decisions["body"].weights is None
    assert decisions["head"].weights == EIGHT
    decisions = decided(model, convolutions, stem, everything)
    assert decisions["stem"].keep_float == "why"


def test_first_and_last_are_of_layers_with_kernels(model):
    edge = TensorSpec(bits=6)
    decisions = decided(
        model,
        Rule(position="first", weights=edge),
        Rule(position="last", weights=W4),
        Rule(weights=EIGHT),
    )
    bits = {name: decision.weights.bits for name, decision in decisions.items()}
    assert bits == {"stem": 6, "act": 8, "body": 8, "flat": 8, "head": 4}


def test_one_kernel_is_first_and_last():
    inputs = tf_keras.Input((3,))
    single = tf_keras.Model(inputs, layers.Dense(2, name="only")(inputs))
    assert decided(single, *Recipe.from_name("w2a2").rules)["only"].weights == EIGHT


@pytest.mark.parametrize(
    "rule",
    [
        Rule(layer="sterm", keep_float="typo"),
        Rule(type="DepthwiseConv2D", weights=W4),
        Rule(layer="act", position="first", weights=W4),
        Rule(layer="input*", keep_float="an input is no layer to quantize"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(model, rule):
    with pytest.raises(RecipeError, match="matches no layer") as error:
        decided(model, rule, Rule(weights=EIGHT))
    message = one_line(error)
    assert "'mine'" in message and str(rule) in message
    # The layers that there are, to choose from.
    assert "stem (Conv2D)" in message and "head (Dense)" in message


def test_a_rule_hidden_by_another_has_matched(model):
    decided(model, Rule(weights=EIGHT), Rule(layer="stem", weights=W4))


def test_a_layer_without_a_rule_is_an_error(model):
    with pytest.raises(RecipeError, match="no rule for layer 'act' \\(ReLU\\)") as error:
        decided(model, Rule(type="Conv2D", weights=W4), Rule(type="Dense", weights=W4))
    one_line(error)


def test_layers_that_are_not_annotated_stay_float(model):
    decisions = decided(model, Rule(weights=W4), annotated={"body": None})
    assert decisions["body"].weights == W4
    assert {d.keep_float for name, d in decisions.items() if name != "body"} == {NOT_ANNOTATED}
    with pytest.raises(RecipeError, match="matches no layer"):
        decided(model, Rule(layer="stem", weights=W4), annotated={"body": None})


def test_an_annotations_own_config_goes_first(model):
    given = configs.LayerQuantizeConfig(weights=TensorSpec(bits=2))
    assert given.weights.method == "lsq"
    annotated = {"stem": given, "body": None, "head": configs.keep_float("asked for")}
    decisions = decided(model, Rule(weights=W4, activations=A4), annotated=annotated)
    assert (decisions["stem"].weights.bits, decisions["stem"].activations) == (2, A4)
    assert (decisions["body"].weights, decisions["body"].activations) == (W4, A4)
    assert decisions["head"].keep_float == "asked for"
    assert (decisions["head"].weights, decisions["head"].activations) == (None, None)


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [recipe, errors])
def test_recipes_need_no_tensorflow(module):
    """A tool that reads recipes need not load TensorFlow."""
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    legal = {"__future__", "qat.errors", "collections.abc", "typing"}
    legal |= {"dataclasses", "fnmatch", "json", "pathlib", "re"}
    assert imported <= legal


def test_every_branch_has_a_first_and_a_last_layer():
    """Two stems, a trunk and three heads, one of which reads an input, too."""
    inputs = [tf_keras.Input((8, 8, 3), name=name) for name in ("left", "right")]
    stems = [layers.Conv2D(4, 3, name=f"stem{i}")(layers.ReLU()(x)) for i, x in enumerate(inputs)]
    x = layers.Conv2D(4, 3, activation="relu", name="trunk")(layers.Add()(stems))
    x = layers.GlobalAveragePooling2D(name="features")(x)
    hidden = layers.Dense(4, name="hidden")(x)
    heads = [layers.Dense(2, name="boxes")(hidden), layers.Dense(3, name="classes")(x), x]
    late = layers.Dense(3, name="late")(layers.Concatenate()([x, layers.Flatten()(inputs[0])]))
    net = tf_keras.Model(inputs, [*heads, layers.Softmax()(late)])
    annotated = {layer.name: None for layer in net.layers}
    found = decide(net, Recipe.from_name("w4a4"), annotated)
    kernels = ("stem0", "stem1", "trunk", "hidden", "boxes", "classes", "late")
    assert {name: found[name].weights.bits for name in kernels} == {
        **{"stem0": 8, "stem1": 8, "trunk": 4, "hidden": 4},
        **{"boxes": 8, "classes": 8, "late": 8},
    }
    edges = Recipe(
        name="edges",
        rules=(
            Rule(position="first", weights=TensorSpec(bits=2)),
            Rule(position="last", weights=TensorSpec(bits=3)),
            Rule(weights=EIGHT),
        ),
    )
    found = decide(net, edges, annotated)
    assert {name: found[name].weights.bits for name in kernels} == {
        **{"stem0": 2, "stem1": 2, "trunk": 8, "hidden": 8},
        **{"boxes": 3, "classes": 3, "late": 2},  # it reads an input, too
    }
