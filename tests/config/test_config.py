"""The YAML files of `conf/`, and the dataclasses that they become."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig

from mixlora_exp.cli.train import execute
from mixlora_exp.config import schema as s
from mixlora_exp.config.architecture import OLD_NAMES, current_model
from mixlora_exp.config.command import compose, compose_cell, plan_runs
from mixlora_exp.config.paths import CONF_DIR
from mixlora_exp.config.recorded import check_recorded
from mixlora_exp.config.resolve import (
    open_session,
    register_schemas,
    to_config,
    to_dict,
)
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError
from mixlora_exp.sweeps.compose_cells import ByGroup

NAMED = {
    "model": ["gemma_2b", "llama2_13b", "llama2_7b", "llama3_8b", "smollm2_135m", "tiny"],
    "method": ["dora", "lora", "mixdora", "mixlora", "none"],
    "task": [*s.TASK_NAMES, "all", "commonsense_170k", "metamath_gsm8k", "multi"],
    "data": ["embedded", "hub", "local"],
    "trainer": ["paper", "smoke"],
    "preset": ["correct", "official"],
    "evaluation": ["full", "limit"],
    "tracker": ["none", "tensorboard", "wandb"],
}
"""Options that documents name. There may be others: a model or a method is added as a file."""
SUITE = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"]
MULTI = ["arc_e", "arc_c", "boolq", "obqa", "piqa"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FILES = sorted(path.relative_to(CONF_DIR) for path in CONF_DIR.rglob("*.yaml"))
OPTIONS = [path for path in FILES if len(path.parts) == 2 and path.parts[0] in NAMED]
GROUPS = {group: [p.stem for p in OPTIONS if p.parts[0] == group] for group in NAMED}
EXPERIMENTS = [path for path in FILES if path.parts[0] == "experiment"]


def test_every_file_is_known() -> None:
    for group, options in NAMED.items():
        assert set(options) <= set(GROUPS[group]), group
    assert len(EXPERIMENTS) >= 2
    launchers = [path for path in FILES if path.parts[0] == "hydra"]
    scales = [path for path in FILES if path.parts[0] == "scale"]
    known = sum(map(len, GROUPS.values())) + len(EXPERIMENTS) + len(launchers) + len(scales)
    roots = {path.stem for path in FILES if len(path.parts) == 1}
    assert roots == {"config", "evaluate", "generate", "hydra_output"}
    assert len(FILES) == len(roots) + known


# `test_model_method_task` composes every option of these, and checks the names.
COVERED = ("model", "method", "task")
OTHERS = [path for path in OPTIONS if path.parts[0] not in COVERED]


FREE_TEXT = ["data=chat", "evaluation.protocols=[exact_match]"]
NAMED_ANSWERS = ["data=chat", "evaluation.protocols=[answer_pattern]"]
NEEDS = {"chat": ["task=metamath_gsm8k", *FREE_TEXT], "metamath_gsm8k": FREE_TEXT,
         "commonsense_170k": NAMED_ANSWERS}  # fmt: skip
"""Options that go with others only: free text has a source and a protocol of its own."""


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.with_suffix("").as_posix())
def test_option_composes_and_is_named_as_its_file(path: Path) -> None:
    group = path.parts[0]
    config = compose([f"{group}={path.stem}", *NEEDS.get(path.stem, [])])
    name = getattr(config, group).name
    assert getattr(name, "value", name) == path.stem


def test_every_experiment_is_valid() -> None:
    by_group = ByGroup()
    with open_session() as hydra:
        for path in EXPERIMENTS:
            words = [f"experiment={path.relative_to('experiment').with_suffix('').as_posix()}"]
            assert plan_runs(hydra, "config", words, False, by_group.cell).cells


def test_a_size_for_a_cpu_goes_with_any_model() -> None:
    config = compose(["scale=cpu", "model=tiny", "data=local", "data.path=x"])
    assert [form.value for form in config.data.forms] == ["text"]
    assert (config.data.train_limit, config.evaluation.limit) == (200, 300)
    assert [one.value for one in config.evaluation.protocols] == ["answer_text"]
    assert compose(["scale=cpu", "evaluation.limit=9"]).evaluation.limit == 9
    assert compose(["scale=full"]) == compose()


def test_experiments() -> None:
    quickstart = compose(["experiment=quickstart"])
    assert quickstart.model.name == "smollm2_135m"
    assert quickstart.method.name == "mixlora"
    assert quickstart.task.name == "all"
    assert quickstart.data.name is s.DataSource.embedded
    assert quickstart.data.forms == [s.AnswerForm.text]
    assert quickstart.evaluation.protocols == [s.Protocol.answer_text, s.Protocol.label_logits]
    assert quickstart.evaluation.before_training
    smoke = compose(["experiment=smoke", "method=lora", "trainer.max_steps=1"])
    assert smoke.model.source is s.ModelSource.random
    assert (smoke.method.name, smoke.trainer.max_steps) == ("lora", 1)
    assert smoke.evaluation.limit == 8


def check_table_3(config: Config, model: str, method: str, task: str) -> None:
    expected = {"multi": MULTI, "all": list(s.TASK_NAMES)}.get(task, [task])
    both = {
        "metamath_gsm8k": (["metamath"], ["gsm8k"]),
        "commonsense_170k": (["commonsense"], [f"cs_{name}" for name in SUITE]),
    }.get(task, (expected, expected))
    assert (config.model.name, config.task.name) == (model, task)
    assert (config.task.train, config.task.evaluate) == both
    trainer = config.trainer
    assert (trainer.learning_rate, trainer.batch_size, trainer.epochs) == (2e-4, 16, 2.0)
    assert config.data.cutoff_length == 512
    chosen = config.method
    assert chosen.name == method
    if method == "none":
        assert type(chosen) is s.MethodConfig
        return
    mixture = method.startswith("mix")
    assert type(chosen) is (s.MixLoraMethodConfig if mixture else s.LoraMethodConfig)
    assert (chosen.rank, chosen.alpha) == ((16, 32.0) if mixture else (80, 160.0))
    assert chosen.dropout == 0.05
    assert chosen.dora is method.endswith("dora")
    assert chosen.targets == TARGETS
    if mixture:
        assert (chosen.num_experts, chosen.top_k, chosen.router_loss_coef) == (8, 2, 1e-3)


@pytest.mark.parametrize("model", GROUPS["model"])
def test_model_method_task(model: str) -> None:
    """Each option is composed, in other company each time: no group reads another."""
    first, methods, tasks = GROUPS["model"].index(model), NAMED["method"], GROUPS["task"]
    with open_session() as hydra:
        for second in range(3):
            task = tasks[(first + second) % len(tasks)]
            method = methods[(3 * first + second) % len(methods)]
            overrides = [f"model={model}", f"method={method}", f"task={task}"]
            overrides += NEEDS.get(task, [])
            check_table_3(compose_cell(hydra, "config", overrides), model, method, task)


def test_no_omegaconf_object_is_left(base: Config) -> None:
    def walk(value: object) -> None:
        assert not isinstance(value, (DictConfig, ListConfig))
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                walk(getattr(value, item.name))
        elif isinstance(value, list):
            for item in value:
                walk(item)

    assert type(base) is Config
    walk(base)


def test_shapes_match_the_paper_denominators() -> None:
    nominal = {"gemma_2b": 3.03e9, "llama2_7b": 7e9, "llama2_13b": 13e9, "llama3_8b": 8e9}
    for name, expected in nominal.items():
        model = compose([f"model={name}"]).model
        assert model.nominal_parameters == expected
        assert re.fullmatch(r"[0-9a-f]{40}", model.revision)
        assert model.hub_id in model.access
        assert "hf auth login" in model.access


def test_register_schemas_is_idempotent() -> None:
    register_schemas()
    before = ConfigStore.instance().list("")
    register_schemas()
    assert ConfigStore.instance().list("") == before
    assert {f"{name}_schema.yaml" for name in ("none", "lora", "mixlora")} <= set(before)


def test_to_dict_is_json(base: Config) -> None:
    tree = to_dict(base)
    assert json.loads(json.dumps(tree)) == tree
    assert tree["data"]["forms"] == ["label"]
    assert tree["trainer"]["loss_on"] == "answer"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.betas=[0.9]"], "trainer.betas=[0.9] is not valid: must be two numbers"),
        (["trainer.betas=[0.9,1]"], "must be two numbers in [0, 1)"),
        (["trainer.final_rate=0.1"], "trainer.schedule=constant does not fall: add trainer.sch"),
        (["trainer.final_rate=1", "trainer.schedule=cosine"], "must be in [0, 1)"),
    ],
)
def test_settings_of_the_optimizer_that_mean_nothing(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        compose(words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=local", "data.path=null"], "data.path=null"),
        (["seed=-1"], "seed=-1"),
        (["model.name=a/b"], "model.name=a/b"),
        (["model.config={num_hidden_layers: 2}"], "model.weights=random"),
        (["model.config.head_dim=2", "model.path=DIR"], "model.weights=random"),
        (["model.layers=2"], "model.config={num_hidden_layers: VALUE}"),
        (["method.rank=0"], "method.rank=0"),
        (["method.alpha=inf"], "method.alpha=inf"),
        (["method.dropout=1"], "method.dropout=1.0"),
        (["method.top_k=9"], "num_experts=8"),
        (["method.targets=[q_proj]"], "method=lora"),
        (["method.targets=[q_prj]"], "q_prj"),
        (["task.train=[arc]"], "task.train=arc"),
        (["task.evaluate=[]"], "task.evaluate=[]"),
        (["data.forms=[text,text]"], "data.forms"),
        (["trainer.learning_rate=nan"], "trainer.learning_rate=nan"),
        (["trainer.micro_batch_size=5"], "trainer.micro_batch_size=5"),
        (["trainer.schedule=cosin"], "constant, linear, cosine"),
        (["evaluation.limit=0"], "evaluation.limit=0"),
        (["evaluation.protocols=[answer_text,answer_text]"], "evaluation.protocols"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_ranges_are_checked(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_to_config_wants_the_schema() -> None:
    with pytest.raises(UserError, match="schema"):
        to_config(DictConfig({"seed": 1}))


def test_missing_conf_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install -e"), open_session(tmp_path / "conf"):
        pass


def test_help_lists_every_option_and_the_readme_every_group(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert execute(["--help"]) == 0
    told = capsys.readouterr().out
    readme = (CONF_DIR / "README.md").read_text(encoding="utf-8")
    names = {**GROUPS, "experiment": [p.stem for p in EXPERIMENTS if len(p.parts) == 2]}
    for group, options in names.items():
        assert f"`{group}`" in readme, group
        for name in [group, *options]:
            assert re.search(rf"\b{name}\b", told), name
    shown = told.partition("group=option ==\n")[2].partition("\n\n")[0].splitlines()
    groups = {line.partition(":")[0] for line in shown if ": " in line}
    assert {group.partition("/")[0] for group in groups} == {*names, "kernel", "scale"}


def test_the_configuration_beside_the_yaml_is_completed(tmp_path: Path) -> None:
    whole = compose(["model=tiny"]).model.config
    assert whole == json.loads((CONF_DIR / "model" / "tiny.json").read_text())
    for words in (["model.config={hidden_size: 32}"], ["model.config.hidden_size=32"]):
        assert compose(["model=tiny", *words]).model.config == {**whole, "hidden_size": 32}
    drawn = ["model=llama2_7b", "model.weights=random"]
    assert compose(drawn).model.nominal_parameters == 7e9
    assert compose([*drawn, "model.config.vocab_size=9"]).model.nominal_parameters is None
    # Fewer positions can be asked of weights that are read.
    few = compose(["model=llama2_7b", "model.config.max_position_embeddings=99"]).model
    assert few.config["max_position_embeddings"] == 99


def test_a_model_of_a_folder_of_ones_own(tmp_path: Path, capsys) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nsource: random\n")
    words = [f"--config-dir={tmp_path}", "model=mine", "dry_run=true", "data=embedded"]
    assert execute(words) == 2
    assert "put its config.json next to the YAML as model/mine.json" in capsys.readouterr().err
    for damaged in ("{", "[]", "[" * 100_000):
        (tmp_path / "model" / "mine.json").write_text(damaged)
        assert execute(words) == 2
        assert "mine.json" in capsys.readouterr().err
    shape = compose(["model=tiny"]).model.config
    (tmp_path / "model" / "mine.json").write_text(json.dumps({**shape, "num_hidden_layers": 3}))
    assert execute(words) == 0
    told = capsys.readouterr().out
    assert "mine: 3 layers, hidden 64" in told
    assert f": python train.py --config-dir={tmp_path} model=mine data=embedded\n" in told


@pytest.mark.parametrize("cut", [None, 2])
def test_a_record_of_before_is_read_as_one_of_today(cut: int | None) -> None:
    """With the fields that the group `model` had before it carried a `config.json`."""
    today = to_dict(compose(["model=smollm2_135m"]).model)
    shape = {new: old for old, new in OLD_NAMES.items() if old != "layers"}
    before = {name: value for name, value in today.items() if name != "config"}
    before |= {shape[name]: value for name, value in today["config"].items()}
    check_recorded({"model": {**before, "layers": cut}})
    found = current_model({**before, "layers": cut})
    depth = {} if cut is None else {"num_hidden_layers": cut}
    assert found == {**today, "config": {**today["config"], **depth}}
    drawn = {**before, "layers": cut, "weights": "random"}
    again = compose(recorded={"model": drawn})
    assert to_dict(again.model) == {**found, "weights": "random"}


def test_evaluation_composes_the_groups_of_training() -> None:
    """One Hydra file cannot take its defaults list from another."""

    def groups(root: str) -> dict[str, str]:
        entries = yaml.safe_load((CONF_DIR / root).read_text(encoding="utf-8"))["defaults"]
        return {key: value for entry in entries if isinstance(entry, dict)
                for key, value in entry.items()}  # fmt: skip

    assert groups("evaluate.yaml") == {**groups("config.yaml"), "method": "none"}


def test_kernels_routers_and_mixtures_are_chosen_by_the_names_that_they_register() -> None:
    """Which the configuration reads, with some properties, from their files without importing
    them."""
    from mixlora_exp.config import choices
    from mixlora_exp.config.choices import KernelName, MixtureName, RouterName
    from mixlora_exp.kernels import KERNELS, MIXTURES, ROUTERS

    assert {choice.value for choice in KernelName} == {"auto", *KERNELS}
    assert {choice.value for choice in RouterName} == set(ROUTERS)
    assert {choice.value for choice in MixtureName} == set(MIXTURES)
    for read, registered, name in (
        (choices.OWN_DROPOUT, KERNELS, "draws_masks"),
        (choices.OWN_PRECISION, ROUTERS, "precision"),
        (choices.BLOCK_OPTIONS, ROUTERS, "block_options"),
        (choices.OWN_SCALE, MIXTURES, "own_scale"),
        (choices.TYPED_LOSS, MIXTURES, "typed_loss"),
        (choices.FROM_GRADIENT, MIXTURES, "starts_from_gradient"),
    ):
        own = {key: getattr(one, name, None) for key, one in registered.items()}
        assert read == {key: value for key, value in own.items() if value}
        assert read, name
    for name in ("auto", *KERNELS):
        assert compose([f"kernel={name}"]).kernel.name is KernelName[name]
