"""Nothing that is loaded runs code, leaves its folder, or is downloaded unasked."""

import json
import pickle
import re
import shutil
import socket
import struct
from pathlib import Path

import pytest

from configs import rl_alternating
from pr1_jax.data import sources, tokenizer_files
from pr1_jax.huggingface import weights
from pr1_jax.huggingface.config import read_config, resolve
from pr1_jax.huggingface.tensors import INDEX, find_tensors
from pr1_jax.stages import checks, curriculum
from pr1_jax.system import hub

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "helpers" / "data" / "hf_reference" / "llama"


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Makes any look-up of a host and any connection an error; the list of them."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise AssertionError(f"the network is asked: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    yield tried
    assert not tried


@pytest.fixture
def folder(tmp_path):
    """A model folder that loads."""
    shutil.copytree(REFERENCE, tmp_path / "model")
    return tmp_path / "model"


def words():
    return tokenizer_files.from_words([" yes", "\n", "a"], pattern=r" yes|[\s\S]")


def load(folder):
    return weights.load_params(folder, read_config(folder))


def change(file, fields):
    """Puts fields into a file of JSON."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def index(folder, weight_map):
    """Names the parts of a model in its index."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# --- Only safetensors ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_not_read_and_it_is_said_what_to_do(folder, tmp_path, name):
    load(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(FileNotFoundError, match=f"{name} is not read") as error:
        load(folder)
    assert "save_pretrained" in one_line(error)
    # Nor where an index names it.
    index(folder, {"model.norm.weight": name})
    with pytest.raises(ValueError, match=f"index.json names the part '{name}'"):
        load(folder)
    # Nor under the name of a safe file.
    (folder / INDEX).unlink()
    shutil.move(folder / name, folder / "model.safetensors")
    with pytest.raises(ValueError, match="safetensors is truncated or damaged"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_the_code_knows_no_unsafe_loader():
    unsafe = re.compile(
        r"\bpickle\b|\bdill\b|joblib|cloudpickle|torch\.load|np\.load\b|allow_pickle"
        r"|trust_remote_code|AutoTokenizer|AutoModel|AutoConfig|yaml\.(unsafe_)?load\b"
        r"|extractall|\beval\(|\bexec\(|importlib\.import_module|__import__"
    )
    files = [*ROOT.glob("pr1_jax/**/*.py"), *ROOT.glob("configs/*.py")]
    assert len(files) > 40
    found = {
        (file.relative_to(ROOT).as_posix(), match.group())
        for file in files
        for match in unsafe.finditer(file.read_text())
    }
    allowed = {  # named in a comment or a message
        ("pr1_jax/huggingface/tensors.py", "AutoModel"),
        ("pr1_jax/data/tokenizer_files.py", "AutoTokenizer"),
        # A function that the user names in the config, called in a process of its own.
        ("pr1_jax/workers/own_worker.py", "exec("),
        ("pr1_jax/workers/own_worker.py", "importlib.import_module"),
    }
    assert found <= allowed


def test_the_code_of_a_folder_is_never_run(folder, tmp_path):
    words().save(folder)
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n"
    for name in ("own.py", "tokenization_own.py", "modeling_own.py"):
        (folder / name).write_text(code)
    auto_map = {
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"],
    }
    own = {"auto_map": auto_map, "tokenizer_class": "Own", "trust_remote_code": True}
    for name in ("config.json", "tokenizer_config.json"):
        change(folder / name, own)
    load(folder)
    assert tokenizer_files.load(folder).encode(" yes") == words().encode(" yes")
    assert not ran.exists()


def test_a_chat_template_reaches_no_python(folder, tmp_path):
    words().save(folder)
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(attack)
    with pytest.raises(ValueError, match="chat template does not take .*'user'"):
        tokenizer_files.load(folder).chat_prompt([{"role": "user", "content": "a"}])


# --- Only the folder ----------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    ["../outside.safetensors", "{tmp_path}/outside.safetensors", "..", "", "a\0", None],
)
def test_parts_outside_the_folder_are_refused(folder, tmp_path, part):
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    part = part.format(tmp_path=tmp_path) if isinstance(part, str) else part
    index(folder, {"model.norm.weight": part})
    with pytest.raises(ValueError, match="expected the name of a .safetensors file"):
        load(folder)


@pytest.mark.parametrize("weight_map", [None, {}, "model.safetensors"])
def test_an_index_without_parts_is_refused(folder, weight_map):
    (folder / "model.safetensors").unlink()
    index(folder, weight_map)
    with pytest.raises(ValueError, match=r"index\.json: weight_map names no files"):
        load(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, indexed):
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")
    if indexed:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        index(folder, {"model.norm.weight": "part.safetensors"})
    with pytest.raises(ValueError, match=r"is a link to .*outside.*: copy the file"):
        load(folder)


def test_the_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    shutil.copytree(REFERENCE, snapshot)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / "model.safetensors", blobs / "4567def")
    (snapshot / "model.safetensors").symlink_to("../../blobs/4567def")
    load(snapshot)


def test_tokenizer_settings_cannot_name_other_files(folder, tmp_path):
    words().save(folder)
    tokenizer_files.from_words(["b", "\n"], pattern=r"[\s\S]").save(tmp_path / "other")
    other = str(tmp_path / "other" / "tokenizer.json")
    for changed in (
        {"tokenizer_file": other},
        {"fast_tokenizer_files": ["../other/tokenizer.4.0.0.json"]},
        {"name_or_path": str(tmp_path / "other"), "vocab_file": other},
    ):
        shutil.copy(other, tmp_path / "other" / "tokenizer.4.0.0.json")
        change(folder / "tokenizer_config.json", changed)
        assert tokenizer_files.load(folder).encode(" yes") == words().encode(" yes")


# --- Damaged and lying files --------------------------------------------------------


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or damaged"),
        (b"\xff" * 8, "truncated or damaged"),
        (with_header(b"{" * 50), "truncated or damaged"),
        (with_header({"a": F32}, b"\0" * 15), "truncated or damaged"),
        (with_header({"a": F32}, b"\0" * 17), "truncated or damaged"),
        (with_header({"a": F32 | {"shape": [2, 3]}}, b"\0" * 16), "truncated"),
        (with_header({"a": F32 | {"data_offsets": [-1, 16]}}, b"\0" * 16), "truncated"),
        (with_header({"a": F32, "b": F32}, b"\0" * 16), "truncated"),
        (with_header({"a": F32 | {"dtype": "X9"}}, b"\0" * 16), "truncated"),
        (with_header({"a": F32 | {"dtype": "I32"}}, b"\0" * 16), "tensor a is I32"),
    ],
)
def test_lying_headers_name_the_file(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        find_tensors(tmp_path)
    assert str(tmp_path / "model.safetensors") in one_line(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "16"}, "hidden_size='16' is not a whole number"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776 is not"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is not .* to 1000"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not"),
        ({"num_key_value_heads": 3}, "is not a multiple of"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None is not a positive number"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] is not an object"),
        ({"layer_types": [[]]}, r"layer_types=\[\[\]\] is not a list of names"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not of"),
        ({"quantization_config": {"a": "b" * 9999}}, "quantization_config="),
    ],
)
def test_a_config_of_the_wrong_kind_is_named(folder, changes, message):
    file = folder / "config.json"
    change(file, changes)
    with pytest.raises(ValueError, match=message) as error:
        read_config(folder)
    text = one_line(error)
    assert text.startswith(str(file)) and len(text) < 500


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"{" * 9, b"[" * 100_000, b"3"])
def test_json_that_is_no_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json does not hold a JSON object"):
        read_config(folder)


def test_a_tokenizer_that_is_of_no_use_is_named(folder):
    words().save(folder)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["vocab"] = {"a": 0}
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"the tokenizer .*model: ") as error:
        tokenizer_files.load(folder)
    one_line(error)


# --- Only what the config names -----------------------------------------------------


def test_a_run_without_hub_names_asks_for_nothing(folder, no_network):
    config = rl_alternating.get_config("smoke")
    config.stages = ("sft", "rl")
    curriculum.prepare(config.lock())
    words().save(folder)
    tokenizer_files.load(folder)
    load(folder)
    assert not no_network


@pytest.mark.parametrize("name", ["gpt2", "./a/b", "/a/b", "~/a", "a/b/c", "configs/x"])
def test_names_of_paths_are_not_looked_up(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hub.looks_local(name)
    for look_up in (resolve, tokenizer_files.load):
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            look_up(name)
    config = rl_alternating.get_config("smoke")
    config.model.path = name
    with pytest.raises(FileNotFoundError, match=f"model.path={re.escape(name)}"):
        checks.check(config)


def test_of_the_hub_only_data_are_taken(folder, monkeypatch):
    words().save(folder)
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/name") == folder
    assert tokenizer_files.load("owner/name").encode("a") == words().encode("a")
    assert {name for name, _ in asked} == {"owner/name"}
    patterns = {pattern for _, patterns in asked for pattern in patterns}
    assert {pattern.rpartition(".")[2] for pattern in patterns} == {
        "json",
        "safetensors",
        "model",
        "jinja",
    }


def test_what_the_hub_says_is_one_line(monkeypatch):
    def snapshot_download(name, *, allow_patterns):
        raise OSError("401 Client Error\nRepository Not Found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for look_up in (resolve, tokenizer_files.load):
        with pytest.raises(ValueError, match="owner/gone is no local folder") as error:
            look_up("owner/gone")
        assert "401 Client Error Repository Not Found" in one_line(error)


@pytest.mark.parametrize(
    "name",
    [
        *("huggingface:openai/gsm8k", "kaggle:x", "owner:gsm8k", "gsm8k/../../x", ""),
        *("/etc/x", "x'); import os; ('", "a b", "../x"),
    ],
)
def test_tfds_names_stand_for_no_code_of_others(name):
    with pytest.raises(ValueError, match="is not tfds:NAME.*hf:OWNER/NAME"):
        sources.open_source(f"tfds:{name}#a=b", "train", seed=0)


def test_tfds_names_that_are_right(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    for name in ("gsm8k", "gsm8k:1.0.0", "mmlu/abstract_algebra", "mmlu/a.b-c:1.*.*"):
        with pytest.raises(FileNotFoundError, match=f"tfds:{re.escape(name)} is not"):
            sources.open_source(f"tfds:{name}", "train", seed=0)
