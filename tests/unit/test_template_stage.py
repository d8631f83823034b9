"""stages.template: a model that gets a chat template and keeps everything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.data import template as templates
from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer, train
from caravan.model import checkpoint, sizes
from caravan.stage import execute
from caravan.stages import template
from caravan.store import Artefact, Store
from caravan.types import Message, UserError

OWN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [Message("user", "be"), Message("assistant", "not")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def model(store: Store, tmp_path: Path) -> Artefact:
    """A checkpoint without a template: its tokenizer knows two ends, its configuration one of them."""
    train(["to be or not to be"] * 4, 300).save(tmp_path / "tok")
    (tmp_path / "tok" / "chat_template.jinja").unlink()
    words = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    del words["chat_template"]
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(words))
    spec, _ = sizes.derive("nano", None, 300, 32)
    net = sizes.fresh(replace(spec, layers=spec.layers[:1]), seed=2)
    checkpoint.save_model(
        net, tmp_path / "m", tmp_path / "tok", torch.float32, {"eos_token_id": 0, "top_k": 7}
    )
    (tmp_path / "m" / "LICENSE").write_text("MIT")
    return store.add(tmp_path / "m", kind="model")


def test_a_built_in_template_goes_with_the_model(store: Store, model: Artefact) -> None:
    made = execute(store, "template", template.Config(template="chatml"), {"model": model})
    tok = Tokenizer.load(made.path)
    assert tok.chat_template == templates.builtin("chatml") == (made / "chat_template.jinja").read_text()
    assert render(TALK, tok).ids[-2] == tok.special["<|im_end|>"]
    said = json.loads((made / "generation_config.json").read_text())
    assert said["top_k"] == 7 and said["eos_token_id"] == sorted([tok.special["<|im_end|>"], tok.eos])
    assert (made / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (made / "LICENSE").read_text() == "MIT" and not store.verify(made) and not store.verify(model)
    assert made.facts["stop"] == "<|im_end|>" and made.facts["tools"] == "as text"
    assert made.facts["system"] and made.facts["several_turns"] and made.facts["calls_can_be_read"]


def test_a_jinja_file_of_ones_own(store: Store, model: Artefact, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    made = execute(
        store, "template", template.Config(), {"model": model, "file": store.add(tmp_path / "own.jinja")}
    )
    tok = Tokenizer.load(made.path)
    assert tok.chat_template == OWN and tok.decode(render(TALK, tok).ids) == "user: beassistant: not"
    assert json.loads((made / "tokenizer_config.json").read_text())["chat_template"] == OWN
    again = execute(store, "template", template.Config(template="plain"), {"model": made})
    assert Tokenizer.load(again.path).chat_template == templates.builtin("plain")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("", None, "give either --template NAME or --file"),
        ("chatml", OWN, "give either --template NAME or --file"),
        ("chatlm", None, "there is no chat template 'chatlm'"),
        ("llama-3", None, "needs tokens that this tokenizer has not: <.start_header_id.>"),
        ("", "{% for m in messages %}", "does not parse"),
        ("", "{{ messages[0].role }}", "does not show"),
        ("", "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "does not show"),
        ("", b"\xff\xfe", "no UTF-8 text"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_template_is_refused(
    store: Store, model: Artefact, tmp_path: Path, name: str, text: str | bytes | None, said: str
) -> None:
    inputs = {"model": model}
    if text is not None:
        (tmp_path / "own.jinja").write_bytes(text if isinstance(text, bytes) else text.encode())
        inputs["file"] = store.add(tmp_path / "own.jinja")
    with pytest.raises(UserError, match=said):
        execute(store, "template", template.Config(template=name), inputs)
