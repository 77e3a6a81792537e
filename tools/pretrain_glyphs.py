"""Pretrain the small vision transformer behind the embedded `digits_l2p` experiment.

The backbone is pretrained on characters that this script renders from the TrueType fonts inside
matplotlib and distorts like handwriting: bent, drawn with another pen, scanned. It is trained on no
handwritten image. Rendered digits are among the classes, as animals and vehicles of CIFAR-100 are
in ImageNet-21k, and three images in ten show one.

    python tools/pretrain_glyphs.py          # writes assets/glyph_vit.safetensors

Data: 22 fonts, ten digits and 120 other characters (letters, Greek, Cyrillic, symbols), 704,000
images in all. Six in seven are reduced to 8 x 8 cells of 17 levels and enlarged again: the form of
the scans in scikit-learn's `load_digits`. None of those is used for training, but the size of the
characters in their frame and the characters that count as a digit (`DIGIT_SHAPES`) were chosen by
looking at the training part of them.

The defaults are the settings of the shipped file. With them, training took 47 minutes on one thread
of a busy two-core machine and reached an accuracy of 84 % on all distorted characters, 92 % on
digits.

The file (2.4 MB) holds the weights of a timm ViT in half precision, under timm's own names and
without a classification head. Inputs are plain [0, 1] RGB tensors, bright strokes on dark. Needs
torch 2.9 or newer, for Muon.

Shapes: B images, G glyphs in the atlas, S pixels a side, D width, N patches, P extra tokens.
"""

import argparse
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import timm
import torch
from PIL import Image, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

#: Characters with the shape of a handwritten digit, which count as that digit.
DIGIT_SHAPES = {"0": "O", "1": "lI|", "4": "Ч", "9": "q"}
#: Code points of zero in Unicode's bold, sans-serif, sans-serif bold and monospace digits.
DIGIT_STYLES = (0x1D7CE, 0x1D7E2, 0x1D7EC, 0x1D7F6)
#: One class each; without characters that look like a digit or a capital in 8 x 8 cells.
OTHERS = (
    "ABCDEFGHJKLMNPQRSTUVWXYZabdefhijkmnprty"
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθκλμξπρστφχψω"
    "БГДЖИЛЦШЩЪЫЭЮЯ"
    "!?#$%&@+=*/<>[{(~^√∞∂∫∑∇∈∩⊂⊕⊥∀∃≈≠≤←↑↔"
)
#: The characters of each class; digits come first.
CLASSES = [
    digit + DIGIT_SHAPES.get(digit, "") + "".join(chr(first + i) for first in DIGIT_STYLES)
    for i, digit in enumerate("0123456789")
] + list(OTHERS)

#: Beginnings of the names of matplotlib's fonts that have few characters or their own encoding.
SKIPPED_FONTS = ("LastResort", "STIXSiz", "STIXNonUni", "cmex", "cmsy", "cmmi", "DejaVuSansDisplay")

ATLAS_SIDE = 48
GLYPH_HEIGHT = 34

#: Steps down and to the right that bring the neighbours to a pixel, clockwise from the north.
RING = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))


def option(default: Any, help: str) -> Any:
    """An option of this program."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Options of this program; the defaults are the settings of the shipped file."""

    output: str = option("assets/glyph_vit.safetensors", "file of the weights")
    seed: int = option(0, "seed of everything that is random")
    num_threads: int = option(1, "threads of torch")
    input_size: int = option(32, "pixels a side of the images")
    patch_size: int = option(8, "pixels a side of a patch")
    embed_dim: int = option(128, "width of the ViT (D)")
    depth: int = option(6, "blocks of the ViT")
    num_heads: int = option(4, "attention heads of the ViT")
    digit_share: float = option(0.3, "share of digits; the other classes share the rest evenly")
    elastic: float = option(0.1, "largest bend, in half images")
    steps: int = option(5500, "training steps")
    batch_size: int = option(128, "images of a step")
    lr: float = option(4e-3, "highest learning rate")
    weight_decay: float = option(0.05, "weight decay of the matrices of the blocks")
    label_smoothing: float = option(0.1, "label smoothing")
    max_extra_tokens: int = option(10, "most extra tokens of a step (P)")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the backbone; writes its weights in half precision under timm's names."""
    parser = argparse.ArgumentParser(
        description="Pretrain the backbone of digits_l2p on drawn characters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for one in fields(Options):
        kind, text = type(one.default), one.metadata["help"]
        parser.add_argument(f"--{one.name}", type=kind, default=one.default, help=text)
    options = Options(**vars(parser.parse_args(argv)))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)
    sampler = GlyphSampler(options)
    model = GlyphClassifier(options)
    seconds = train(model, sampler, options)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.vit.state_dict().items()}
    save_file(state, path)
    logger.info("wrote %s after %.1f minutes of training", path, seconds / 60)


class GlyphClassifier(nn.Module):
    """A timm ViT that is trained to classify from its class token and from extra tokens behind it.

    The extra tokens are random in every step and take the place of L2P's prompts, so that the
    backbone learns to gather information about the image in tokens that are inserted there.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        shape = {n: vars(options)[n] for n in ("patch_size", "embed_dim", "depth", "num_heads")}
        self.vit: Any = timm.create_model(
            "vit_tiny_patch16_224", img_size=options.input_size, num_classes=0, **shape
        )
        self.head = nn.Linear(options.embed_dim, len(CLASSES))

    def forward(self, images: Tensor, num_extra: int) -> list[Tensor]:
        """Returns the logits of the class token and, if there are any, of the mean extra token."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))  # (B, 1+N, D)
        batch, _, width = tokens.shape
        strength = torch.rand(batch, 1, 1)
        extra = strength * uniform(-1, 1, batch, num_extra, width)
        extra = extra + self.vit.pos_embed[:, :1]  # (B, P, D)
        tokens = torch.cat([tokens[:, :1], extra, tokens[:, 1:]], dim=1)  # (B, 1+P+N, D)
        features = self.vit.norm(self.vit.blocks(tokens))
        pooled = [features[:, 0]]  # each (B, D)
        if num_extra:
            pooled.append(features[:, 1 : 1 + num_extra].mean(dim=1))
        return [self.head(one) for one in pooled]


def train(model: GlyphClassifier, sampler: "GlyphSampler", options: Options) -> float:
    """Trains in place, and returns the seconds taken.

    Muon trains the matrices of the blocks, AdamW everything else.
    """
    lr, decay = options.lr, options.weight_decay
    matrices = [p for p in model.vit.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def factor(step: int) -> float:
        """5 % linear warm-up, then half a cosine down to zero."""
        cosine = math.cos(math.pi * step / options.steps)
        return min(1.0, 20 * (step + 1) / options.steps) * 0.5 * (1 + cosine)

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in optimizers]
    criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    start, sums = time.perf_counter(), torch.zeros(3)  # of loss, accuracy, accuracy on digits
    for step in range(1, options.steps + 1):
        images, labels = sampler.batch(options.batch_size)
        # About a third of the steps have no extra tokens, like the pass that gives L2P its query.
        num_extra = max(0, int(torch.randint(-3, options.max_extra_tokens + 1, ())))
        logits = model(images, num_extra)
        loss = torch.stack([criterion(one, labels) for one in logits]).sum()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        hit = (logits[0].argmax(1) == labels).float()
        sums += torch.stack([loss.detach() / len(logits), hit.mean(), hit[labels < 10].mean()])
        if step % 100 == 0:
            logger.info(
                "step %d of %d: loss %.3f, accuracy %.1f %% (digits %.1f %%), %.0f s",
                *(step, options.steps, sums[0] / 100, *sums[1:], time.perf_counter() - start),
            )
            sums.zero_()
    return time.perf_counter() - start


class GlyphSampler:
    """An endless source of distorted glyphs."""

    def __init__(self, options: Options) -> None:
        self.side, self.elastic = options.input_size, options.elastic
        self.glyphs, self.labels = build_atlas()  # (G, 2, S, S), (G,)
        share = torch.full([len(CLASSES)], (1 - options.digit_share) / (len(CLASSES) - 10))
        share[:10] = options.digit_share / 10
        self.weights = (share / torch.bincount(self.labels))[self.labels]  # (G,)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draws images, (B, 3, S, S) in [0, 1], and their classes, (B,)."""
        chosen = torch.multinomial(self.weights, size, replacement=True)
        thinned = torch.randint(2, (size,))
        ink = write_by_hand(self.glyphs[chosen, thinned, None], self.elastic)
        num_cells = 8 if torch.rand(()) < 0.85 else int(torch.randint(6, 17, ()))
        return disturb(enlarge(scan(ink, num_cells), self.side)), self.labels[chosen]


def build_atlas() -> tuple[Tensor, Tensor]:
    """Renders every character in every font of matplotlib that has it.

    Gives glyphs, as rendered and thinned to lines, (G, 2, S, S) in [0, 1], and their classes, (G,).
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn, labels = [], []
    for path in sorted(folder.glob("*.ttf")):
        if path.name.startswith(SKIPPED_FONTS):
            continue
        font = ImageFont.truetype(str(path), 96)
        missing = bytes(font.getmask("\U0010fffe"))
        for label, characters in enumerate(CLASSES):
            for character in characters:
                mask = font.getmask(character)
                if mask.getbbox() and bytes(mask) != missing:
                    drawn.append(_on_canvas(Image.frombytes("L", mask.size, bytes(mask))))
                    labels.append(label)
    glyphs = np.stack(drawn)  # (G, S, S)
    both = np.stack([glyphs, thin(glyphs > 0.5)], axis=1)
    return torch.from_numpy(both.astype(np.float32)), torch.tensor(labels)


def _on_canvas(glyph: Image.Image) -> np.ndarray:
    """Scales a glyph to a fixed height in the middle of a canvas, (S, S) in [0, 1]."""
    glyph = glyph.crop(glyph.getbbox())
    width = round(GLYPH_HEIGHT * min(max(glyph.width / glyph.height, 0.35), 1.1))
    canvas = Image.new("L", (ATLAS_SIDE, ATLAS_SIDE))
    corner = ((ATLAS_SIDE - width) // 2, (ATLAS_SIDE - GLYPH_HEIGHT) // 2)
    canvas.paste(glyph.resize((width, GLYPH_HEIGHT), Image.Resampling.BILINEAR), corner)
    return np.asarray(canvas, dtype=np.float32) / 255


def thin(ink: np.ndarray) -> np.ndarray:
    """Thins strokes, boolean (G, S, S) with an empty border, to lines of one pixel.

    Source: Zhang and Suen, "A fast parallel algorithm for thinning digital patterns", 1984.
    """
    ink, before = ink.copy(), -1
    while before != (before := int(ink.sum())):
        for first_half in (True, False):
            ring = [np.roll(ink, shift, axis=(1, 2)) for shift in RING]
            north, east, south, west = ring[::2]
            count = np.sum(ring, axis=0)
            rises = np.sum([~a & b for a, b in zip(ring, ring[1:] + ring[:1], strict=True)], axis=0)
            first, second = east & south & (north | west), north & west & (east | south)
            blocked = first if first_half else second
            ink &= ~((count >= 2) & (count <= 6) & (rises == 1) & ~blocked)
    return ink


def write_by_hand(glyphs: Tensor, elastic: float) -> Tensor:
    """Distorts glyphs like handwriting: bars across, slant, uneven strokes, another pen.

    Takes characters in [0, 1], gives ink, 0 or 1, each (B, 1, S, S).
    """
    batch, _, side, _ = glyphs.shape
    turn, slant = 0.12 * torch.randn(batch), 0.2 * torch.randn(batch)
    size, none = uniform(0.85, 1.2, 2, batch), torch.zeros(batch)
    across = torch.stack([turn.cos() * size[0], turn.sin() + slant, none], dim=1)
    down = torch.stack([-turn.sin(), turn.cos() * size[1], none], dim=1)
    affine = torch.stack([across, down], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(affine, [batch, 1, side, side], align_corners=False)  # (B, S, S, 2)
    for num_knots, share in ((4, 1.0), (7, 0.35)):
        amplitude = share * elastic * uniform(0.2, 1.0, batch, 1, 1, 1)
        knots = amplitude * torch.randn(batch, 2, num_knots, num_knots)
        bend = F.interpolate(knots, size=(side, side), mode="bicubic", align_corners=True)
        grid = grid + bend.permute(0, 2, 3, 1)
    # Some get a bar across the middle, as in a crossed seven.
    height, half_length = uniform(0.42, 0.58, batch), uniform(0.1, 0.22, batch)
    centre = torch.stack([height, torch.full([batch], 0.5)], dim=1)
    half = torch.stack([torch.full([batch], 0.025), half_length], dim=1)
    crossed = torch.maximum(glyphs, _boxes(centre, half, side, share=0.12).float())
    return _draw_with_pen(F.grid_sample(crossed, grid, align_corners=False))


def _draw_with_pen(glyphs: Tensor) -> Tensor:
    """Gives strokes a new width: blurs, then inks the darkest 20-55 % of the glyph's box."""
    kernel = torch.exp(-torch.arange(-5, 6.0).square() / (2 * 1.8**2))
    kernel = kernel / kernel.sum()
    ink = F.conv2d(glyphs, kernel.view(1, 1, 1, -1), padding=(0, 5))
    ink = F.conv2d(ink, kernel.view(1, 1, -1, 1), padding=(5, 0))
    flat = ink.flatten(1)  # (B, S*S)
    darkest = flat.amax(dim=1, keepdim=True)  # (B, 1)
    seen = ink[:, 0] > 0.15 * darkest[:, :, None]  # (B, S, S)
    area = seen.any(dim=1).sum(dim=1) * seen.any(dim=2).sum(dim=1)  # (B,)
    rank = (area * uniform(0.2, 0.55, len(ink))).long()
    level = flat.sort(dim=1, descending=True).values.gather(1, rank[:, None])  # (B, 1)
    level = torch.clamp(level, 0.12 * darkest, 0.8 * darkest)
    return (ink > level[:, :, None, None]).float()


def scan(ink: Tensor, num_cells: int) -> Tensor:
    """Frames the ink and averages it in cells of 4 x 4 pixels, as in the scans of the digits.

    Takes ink, 0 or 1, (B, 1, S, S); gives its share of each cell, (B, 1, num_cells, num_cells).
    """
    batch, _, side, _ = ink.shape
    position = (2 * torch.arange(side) + 1) / side - 1
    seen = torch.cat([ink.amax(dim=2), ink.amax(dim=3)], dim=1) > 0  # across, down: (B, 2, S)
    low = torch.where(seen, position, 1.0).amin(dim=2)
    high = torch.where(seen, position, -1.0).amax(dim=2)
    centre, half = (low + high) / 2, (high - low) / 2 + 1 / side  # (B, 2)
    # Most glyphs fill their frame from top to bottom, and 60-90 % of its width unless narrow.
    filled = uniform(0.7, 1.1, batch, 2)
    filled[:, 1] = torch.where(torch.rand(batch) < 0.6, 1.0, filled[:, 1])
    widest = uniform(1.0, 3.0, batch) * half[:, 0] / half[:, 1]
    filled[:, 0] = torch.minimum(uniform(0.6, 0.9, batch), widest)
    slack = 0.04 * torch.randn(batch, 2) + (1 - filled).clamp_min(0) * (torch.rand(batch, 2) - 0.5)
    framed = _window(ink, centre + slack * half, half / filled, 4 * num_cells)
    return F.avg_pool2d((framed > 0.5).float(), 4)


def enlarge(cells: Tensor, side: int) -> Tensor:
    """Adds noise, rounds to 17 levels and enlarges the whole scan or a window of it.

    Takes shares of ink, (B, 1, cells, cells); gives images in [0, 1], (B, 1, side, side).
    """
    batch = len(cells)
    noise = torch.randn_like(cells) * uniform(0, 0.12, batch, 1, 1, 1)
    cells = ((cells + noise).clamp(0, 1) * 16).round() / 16
    images = F.interpolate(cells, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    # Of half of the images a window, of 60-100 % of the area.
    area, ratio = uniform(0.6, 1.0, batch), uniform(math.log(3 / 4), math.log(4 / 3), batch).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1)  # (B, 2)
    size = torch.where(torch.rand(batch, 1) < 0.5, size.clamp_max(1.0), 1.0)
    centre = (1 - size) * uniform(-1, 1, batch, 2)
    return _window(images, centre, size, side, padding_mode="border")


def disturb(images: Tensor) -> Tensor:
    """Erases a patch of some images, changes contrast and brightness, adds noise.

    Takes pixels in [0, 1], (B, 1, S, S); gives (B, 3, S, S), the channels equal.
    """
    batch, _, side, _ = images.shape
    centre, half = torch.rand(batch, 2), uniform(0.05, 0.17, batch, 2)
    images = images.masked_fill(_boxes(centre, half, side, share=0.3), 0.0)
    contrast = uniform(0.7, 1.0, batch, 1, 1, 1)
    brightness = torch.rand(batch, 1, 1, 1) * (1 - contrast) / 2
    noise = torch.randn_like(images) * uniform(0, 0.05, batch, 1, 1, 1)
    return (images * contrast + brightness + noise).clamp(0, 1).expand(-1, 3, -1, -1)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Draws numbers of a uniform distribution."""
    return torch.empty(shape).uniform_(low, high)


def _boxes(centre: Tensor, half: Tensor, side: int, share: float) -> Tensor:
    """Whether a pixel is in a box, (B, 1, S, S), which a share of the images have.

    Centre and half size of the boxes, (B, 2), are shares of the image, downwards and across.
    """
    position = (torch.arange(side) + 0.5) / side
    inside = (position - centre[:, :, None]).abs() < half[:, :, None]  # (B, 2, S)
    shown = torch.rand(len(centre), 1, 1, 1) < share
    return inside[:, :1, :, None] & inside[:, 1:, None, :] & shown


def _window(images: Tensor, centre: Tensor, half: Tensor, side: int, **kwargs: Any) -> Tensor:
    """Windows of images, (B, 1, side, side).

    Their centre and half size, (B, 2), are in half images from the middle, across and downwards.
    """
    affine = torch.cat([torch.diag_embed(half), centre[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(affine, [len(images), 1, side, side], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, **kwargs)


if __name__ == "__main__":
    main()
