"""Options from defaults, a file and flags; and every mistake named, with the others, before torch is imported."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import ROOT

from hfcustom.options import EXIT_CONFIG, ConfigError, parse, read, read_file
from hfcustom.train_config import TrainConfig


@dataclass(kw_only=True)
class Options:
    """One field of each kind that a recipe uses."""

    rate: Annotated[float, "a share, at most 100% of it"] = 0.5
    max_steps: Annotated[int, "a whole number"] = 10
    limit: Annotated[int | None, "a number or nothing"] = None
    mode: Annotated[Literal["fast", "slow"], "one of two"] = "fast"
    kind: Annotated[Literal["8bit", "4bit"] | None, "one of two or nothing"] = None
    verbose: Annotated[bool, "talk"] = False
    resume: Annotated[bool, "go on"] = True
    careful: Annotated[bool | None, "yes, no, or as it fits"] = None
    names: Annotated[list[str], "some words"] = field(default_factory=list)
    loss: Annotated[str | dict[str, Any] | None, "a name or a mapping"] = None
    title: str = "plain"

    def problems(self) -> list[str]:
        """Return what is out of range."""
        return [f"rate={self.rate} must be at most 1"] if self.rate > 1 else []


def given(*flags: str, config_class: type = Options) -> dict[str, Any]:
    """Return the values that a command line sets, less the defaults."""
    config = read(config_class, None, flags)
    return {name: getattr(config, name) for name in config.sources}


def problems(*flags: str, config_class: type = Options) -> str:
    with pytest.raises(ConfigError) as error:
        read(config_class, None, flags)
    return str(error.value)


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Write a config file; return its path as a string."""

    def write(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return write


# ---- values ---------------------------------------------------------------------------------------------------------

FLAGS = {
    "float": (["--rate", "1e-3"], {"rate": 1e-3}),
    "negative": (["--rate", "-1"], {"rate": -1.0}),
    "equals sign": (["--rate=0.25"], {"rate": 0.25}),
    "int": (["--max-steps", "7"], {"max_steps": 7}),
    "optional": (["--limit", "3"], {"limit": 3}),
    "literal": (["--mode", "slow"], {"mode": "slow"}),
    "optional literal": (["--kind", "4bit"], {"kind": "4bit"}),
    "bool on": (["--verbose"], {"verbose": True}),
    "bool off": (["--no-resume"], {"resume": False}),
    "list of one": (["--names", "a"], {"names": ["a"]}),
    "list": (["--names", "a", "b c", "--verbose"], {"names": ["a", "b c"], "verbose": True}),
    "a name": (["--loss", "focal"], {"loss": "focal"}),
    "a mapping": (['--loss={"focal": {"weight": 0.5}, "z": 1}'], {"loss": {"focal": {"weight": 0.5}, "z": 1}}),
    "a number that is a name": (["--title", "7"], {"title": "7"}),
    "braces in a string": (["--title", "{a}"], {"title": "{a}"}),
    "nothing": ([], {}),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_become_values_of_the_declared_type(name: str) -> None:
    flags, expected = FLAGS[name]
    values = given(*flags)
    assert values == expected
    assert [type(value) for value in values.values()] == [type(value) for value in expected.values()]


FILES = {
    "a.yaml": "rate: 1e-3\nmax_steps: 7\nlimit: null\nverbose: true\nnames: [a, b]\nloss:\n  focal: {weight: 0.5}\n",
    "a.yml": "{rate: 0.001, max_steps: 7, limit: ~, verbose: true, names: [a, b], loss: {focal: {weight: 0.5}}}",
    "a.json": '{"rate": 0.001, "max_steps": 7, "limit": null, "verbose": true, "names": ["a", "b"],'
    ' "loss": {"focal": {"weight": 0.5}}}',
}


@pytest.mark.parametrize("name", FILES)
def test_yaml_and_json_files_give_the_same_values(name: str, written: Any) -> None:
    expected = {"rate": 1e-3, "max_steps": 7, "limit": None, "verbose": True, "names": ["a", "b"]}
    assert given("--config", written(name, FILES[name])) == {**expected, "loss": {"focal": {"weight": 0.5}}}


def test_yaml_is_version_1_2_where_no_and_on_are_words(written: Any) -> None:
    assert given("--config", written("a.yaml", "title: no\nnames: [on, off, 012a]\n")) == {
        "title": "no",
        "names": ["on", "off", "012a"],
    }


def test_defaults_give_way_to_the_file_and_the_file_to_flags(written: Any) -> None:
    path = written("a.yaml", "rate: 0.25\nmax_steps: 20\n")
    config = read(Options, None, ["--config", path, "--max-steps", "30", "--no-resume"])
    assert (config.rate, config.max_steps, config.resume, config.mode) == (0.25, 30, False, "fast")
    assert config.sources == {"rate": path, "max_steps": "--max-steps", "resume": "--resume"}


def test_a_flag_of_three_answers_is_yes_or_no_where_it_is_given() -> None:
    assert given("--careful") == {"careful": True}
    assert given("--no-careful") == {"careful": False}
    assert read(Options, None, []).careful is None


def test_defaults_are_not_shared_between_configs() -> None:
    read(Options, None, []).names.append("a")
    assert read(Options, None, []).names == []


# ---- mistakes -------------------------------------------------------------------------------------------------------

WRONG_FLAGS = {
    "unknown": (["--max-step", "3"], "Unknown flag --max-step. Did you mean --max-steps? See --help."),
    "underscore": (["--max_steps=3"], "Unknown flag --max_steps. Did you mean --max-steps? See --help."),
    "abbreviation": (["--verb"], "Unknown flag --verb. Did you mean --verbose?"),
    "nothing near": (["--qqqq"], "Unknown flag --qqqq. See --help."),
    "a word": (["hello"], "'hello' belongs to no flag."),
    "no value": (["--rate"], "argument --rate: expected one argument"),
    "no words": (["--names"], "argument --names: expected at least one argument"),
    "a bool with a value": (["--verbose=yes"], "argument --verbose/--no-verbose: ignored explicit argument 'yes'"),
    "no float": (["--rate", "fast"], "--rate: rate='fast': input should be a valid number"),
    "no int": (["--max-steps", "1.5"], "--max-steps: max_steps='1.5': input should be a valid integer"),
    "no optional int": (["--limit", "x"], "--limit: limit='x': input should be a valid integer"),
    "no choice": (["--mode", "fats"], "--mode: mode='fats': input should be 'fast' or 'slow'"),
    "no JSON": (["--loss", "{focal: 1}"], "--loss: loss='{focal: 1}': no JSON mapping: Expecting property name"),
    "a JSON key twice": (["--loss", '{"a": 1, "a": 2}'], "key 'a' is given twice"),
    "out of range": (["--rate", "2"], "rate=2.0 must be at most 1"),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_a_wrong_flag_names_itself_its_value_and_what_is_allowed(name: str) -> None:
    flags, message = WRONG_FLAGS[name]
    assert message in problems(*flags)


WRONG_FILES = {
    "unknown key": (
        "a.yaml",
        "max_step: 3\n",
        "Unknown key 'max_step'. Did you mean 'max_steps'? Allowed: careful, kind, limit,",
    ),
    "a flag's spelling": ("a.yaml", "max-steps: 3\n", "Unknown key 'max-steps'. Did you mean 'max_steps'?"),
    "a key of another type": ("a.yaml", "3: x\n", "Unknown key 3."),
    "wrong type": ("a.yaml", "rate: fast\n", "rate='fast': input should be a valid number"),
    "true for a number": ("a.yaml", "rate: true\n", "rate=True: input should not be true or false"),
    "true for a whole number": ("a.json", '{"max_steps": true}', "max_steps=True: input should not be true or false"),
    "a number for text": ("a.yaml", "title: 7\n", "title=7: input should be a valid string"),
    "a number for either": (
        "a.yaml",
        "loss: 7\n",
        "loss=7: input should be a valid string, or input should be a valid dict",
    ),
    "text for a list": ("a.yaml", "names: a\n", "names='a': input should be a valid list"),
    "nothing for a number": ("a.yaml", "rate: null\n", "rate=None: input should be a valid number"),
    "duplicate YAML key": (
        "a.yaml",
        "rate: 0.1\nmode: slow\nrate: 0.2\n",
        'a.yaml, line 3: found duplicate key "rate"',
    ),
    "duplicate JSON key": ("a.json", '{"rate": 0.1, "rate": 0.2}', "a.json: key 'rate' is given twice"),
    "malformed YAML": ("a.yaml", "mode: slow\nrate: [1\n", "a.yaml, line 3: "),
    "malformed JSON": ("a.json", '{"rate": 1,}', "a.json: "),
    "two documents": ("a.yaml", "rate: 1\n---\nrate: 2\n", "a.yaml, line 2: but found another document"),
    "no mapping": ("a.yaml", "- rate\n", "a.yaml: the top level is list, not a mapping of options"),
    "no mapping in JSON": ("a.json", "3", "a.json: the top level is int, not a mapping of options"),
    "empty": ("a.yaml", "# nothing\n", "a.yaml: the top level is NoneType, not a mapping of options"),
    "another suffix": ("a.toml", "rate = 1\n", "a.toml: the file must end in .yaml, .yml or .json"),
    "no UTF-8": ("a.yaml", b"title: caf\xe9\n", "a.yaml: not UTF-8 at byte 10; save the file as UTF-8"),
    "out of range": ("a.yaml", "rate: 2\n", "rate=2.0 must be at most 1"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_names_itself_its_value_and_what_is_allowed(name: str, written: Any) -> None:
    file, content, message = WRONG_FILES[name]
    assert message in problems("--config", written(file, content))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert problems("--config", "gone.yaml") == "--config gone.yaml: No such file or directory"
    assert problems("--config", str(tmp_path)) == f"--config {tmp_path}: Is a directory"


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir", "!!python/module:os"],
)
def test_yaml_that_would_construct_a_python_object_is_refused(tag: str, written: Any, tmp_path: Path) -> None:
    path = written("a.yaml", f"mode: slow\ntitle: {tag} [{tmp_path / 'made'}]\n")
    assert "a.yaml, line 2: could not determine a constructor for the tag" in problems("--config", path)
    assert not (tmp_path / "made").exists()


def test_read_file_returns_plain_values(written: Any) -> None:
    content = read_file(Path(written("a.yaml", "a: {b: [1, 2.5, x]}\n")))
    assert type(content) is dict and type(content["a"]) is dict and type(content["a"]["b"]) is list


def test_all_problems_come_together(written: Any) -> None:
    path = written("a.yaml", "max_step: 3\nrate: 5\nmode: fats\n")
    message = problems("--config", path, "--limt", "3", "--loss", "{", "--max-steps", "x")
    lines = message.splitlines()
    assert lines[0] == "these options are wrong:"
    expected = ["--limt", "'max_step'", "mode='fats'", "loss='{'", "max_steps='x'", "rate=5.0 must be at most 1"]
    assert len(lines) == 1 + len(expected)
    for piece in expected:
        assert sum(piece in line for line in lines) == 1, piece


def test_parse_prints_the_problems_and_exits_with_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(Options, None, ["--rate", "2", "--max-step", "1"])
    assert exit_.value.code == EXIT_CONFIG == 3
    streams = capsys.readouterr()
    assert not streams.out
    assert "rate=2.0 must be at most 1" in streams.err and "Did you mean --max-steps?" in streams.err


def test_parse_reads_the_command_line_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--rate", "0.75"])
    assert parse(Options, None).rate == 0.75


def test_help_shows_the_description_every_flag_its_meaning_and_its_default(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        parse(Options, "Do a thing.\n\n    recipe.py --rate 1", ["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "Do a thing.\n\n    recipe.py --rate 1\n" in shown
    listed = " ".join(shown.split("options:")[1].split())
    for expected in (
        "--config FILE YAML or JSON file with any of the options below",
        "--rate VALUE a share, at most 100% of it (default: 0.5)",
        "--limit VALUE a number or nothing --mode",
        "--mode fast|slow one of two (default: fast)",
        "--kind 8bit|4bit one of two or nothing --verbose",
        "--resume, --no-resume go on (default: True)",
        "--names VALUE [VALUE ...] some words --loss",
        "--title VALUE (default: plain)",
    ):
        assert expected in listed, expected


# ---- TrainConfig ----------------------------------------------------------------------------------------------------

RULES = [
    *(
        (name, value, "must be positive")
        for name in ("max_steps", "batch_size", "log_steps", "keep_checkpoints", "epochs", "lr", "max_cache_gb")
        for value in (0, -1)
    ),
    *(
        (name, value, "must be positive")
        for name in ("row_seconds", "rank_seconds", "spike_rewinds")
        for value in (0, -1)
    ),
    *(
        (name, value, "must be finite and not negative")
        for name in ("neftune_alpha", "spike_factor")
        for value in (-1, float("inf"), float("nan"))
    ),
    ("spike_window", 3, "must be at least 4"),
    *(("ema_decay", value, "must be between 0 and 1") for value in (0, 1, float("nan"))),
    *(
        (name, value, "must be positive")
        for name in ("micro_batch_size", "eval_steps", "save_steps", "max_length", "connector_lr", "vision_lr")
        for value in (0, -1)
    ),
    *((name, value, "must be positive") for name in ("pack_tokens", "pack_crops") for value in (0, -1)),
    *(
        (name, -1, "must not be negative")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm", "min_pixels", "num_workers")
    ),
    *(("beta2", value, "must be in [0, 1)") for value in (-0.1, 1.0)),
    *((name, value, "must be in [0, 1]") for name in ("min_lr_ratio", "max_bad_share") for value in (-0.1, 1.1)),
    *(
        (name, float("nan"), "must ")
        for name in ("lr", "epochs", "weight_decay", "beta2", "min_lr_ratio", "max_grad_norm", "vision_lr")
    ),
    *(
        (name, float("inf"), "must be finite")
        for name in ("lr", "weight_decay", "connector_lr", "vision_lr", "rank_seconds")
    ),
    *(("seed", value, "must be in [0, 2**32)") for value in (-1, 2**32)),
]


@pytest.mark.parametrize(("name", "value", "rule"), RULES)
def test_every_number_out_of_range_is_named_with_its_rule(name: str, value: Any, rule: str) -> None:
    (problem,) = TrainConfig(**{name: value, "packing": name.startswith("pack_")}).problems()
    assert problem.startswith(f"{name}={value} {rule}")


@pytest.mark.parametrize(
    ("name", "value"), [("part_lr", {"head": math.inf}), ("part_weight_decay", {"new": math.inf})]
)
def test_a_rate_of_a_part_that_is_infinite_is_named(name: str, value: dict[str, float]) -> None:
    assert TrainConfig(**{name: value}).problems() == [f"{name}: inf of {next(iter(value))} must be finite"]


def test_micro_batches_that_do_not_make_a_step_are_named_before_anything_is_loaded() -> None:
    rule = "cannot be shared out in micro-batches of"
    assert TrainConfig(batch_size=8, micro_batch_size=3).problems() == [
        f"batch_size=8 rows {rule} micro_batch_size=3; choose a batch_size that is a multiple of it"
    ]
    assert TrainConfig(batch_size=8, micro_batch_size=4).problems() == []
    assert not [said for said in TrainConfig(batch_size=8, micro_batch_size=0).problems() if rule in said]


ALLOWED = {
    "seed": 2**32 - 1,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "num_workers": 0,
    "beta2": 0,
    "min_lr_ratio": 1,
    "max_steps": 1,
    "max_length": 1,
}


def test_the_defaults_and_the_borders_are_usable() -> None:
    assert TrainConfig().problems() == []
    assert TrainConfig(**ALLOWED).problems() == []  # type: ignore[arg-type]


def test_every_number_of_the_config_has_a_rule() -> None:
    kinds = (int, float, int | None, float | None)
    numbers = {name for name, kind in typing.get_type_hints(TrainConfig).items() if kind in kinds}
    assert numbers == {name for name, _, _ in RULES}


@pytest.mark.parametrize("flags", [["--max-steps", "5", "--epochs", "2"], ["--epochs", "1", "--max-steps", "5"]])
def test_epochs_beside_max_steps_are_an_error(flags: list[str]) -> None:
    told = r"epochs=\d.0 has no effect beside max_steps=5, which says when to stop; leave one out"
    assert re.search(told, problems(*flags, config_class=TrainConfig))


def test_a_number_passed_as_text_is_told() -> None:
    (problem,) = TrainConfig(ema_decay="0.9").problems()  # type: ignore[arg-type]
    assert problem == "TrainConfig: ema_decay='0.9' is text; pass 0.9, without quotation marks."


def test_epochs_beside_max_steps_are_an_error_without_a_command_line_too() -> None:
    (problem,) = TrainConfig(max_steps=5, epochs=2).problems()
    assert "epochs=2 has no effect beside max_steps=5" in problem


def test_epochs_may_replace_the_steps_that_a_recipe_has_by_default(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Recipe(TrainConfig):
        max_steps: Annotated[int | None, "another default"] = 400

    (tmp_path / "run.yaml").write_text("max_steps: null\n")
    found = read(Recipe, None, ["--epochs", "2", "--config", str(tmp_path / "run.yaml")])
    assert (found.max_steps, found.epochs) == (None, 2.0)
    assert "max_steps: null in a --config file" in problems("--epochs", "2", config_class=Recipe)


def test_problems_of_a_train_config_are_told_together() -> None:
    message = problems("--lr", "0", "--batch-size", "-4", "--schedule", "step", config_class=TrainConfig)
    for piece in ("lr=0.0 must be positive", "batch_size=-4 must be positive", "'cosine', 'linear' or 'constant'"):
        assert piece in message


def test_a_recipe_adds_fields_and_rules_to_the_train_config() -> None:
    @dataclass(kw_only=True)
    class Recipe(TrainConfig):
        lr: Annotated[float, "another default"] = 1.0
        rank: Annotated[int, "a new field"] = 8

        def problems(self) -> list[str]:
            return [*super().problems(), *([] if self.rank > 0 else ["rank must be positive"])]

    assert given("--rank", "4", "--trackers", "tensorboard", "wandb", config_class=Recipe) == {
        "rank": 4,
        "trackers": ["tensorboard", "wandb"],
    }
    assert read(Recipe, None, []).lr == 1.0  # type: ignore[attr-defined]
    assert problems("--rank", "0", "--epochs", "0", config_class=Recipe).count("must be positive") == 2


# ---- nothing heavy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--help"], ["--lr", "fast"], ["--lr", "1"]])
def test_options_are_read_before_anything_heavy_is_imported(flags: list[str]) -> None:
    script = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'PIL', 'numpy', 'peft'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        "from hfcustom.options import parse\n"
        "from hfcustom.train_config import TrainConfig\n"
        "parse(TrainConfig, None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == (EXIT_CONFIG if "fast" in flags else 0), done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")
