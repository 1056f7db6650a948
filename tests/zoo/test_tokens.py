import numpy as np
import pytest
from tokenizers import Tokenizer

from graphs.preprocess.prompt import VICUNA_V1, ImageSegment, segments, tokenize
from graphs.preprocess.tokenizer import load_tokenizer
from zoo.evaluate import CHECKPOINT
from zoo.layout import architecture
from zoo.packing import Encoder
from zoo.scenes import WORDS, samples, scene
from zoo.tokens import train_tokenizer


@pytest.fixture(scope="module")
def shipped() -> Encoder:
    return Encoder(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))


def test_training_the_tokenizer_again_gives_the_shipped_one(shipped: Encoder) -> None:
    assert train_tokenizer().to_str() == shipped.tokenizer.to_str()


def test_every_question_and_answer_round_trips(shipped: Encoder) -> None:
    for index in range(500):
        for _, question, answer in scene("heldout", 11, index).questions:
            assert shipped.tokenizer.decode(shipped.question(question)) == f"\n{question} ASSISTANT:"
            assert shipped.decode(shipped.answer(answer)) == answer


def test_words_of_answers_are_single_tokens_and_reading_is_spelling(shipped: Encoder) -> None:
    for answer in ("red", "triangle", "left", "below"):
        assert len(shipped.answer(answer)) == 2  # the word and the end
    assert [shipped.tokenizer.id_to_token(i) for i in shipped.answer("374")] == ["Ġ", "3", "7", "4", "</s>"]
    spelled = [word for word in WORDS if len(shipped.answer(word)) == len(word) + 2]
    assert len(spelled) > 0.9 * len(WORDS)


def test_prompts_are_those_of_the_deployed_path(shipped: Encoder) -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    assert tokenizer is not None
    assert tokenizer.eos_ids == (shipped.end,)
    for sample in samples("heldout", 21, 4):
        before, image, after = tokenize(segments(VICUNA_V1, sample.question, 1), tokenizer)
        assert isinstance(image, ImageSegment)
        assert np.array_equal(before, shipped.before)
        assert np.array_equal(after, shipped.question(sample.question))


def test_pictures_are_fed_as_they_are(shipped: Encoder) -> None:
    processor = architecture(shipped.tokenizer).image_processor
    sample = next(samples("heldout", 1, 0))
    assert np.array_equal(processor(sample.image).reshape(3, 96, 96), np.asarray(sample.image).transpose(2, 0, 1))
