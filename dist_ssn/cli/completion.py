"""`dist-ssn completion`: a script for bash or zsh, made from the declarations of all commands."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Iterator, Mapping

from dist_ssn.cli.declare import CLUSTERS, FILES, FOLDERS, RECIPES, Argument, Command, Option
from dist_ssn.cli.recipe_options import recipe_groups

SHELLS = ("bash", "zsh")
_OF_MANY_PROCESSES = ("train", "plan", "cluster")  # what may follow the two dashes of launch and lab

_SCRIPT = """\
# Completion of dist-ssn for {shell}, made by: dist-ssn completion {shell}
{before}_dist_ssn() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local option="" prefix="" words="" files="" command="${{COMP_WORDS[1]}}" first=1 i IFS
  # bash takes --key=value for three words, zsh for one.
  if [[ $current == --*=* ]]; then option="${{current%%=*}}" prefix="${{current%%=*}}=" current="${{current#*=}}"
  elif [[ $current == = ]]; then option="$before" current=""
  elif [[ $before == = ]]; then option="${{COMP_WORDS[COMP_CWORD-2]}}"
  elif [[ $before == --?* ]]; then option="$before"
  fi
  for ((i = 2; i < COMP_CWORD; i++)); do  # a program of launch or lab
    if [[ ${{COMP_WORDS[i]}} == -- ]]; then first=$((i + 1)) command="${{COMP_WORDS[i+1]}}"; break; fi
  done
  if ((COMP_CWORD == first)); then
    if ((first == 1)); then words="{commands} --help --version"; else words="{programs}" files=-f; fi
  else
    case "$command $option" in
{cases}
    esac
  fi
  IFS=$' \\t\\n'
  COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$current"))
  if [[ -n $files ]]; then
    IFS=$'\\n'
    COMPREPLY+=($(compgen -P "$prefix" $files -- "$current"))
  fi
  if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
  return 0
}}
complete {options}-F _dist_ssn dist-ssn
"""
_ZSH = """\
(($+functions[compdef])) || { autoload -U +X compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""


def completion(commands: Mapping[str, Command]) -> Command:
    """The command that completes these commands, and itself once it is among them."""
    return Command(
        "completion",
        "this installation",
        "Print a completion script for bash or zsh: commands, options, recipe keys, and names of recipes and clusters.",
        (
            "dist-ssn completion bash > ~/.local/share/bash-completion/completions/dist-ssn",
            "source <(dist-ssn completion zsh)",
        ),
        functools.partial(_run, commands),
        (),
        (Argument("SHELL", "Shell that reads the script: bash or zsh.", choices=SHELLS),),
    )


def _run(commands: Mapping[str, Command], given: argparse.Namespace, rest: list[str]) -> None:
    print(script(given.shell, commands), end="")


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """The script for a shell, one of SHELLS."""
    names = {RECIPES: _recipes(), CLUSTERS: _clusters()}
    keys = [option for group in recipe_groups() for option in group.options]
    return _SCRIPT.format(
        shell=shell,
        before=_ZSH if shell == "zsh" else "",
        commands=" ".join(commands),
        programs=" ".join(_OF_MANY_PROCESSES),
        cases="\n".join(f"      {case}" for case in _cases(commands.values(), keys, names)),
        options="-o nospace " if shell == "zsh" else "",
    )


def _cases(commands: Iterable[Command], keys: list[Option], names: Mapping[str, str]) -> Iterator[str]:
    """Lines of the case statement: an option's values, then a command's options."""
    commands = list(commands)
    for command in commands:
        for option in command.options():
            if option.metavar:
                yield f'"{command.name} {option.name}") {_values(option, names)}'
    for option in keys:  # a command's own option of the same name came first
        yield f'*" {option.name}") {_values(option, names)}'
    for command in commands:
        words = [choice for argument in command.arguments for choice in argument.choices]
        words += [_word(option) for option in command.options()]
        own = {option.name for option in command.options()}
        words += [_word(option) for option in keys if option.name not in own] if command.takes_recipe else []
        words += ["--"] if command.takes_program else []
        files = " files=-d" if any(argument.completes == FOLDERS for argument in command.arguments) else ""
        yield f'"{command.name} "*) words="{" ".join([*words, "--help"])}"{files} ;;'


def _word(option: Option) -> str:
    if option.name.endswith(".NAME"):
        return option.name.removesuffix("NAME")
    return f"{option.name}=" if option.metavar else option.name


def _values(option: Option, names: Mapping[str, str]) -> str:
    words = " ".join(option.choices) or names.get(option.completes, "")
    files = {FILES: "-f", FOLDERS: "-d", RECIPES: "-f", CLUSTERS: "-f"}.get(option.completes, "")
    parts = [f'words="{words}"' if words else "", f"files={files}" if files else "", ";;"]
    return " ".join(part for part in parts if part)


def _recipes() -> str:
    from dist_ssn.train.recipe.keys import bundled_recipes

    return " ".join(bundled_recipes())


def _clusters() -> str:
    from dist_ssn.cluster import bundled_clusters

    return " ".join(bundled_clusters())
