import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.sft import END, SPECIAL_TOKENS, SftSettings, bpe_tokenizer, character_tokenizer, main, train

ALPHABET = "0123456789+=abc \n\\{}"
TEXTS = ["Let x be 3.", "so $x^2 = 9$", "Größe und Maß", "一共有多少个？", "naïve café"] * 20
BPE = bpe_tokenizer(iter(TEXTS), 400)


@pytest.fixture
def settings(tmp_path: Path) -> SftSettings:
    """Copying a digit: what forty steps can learn."""
    pairs = [{"prompt": f"{a}{b}=", "completion": f"{a}{b}{a}"} for a in range(10) for b in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return SftSettings(
        pairs=str(tmp_path / "pairs.jsonl"),
        output=str(tmp_path / "base"),
        alphabet="0123456789=",
        hidden_size=32,
        num_layers=1,
        num_heads=1,
        intermediate_size=48,
        max_tokens=16,
        steps=60,
        batch_size=16,
        learning_rate=1e-2,
    )


def with_changes(settings: SftSettings, **changes: object) -> SftSettings:
    return SftSettings(**(vars(settings) | changes))


def test_training_lowers_the_loss_and_leaves_a_folder_transformers_loads(
    settings: SftSettings, capsys: pytest.CaptureFixture[str]
):
    train(settings)
    progress = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in progress] == [20, 40, 60]
    assert progress[-1]["loss"] < 0.5 * progress[0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(settings.output)
    model = AutoModelForCausalLM.from_pretrained(settings.output)
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 16
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    ids = tokenizer("37=373" + END, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids).logits.log_softmax(-1)[0, 2:-1].gather(-1, ids[0, 3:, None]).neg().mean()
    assert float(loss) < progress[0]["loss"]


def test_the_same_seed_gives_the_same_model(settings: SftSettings, tmp_path: Path):
    folders = [str(tmp_path / name) for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        train(with_changes(settings, output=folder, steps=5, seed=seed))
    one, two, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_completion_is_learned(settings: SftSettings):
    from learner.sft import _pack

    token_ids, positions, boundaries, targets = _pack([([5, 6, 7, 1], 2), ([8, 9, 1], 1)])
    assert token_ids.tolist() == [5, 6, 7, 1, 8, 9, 1]
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert boundaries == (0, 4, 7)
    assert targets.tolist() == [2, 3, 5, 6]


def test_zero_steps_give_random_weights_and_a_bpe_of_the_pairs(settings: SftSettings):
    train(with_changes(settings, steps=0, alphabet="", vocabulary=300))
    tokenizer = AutoTokenizer.from_pretrained(settings.output)
    assert tokenizer.decode(tokenizer("Maß: 一 12").input_ids) == "Maß: 一 12"
    assert AutoModelForCausalLM.from_pretrained(settings.output).config.vocab_size == len(tokenizer) <= 300


def test_an_interrupted_training_leaves_no_output(settings: SftSettings, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(with_changes(settings, steps=1))
    assert not Path(settings.output).exists() and Path(settings.output + ".incomplete").exists()
    train(with_changes(settings, steps=1))
    assert Path(settings.output).exists() and not Path(settings.output + ".incomplete").exists()


def test_pairs_that_do_not_fit_are_an_error_of_one_sentence(
    settings: SftSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "settings.json").write_text(json.dumps(vars(with_changes(settings, max_tokens=3))))
    assert main([str(tmp_path / "settings.json")]) == 2
    assert capsys.readouterr().err == "error: none of the 100 pairs fits 3 tokens; raise the context length\n"
    assert not Path(settings.output).exists()


@given(st.text(ALPHABET))
def test_the_character_tokenizer_gives_back_any_text_of_its_alphabet(text: str):
    tokenizer = character_tokenizer(ALPHABET)
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens_come_first_and_stand_for_unknown_characters():
    tokenizer = character_tokenizer("ba")
    assert [tokenizer.id_to_token(i) for i in range(5)] == [*SPECIAL_TOKENS, "a", "b"]
    assert tokenizer.encode("aXb").ids == [3, 0, 4]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_bpe_gives_back_any_text(text: str):
    assert BPE.decode(BPE.encode(text).ids, skip_special_tokens=False) == text


def test_the_bpe_has_merged_what_is_frequent():
    assert BPE.get_vocab_size() <= 400
    assert len(BPE.encode("Größe und Maß").ids) < len("Größe und Maß".encode()) / 2
