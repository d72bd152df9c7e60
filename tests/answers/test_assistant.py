"""``panda generate`` and ``panda chat`` on what runs leave, compared with plain transformers."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_delta
from checkpoint_files import save_hf
from checkpoint_files import save_pickle
from distributions import Distributions
from launching import train_many
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer

from panda.answers.assistant import Sampling
from panda.answers.generation import continuation
from panda.answers.generation import greedy
from panda.answers.loading import described_in
from panda.cli import answering
from panda.cli import replay
from panda.cli.main import main
from panda.engine.checkpoints.in_use import remove_unless_read
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.chosen import Chosen
from panda.registry.contexts import ModelContext
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.options import build
from panda.weights.export import decoding_of
from panda.weights.export import describe_model
from panda.weights.export import export
from panda.weights.stored_tensor import StoredTensor

SAMPLE = "panda:data/sample/instruct"
CPU = torch.device("cpu")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of an instruct and of a pretrain task, from a checkpoint whose answers differ with every token."""
    folder = tmp_path_factory.mktemp("inference")
    save_hf(llama(4), folder / "base")
    common = ["--model", "llama", "--ckpt_path", "base", "--max_seq_length", 64, "--max_steps", 1, "--num_workers", 0]
    common += ["--gradient_accumulation_steps", 1, "-p", "no:tensorboard"]
    instruct = ["--instruction_tuning_data_dir", "panda:data/sample/instruct", "--separator", " =>\n"]
    pretrain = ["--task", "pretrain", "--pretraining_data_dir", "panda:data/sample/pretrain"]
    train_many(
        [
            [*common, *instruct, "--output_dir", "instruct", "--zero_stage", 3],
            [*common, *pretrain, "--output_dir", "pretrain"],
        ],
        cwd=folder,
    )
    return folder


def plain_answer(export: Path, prompt: str, tokens: int) -> str:
    """What plain transformers continues the prompt with, its ids written out here."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    ids = torch.tensor([[1, *(byte + 3 for byte in prompt.encode())]])
    answer = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("what", ["instruct", "instruct/checkpoints/step-00000001", "instruct/export"])
def test_a_run_a_checkpoint_and_an_export_answer_as_plain_transformers(
    folder: Path, capsys: Captured, what: str
) -> None:
    assert main(["generate", str(folder / what), "--prompt", "Say tomato.", "--max_new_tokens", "12"]) == 0
    expected = plain_answer(folder / "instruct/export", "Say tomato. =>\n", 12)
    assert len(expected) > 3
    assert capsys.readouterr().out == expected + "\n"


def test_a_pretrained_model_continues_the_text(folder: Path, capsys: Captured) -> None:
    assert main(["generate", str(folder / "pretrain"), "--prompt", "Mei", "Bao", "--max_new_tokens", "9"]) == 0
    mei, bao = (plain_answer(folder / "pretrain/export", name, 9) for name in ("Mei", "Bao"))
    captured = capsys.readouterr()
    assert captured.out == f"{mei}\n\n{bao}\n"
    assert "> Mei\n" in captured.err and "> Bao\n" in captured.err


def test_the_template_gives_the_tokens_that_training_gave(folder: Path) -> None:
    from panda.data.json_reader import JsonReader
    from panda.registry import NoOptions
    from panda.tasks.instruct import Instruct
    from panda.tasks.instruct import InstructOptions

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    context = TaskContext(tokenizer, JsonReader(NoOptions(), ReaderContext()), 64)
    task = Instruct(InstructOptions(instruction_tuning_data_dir=SAMPLE, separator=" =>\n"), context)
    assistant = described_in(folder / "instruct/export").assistant(CPU)
    for prompt in ("Say tomato.", "  two\n\nlines ", "{{ x }} 'quoted'", "🐼"):
        assert assistant.encode([{"role": "user", "content": prompt}]) == task.encode_prompt(prompt)


def test_text_comes_piece_by_piece_and_drawing_follows_the_seed(folder: Path) -> None:
    assistant = described_in(folder / "base").assistant(CPU)
    ids = assistant.encode([{"role": "user", "content": "one two"}])
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pieces: list[str] = []
        texts.append(assistant.answer(ids, Sampling(300, temperature=1.5, top_p=0.95), pieces.append, print).text)
        assert "".join(pieces) == texts[-1]
        assert len([piece for piece in pieces if piece]) > 1, "a word at a time"
    assert texts[0] == texts[1] != texts[2]


def chat(monkeypatch: pytest.MonkeyPatch, what: Path, lines: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", str(what), "--max_new_tokens", "6"])


def test_chat_remembers_the_dialogue_until_a_new_one(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(monkeypatch, folder / "instruct", "abc\n\nde\n/reset\nabc\n/quit\nnot read\n") == 0
    answers = capsys.readouterr().out
    export = folder / "instruct/export"
    first = plain_answer(export, "abc =>\n", 6)
    assistant = described_in(export).assistant(CPU)
    dialogue = [("user", "abc"), ("assistant", first), ("user", "de")]
    ids = assistant.encode([{"role": role, "content": text} for role, text in dialogue])
    text = ("abc =>\n", first, "de =>\n")
    turns = [[byte + 3 for byte in part.encode()] for part in text]
    assert ids == [1, *turns[0], *turns[1], 2, *turns[2]]
    second = assistant.answer(ids, Sampling(6), lambda text: None, print).text
    assert answers == f"{first}\n{second}\n{first}\n"


def test_chat_obeys_commands_and_says_which_it_does_not_know(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("kept")
    lines = [
        "/savd x", "/save a.jsonl", "/reset now", "/save", '"""/two', ' lines"""', "/save a.jsonl", "abc",
        "/save a.jsonl", "/save there", "/system", "/save a.jsonl", '"""never sent', "abc",
    ]  # fmt: skip
    assert chat(monkeypatch, folder / "instruct", "\n".join(lines)) == 0
    answers, told = capsys.readouterr()
    kept = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [turn["role"] for turn in kept] == ["user", "assistant"] * 2
    assert [kept[0]["content"], kept[2]["content"]] == ["/two\n lines", "abc"]
    assert answers == f"{kept[1]['content']}\n{kept[3]['content']}\n" and (tmp_path / "there").read_text() == "kept"
    for line in (
        "unknown command '/savd'. Did you mean '/save'? /help lists the commands; a message that begins with / is"
        " written with a space before it.",
        "/reset takes nothing after it, and 'now' is there. Nothing was done.",
        "/save needs the name of a file: /save chat.jsonl",
        f"/save: {tmp_path / 'there'} exists, and is not replaced. Name another file.",
        f"{tmp_path / 'a.jsonl'}: 4 messages",
        'not sent: the input ended before the """ that ends the message.',
    ):
        assert told.count(f"\n{line}\n") == 1, line
    assert told.count("/save: nothing has been said yet.") == 2, "/system begins a new dialogue"


def test_a_system_turn_is_given_in_a_chat_as_by_its_flag(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = shutil.copytree(folder / "instruct/export", tmp_path / "model")
    with_system = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    (model / "chat_template.jinja").write_text(with_system)
    assert chat(monkeypatch, model, "/system Be brief.\nabc\n") == 0
    asked = capsys.readouterr().out
    assert main(["generate", str(model), "--system", "Be brief.", "--prompt", "abc", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == asked
    (model / "chat_template.jinja").write_text(with_system.replace("messages %}", "messages if m.role == 'user' %}"))
    assert chat(monkeypatch, model, "/system Be brief.\n") == 0
    told = capsys.readouterr().err
    assert (
        "/system: not taken, the dialogue goes on as it was: the chat template leaves the system turn out. Go on"
        " without one.\n" in told
    )


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pieces: list[str] = []
    stops = [True]

    def write(text: str) -> None:
        if stops and "".join(pieces):
            stops.clear()
            raise KeyboardInterrupt
        pieces.append(text)

    monkeypatch.setattr("panda.cli.answering.write", write)
    monkeypatch.chdir(tmp_path)
    assert chat(monkeypatch, folder / "instruct", "abc\n/save a.jsonl\nde\n/save b.jsonl\n") == 0
    stopped = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    begun = stopped[1]["content"]
    assert begun and "".join(pieces).startswith(begun) and len(stopped) == 2
    went_on = json.loads((tmp_path / "b.jsonl").read_text())["messages"]
    assert went_on[:2] == stopped and len(went_on) == 4 and "".join(pieces) == begun + went_on[3]["content"] + "\n"
    assert "\nstopped; the dialogue goes on from here.\n" in capsys.readouterr().err


def test_answers_as_json(folder: Path, capsys: Captured) -> None:
    assert main(["generate", str(folder / "pretrain"), "--prompt", "Mei", "Bao 🐼", "--max_new_tokens", "9"]) == 0
    plain = capsys.readouterr().out.splitlines()[::2]
    argv = ["generate", str(folder / "pretrain"), "--prompt", "Mei", "Bao 🐼", "--max_new_tokens", "9", "--json"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    objects = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.out.isascii(), "for any encoding, and for a terminal"
    assert [each["answer"] for each in objects] == plain
    assert [each["prompt"] for each in objects] == ["Mei", "Bao 🐼"]
    assert [each["prompt_tokens"] for each in objects] == [4, 9]
    assert [(each["finish"], each["answer_tokens"]) for each in objects] == [("length", 9)] * 2
    assert captured.err.count("the answer was cut after 9 tokens: `--max_new_tokens`\n") == 2


def test_why_an_answer_ended(folder: Path) -> None:
    assistant = described_in(folder / "pretrain/export").assistant(CPU)
    ids = assistant.encode([{"role": "user", "content": "Mei"}])
    whole = assistant.answer(ids, Sampling(9), lambda text: None, lambda note: None)
    assert (whole.finish, whole.tokens, whole.prompt_tokens) == ("length", 9, 4)
    *_, third = continuation(assistant.model, ids, max_new_tokens=3, end_tokens=[], temperature=0, top_p=1, device=CPU)
    assistant.decoding = replace(assistant.decoding, ends=[third])
    ended = assistant.answer(ids, Sampling(9), lambda text: None, print)
    assert ended.finish == "stop" and whole.text.startswith(ended.text) and ended.tokens < 9
    assistant.decoding = replace(assistant.decoding, ends=[], honoured={"max_time": 1e-9})
    assert assistant.answer(ids, Sampling(9), lambda text: None, print).finish == "time"


def test_what_holds_no_model_or_no_template_is_told(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:  # before a model is loaded
        patch.setattr("panda.answers.loading._filled", None)
        assert chat(patch, folder / "pretrain", "abc\n") == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "no complete checkpoint, no export, no config.json" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["generate", str(folder / "base"), "--prompt", "x", "--top_p", "0"]) == 2
    assert "--top_p: 0.0 is not a number > 0 and <= 1." in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "has no weights: none of *.safetensors" in capsys.readouterr().err


# -- folders in Hugging Face's format ---------------------------------------------------------


def refused(capsys: Captured, *argv: object) -> str:
    """What ``panda generate`` says; nothing may be answered."""
    assert main(["generate", *map(str, argv), "--prompt", "Mei", "--max_new_tokens", "6"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_answers_as_plain_transformers(
    tmp_path: Path, capsys: Captured, dtype: torch.dtype, tied: bool
) -> None:
    save_hf(llama(4, tie_word_embeddings=tied).to(dtype), tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "--prompt", "Mei", "--max_new_tokens", "9"]) == 0
    assert capsys.readouterr().out == plain_answer(tmp_path / "model", "Mei", 9) + "\n"


def test_a_folder_that_states_another_type_than_its_weights_have_answers_in_that_type(tmp_path: Path) -> None:
    config = save_hf(llama(4), tmp_path / "model") / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    found = described_in(tmp_path / "model").assistant(CPU).model.state_dict()
    assert found.keys() == plain.keys()
    assert all(found[name].dtype == plain[name].dtype and torch.equal(found[name], plain[name]) for name in plain)


def test_a_mixture_of_experts_is_converted_as_by_transformers_and_checked(tmp_path: Path, capsys: Captured) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 259}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads))
    save_hf(model, tmp_path / "model", shards=False)
    assert main(["generate", str(tmp_path / "model"), "--prompt", "Mei", "--max_new_tokens", "9"]) == 0
    assert capsys.readouterr().out == plain_answer(tmp_path / "model", "Mei", 9) + "\n"
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert "missing from it: model.layers.2." in refused(capsys, tmp_path / "model")


def test_a_delta_is_refused_without_its_base_and_answers_with_it(tmp_path: Path, capsys: Captured) -> None:
    base, target = llama(1), llama(2)
    save_hf(base, tmp_path / "base")
    save_hf(target, tmp_path / "target")
    save_delta(target, base, tmp_path / "my-delta")
    error = refused(capsys, tmp_path / "my-delta")
    assert "is a delta: the difference" in error and "`base_path`" in error
    argv = ["generate", str(tmp_path / "my-delta"), "--base_path", str(tmp_path / "base"), "--prompt", "Mei"]
    assert main([*argv, "--max_new_tokens", "9"]) == 0
    assert capsys.readouterr().out == plain_answer(tmp_path / "target", "Mei", 9) + "\n"
    assert "is neither a delta nor adapters" in refused(capsys, tmp_path / "target", "--base_path", tmp_path / "base")


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        ('"num_hidden_layers": 2', '"num_hidden_layers": 3', "missing from it: model.layers.2.self_attn.q_proj.weight"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1', "and not in the model: model.layers.1."),
        ('"intermediate_size": 48', '"intermediate_size": 40', "mlp.gate_proj.weight is [48, 32] and should be [40"),
        ('"vocab_size": 259', '"vocab_size": 300', "model.embed_tokens.weight is [259, 32] and should be [300, 32]"),
        ('"vocab_size": 259', '"vocab_size": 200', "its tokenizer needs 259 rows"),
        ('"model_type": "llama"', '"model_type": "lama"', "transformers makes no causal language model"),
        ('"model_type": "llama"', '"x": 1', "it has no 'model_type'"),
    ],
)
def test_a_configuration_of_other_weights_is_told_by_the_names_of_tensors(
    tmp_path: Path, capsys: Captured, was: str, becomes: str, told: str
) -> None:
    config = save_hf(llama(4), tmp_path / "model") / "config.json"
    assert was in config.read_text()
    config.write_text(config.read_text().replace(was, becomes))
    assert told in refused(capsys, tmp_path / "model")


def test_a_folder_that_lacks_something_is_told_as_in_training(tmp_path: Path, capsys: Captured) -> None:
    model = save_hf(llama(4), tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    error = refused(capsys, model)
    assert f"{shard}: damaged, or not safetensors" in error and "Fetch it again" in error
    shard.unlink()
    assert f"files of weights are missing, which model.safetensors.index.json lists: {shard.name}" in refused(
        capsys, model
    )
    shard.write_bytes(whole)
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer that transformers loads (none of tokenizer.json" in refused(capsys, model)
    save_pickle(llama(4), tmp_path / "pickled")
    assert "`--allow_pickle`" in refused(capsys, tmp_path / "pickled")
    argv = ["generate", str(tmp_path / "pickled"), "--prompt", "Mei", "--max_new_tokens", "9", "--allow_pickle"]
    assert main(argv) == 0
    assert capsys.readouterr().out == plain_answer(tmp_path / "pickled", "Mei", 9) + "\n"


def test_a_damaged_checkpoint_that_is_passed_over_is_told(folder: Path, capsys: Captured, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "instruct", run)
    first, later = run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002"
    shutil.copytree(first, later)
    cut = next(file for file in later.rglob("*") if file.is_file() and file.name != "manifest.json")
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-1])
    told = (
        f"{later}: passed over, since it is damaged: {cut.relative_to(later)} has {size - 1:,} bytes and had {size:,}"
    )
    assert main(["generate", str(run), "--prompt", "x", "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().err.startswith(f"{told}\nweights: {first}\n")
    assert main(["export", str(run)]) == 0
    captured = capsys.readouterr()
    assert told in captured.err and "step-00000001" in captured.out
    assert main(["export", str(first), "--output", str(tmp_path / "named")]) == 0
    assert capsys.readouterr().err == ""
    shutil.rmtree(first)
    assert main(["export", str(run), "--output", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert told in error and "no complete checkpoint there" in error


def test_the_checkpoint_that_is_read_is_the_one_that_is_held(
    folder: Path, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "instruct", run)
    first, later = run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002"
    report = answering.report_passed_over

    def save(path: Path) -> None:
        """What a run that goes on does while the command loads torch."""
        shutil.copytree(first, later)
        report(path)

    monkeypatch.setattr(answering, "report_passed_over", save)
    (tmp_path / "rows.json").write_text('[{"input": "Spell om.", "target": "o-m"}]')
    asked = ["--prompt", "x", "--max_new_tokens", "1"]
    evaluated = ["--data", str(tmp_path / "rows.json"), "-p", "no:eval_generate"]
    for command, more in (("generate", asked), ("eval", evaluated)):
        assert main([command, str(run), *more]) == 0
        captured = capsys.readouterr()
        assert f"weights: {first}\n" in captured.err, command
        assert "answers" not in captured.out, "none were asked for"
        shutil.rmtree(later)
    with replay.read_before(run, 2) as read:
        assert read == first and not remove_unless_read(first)
    provenance = json.loads((run / "provenance.json").read_text())
    for begun_from, before in ((first, None), (folder / "instruct/checkpoints/step-00000001", UserError)):
        (run / "provenance.json").write_text(json.dumps(provenance | {"resumed_from": str(begun_from)}))
        with pytest.raises(UserError) if before else nullcontext(), replay.read_before(run, 1) as read:
            assert read is None, "a run that went on by itself began by itself"
    assert remove_unless_read(first)


# -- export -----------------------------------------------------------------------------------


def test_an_export_is_not_written_over_anything_but_its_runs_own(
    folder: Path, capsys: Captured, tmp_path: Path
) -> None:
    assert main(["export", str(tmp_path)]) == 2
    assert "no complete checkpoint there" in capsys.readouterr().err
    assert main(["export", str(folder / "instruct"), "--output", str(folder / "base")]) == 2
    assert "is not empty" in capsys.readouterr().err
    before = (folder / "instruct/export/model.safetensors").read_bytes()
    assert main(["export", str(folder / "instruct")]) == 0
    assert (folder / "instruct/export/model.safetensors").read_bytes() == before
    assert not list((folder / "instruct").glob(".tmp*"))


# -- models of other packages -----------------------------------------------------------------

GRU = """
    @dataclass(frozen=True)
    class Options:
        width: int = 8

    @register_model("recurrent", options=Options)
    def build(options, context):
        import torch

        class Recurrent(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = torch.nn.Embedding(context.vocab_size, options.width)
                self.rnn = torch.nn.GRU(options.width, options.width, num_layers=2, batch_first=True)
                self.output = torch.nn.Linear(options.width, context.vocab_size, bias=False)
                self.output.weight = self.embedding.weight
                self.register_buffer("bias", torch.zeros(context.vocab_size))

            def forward(self, ids):
                return self.output(self.rnn(self.embedding(ids))[0]) + self.bias

        return Recurrent()
"""


def test_a_model_of_another_package_answers_from_its_export(tmp_path: Path, distributions: Distributions) -> None:
    distributions.install("acme", {"models": {"recurrent": "acme.r"}}, {"acme.r": GRU})
    catalog = Catalog()
    offer = catalog.find("model", "recurrent")
    component = catalog.load(offer)
    assert component is not None
    context = ModelContext(259, 64, 0, 1, 2)
    torch.manual_seed(0)
    chosen = Chosen(offer, component, build(component.options, {"width": 24}))
    module = component.factory(chosen.options, context)
    module.bias.normal_()  # a buffer that training changed
    tokenizer = AutoTokenizer.from_pretrained(save_hf(llama(), tmp_path / "base"))
    describe_model(
        tmp_path / "model",
        module,
        torch.float32,
        tokenizer,
        model=chosen,
        context=context,
        pretrained=None,
        generation=decoding_of(module, tokenizer, None, [2]),
    )
    weights = {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    export(tmp_path / "model", weights, tmp_path / "export")
    assistant = described_in(tmp_path / "export").assistant(CPU)
    assert assistant.model.output.weight is assistant.model.embedding.weight
    assert torch.equal(assistant.model.bias, module.bias)
    ids = [1, 70, 80]
    pieces: list[str] = []
    answer = assistant.answer(ids, Sampling(10), pieces.append, print).text
    (expected,) = greedy(module, [ids], max_new_tokens=10, pad_token_id=0, end_tokens=[2], device=CPU)
    assert answer == "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(answer) > 2


def test_tokens_are_drawn_by_temperature_from_the_likeliest() -> None:
    """A model of one distribution: the shares of many draws are those of the softmax, cut at top_p."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))

    def model(ids: torch.Tensor) -> torch.Tensor:
        return logits.expand(*ids.shape, -1)

    def shares(temperature: float, top_p: float) -> torch.Tensor:
        drawn = continuation(
            model,
            [0],
            max_new_tokens=3000,
            end_tokens=[9],
            temperature=temperature,
            top_p=top_p,
            device=CPU,
        )
        return torch.bincount(torch.tensor(list(drawn)), minlength=4) / 3000

    torch.manual_seed(0)
    assert torch.allclose(shares(1.0, 1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04)
    assert torch.allclose(shares(1.0, 0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.04)
    assert shares(1.0, 0.1).tolist() == shares(0.0, 1.0).tolist() == [1, 0, 0, 0]
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(shares(0.5, 1.0), squared / squared.sum(), atol=0.04)


def test_help_has_an_example(capsys: Captured) -> None:
    for command in ("generate", "chat", "export", "delta"):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        assert f"panda {command}" in capsys.readouterr().out.partition("example")[2]


def test_an_export_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    from panda.registry import UserError

    for name in ("model", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"in": "' + name + '"}')
    broken = StoredTensor((1,), torch.float32, lambda: torch.tensor([float("nan")]))
    with pytest.raises(UserError, match="not finite"):
        export(tmp_path / "model", {"a": broken}, tmp_path / "export")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "export"}
    assert [path.read_text() for path in (tmp_path / "export").iterdir()] == ['{"in": "export"}']
