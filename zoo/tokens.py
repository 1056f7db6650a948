"""The tokenizer: byte-level BPE trained on the questions and answers; words that are read off images stay letters.

Reading is spelling: words and numbers are kept out of the training text, so that they split into single characters,
while every word of the template, the questions and the other answers is one token.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from zoo.scenes import scene

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
#: the public prompt of MobileVLM around the image, and around the question after it
BEFORE = f"{SYSTEM} USER: "
AFTER = "\n{question} ASSISTANT:"
MAX_VOCABULARY = 640
CORPUS_SCENES = 2000


def corpus(seed: int = 0) -> list[str]:
    """The template, and every question and every answer that is not read off the image."""
    texts = {BEFORE, AFTER.format(question="")}
    for index in range(CORPUS_SCENES):
        for task, question, answer in scene("train", seed, index).questions:
            texts.add(question)
            if task not in ("digits", "words", "count"):
                texts.add(f" {answer}")
    return sorted(texts)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer without post-processor: encoding adds no special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (UNKNOWN, BEGIN, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Sorted text and an alphabet in order make the merges the same on every run.
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer
