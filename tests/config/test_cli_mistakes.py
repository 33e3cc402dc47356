"""Every mistake gives exit code 2 and one message, before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from mixlora_exp.config.choices import KernelName, RouterName
from mixlora_exp.config.command import compose, compose_settings
from mixlora_exp.config.explain import methods_with
from mixlora_exp.config.schema import Config
from mixlora_exp.errors import UserError

Refused = Callable[[list[str]], str]
LONG = "this name is too long for a file"
HEADER = "# @package _global_\n"
BAD = [
    # groups and their options
    (["model=lama2_7b"], ["model=lama2_7b", "model=llama2_7b", "options:", "tiny_gemma"]),
    (["experiment=smok"], ["experiment=smok", "experiment=smoke"]),
    (["hydra/launcher=cluster"], ["hydra/launcher=cluster", "basic"]),
    (["modle=tiny"], ["modle=tiny", "did you mean model?"]),
    (["modle/x=tiny"], ["modle/x=tiny", "did you mean model?"]),
    (["model@other=tiny"], ["model@other"]),
    (["model=3"], ["model=3", "choose one option", "tiny"]),
    (["model=null"], ["model=null", "choose one option"]),
    (["model=[{a:1}]"], ["model=[{a:1}]", "choose one option"]),
    (["hydra/sweeper=[[]]"], ["hydra/sweeper=[[]]", "choose one option", "basic"]),
    (["+model=tiny"], ["+model=tiny", "write model=tiny"]),
    (["++model=tiny"], ["++model=tiny", "write model=tiny"]),
    (["~model"], ["~model", "another value"]),
    (["~method"], ["~method", "another value"]),
    (["~tracker"], ["~tracker", "tracker=none"]),
    (["~trainer.max_steps"], ["~trainer.max_steps", "another value"]),
    # keys
    (["trainer.max_step=3"], ["trainer.max_step=3", "did you mean trainer.max_steps"]),
    (["+trainer.max_step=3"], ["trainer.max_step=3", "did you mean trainer.max_steps"]),
    (["++trainer.max_step=3"], ["trainer.max_step=3", "did you mean trainer.max_steps"]),
    (["foo=1"], ["foo=1", "not a setting", "output_dir"]),
    (["+foo=1"], ["foo=1", "not a setting", "output_dir"]),
    (["+method.extra.deep=1"], ["method.extra", "not a setting"]),
    (["method=lora", "method.top_k=2"], ["method.top_k=2", "hydralora, loramoe, mixlora, mola"]),
    (
        ["method=lora", "method.match_params=lora_r8"],
        [f"{', '.join(methods_with('match_params'))}, and methods made from"],
    ),
    (["method=lora", "method.target_modules=all-linear"], ["write method.targets, as in"]),
    (["method=vera", "+method.target_modules=[q_proj]"], ["write method.targets, as in"]),
    (["hydra.foo=1"], ["hydra.foo=1", "not a setting"]),
    (["--dry-run"], ["settings have no dashes", "write dry_run=..."]),
    (["experiment=study"], ["experiment=study is a folder", "experiment=study/step_size"]),
    (["experiment=study/stepsize"], ["not an option", "did you mean", "study/step_size"]),
    # values
    (["trainer.max_steps=abc"], ["trainer.max_steps=abc", "whole number"]),
    (["trainer.max_steps=true"], ["trainer.max_steps=true", "whole number"]),
    (["trainer.learning_rate=fast"], ["trainer.learning_rate=fast", "expected a number"]),
    (["method.rank=1.5"], ["method.rank=1.5", "whole number"]),
    (["dry_run=maybe"], ["dry_run=maybe", "true or false"]),
    (["seed=null"], ["seed=null", "null is not allowed"]),
    (["task.train=arc_e"], ["task.train=arc_e", "expected a list"]),
    (["trainer.loss_on=answers"], ["trainer.loss_on=answers", "answer, all", "mean answer"]),
    (["data.forms=[lable]"], ["data.forms=[lable]", "label, text"]),
    (["kernel.name=fast"], ["kernel.name=fast", ", ".join(KernelName.__members__)]),
    (["trainer.max_steps=0"], ["trainer.max_steps=0", ">= 1"]),
    (["method=mixlora", "method.top_k=9"], ["method.top_k=9", "num_experts=8"]),
    (
        ["method=mixlora", "method.router=best"],
        ["method.router=best", ", ".join(RouterName.__members__)],
    ),
    (
        ["method=mixlora", "method.router_loss_pooling=all", "method.router_loss_reduction=sum"],
        ["method.router_loss_reduction=sum", "router_loss_pooling=layer"],
    ),
    (
        ["method=mixlora", "method.router=switch", "method.router_precision=bfloat16"],
        ["method.router_precision=bfloat16", "router=", "top_k"],
    ),
    (["data=local", "data.path=null"], ["data.path=null", "data.path=DIR"]),
    # folders that are not there, before torch is loaded
    (["data=local", "data.path=/no/such"], ["data.path=/no/such", "TASK/SPLIT.jsonl"]),
    (["data.mirror=/no/such"], ["data.mirror=/no/such does not exist"]),
    (["model.path=/no/such"], ["model.path=/no/such does not exist", "a model"]),
    (["method=none", "adapter=/no/such"], ["adapter=/no/such does not exist"]),
    (["model.name=???"], ["model.name=???", "set model.name=VALUE"]),
    (["output_dir=${foo}"], ["output_dir=${foo}", "'foo' not found"]),
    (["trainer.max_steps=${trainer.epochs}"], ["trainer.max_steps=${trainer.epochs}", "2.0"]),
    # grammar and flags
    (["a=["], ["'a=['", "group.field=value"]),
    (["tracker.group=a=b"], ["tracker.group=a=b", "quote"]),
    (["data=local", "data.path=/a=b, (c)"], ["data.path=/a=b, (c) does not exist"]),
    (["data=local", "data.path=/a,/b"], ["data.path=/a,/b", "add -m"]),
    (["nothing"], ["'nothing'", "group=option"]),
    (["lora"], ["'lora'", "did you mean method=lora?"]),
    (["arc_e", "method=lora"], ["'arc_e'", "did you mean task=arc_e?"]),
    (["=3"], ["'=3'", "group=option"]),
    (["method.rank=2,4"], ["method.rank=2,4", "-m"]),
    (["seed=range(1,3)"], ["seed=range(1,3)", "-m"]),
    (["--foo"], ["--foo"]),
    (["--methd=lora"], ["--methd=lora", "write method=..."]),
    (["--trainer.max_steps=3"], ["settings have no dashes", "write trainer.max_steps=..."]),
    (["--mutlirun"], ["--mutlirun", "--multirun"]),
    (["--cfg", "jobs"], ["--cfg", "jobs", "job"]),
    (["--cfg", "job", "model=tinny"], ["model=tinny", "model=tiny"]),
    (["--help", "modle=tiny"], ["modle=tiny"]),
    (["--cfg", "job", "--info"], ["--cfg", "--info"]),
    (["--run", "--multirun"], ["--run", "--multirun"]),
    (["--resolve"], ["--resolve"]),
    (["--config-name=nope"], ["nope"]),
    (["--config-dir=/does/not/exist"], ["/does/not/exist"]),
    (["--config-path=/does/not/exist"], ["/does/not/exist"]),
    (["--experimental-rerun=x.pickle"], ["x.pickle"]),
    (["-sc"], ["write -sc install=bash"]),
    (["-sc", "install=csh"], ["install=csh", "bash, fish or zsh"]),
    # Hydra's own settings
    (["hydra.mode=${x}"], ["hydra.mode=${x}", "'x' not found"]),
    (["hydra.run.dir=${x}"], ["hydra.run.dir=${x}", "'x' not found"]),
    (["-m", "hydra.sweep.dir=${x}"], ["hydra.sweep.dir=${x}", "'x' not found"]),
    # folders of a user that does not exist
    (["output_dir=~no-user/x"], ["output_dir=~no-user/x: there is no user of the name after ~"]),
    (["data.mirror=~no-user"], ["data.mirror=~no-user: there is no user", "in full"]),
    # longer than a file's name may be
    ([f"experiment={300 * 'a'}"], ["error: experiment: ", "conf/experiment/aaa", LONG]),
    ([f"model.name={300 * 'a'}"], ["error: model.name: ", "conf/model/aaa", LONG]),
    ([f"data.mirror=/{300 * 'a'}"], ["error: data.mirror: ", "/aaa", LONG]),
    ([f"output_dir=/{300 * 'a'}/b"], ["error: output_dir=/aaa", LONG]),
    ([f"output_dir={200 * 'ä'}", "dry_run=true"], ["error: output_dir=äää", LONG]),
    (["-m", f"output_dir={300 * 'a'}", "seed=1,2"], ["error: output_dir=aaa", LONG]),
    ([f"--config-name={300 * 'a'}"], ["error: --config-name: ", LONG]),
    ([f"--config-dir={300 * 'a'}"], ["error: --config-dir: ", LONG]),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(argv)[:60] for argv, _ in BAD])
def test_mistake(
    argv: list[str],
    words: list[str],
    ran: list[Config],
    refused: Refused,
) -> None:
    message = refused(argv)
    for word in words:
        assert word in message
    assert not ran


BAD_FILES = [
    (HEADER + "trainer: {max_step: 3}\n", ["trainer.max_step", "trainer.max_steps", "bad.yaml"]),
    (HEADER + "foo: 3\n", ["foo", "bad.yaml", "output_dir"]),
    (HEADER + "trainer: {max_steps: abc}\n", ["trainer.max_steps=abc", "bad.yaml"]),
    (HEADER + "trainer: {loss_on: answers}\n", ["trainer.loss_on=answers", "bad.yaml", "all"]),
    (HEADER + "evaluation: {protocols: [logits]}\n", ["protocols[0]=logits", "answer_text"]),
    (HEADER + "trainer: 3\n", ["bad.yaml", "TrainerConfig", "3"]),
    (
        HEADER + "trainer: {max_steps: 0}\n",
        ["trainer.max_steps=0 (in experiment/bad.yaml) is not valid: must be >= 1"],
    ),
    (
        HEADER + "defaults: [override /method: mixlora]\nmethod: {rank_pattern: {q_proj: 8}}\n",
        ["method.rank_pattern={q_proj:8} (in experiment/bad.yaml) is not valid"],
    ),
    (HEADER + "output_dir: ${nowhere}\n", ["output_dir=${nowhere}"]),
    (HEADER + "defaults: [override /model: tinny]\n", ["model=tinny", "experiment=bad", "tiny"]),
    (HEADER + "defaults: [override /modle: tiny]\n", ["modle", "bad.yaml", "model?"]),
    (HEADER + "defaults: [model: tiny]\n", ["model=tiny", "bad.yaml"]),
    (HEADER + "trainer: {a\n", ["bad.yaml", "line 2"]),
    (HEADER + "seed: 1\nseed: 2\n", ["bad.yaml", "seed"]),
    ("trainer: {max_steps: 3}\n", ["bad.yaml", "# @package _global_"]),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=[str(i) for i in range(len(BAD_FILES))])
def test_mistake_in_a_file(
    text: str,
    words: list[str],
    ran: list[Config],
    tmp_path: Path,
    refused: Refused,
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text(text, encoding="utf-8")
    message = refused([f"--config-dir={tmp_path}", "experiment=bad"])
    for word in words:
        assert word in message
    assert not ran


def test_the_file_of_a_scale_is_named_too(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "scale").mkdir()
    text = HEADER + "trainer: {max_steps: 0}\n"
    (tmp_path / "scale" / "bad.yaml").write_text(text, encoding="utf-8")
    told = refused([f"--config-dir={tmp_path}", "scale=bad"])
    assert "trainer.max_steps=0 (in scale/bad.yaml) is not valid" in told


def test_what_was_typed_is_in_no_file(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "experiment").mkdir()
    text = HEADER + "trainer: {max_steps: 3}\n"
    (tmp_path / "experiment" / "bad.yaml").write_text(text, encoding="utf-8")
    given = [f"--config-dir={tmp_path}", "experiment=bad", "trainer.max_steps=0"]
    assert "trainer.max_steps=0 is not valid" in refused(given)


GIVEN = {"expert_alpha": "8", "rank_pattern": "{q_proj:8}", "lora_fa": "true", "dora": "true"}


@pytest.mark.parametrize("name", GIVEN)
def test_the_methods_that_a_message_names_take_the_setting(name: str) -> None:
    others = {"lora", "mixlora", "mola", "moslora", "pissa"} - set(named := methods_with(name))
    assert named
    for method in (named[0], *others):
        words = [f"method={method}", f"++method.{name}={GIVEN[name]}"]
        if method in named:
            compose(words)
            continue
        with pytest.raises(UserError):
            compose(words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["model=tiny,tinny"], ["cell 2 of 2 (model=tinny)", "model=tiny"]),
        (["method=mixlora,lora", "method.top_k=1"], ["cell 2 of 2 (method=lora method.top_k=1)"]),
        (["method.rank=4,0"], ["cell 2 of 2 (method.rank=0)", "method.rank=0 is not valid"]),
        (["trainer.max_step=1,2"], ["cell 1 of 2 (trainer.max_step=1)", "trainer.max_steps"]),
        (["seed=range(-1,2)"], ["cell 1 of 3 (seed=-1)"]),
        (["method=glob(?ora)", "method.num_experts=4"], ["cell 1 of 2 (method=dora"]),
        (["seed=1,2", "+foo=3"], ["foo=3", "not a setting"]),
        (["seed=1,2", "trainer.max_steps=abc"], ["trainer.max_steps=abc"]),
        (["seed=interval(0,1)"], ["interval"]),
        (["hydra.verbose=true,false"], ["hydra.verbose=true,false"]),
        (["seed=1,2", "~model"], ["~model"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_bad_cell_stops_the_sweep(
    argv: list[str], words: list[str], ran: list[Config], refused: Refused
) -> None:
    message = refused(["-m", *argv])
    for word in words:
        assert word in message
    assert not ran
    assert not list(Path.cwd().iterdir())


@dataclasses.dataclass(slots=True, kw_only=True)
class Fields:
    text: str | None = None
    count: int = 1
    share: float | None = None
    rows: list[str] = dataclasses.field(default_factory=list)


def test_settings_of_a_command_that_are_not_in_conf() -> None:
    words = ["text='a=b'", "count=2", "share=0", "rows=[lora,mixlora]"]
    made = compose_settings(Fields, words)
    assert made == Fields(text="a=b", count=2, share=0.0, rows=["lora", "mixlora"])
    assert compose_settings(Fields, ["text=null", "share=null", "rows=[]"]) == Fields()


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("count=two", ["count=two is not valid: expected a whole number"]),
        ("count=null", ["count=null is not valid: null is not allowed"]),
        ("count=[", ["'count=['", "cannot be read"]),
        ("count=1,2", ["count=1,2 is not valid", "a list as name=[a,b]"]),
        ("~count", ["~count is not valid: write name=value"]),
        ("share=much", ["share=much is not valid: expected a number"]),
        ("rows=lora", ["rows=lora is not valid: expected a list, as in rows=[a,b]"]),
        ("rows.x=1", ["rows.x is not a setting"]),
        ("absent=1", ["absent is not a setting", "(there are: text, count, share, rows)"]),
        ("texts=x", ["texts is not a setting", "did you mean text?"]),
        ("text", ["'text'", "cannot be read"]),
    ],
)
def test_mistakes_in_such_settings(word: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as told:
        compose_settings(Fields, ["share=1", word])
    assert all(part in str(told.value) for part in parts)
