"""Recipes: the grammar, each of its errors, and the shipped ones on the real model's shapes."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgguf.errors import RecipeError
from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.machine import AmdMemory, Machine
from stepgguf.fit.memory import ContextParams, Footprint, LayerFootprint, memory_budget, memory_need
from stepgguf.model.hparams import HParams
from stepgguf.model.names import TensorName
from stepgguf.model.tensors import TENSORS, TensorSpec, tensor_specs
from stepgguf.quants import mixtures, recipe, recipe_grammar
from stepgguf.quants.mixtures import BASE_TYPES, RuleFacts, TypeChoice
from stepgguf.quants.recipe import Recipe
from stepgguf.quants.recipe_files import load_recipe, shipped_descriptions
from stepgguf.quants.recipe_grammar import parse_recipe
from stepgguf.quants.types import row_size
from stepgguf.runtime.llama_build import Gpu
from tests.conftest import real_config
from tests.processor_time import at_most

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HP = HParams.from_config(real_config())
FACTS = RuleFacts(n_layer=45, n_expert=288, gqa=8)
SPECS = tensor_specs(HP)
CANDIDATES = [s for s in SPECS if s.is_quantizable]
TRUNK = [c for c in CANDIDATES if c.layer is None or c.layer < FACTS.n_layer]
N_WEIGHTS = sum(math.prod(spec.shape) for spec in SPECS)


def rule_of_thumb(default: str, gate_up: str, down: str) -> str:
    return f'default = "{default}"\nffn_down_exps = "{down}"\n"ffn_{{gate,up}}_exps" = "{gate_up}"\n'


RULE_OF_THUMB = rule_of_thumb("Q8_0", "Q4_K", "Q5_K")


def chosen(text: str, candidates: list[TensorSpec] = CANDIDATES, facts: RuleFacts = FACTS) -> dict[str, TypeChoice]:
    choices = parse_recipe(text, "my.toml").choose_types(candidates, facts)
    return {c.name: choice for c, choice in zip(candidates, choices, strict=True)}


def types(text: str) -> dict[str, str]:
    return {name: choice.ggml_type.name for name, choice in chosen(text).items()}


def n_bytes(policy: Recipe) -> int:
    """Tensor data of the real model with its MTP blocks."""
    quantized = sum(
        math.prod(c.shape[:-1]) * row_size(choice.ggml_type, c.shape[-1])
        for c, choice in zip(CANDIDATES, policy.choose_types(CANDIDATES, FACTS, has_imatrix=True), strict=True)
    )
    return quantized + sum(4 * math.prod(spec.shape) for spec in SPECS if not spec.is_quantizable)


# what a recipe decides ------------------------------------------------------------------------------------------


def test_the_roles_are_those_of_the_models_table() -> None:
    kept = {spec.name.stem for spec in SPECS if not spec.is_quantizable}
    rows = {(rule.where, TensorName(rule.name)) for rule in TENSORS}
    assert {name.role for where, name in rows if where == "model" and name.stem not in kept} == set(recipe.MODEL_ROLES)
    in_layers = [name for where, name in rows if where in ("layer", "dense", "moe")]
    assert {name.role for name in in_layers if name.stem not in kept} == set(recipe.LAYER_ROLES)
    assert {f"nextn.{s.role}" for s in SPECS if s.is_mtp and s.is_quantizable} == set(recipe.MTP_ROLES)
    assert {name.stem for _, name in rows if name.stem in kept} == set(recipe.FLOAT32_ROLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASE_TYPES)
@pytest.mark.parametrize("has_imatrix", [False, True])
def test_a_stock_name_is_the_stock_mixture(name: str, has_imatrix: bool) -> None:
    ours = load_recipe(name.lower()).choose_types(TRUNK, FACTS, has_imatrix=has_imatrix)
    assert ours == mixtures.choose_types(name, TRUNK, FACTS, has_imatrix=has_imatrix)


# default, gate, up, down and the published GiB and bpw of huggingface.co/AesSedai/Step-3.5-Flash-GGUF, whose files
# carry the MTP blocks in Q8_0.
@pytest.mark.parametrize(
    ("default", "gate_up", "down", "gib", "bpw"),
    [
        ("Q8_0", "Q8_0", "Q8_0", "197.43", "8.51"),
        ("Q8_0", "Q5_K", "Q6_K", "138.83", "5.98"),
        ("Q8_0", "Q4_K", "Q5_K", "116.22", "5.01"),
        ("Q8_0", "IQ3_S", "IQ4_XS", "91.31", "3.93"),
        ("Q6_K", "IQ2_S", "IQ3_S", "70.89", "3.05"),
        ("Q6_K", "IQ2_XS", "IQ3_XXS", "64.43", "2.78"),
    ],
)
def test_the_three_line_rule_of_thumb_has_the_published_sizes(
    default: str, gate_up: str, down: str, gib: str, bpw: str
) -> None:
    size = n_bytes(parse_recipe(rule_of_thumb(default, gate_up, down), "rule-of-thumb.toml"))
    assert (f"{size / GIB:.2f}", f"{8 * size / N_WEIGHTS:.2f}") == (gib, bpw)


def test_a_choice_says_which_line_made_it() -> None:
    made = chosen("# mine\n\n" + RULE_OF_THUMB)
    assert made["blk.3.ffn_down_exps.weight"].reason == "recipe line 4: ffn_down_exps"
    assert made["blk.44.ffn_up_exps.weight"].reason == "recipe line 5: ffn_{gate,up}_exps"
    assert made["blk.3.ffn_down_shexp.weight"].reason == made["blk.0.ffn_down.weight"].reason == "recipe default"


def test_the_first_rule_wins_and_the_base_decides_the_rest() -> None:
    base = dict(zip((c.name for c in TRUNK), mixtures.choose_types("Q4_K_M", TRUNK, FACTS), strict=True))
    made = chosen('base = "Q4_K_M"\n"attn_v @ 3" = "Q8_0"\n"attn_{q,v}" = "Q5_K"\n')
    assert made["blk.3.attn_v.weight"].ggml_type.name == "Q8_0"
    assert {c.name for c in TRUNK if made[c.name] != base[c.name]} == {
        c.name for c in TRUNK if c.role in ("attn_q", "attn_v")
    }


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("7", [7]),
        ("0-4", [0, 1, 2, 3, 4]),
        ("42-", [42, 43, 44]),
        ("0-1, 44-", [0, 1, 44]),
        ("first 2", [0, 1]),
        ("last 2,5-5", [5, 43, 44]),
        ("last 45", list(range(45))),
    ],
)
def test_layers_count_both_ends(layers: str, expected: list[int]) -> None:
    made = types(f'default = "Q8_0"\n"attn_q @ {layers}" = "Q4_K"\n')
    assert [name for name, kind in made.items() if kind == "Q4_K"] == [f"blk.{i}.attn_q.weight" for i in expected]


@pytest.mark.parametrize(
    ("pattern", "roles"),
    [
        ("ffn_*_shexp", {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}),
        ("ffn_down", {"ffn_down"}),
        ("{token_embd,output}", {"token_embd", "output"}),
        ("attn_{k, v} , output", {"attn_k", "attn_v", "output"}),
        ("attn_{q,gat{e}}", None),
        ("*", {*recipe.MODEL_ROLES, *recipe.LAYER_ROLES}),
        ("* @ 0-", set(recipe.LAYER_ROLES)),
        ("nextn", set(recipe.MTP_ROLES)),
        ("nextn.eh_*", {"nextn.eh_proj"}),
    ],
)
def test_patterns_name_whole_roles_and_only_nextn_reaches_the_mtp_blocks(pattern: str, roles: set[str] | None) -> None:
    text = f'default = "Q4_0"\n"{pattern}" = "Q4_1"\n'
    if roles is None:
        with pytest.raises(RecipeError, match=r"unknown role"):
            parse_recipe(text, "my.toml")
        return
    made = types(text)
    hit = {
        f"nextn.{s.role}" if s.is_mtp else s.role for s in SPECS if s.name in made and made[s.name] == "Q4_1"
    }  # fmt: skip
    assert hit == roles


@pytest.mark.parametrize(
    ("default", "expected"), [("Q4_K", "Q8_0"), ("BF16", "BF16"), ("F32", "F32"), ("Q8_0", "Q8_0")]
)
def test_mtp_blocks_are_q8_0_or_the_files_float_type(default: str, expected: str) -> None:
    for head in (f'default = "{default}"', f'base = "{default if default != "Q4_K" else "Q4_K_M"}"'):
        made = types(head + "\n")
        assert {made[s.name] for s in SPECS if s.is_mtp and s.name in made} == {expected}


def test_rows_that_blocks_do_not_divide_fall_back_with_the_reason() -> None:
    tensor = TensorSpec("", TensorName("blk.0.attn_q.weight"), (64, 96), is_mtp=False)
    made = chosen('default = "Q8_0"\nattn_q = "Q5_K"', [tensor])["blk.0.attn_q.weight"]
    assert (made.ggml_type.name, made.reason) == (
        "Q5_1",
        "recipe line 2: attn_q; rows of 96 do not divide into Q5_K blocks",
    )


# for the allocator ----------------------------------------------------------------------------------------------


def test_a_budget_leaves_open_what_no_rule_fixes_and_floors_bound_it() -> None:
    policy = parse_recipe('bpw = 4.2\noutput = "Q6_K"\n"attn_*" = { floor = "Q5_K" }\n', "my.toml")
    by_role = {c.role: c for c in TRUNK}
    assert policy.bpw == 4.2
    assert policy.fixed_type(by_role["output"], FACTS) == TypeChoice(BASE_TYPES["Q6_K"], "recipe line 2: output")
    assert policy.floor_type(by_role["output"], FACTS) is None
    assert policy.fixed_type(by_role["attn_v"], FACTS) is None
    assert policy.floor_type(by_role["attn_v"], FACTS) == BASE_TYPES["Q5_K_S"]
    assert policy.fixed_type(by_role["ffn_up_exps"], FACTS) is None
    assert policy.floor_type(by_role["ffn_up_exps"], FACTS) is None
    with pytest.raises(RecipeError, match=r"my\.toml: no rule decides token_embd\.weight, and a target in bits"):
        policy.choose_types(TRUNK, FACTS)


def test_a_floor_raises_what_the_base_chooses_and_lowers_nothing() -> None:
    stock = types('base = "Q4_K_M"')
    made = chosen('base = "Q4_K_M"\n"attn_{q,v}" = { floor = "Q5_K" }')
    q, v = made["blk.5.attn_q.weight"], made["blk.0.attn_v.weight"]
    assert (stock["blk.5.attn_q.weight"], q.ggml_type.name) == ("Q4_K", "Q5_K")
    assert q.reason == "recipe line 2: attn_{q,v}, floor"
    assert stock["blk.0.attn_v.weight"] == v.ggml_type.name == "Q6_K"


# errors ---------------------------------------------------------------------------------------------------------

ERRORS = {
    'default = "Q8_0"\n\n\nffn_dwn_exps = "Q5_K"': r"line 4: unknown role 'ffn_dwn_exps'; did you mean ffn_down_exps\?",
    'defualt = "Q8_0"': r"line 1: unknown role 'defualt'; did you mean default\?",
    'default = "Q8_0"\n"ffn_{up,gat}_exps" = "Q4_K"': r"line 2: unknown role 'ffn_gat_exps'; did you mean ffn_gate",
    'default = "Q8_0"\neh_proj = "Q6_K"': r"line 2: unknown role 'eh_proj'; did you mean nextn\.eh_proj\?",
    'default = "Q8_0"\n"" = "Q6_K"': r"line 2: unknown role ''",
    'default = "Q8_0"\nffn_gate_inp = "Q8_0"': r"line 2: ffn_gate_inp stays F32",
    'default = "Q8_0"\n"*_norm" = "Q8_0"': r"line 2: output_norm, attn_norm, \S+ \S+ ffn_norm stays F32",
    'default = "Q8_0"\nattn_q = "Q5K"': r"line 2: unknown type 'Q5K'; did you mean Q5_K\?",
    'default = "Q8_0"\nattn_q = "Q5_K_M"': r"line 2: Q5_K_M is a mixture of types; did you mean Q5_K\?",
    'default = "Q4_K_M"': r"line 1: Q4_K_M is a mixture of types; did you mean Q4_K\?",
    'default = "Q8_0"\nattn_q = "I32"': r"line 2: unknown type 'I32'",
    'base = "Q4_K_X"': r"line 1: unknown stock mixture 'Q4_K_X'; did you mean Q4_K_\w\?",
    'default = "Q8_0"\nattn_q = 4': r"line 2: attn_q is 4, expected a type or a floor",
    'default = "Q8_0"\nattn_q = { flor = "Q5_K" }': r"line 2: attn_q is \{'flor': 'Q5_K'\}, expected",
    'default = "Q8_0"\nattn_q = { floor = "Q5" }': r"line 2: unknown type 'Q5'; did you mean Q5_\w\?",
    'default = "Q8_0"\nattn_q = { floor = "Q5_K", ceiling = "Q6_K" }': r"line 2: attn_q is .*, expected",
    'default = "Q8_0"\n\nnextn.eh_proj = "Q6_K"': r"line 3: nextn is \{'eh_proj': 'Q6_K'\}, expected",
    '[attn_q]\ndefault = "Q8_0"': r"line 1: attn_q is \{\}, expected",
    'default = "Q8_0"\n"attn_q @ 5-3" = "Q4_K"': r"line 2: the layers 5-3 end before they begin",
    'default = "Q8_0"\n"attn_q @ -6" = "Q4_K"': r"line 2: '-6' names no layers",
    'default = "Q8_0"\n"attn_q @" = "Q4_K"': r"line 2: '' names no layers",
    'default = "Q8_0"\n"attn_q @ ' + "1" * 5000 + '" = "Q4_K"': r"line 2: '1+' names no layers",
    'default = "Q8_0"\n"attn_q @ last 0" = "Q4_K"': r"line 2: 'last 0' names no layers",
    'default = "Q8_0"\n"attn_q, output @ 3" = "Q4_K"': r"line 2: output is not in the trunk's layers",
    'default = "Q8_0"\n"nextn.* @ 3" = "Q4_K"': r"line 2: nextn\.attn_q is not in the trunk's layers",
    'default = "Q8_0"\nattn_q = "Q4_K"\n"attn_q" = "Q5_K"': r"line 3: 'attn_q' is already on line 2",
    'default = "Q8_0"\nattn_q = Q4_K\nattn_k = "Q4_K"': r"line 2: not TOML: attn_q = Q4_K",
    'default = "Q8_0"\nx = ' + "[" * 10000: r"line 2: not TOML: x = \[{76}$",
    "bpw = " + "9" * 5000: r"line 1: not TOML: bpw = 9+$",
    "bpw = true": r"line 1: bpw is True, expected a number",
    "bpw = nan": r"line 1: bpw is nan, expected a number",
    "bpw = 0": r"line 1: bpw is 0, expected a number",
    "name = 3": r"line 1: name is 3, expected text in quotes",
}


@pytest.mark.parametrize("text", ERRORS, ids=[text[:60] for text in ERRORS])
def test_errors_name_file_line_and_near_miss(text: str) -> None:
    with pytest.raises(RecipeError, match=rf"^my\.toml {ERRORS[text]}"):
        parse_recipe(text, "my.toml")


@pytest.mark.parametrize(
    ("text", "found"), [("", "none"), ('bpw = 4\n\nbase = "Q2_K"', "base on line 3, bpw on line 1")]
)
def test_exactly_one_setting_decides_what_no_rule_does(text: str, found: str) -> None:
    with pytest.raises(RecipeError, match=rf"^my\.toml: exactly one of default, base and bpw .* found {found}$"):
        parse_recipe(text, "my.toml")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ('"attn_*" = "Q5_K"\nattn_q = "Q6_K"', "line 3: attn_q can never match, line 2 comes first"),
        (
            '"attn_q @ 0-20" = "Q5_K"\n"attn_q @ last 24" = "Q4_K"\n"attn_q @ 3-40" = "Q6_K"',
            "line 4: attn_q @ 3-40 can never match, line 2, 3 comes first",
        ),
        ('nextn = "Q6_K"\n"nextn.eh_proj" = "Q8_0"', "line 3: nextn.eh_proj can never match, line 2 comes first"),
        ('"attn_q @ 40-45" = "Q5_K"', "line 2: attn_q @ 40-45: the model has layers 0 to 44"),
        ('"attn_q @ 45-" = "Q5_K"', "line 2: attn_q @ 45-: the model has layers 0 to 44"),
        ('"attn_q @ last 46" = "Q5_K"', "line 2: attn_q @ last 46: the model has layers 0 to 44"),
    ],
)
def test_rules_that_this_model_gives_nothing_to_do_are_errors(rules: str, message: str) -> None:
    policy = parse_recipe(f'default = "Q8_0"\n{rules}\n', "my.toml")
    with pytest.raises(RecipeError, match=rf"^my\.toml {re.escape(message)}$"):
        policy.choose_types(CANDIDATES, FACTS)


def test_a_rule_that_is_covered_only_in_part_is_none_of_them() -> None:
    made = types('default = "Q8_0"\n"attn_q @ 1-" = "Q5_K"\n"attn_q @ 0-4" = "Q6_K"\n')
    assert [made[f"blk.{i}.attn_q.weight"] for i in (0, 1, 4, 44)] == ["Q6_K", "Q5_K", "Q5_K", "Q5_K"]


def test_line_numbers_survive_whatever_toml_allows_between_the_lines() -> None:
    text = (
        '# attn_q = "Q2_K"\r\ndescription = """\nattn_q = "Q2_K"\n[x]\n"""\n\n'
        "'attn_k' = 'Q4_K' # attn_q\n\"attn_\\u0071\" = { floor = \"Q4_K\" }\nname = '''a\u2028\n'''\n"
        '  attn_v\t= "Q6_K"\nbpw = 4 \n'
    )
    rules = {rule.roles: rule.line for rule in parse_recipe(text, "my.toml").rules}
    assert rules == {("attn_k",): 7, ("attn_q",): 8, ("attn_v",): 11}


# where recipes come from ----------------------------------------------------------------------------------------


def test_a_file_is_a_recipe_with_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RULE_OF_THUMB)
    policy = load_recipe(str(path))
    assert (policy.name, policy.text, policy.description) == ("mine", RULE_OF_THUMB, "")
    path.write_text('name = "ours"\ndescription = "d"\n' + RULE_OF_THUMB)
    assert (load_recipe(str(path)).name, load_recipe(str(path)).description) == ("ours", "d")


def test_a_file_that_cannot_be_read_is_an_error_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b'default = "Q8_0"\n\xff')
    with pytest.raises(RecipeError, match=r"bad\.toml: not UTF-8 text, byte 17 is 0xff"):
        load_recipe(str(path))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.toml: Is a directory"):
        load_recipe(str(tmp_path / "folder.toml"))


def test_an_unknown_name_has_the_near_miss_of_types_recipes_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(RULE_OF_THUMB)
    misses = {"Q4KM": "Q4_K_M", "q5_k_n": r"Q5_K_\w", "128": "128gb", "./mine.tml": r"(\./)?mine\.toml"}
    for name, near in misses.items():
        with pytest.raises(RecipeError, match=rf"unknown type or recipe '{re.escape(name)}'; did you mean {near}\?$"):
            load_recipe(name)


def test_a_recipe_file_that_is_not_there_is_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RULE_OF_THUMB)
    with pytest.raises(RecipeError, match=r"mien\.toml: no such file; did you mean \S+/mine\.toml\?$"):
        load_recipe(str(tmp_path / "mien.toml"))


# the shipped recipes --------------------------------------------------------------------------------------------

LAYERS = tuple(LayerFootprint(layer.n_head, layer.n_head_kv, layer.is_sliding, layer.is_mtp) for layer in HP.layers)


def mac(gib: int, text: str) -> Machine:
    """Set up as the recipe says."""
    wired = re.search(r"sudo sysctl iogpu\.wired_limit_mb=(\d+)$", text, re.MULTILINE)
    assert wired is not None
    return Machine(
        "Darwin", "arm64", "Apple", 16, 16, frozenset(), gib * GIB, gib * GIB, 0, wired_limit=int(wired[1]) * 2**20
    )


def linux(gib: int) -> Machine:
    """A machine that lists so much memory, which is less than its modules have."""
    return Machine("Linux", "x86_64", "cpu", 16, 32, frozenset(), gib * GIB, gib * GIB, 0)


def machines(name: str, text: str) -> list[Machine]:
    """What the description promises that the recipe is for."""
    match name:
        case "128gb":
            spark = Machine(
                "Linux", "aarch64", "cpu", 20, 20, frozenset(), 121 * GIB, 0, 0, gpus=(Gpu("NVIDIA GB10", None, None),)
            )
            halo = Machine(
                "Linux", "x86_64", "AMD RYZEN AI MAX+ 395", 16, 32, frozenset(), 124 * GIB, 0, 0,
                amd=AmdMemory(GIB // 2, 126976 * 2**20),
            )  # fmt: skip
            return [mac(128, text), spark, halo]
        case "96gb":
            card = Machine(
                "Linux", "x86_64", "cpu", 16, 32, frozenset(), 64 * GIB, 0, 0, gpus=(Gpu("GPU", 95 * GIB, 95 * GIB),)
            )
            return [mac(96, text), linux(93), card]
        case "64gb":
            return [mac(64, text), linux(62)]
        case "192gb":
            return [mac(192, text), linux(188)]
    raise AssertionError(f"no machine for {name}")


def test_the_shipped_recipes_are_listed_for_the_smallest_machine_first() -> None:
    assert list(shipped_descriptions()) == ["64gb", "96gb", "128gb", "192gb"]


@pytest.mark.parametrize("name", shipped_descriptions())
def test_a_shipped_recipe_keeps_the_numbers_of_its_description(name: str) -> None:
    policy = load_recipe(name)
    said = re.match(r"([\d.]+) GiB, ([\d.]+) bpw: (\d+)K tokens in (\d+) GiB; for ", policy.description)
    assert said is not None
    weights = n_bytes(policy)
    assert (said[1], said[2]) == (f"{weights / GIB:.1f}", f"{8 * weights / N_WEIGHTS:.2f}")
    model = Footprint(
        weights, LAYERS, HP.head_dim, HP.head_dim, HP.sliding_window, HP.hidden_size, HP.intermediate_size,
        HP.vocab_size, HP.n_expert_used, HP.expert_size, HP.max_position,
    )  # fmt: skip
    total = memory_need(model, ContextParams(int(said[3]) * 1024)).total
    assert math.ceil(total / GIB) == int(said[4])
    for machine in machines(name, policy.text):
        assert total <= memory_budget(machine).limit, machine


@pytest.mark.parametrize("name", shipped_descriptions())
def test_a_shipped_recipe_says_when_it_needs_an_imatrix(name: str) -> None:
    policy = load_recipe(name)
    choices = policy.choose_types(CANDIDATES, FACTS)
    needed = any(
        mixtures.requires_imatrix("", c, choice.ggml_type) for c, choice in zip(CANDIDATES, choices, strict=True)
    )
    assert policy.description.endswith("; needs an imatrix") == needed


HOSTILE = {
    "an open string": 'x = """' + "a\n" * 50_000,
    "an open list with brackets in strings": "x = [" + '"]",\n' * 20_000,
    "open brackets": "x = [" + "[\n" * 50_000,
    "quotes": '"\n' * 50_000,
    "triple quotes": "'''\n'" * 20_000,
    "escapes": 'x = "' + "\\\\" * 50_000,
    "comments": "# a\n" * 20_000,
    "a key of many parts": "a." * 50_000 + "b = 1\n",
    "alternatives": '"' + "{a,b}" * 20_000 + '" = "Q4_K"\n',
    "alternatives in alternatives": '"' + "{a," * 20_000 + '" = "Q4_K"\n',
    "stars": '"' + "*f*n" * 20_000 + '" = "Q4_K"\n',
    "layers": '"ffn_down_exps @ ' + "1," * 50_000 + '1" = "Q4_K"\n',
    "rules": "".join(f'"ffn_down @ {i % 40}" = "Q4_K" # {i}\n' for i in range(5_000)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_reading_takes_time_in_proportion_to_the_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each character goes to tomllib at most once, and the time is a fraction of what a square would take."""
    read, loads = 0, tomllib.loads

    def count(text: str) -> dict[str, object]:
        nonlocal read
        read += len(text)
        return loads(text)

    monkeypatch.setattr(recipe_grammar.tomllib, "loads", count, raising=True)
    text = 'default = "Q8_0"\n' + HOSTILE[kind]
    with at_most(5), contextlib.suppress(RecipeError):
        parse_recipe(text, "hostile")
    assert read <= len(text)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["# [ a comment \"\n", "\n", "a{n} = 'x]'\n", 'b{n} = "y # \\" ["\n', "c{n} = [\n  1, # ]\n  2,\n]\n",
             'd{n} = """\n[ \'\'\' "" \n"""\n', "e{n} = \'\'\'\n\"\"\" [\n\'\'\'\n", 'f{n} = { g = "}" }\n']
        )
    )
)  # fmt: skip
def test_statements_are_what_tomllib_makes_of_the_whole(parts: list[str]) -> None:
    text = "".join(part.replace("{n}", str(n)) for n, part in enumerate(parts))
    found = {key: value for _, key, value in recipe_grammar.split_statements(text, "r")}
    assert found == tomllib.loads(text)
