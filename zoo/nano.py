"""mobilevlm-nano in training and in bulk: packed questions through the modules of `graphs`, greedy answers by batch.

Shape suffixes: B pictures, P patches, M image embeddings, T tokens after the image, S all tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.architectures.mobilevlm import MobileVLM
from graphs.components.image_text import VisionEncoder
from graphs.components.text.decoder import TextDecoder
from graphs.components.vision.clip import ClipVisionTower
from zoo.packing import COLORS, IGNORED, NAMES, Batch, Encoder, mask, pixels

MAX_ANSWER_TOKENS = 24
PLACES = 3  # rows and columns of places that answers name


class Nano(nn.Module):
    """The model of `architecture` over batches, without a cache. Its parameters are those of `architecture.build()`."""

    def __init__(self, architecture: MobileVLM) -> None:
        super().__init__()
        self.root = architecture.build()
        self.vision = cast(VisionEncoder, self.root.vision_encoder)
        self.embed = cast(nn.Embedding, self.root.token_embedding)
        self.decoder = cast(TextDecoder, self.root.text_decoder)

    @classmethod
    def load(cls, directory: Path | str) -> Nano:
        """The trained checkpoint in a directory, in float32. Raises: UserError where it is not one."""
        from graphs.model import Request, load_model

        model = load_model(Request("mobilevlm", checkpoint=str(directory)))
        if not isinstance(model.architecture, MobileVLM):
            raise TypeError(f"{directory} is no MobileVLM")
        nano = cls(model.architecture)
        nano.root.load_state_dict(dict(model.weights), strict=False)  # the tables are buffers and computed already
        return nano.eval()

    def see(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw pixels to the class token's state [B, D], patch features [B, P, D] and image embeddings [B, M, D]."""
        tower = cast(ClipVisionTower, self.vision.tower)
        states_BTD = tower.states(self.vision.normalize(pixels_BCHW))
        return states_BTD[:, 0], states_BTD[:, 1:], self.vision.projector(states_BTD[:, 1:])

    def read(
        self, image_BMD: Tensor, before: Tensor, ids_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor
    ) -> Tensor:
        """The decoder's final states [B, T, D] at packed tokens that follow the prompt's beginning and the image."""
        embed, decoder = self.embed, self.decoder
        x_BSD = torch.cat([embed(before).expand(len(ids_BT), -1, -1), image_BMD, embed(ids_BT)], dim=1)
        prefix = x_BSD.shape[1] - ids_BT.shape[1]
        positions_BS = torch.cat([torch.arange(prefix).expand(len(ids_BT), -1), prefix + positions_BT], dim=1)
        cos, sin = (t[positions_BS].unsqueeze(1).to(x_BSD.dtype) for t in (decoder.rotary.cos, decoder.rotary.sin))
        return decoder.hidden(x_BSD, cos, sin, mask(segments_BT, prefix).to(x_BSD.dtype))[:, prefix:]

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits from the decoder's final states."""
        return self.decoder.lm_head(states)

    @torch.no_grad()
    def answers(self, images: Sequence[Image.Image], questions: Sequence[str], encoder: Encoder) -> list[str]:
        """Greedy answers to one question for each image."""
        *_, image_BMD = self.see(torch.stack([pixels(image) for image in images]))
        rows = [encoder.question(question) for question in questions]
        starts = [len(row) for row in rows]
        before = torch.tensor(encoder.before)
        for _ in range(MAX_ANSWER_TOKENS):
            going = [n for n, row in enumerate(rows) if encoder.end not in row[starts[n] :]]
            if not going:
                break
            longest = max(len(rows[n]) for n in going)
            ids = torch.tensor([rows[n] + [encoder.end] * (longest - len(rows[n])) for n in going])
            positions = torch.arange(longest).expand(len(ids), -1)
            states = self.read(image_BMD[going], before, ids, positions, torch.zeros_like(ids))
            last = states[torch.arange(len(ids)), torch.tensor([len(rows[n]) - 1 for n in going])]
            for n, token in zip(going, self.logits(last).argmax(-1).tolist(), strict=True):
                rows[n].append(token)
        return [encoder.decode(row[start:]) for row, start in zip(rows, starts, strict=True)]


class Student(nn.Module):
    """`nano` with what only training needs: initial values, and heads that name what each patch shows.

    The heads give the tower a label for each of its patches, so that it learns to see in a few thousand pictures; the
    answers alone would take far longer. They are dropped afterwards.
    """

    def __init__(self, architecture: MobileVLM) -> None:
        super().__init__()
        self.nano = Nano(architecture)
        width = architecture.vision.hidden_size
        self.name_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(NAMES)))
        self.color_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(COLORS)))
        tokens = architecture.text.hidden_size
        self.token_name_head = nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, len(NAMES)))
        self.token_color_head = nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, len(COLORS)))
        self.token_place_head = nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, PLACES**2))
        self._initialise(architecture.vision.grid)
        self.class_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(NAMES) + len(COLORS)))

    def losses(self, batch: Batch, before: Tensor, tokens: bool, places: bool, picture: bool) -> dict[str, Tensor]:
        """`answer`: cross entropy of the answers' tokens; `names`, `colors`: of what each patch shows.

        With `tokens` also of what each visual token shows, as `token_names` and `token_colors`; with `places` also of
        where in the picture each one is, as `token_places`; with `picture` also of what the class token's state says
        is somewhere in the picture, as `picture`: its attention, unused otherwise, then points at what is there.
        """
        class_BD, patches_BPD, image_BMD = self.nano.see(batch.pixels)
        read_BMD = image_BMD if batch.shortening is None else batch.shortening @ image_BMD
        states = self.nano.read(read_BMD, before, batch.ids, batch.positions, batch.segments)
        wanted = batch.targets != IGNORED
        logits = self.nano.logits(states[wanted])
        losses = {
            "answer": F.cross_entropy(logits.float(), batch.targets[wanted]),
            "names": _balanced(self.name_head(patches_BPD), batch.names),
            "colors": _balanced(self.color_head(patches_BPD), batch.colors),
        }
        if tokens:
            losses["token_names"] = _balanced(self.token_name_head(image_BMD), batch.token_names)
            losses["token_colors"] = _balanced(self.token_color_head(image_BMD), batch.token_colors)
        if places:
            where = self.token_place_head(image_BMD).float().flatten(0, 1)
            losses["token_places"] = F.cross_entropy(where, _places(image_BMD.shape[1]).repeat(len(image_BMD)))
        if picture:
            there = [F.one_hot(x, len(y)).amax(1) for x, y in ((batch.names, NAMES), (batch.colors, COLORS))]
            said = self.class_head(class_BD).float()
            losses["picture"] = F.binary_cross_entropy_with_logits(said, torch.cat(there, dim=1).float())
        return losses

    @torch.no_grad()
    def _initialise(self, grid: int) -> None:
        """Positions of the tower from sines; small embeddings; outputs of blocks scaled down with the depth."""
        tower, decoder = cast(ClipVisionTower, self.nano.vision.tower), self.nano.decoder
        table = tower.embeddings.position_embedding.weight
        table.copy_(0.3 * _sines(grid, table.shape[1]))
        cast(Tensor, tower.embeddings.class_embedding).normal_(0, 0.1)
        self.nano.embed.weight.normal_(0, 0.2)
        for layers, ends in ((tower.layers, ("out_proj", "fc2")), (decoder.layers, ("o_proj", "down_proj"))):
            for name, module in layers.named_modules():
                if isinstance(module, nn.Linear) and name.endswith(ends):
                    module.weight.mul_(1 / math.sqrt(2 * len(layers)))


def _balanced(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, means over shown and empty patches added, the empty ones weighing a fifth."""
    each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    shown = (labels.flatten() != 0).float()
    return (each * shown).sum() / shown.sum() + 0.2 * (each * (1 - shown)).sum() / (1 - shown).sum()


def _places(tokens: int) -> Tensor:
    """int64 [tokens]: in which of the 3 x 3 places each visual token lies, by rows."""
    side = math.isqrt(tokens)
    line = torch.arange(side) * PLACES // side
    return (line[:, None] * PLACES + line).flatten()


def _sines(grid: int, width: int) -> Tensor:
    """[1 + grid^2, width]: sines and cosines of the column and of the row of each patch; zeros for the class token."""
    rate = 0.05 ** (torch.arange(width // 4) / (width // 4 - 1)) * math.pi / 2
    angle = torch.arange(grid)[:, None] * rate
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    places = torch.cat([axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)], dim=2)
    return torch.cat([torch.zeros(1, width), places.reshape(grid * grid, width)])
