"""Files that anybody may have written: they are refused by one sentence, and nothing in them runs, hangs or fills the memory."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ssn.cli.entry import main
from dist_ssn.errors import CheckpointError, RecipeError
from dist_ssn.files import MIB, read_tensors, read_text
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.read import load_recipe
from testing.fuzz_targets import Readers, header_of, mutated

EXAMPLES = {"plan": 400, "cluster": 300, "recipe": 100, "recipe-json": 100}  # about 2 s each
OF_CHECKPOINT = 200
NAMES = (
    "plan",
    "cluster",
    "recipe",
    "recipe-json",
    "state.json",
    "model.safetensors",
    "optimizer.safetensors",
    "recipe.json",
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Readers]:
    yield Readers(tmp_path_factory.mktemp("files"))


def test_the_seeds_are_good_files(readers: Readers) -> None:
    assert [name for name, seed in readers.seeds.items() if not readers.accepts(name, seed)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file_is_refused_by_an_error_of_ours(readers: Readers, name: str) -> None:
    @settings(max_examples=EXAMPLES.get(name, OF_CHECKPOINT), database=None)
    @given(st.integers(0, 2**32))
    def changed(number: int) -> None:
        readers.accepts(name, mutated(readers.seeds[name], random.Random(number)))

    changed()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", ["plan", "state.json", "recipe-json"])
def test_a_field_of_any_value_is_refused_by_an_error_of_ours(readers: Readers, name: str) -> None:
    good = json.loads(readers.seeds[name])

    @settings(max_examples=150, database=None)
    @given(st.sampled_from(sorted(good)), json_values)
    def replaced(key: str, value: object) -> None:
        readers.accepts(name, json.dumps({**good, key: value}).encode())

    replaced()


HEADERS = {
    "a tensor of 2⁶⁰ bytes": header_of({"bank": ("F32", [1 << 58], [0, 1 << 60])}, bytes(16)),
    "an overflowing shape": header_of({"bank": ("F32", [1 << 33, 1 << 33], [0, 16])}, bytes(16)),
    "overlapping tensors": header_of({"a": ("F32", [4], [0, 16]), "b": ("F32", [4], [0, 16])}, bytes(16)),
    "an unknown kind of number": header_of({"a": ("F4096", [4], [0, 16])}, bytes(16)),
    "a header as long as it says no file is": b"\xff" * 8 + b"{}",
    "a header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "an empty file": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_is_believed_only_as_far_as_the_file_goes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x").write_bytes(HEADERS[kind])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_tensors(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text("{}")
    tracemalloc.start()
    try:
        read_text(tmp_path / "small.json")
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_a_large_file_and_a_pipe_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 1000 bytes"):
            read_text(tmp_path / "large", 1000)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_text(tmp_path / "pipe")


BOMBS = {
    "anchors and aliases are not for recipes": "a: &a [x, x]\nb: &b [*a, *a]\nmodel_args: {c: [*b, *b]}",
    "nested more than 20 deep": "model_args: {a: " + "[" * 50 + "]" * 50 + "}",
    "more than 65536 bytes": "#" * 65537,
    "cannot be read": "model_args: {a: " + "9" * 5000 + "}",
    "the tag tag:yaml.org,2002:python/object/apply:os.system": "model: !!python/object/apply:os.system [touch hacked]",
}


@pytest.mark.parametrize("sentence", BOMBS)
def test_a_recipe_is_plain_and_small(tmp_path: Path, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(BOMBS[sentence])
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(tmp_path / "recipe.yaml")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.run", "pickle.load", "builtins.exec", "importlib.import_module"]
)
def test_a_recipe_calls_nothing_of_pythons_own(name: str) -> None:
    with pytest.raises(RecipeError, match="Python's own library builds no model"):
        build_model(name, {"command": "touch hacked"})


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "a/b", "..", ""])
def test_a_run_stays_in_its_folder(name: str) -> None:
    with pytest.raises(RecipeError, match="name must"):
        load_recipe(None, [f"--name={name}"])


def test_a_checkpoint_opens_only_its_own_files(readers: Readers) -> None:
    """Whatever else state.json lists is never looked at."""
    state = json.loads(readers.seeds["state.json"])
    state["files"]["../../../../../etc/shadow"] = {"bytes": 1, "sha256": "0"}
    assert readers.accepts("state.json", json.dumps(state).encode())
    state["files"]["model.safetensors"] = {"bytes": 1, "sha256": "0"}
    with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes and was written with 1"):
        readers.read["state.json"](json.dumps(state).encode())


def test_a_secret_of_the_environment_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "5ec0e7" * 6
    monkeypatch.setenv("WANDB_API_KEY", secret)
    arguments = [
        "train",
        f"--output={tmp_path}",
        "--steps=2",
        "--batch_size=2",
        "--evaluate_batches=1",
        "--data.limit=50000",
    ]
    arguments += [
        "--model_args={layers: 1, width: 16, heads: 2, context: 16}",
        "--share.budget=50%",
        "--checkpoint.every=1",
    ]
    assert main(arguments) == 0
    assert main([*arguments, "--optimizer.lr=1e30", "--steps=5", "--clip_norm=null"]) == 2
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    assert [file for file in written if secret.encode() in file.read_bytes()] == []
    said = capsys.readouterr()
    assert secret not in said.out + said.err
