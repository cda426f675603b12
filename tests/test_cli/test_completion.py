"""Completion: bash takes the script, and offers commands, options, recipe keys and their values."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ssn.cli.commands import COMMANDS
from dist_ssn.cli.completion import SHELLS, script
from dist_ssn.cli.entry import main
from dist_ssn.cluster import bundled_clusters
from dist_ssn.engines import ENGINES
from dist_ssn.train.recipe.keys import bundled_recipes, recipe_keys

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "dist-ssn.bash"
    path.write_text(script("bash", COMMANDS))
    return path


def completed(bash_script: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words, as bash cuts them: `=` is a word of its own."""
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dist_ssn; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "-c", program, "bash", str(bash_script), "dist-ssn", *words],
        cwd=bash_script.parent,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert not result.stderr
    return result.stdout.split()


def test_bash_takes_the_script() -> None:
    program = f'source <("{sys.executable}" -m dist_ssn.cli completion bash); complete -p dist-ssn'
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "complete -F _dist_ssn dist-ssn\n", "")


def test_commands(bash_script: Path) -> None:
    assert completed(bash_script, "") == [*COMMANDS, "--help", "--version"]
    assert completed(bash_script, "pl") == ["plan"]
    assert completed(bash_script, "completion", "") == [*SHELLS, "--help"]
    assert completed(bash_script, "lab", "c") == ["clean"]


@pytest.mark.parametrize("command", ["train", "plan", "search"])
def test_recipe_keys(bash_script: Path, command: str) -> None:
    offered = completed(bash_script, command, "--")
    assert {f"--{key.name}=" for key in recipe_keys()} | {"--model_args.", "--config="} <= set(offered)
    own = {f"{option.name}{'=' if option.metavar else ''}" for option in COMMANDS[command].options()}
    assert own <= set(offered) and len(offered) == len(set(offered))
    assert completed(bash_script, command, "--optimizer.l") == ["--optimizer.lr="]


@pytest.mark.parametrize("command", COMMANDS)
def test_own_options_of_each_command(bash_script: Path, command: str) -> None:
    offered = completed(bash_script, command, "--")
    for option in COMMANDS[command].options():
        assert f"{option.name}{'=' if option.metavar else ''}" in offered
    assert "--help" in offered


def test_values(bash_script: Path) -> None:
    (bash_script.parent / "my recipe.yaml").touch()
    (bash_script.parent / "folder").mkdir(exist_ok=True)
    for words in (["--engine.name", "="], ["--engine.name", "=", ""], ["--engine.name", ""]):  # bash's own ways to cut
        assert completed(bash_script, "train", *words) == list(ENGINES)
    assert completed(bash_script, "train", "--engine.name=f") == ["--engine.name=fsdp"]  # uncut, as in zsh
    assert completed(bash_script, "train", "--share.control", "=", "h") == ["hashed", "hashed-global"]
    assert completed(bash_script, "plan", "--data.augment", "=", "") == ["true", "false"]
    assert set(bundled_recipes()) <= set(completed(bash_script, "train", "--config", ""))
    assert completed(bash_script, "train", "--config", "=", "my") == ["my", "recipe.yaml"]  # one name with a space
    assert set(bundled_clusters()) <= set(completed(bash_script, "plan", "--cluster", "=", ""))
    assert completed(bash_script, "search", "--method", "=", "w") == ["weights-free"]
    assert completed(bash_script, "plan", "--workers", "=", "") == []
    assert (
        completed(bash_script, "search", "--output", "=", "fol")
        == completed(bash_script, "report", "fol")
        == ["folder"]
    )
    assert "--cluster=" in completed(bash_script, "plan", "--json", "--cl")  # a flag has no value


def test_a_program_of_launch(bash_script: Path) -> None:
    (bash_script.parent / "mine.py").touch()
    assert {"train", "plan", "cluster", "mine.py"} <= set(completed(bash_script, "launch", "--cluster=wan", "--", ""))
    assert completed(bash_script, "launch", "--", "train", "--engine.n") == ["--engine.name="]
    assert completed(bash_script, "launch", "--", "train", "--engine.name", "=", "m") == ["mpi"]


def test_zsh_script_differs_only_in_its_beginning_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert "bashcompinit" in text and text.endswith("complete -o nospace -F _dist_ssn dist-ssn\n")
    body = text[text.index("_dist_ssn() {") : text.index("\ncomplete ")]
    assert body in script("bash", COMMANDS)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script("zsh", COMMANDS))
    ask = "emulate -L sh; setopt kshglob noshglob braceexpand"  # as bashcompinit calls a function
    ask += "; COMP_WORDS=(dist-ssn train --engine.name=f); COMP_CWORD=2; _dist_ssn; echo ${COMPREPLY[@]}"
    program = f"source {tmp_path}/script; echo ${{_comps[dist-ssn]}}; ask() {{ {ask}; }}; ask"
    result = subprocess.run(["zsh", "-fc", program], capture_output=True, text=True, timeout=20, check=False)
    registered, offered = result.stdout.splitlines()  # zsh itself drops what does not begin as the word does
    assert registered == "_bash_complete -o nospace -F _dist_ssn", result.stderr
    assert "--engine.name=fsdp" in offered.split() and "--steps=" not in offered
