"""Makes an artefact for the tests: python -m tests.peers.maker OUT WORD [FROM]."""

import sys
from pathlib import Path

out, word, *sources = sys.argv[1:]
if word == "fail":
    sys.exit("the weights are made of cheese")
block = bytearray(64 << 20)
block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
text = "".join((Path(source) / "file").read_text() for source in sources)
(Path(out) / "file").write_text(text + word)
