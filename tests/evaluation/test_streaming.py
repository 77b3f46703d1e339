"""Answers told piece by piece are the answers that are generated at once."""

import pytest
import torch
from transformers import AutoTokenizer, TopPLogitsWarper

from fedloom.evaluation.generate import Ask, generate, load_encoder, most_probable
from fedloom.evaluation.streaming import Pieces, stream
from fedloom.models.load import load_backbone, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def encoder(model_folder):
    return load_encoder(str(model_folder))


@pytest.fixture(scope="module")
def model(model_folder, tokenizer):
    return load_backbone(str(model_folder), pad_token_id=tokenizer.pad_token_id).eval()


TEXTS = (
    "Where is the red cup?",
    "  two  blanks\n\nand lines ",
    "Zoë 🙂🙃 日本 e\u0301",
    "<s> is no token",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("trim", [True, False])
def test_pieces_are_the_text(tokenizer, text, trim):
    pieces = Pieces(tokenizer, trim=trim)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [pieces.add(token) for token in tokens]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in found)
    assert "".join(found) + pieces.finish() == pieces.told == (whole.strip() if trim else whole)


def test_a_character_that_is_never_whole_is_told_at_the_end(tokenizer):
    pieces = Pieces(tokenizer)
    tokens = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(map(pieces.add, tokens)) == "a"
    assert pieces.finish() == tokenizer.decode(tokens)[1:] != ""


@pytest.mark.parametrize(
    ("stop", "left"),
    [(("red",), "Where is the"), (("the red", "is"), "Where"), (("Wh",), ""), (("cup!",), None)],
)
def test_what_stops_an_answer_is_never_told(tokenizer, stop, left):
    """Not even its beginning, which may come tokens before its end."""
    text = "Where is the red cup"
    pieces = Pieces(tokenizer, stop)
    told = ""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        told += pieces.add(token)
        assert (text if left is None else left).startswith(told)
        if pieces.stopped:
            break
    told += pieces.finish()
    assert (told, pieces.stopped) == (text if left is None else left, left is not None)


def test_the_most_probable_tokens_of_a_share():
    scores = torch.tensor([0.2, 0.5, 0.3]).log()
    kept = {share: most_probable(scores, share).isfinite().tolist() for share in (0.4, 0.7, 0.9, 1)}
    assert kept[0.4] == [False, True, False] and kept[0.7] == [False, True, True]
    assert kept[0.9] == kept[1] == [True, True, True]


def test_as_transformers_has_them():
    rows = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    for share in (0.1, 0.5, 0.95):
        expected = TopPLogitsWarper(share)(None, rows.clone())
        found = torch.stack([most_probable(row, share) for row in rows])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_stream_is_the_answer(model, encoder, temperature):
    ask = Ask(tuple(encoder.prompt("Ada asks where")), temperature, seed=3, top_p=0.9)
    told = []
    answer = stream(model, encoder, ask, 12, told.append, cached=True)
    assert [answer.text] == generate(model, encoder, [ask], 12) == ["".join(told)]
    assert len(told) > 1 and (answer.tokens, answer.reason) == (12, "length")
    first = told[0]
    short = stream(
        model, encoder, ask, 12, told.append, cached=True, stop=[answer.text[len(first)]]
    )
    assert short.reason == "stop" and short.tokens < 12 and answer.text.startswith(short.text)


def test_what_is_raised_while_it_is_told_ends_an_answer(model, encoder):
    told = []

    def tell(piece):
        told.append(piece)
        if len(told) == 2:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        stream(model, encoder, Ask(tuple(encoder.prompt("Ada"))), 50, tell, cached=True)
    assert len(told) == 2


def test_a_tokenizer_of_sentence_pieces_keeps_its_blanks():
    """Its first token of a text loses a blank where it is decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "▁a": 1, "▁cup": 2, "s": 3}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    own = PreTrainedTokenizerFast(tokenizer_object=backend)
    pieces = Pieces(own)
    assert [pieces.add(token) for token in (1, 2, 3, 2)] == ["a", " cup", "s", " cup"]


def test_the_tokenizer_of_the_tests_splits_characters(model_folder):
    """Else the tests above would test nothing."""
    own = AutoTokenizer.from_pretrained(str(model_folder))
    assert len(own("🙂", add_special_tokens=False)["input_ids"]) > 1
